"""A user's way through each family: ``check``, a run that resumes, its exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_model import LLAMA3_ROPE, PUBLISHED, build_family
from family_tokenizer import LLAMA3, SMOLLM2, tokenizer_of
from fixture_model import load_fixture_policy
from fixture_recipe import write_recipe


def with_tokenizer(folder: Path, name: str, tokenizer: Any) -> Path:
    """A small model of a family with this tokenizer instead of the fixture's."""
    build_family(folder, name, vocab_size=len(tokenizer))
    for file in ("vocab.json", "merges.txt"):
        (folder / file).unlink()
    tokenizer.save_pretrained(folder)
    return folder


def test_check_shows_llamas_prompt(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """In its own markers, with what was changed, and what ends an answer."""
    folder = with_tokenizer(tmp_path / "m", "Llama-3.2-1B", tokenizer_of(LLAMA3, prepends=True))
    recipe = write_recipe(tmp_path, folder)
    code, out, _ = cli("check", "--recipe", recipe, "--set", "data.prompt=qwen-boxed", "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and found["stops"] == ["<|start_header_id|>", "<|eot_id|>"]
    assert found["prompt"].startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nPlease")
    assert (
        "prompt: qwen-boxed in the model's own markers, <|start_header_id|> and <|eot_id|>" in found["notes"]
    )
    markers, text = 9, len(found["prompt"].encode())  # of which each is one token, and each byte of the text
    assert found["longest"] <= text - markers * 8


def test_check_tells_of_a_mended_tokenizer(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    wrong = tokenizer_of((SMOLLM2[0], "<|im_start|>", "<|im_start|>", None))
    recipe = write_recipe(tmp_path, with_tokenizer(tmp_path / "m", "SmolLM2-135M", wrong))
    code, out, _ = cli("check", "--recipe", recipe, "--set", "data.prompt=qwen-boxed")
    assert code == 0
    assert "note: tokenizer: its end token <|im_start|> begins a turn; <|im_end|> is used" in out
    assert "an answer ends at '<|im_start|>' or '<|im_end|>'" in out


def test_a_config_as_llama_3_2_publishes_it(tmp_path: Path) -> None:
    """``rope_theta`` and ``rope_scaling`` apart, an end token for each way to end: the same model."""
    folder = build_family(tmp_path, "Llama-3.2-1B")
    ids = [((5, 6, 7, 8, *range(90)), (9, 10, 11))]
    expected = load_fixture_policy(folder).completion_logprobs(ids)[0]
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    assert rope["rope_type"] == LLAMA3_ROPE["rope_type"]
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "eos_token_id": [256, 257, 258]}
    (folder / "config.json").write_text(json.dumps(config))
    policy = load_fixture_policy(folder)
    assert torch.equal(policy.completion_logprobs(ids)[0], expected)
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    assert not torch.allclose(load_fixture_policy(folder).completion_logprobs(ids)[0], expected, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "Qwen2.5-0.5B"])
def test_a_run_resumes_and_exports(cli, tmp_path: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    """Over NF4: three steps at once and in two parts are the same to the bit; both exports agree with it."""
    recipe = write_recipe(tmp_path, build_family(tmp_path / "m", name))
    four_bit = ("--recipe", recipe, "--set", "model.load_in_4bit=true", "--set", "run.eval_every=0")
    for run, parts in (("whole", [3]), ("parts", [1, 3])):
        for steps in parts:
            out = tmp_path / run
            assert cli("train", *four_bit, "--output-dir", out, "--max-steps", steps, "--resume")[0] == 0
    weights = [(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    metrics = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any(m.get("grad_norm") for m in metrics), "something was learned from"
    for kind in ("adapter", "merged"):
        code, said, _ = cli("export", tmp_path / "whole", "--to", kind, "--out", tmp_path / kind, "--json")
        assert code == 0 and json.loads(said.splitlines()[-1])["argmax_agreement"] >= 0.99
    code, said, _ = cli("chat", tmp_path / "whole", "--prompt", "1 + 1 = ?", "--json")
    assert code == 0 and json.loads(said.splitlines()[-1])["tuned"]["tokens"] >= 1
