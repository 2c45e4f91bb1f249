"""Models of a given shape with random weights, and a tokenizer of bytes: nothing is downloaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

END, START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
BYTES = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a Qwen2 architecture."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = True

    @property
    def head_dim(self) -> int:
        """Of a query, a key, a value."""
        return self.hidden // self.heads

    @property
    def linear_parameters(self) -> int:
        """Of the seven linears of every layer, biases left out."""
        kv = self.kv_heads * self.head_dim
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * kv
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        """Of the output embedding."""
        return self.vocab * self.hidden

    def cache_bytes(self, itemsize: int) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


#: The shapes that Qwen2.5 is published in, and the bundled model's.
SHAPES = {
    "0.5B": Shape(896, 4864, 24, 14, 2, 151_936),
    "1.5B": Shape(1536, 8960, 28, 12, 2, 151_936),
    "3B": Shape(2048, 11_008, 36, 16, 2, 151_936),
    "7B": Shape(3584, 18_944, 28, 28, 4, 152_064, tied=False),
    "tiny": Shape(128, 384, 4, 4, 2, 530),
}


def wider(shape: Shape, factor: int) -> Shape:
    """The same depth and vocabulary, ``factor`` times as wide, heads of the same size."""
    return replace(
        shape,
        hidden=shape.hidden * factor,
        intermediate=shape.intermediate * factor,
        heads=shape.heads * factor,
        kv_heads=shape.kv_heads * factor,
    )


def write_model(folder: Path, shape: Shape, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A model folder that ``from_pretrained`` takes; weights are made on the GPU where there is one."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from empg_lite.policy import quiet

    quiet()
    assert shape.vocab >= BYTES + 3, "a token for each byte, and three ends"
    folder.mkdir(parents=True, exist_ok=True)
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=shape.tied,
        eos_token_id=BYTES,
        pad_token_id=BYTES,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            Qwen2ForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("", "utf-8")
    flags = dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False)
    ends = {
        str(BYTES + i): {"content": text, "special": True, **flags}
        for i, text in enumerate((END, START, TURN_END))
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": ends,
        "eos_token": END,
        "pad_token": END,
        "unk_token": None,
        "bos_token": None,
        "model_max_length": 32_768,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
