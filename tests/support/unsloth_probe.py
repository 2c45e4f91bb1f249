"""Run in a process of its own, for Unsloth patches what it is imported before: what is borrowed from it.

python tests/support/unsloth_probe.py prefix|kernels MODEL_FOLDER
python tests/support/unsloth_probe.py numbers MODEL_FOLDER PROBLEMS SAMPLES NEW_TOKENS
Prints a JSON object on the last line. ``kernels`` wants TRITON_INTERPRET=1 in the environment.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Any


def load(model: str) -> Any:
    """The fixture model by Unsloth in NF4, its adapter not zero."""
    from fixture_model import perturb_adapter

    from empg_lite.policy import load_policy
    from empg_lite.recipe.schema import ModelSection

    section = ModelSection(
        name=model, backend="unsloth", dtype="float32", load_in_4bit=True, lora_r=4, lora_alpha=8
    )
    policy = load_policy(section, "plain", seed=0, gradient_checkpointing=True)
    perturb_adapter(policy)
    return policy


# --- the M-step's forward pass ------------------------------------------------------------------------


def prefix(model: str) -> dict[str, Any]:
    """Unsloth's table of segments inside transformers' layers: on a CPU it has no layers of its own."""
    import torch

    from empg_lite.policy import shared_prefix
    from empg_lite.policy.backends import future_leak

    policy = load(model)
    facts: dict[str, Any] = {"facts": policy.facts(), "leak": future_leak(policy)}
    import unsloth.models.llama  # noqa: F401  a GPU has imported it by now

    facts["without its attention"] = shared_prefix.disagreement(policy)
    attend_by_segments(policy)
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    facts["with it"] = shared_prefix.disagreement(policy)
    facts["adapter as before"] = all(torch.equal(before[n], p) for n, p in policy.trainable().items())
    facts["no gradient left"] = all(p.grad is None for p in policy.trainable().values())

    pairs = shared_prefix.check_pairs(259)
    with torch.no_grad():
        packed, shared = (policy.completion_logprobs(pairs, shared=which) for which in (False, True))
    facts["apart"] = max(float((a - b).abs().max()) for a, b in zip(packed, shared, strict=True))

    real = shared_prefix.stream

    def shifted(rows: Any) -> Any:
        laid = real(rows)
        laid.positions[40:] = [p + 1 for p in laid.positions[40:]]
        return laid

    shared_prefix.stream = shifted
    facts["with positions that are off"] = shared_prefix.disagreement(policy)
    shared_prefix.stream = real

    attention = policy.causal.model.layers[0].self_attn
    for name in ("paged_attention", "paged_attention_K", "attention"):
        setattr(attention, name, torch.zeros(1))
    with policy.sampling():
        facts["buffers while sampling"] = hasattr(attention, "paged_attention")
    facts["buffers afterwards"] = hasattr(attention, "paged_attention")
    return facts


def attend_by_segments(policy: Any) -> None:
    """Let transformers' attention take the table of segments.

    By Unsloth's FlexAttention, uncompiled; as that has no gradients on a CPU, then by its mask written out.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from unsloth.utils.prefix_grouper_kernel import _make_mask_mod, flex_shared_prefix_attention

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: Any, q: Any, k: Any, v: Any, mask: Any, prefix_seg_info: Any = None, **rest: Any
    ) -> Any:
        if prefix_seg_info is None:
            return plain(module, q, k, v, mask, **rest)
        if torch.is_grad_enabled():
            table, at = prefix_seg_info, torch.arange(q.shape[2])
            keeps = _make_mask_mod(table.group_of_kv, table.is_prefix, table.suffix_of_kv)
            seen = keeps(0, 0, at[:, None], at[None])
            return scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2), None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex_shared_prefix_attention(q, k, v, prefix_seg_info, compiled=False), None

    ALL_ATTENTION_FUNCTIONS.register("segments", attend)
    policy.causal.config._attn_implementation = "segments"
    for module in policy.causal.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "segments"


# --- the kernels of a decoding step -------------------------------------------------------------------


def kernels(model: str) -> dict[str, Any]:
    """Unsloth's Triton kernels under Triton's interpreter: verified, and sampled with."""
    import torch

    policy = load(model)
    from sampling import ids_of, prompts_of
    from unsloth.kernels import rope_embedding

    from empg_lite.policy.kernels import PLAIN, unsloth_kernels, verified
    from empg_lite.sampler import Decoding
    from empg_lite.sampler.native import NativeSampler

    # The launcher asks for a GPU, the kernel does not need one.
    rope_embedding._eviction_hints_ok = lambda device: False

    def rope(q: Any, k: Any, cos: Any, sin: Any, rows: Any) -> bool:
        rope_embedding._rope_qk(q, k, q, k, cos, sin, rows, True, False, rope_embedding._eager_kernel)
        return True

    rope_embedding.decode_rope_inplace = rope
    found = verified(unsloth_kernels(), policy.causal, torch.float32)
    result: dict[str, Any] = {"borrowed": found.borrowed, "notes": found.notes}
    prompts, decoding = prompts_of(policy, 3, 4), Decoding(6)
    for merged in (True, False):
        for off in (False, True):
            with policy.reference() if off else nullcontext():
                drawn = {}
                for name, used in (("plain", PLAIN), ("unsloth", found)):
                    policy.kernels = used
                    drawn[name] = NativeSampler(policy, merged=merged).sample(prompts, decoding)
            pairs = [
                (a, b)
                for one, other in zip(drawn["plain"], drawn["unsloth"], strict=True)
                for x, y in zip(one, other, strict=True)
                for a, b in zip(x.logprobs, y.logprobs, strict=True)
            ]
            result[f"merged {merged}, adapter {not off}"] = {
                "same tokens": ids_of(drawn["plain"]) == ids_of(drawn["unsloth"]),
                "apart": max(abs(a - b) for a, b in pairs),
            }
    return result


def numbers(model: str, *sizes: str) -> dict[str, Any]:
    """What ``backend_probe.py`` finds, then ``prefix``: one import for both."""
    from backend_probe import both_precisions

    found = both_precisions("unsloth", model, *map(int, sizes))
    return {**found, "prefix": prefix(model)}


if __name__ == "__main__":
    what, model, *sizes = sys.argv[1:]
    print(json.dumps({"prefix": prefix, "kernels": kernels, "numbers": numbers}[what](model, *sizes)))
