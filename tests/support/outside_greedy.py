"""Greedy answers of a GGUF file in llama.cpp, and of a plain peft model, beside those of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def in_llama_cpp(file: Path, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    """Its tokens, the one that ends an answer included; at most ``limit`` each."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = str(file), 512, 1, 0
    settings.warmup, settings.verbosity = False, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    server, answers = xllamacpp.Server(settings), []
    for prompt in prompts:
        asked = {"prompt": list(prompt), "max_tokens": limit, "temperature": 0, "logprobs": 1}
        said = server.handle_completions(asked)
        said = json.loads(said) if isinstance(said, str) else said
        answers.append([token["id"] for token in said["choices"][0]["logprobs"]["content"]])
    return answers


def in_peft(base: Path, adapter: Path, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    """The same of the adapter over a folder that plain transformers loads, one prompt at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert type(plain) is LlamaForCausalLM
    model: Any = PeftModel.from_pretrained(plain, adapter)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=limit,
            pad_token_id=0,
        )
        answers.append(made[0, len(prompt) :].tolist())
    return answers


def equal_share(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of the tokens, position by position, that are equal; a missing or further one is not."""
    pairs = list(zip(ours, theirs, strict=True))
    equal = sum(a == b for mine, other in pairs for a, b in zip(mine, other, strict=False))
    return equal / sum(max(len(mine), len(other)) for mine, other in pairs)
