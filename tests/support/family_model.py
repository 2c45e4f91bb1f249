"""Random models of every family, in the shapes of published ones; biases and norms are not trivial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fixture_model import write_tokenizer

#: Rotary scaling of Llama 3.2 (its published config.json).
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
#: (model_type, what its config.json says), without layers and vocabulary.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-0.5B": ("qwen2", dict(
        hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2,
        rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=32_768, tie_word_embeddings=True)),
    "SmolLM2-135M": ("llama", dict(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
        rms_norm_eps=1e-5, rope_theta=1e5, max_position_embeddings=8192, tie_word_embeddings=True)),
    "Llama-3.2-1B": ("llama", dict(
        hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        rms_norm_eps=1e-5, rope_parameters=LLAMA3_ROPE, max_position_embeddings=131_072,
        tie_word_embeddings=True)),
    "Qwen3-0.6B": ("qwen3", dict(
        hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=40_960, tie_word_embeddings=True)),
}  # fmt: skip
#: The same in small, with the proportions of the published ones.
SMALL: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": dict(hidden_size=56, intermediate_size=304, num_attention_heads=14),
    "SmolLM2-135M": dict(hidden_size=144, intermediate_size=384),
    "Llama-3.2-1B": dict(
        hidden_size=64, intermediate_size=256, num_attention_heads=4, num_key_value_heads=1, head_dim=16,
        rope_parameters=LLAMA3_ROPE | {"rope_theta": 1e4, "original_max_position_embeddings": 32}),
    "Qwen3-0.6B": dict(hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32),
}  # fmt: skip


def build_family(folder: Path, name: str, *, small: bool = True, layers: int = 2, **changes: Any) -> Path:
    """Write a model in the shape of a published one, with the fixture's tokenizer of 259 tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    kind, sizes = PUBLISHED[name]
    ids = dict(vocab_size=259, num_hidden_layers=layers, bos_token_id=256, eos_token_id=256)
    sizes = sizes | (SMALL[name] if small else {}) | ids | changes
    sizes |= {"initializer_range": 0.8 / sizes["hidden_size"] ** 0.5} if small else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            elif key.endswith("bias"):
                parameter.normal_(std=0.5)
        model.model.norm.weight.mul_(2.0)  # logits that are sure of something
    model.save_pretrained(folder)
    return folder
