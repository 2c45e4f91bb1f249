"""A 0.05M-parameter Qwen2 with a byte-level tokenizer, made from a seed: the mechanics' test model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from empg_lite.policy.policy import Policy

END, START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def build_model(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    scale: float = 3.0,
    intermediate: int | None = None,
    vocab: int = 259,
) -> Path:
    """Write config, random weights and tokenizer; ``scale`` lets the frozen head be sure of something.

    Args:
        intermediate: width of the MLP, by default twice ``hidden``.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate or 2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=256,
        bos_token_id=256,
        initializer_range=0.05,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.mul_(scale)
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """The byte-level tokenizer of the fixture models, in Qwen2's class."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("", "utf-8")
    specials = {str(256 + i): _special(text) for i, text in enumerate((END, START, TURN_END))}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": specials,
        "eos_token": END,
        "pad_token": END,
        "unk_token": None,
        "bos_token": None,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def _special(text: str) -> dict[str, object]:
    return {
        "content": text,
        "special": True,
        "normalized": False,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
    }


def load_fixture_policy(
    model_dir: Path, *, perturb: bool = True, load_in_4bit: bool = False, prompt: str = "plain"
):
    """A fresh policy over the fixture model; ``perturb`` moves LoRA B off zero: the adapter matters."""
    from empg_lite.policy import load_policy
    from empg_lite.recipe.schema import ModelSection

    section = ModelSection(
        name=str(model_dir),
        backend="transformers",
        dtype="float32",
        load_in_4bit=load_in_4bit,
        lora_r=4,
        lora_alpha=8,
    )
    loaded = load_policy(section, prompt, seed=0)
    if perturb:
        perturb_adapter(loaded)
    return loaded


def perturb_adapter(policy: Policy) -> None:
    """Move every LoRA weight by 0.1 times a normal number, from a fixed seed."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
