"""The memory plan for every family: published sizes, and models in their proportions as they allocate."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from family_model import PUBLISHED, build_family
from plan_measured import (
    kept_by_a_block,
    loaded,
    m_step_beside_plan,
    pairs_of,
    sample_beside_plan,
)
from plan_settings import BASE
from torch import Tensor

from empg_lite.core.errors import MissingInput
from empg_lite.policy.memory import terms as t
from empg_lite.policy.memory.shape import read_shape
from empg_lite.policy.merged import MergedCopy
from empg_lite.sampler import decoder

NAMES = [name for name in PUBLISHED if name != "Qwen2.5-0.5B"]  # which test_plan_terms.py measures
#: The plan knows no difference within a kind: the other Llama is left to the slow set.
BY_KIND = [pytest.param("Llama-3.2-1B", marks=pytest.mark.slow), "SmolLM2-135M", "Qwen3-0.6B"]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    return cache(lambda name: build_family(tmp_path_factory.mktemp("family"), name))


@pytest.mark.parametrize(
    ("name", "params", "kv"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, 22.5),
        ("HuggingFaceTB/SmolLM2-360M", 361_821_120, 40),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384, 192),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, 32),
        ("unsloth/Llama-3.2-3B", 3_212_749_824, 112),
        ("Qwen/Qwen3-0.6B", 596_049_920, 112),
        ("Qwen/Qwen3-1.7B-Base", 1_720_574_976, 112),
        ("Qwen/Qwen3-4B", 4_022_468_096, 144),
        ("Qwen/Qwen3-8B", 8_190_735_360, 144),
    ],
)
def test_known_shapes_have_the_published_sizes(name: str, params: int, kv: float) -> None:
    """Parameters to the last one, as the hub counts them, and KiB of keys and values of a 16-bit token."""
    shape = read_shape(name)
    assert shape.linear_params + shape.embedding_params + shape.small_params == params
    assert t.cache_bytes_per_token(shape, 2) == kv * 1024


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.5B", "somebody/Qwen3-4B", "Qwen3-4B", "Qwen/Qwen3-4B-FP8"])
def test_a_name_that_only_looks_known_is_not(name: str) -> None:
    with pytest.raises(MissingInput, match="not known"):
        read_shape(name)


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_a_loaded_model(folder_of, name: str, four_bit: bool) -> None:  # type: ignore[no-untyped-def]
    """To the byte: parameters, the scales beside NF4 weights, the adapter; and the merged copy."""
    s, shape = replace(BASE, four_bit=four_bit, merged=True), read_shape(str(folder_of(name)))
    policy = loaded(folder_of(name), s)
    sizes = {"base": 0, "lora": 0}
    for key, p in policy.model.named_parameters():
        sizes["lora" if "lora_" in key else "base"] += p.nbytes
        if (state := getattr(p, "quant_state", None)) is not None:
            inner = state.state2
            held = (state.absmax, state.code, state.offset, inner.absmax, inner.code)
            sizes["base"] += sum(tensor.nbytes for tensor in held)
    sizes["base"] += sum(x.qk_norm.nbytes for x in policy.network.layers if x.qk_norm is not None)
    assert t.linear_weights(shape, s) + t.embeddings(shape, s) == sizes["base"]
    assert t.adapter(shape, s) == sizes["lora"]
    copy = MergedCopy(policy.causal, torch.float32)
    held = (x for f in copy._fused for x in (f.qkv, f.bias, f.out, f.gate_up, f.down) if x is not None)
    assert t.sampler_copy(shape, s) == sum(x.nbytes for x in held)


@pytest.mark.parametrize("dtype, four_bit", [("float32", False), ("bfloat16", True)])
@pytest.mark.parametrize("name", NAMES)
def test_a_block_keeps_what_autograd_saves(folder_of, name: str, dtype: str, four_bit: bool) -> None:  # type: ignore[no-untyped-def]
    """To the byte, Qwen3's norms of queries and keys included."""
    s = replace(BASE, itemsize=4 if dtype == "float32" else 2, four_bit=four_bit)
    shape = read_shape(str(folder_of(name)))
    assert kept_by_a_block(folder_of(name), s, pairs_of(s)) == t.kept_block(shape, s)


@pytest.mark.parametrize("itemsize, again", [(4, False), (2, True)], ids=["fp32", "bf16-again"])
@pytest.mark.parametrize("name", BY_KIND)
def test_an_m_step_allocates_what_the_plan_says(folder_of, name: str, itemsize: int, again: bool) -> None:  # type: ignore[no-untyped-def]
    s = replace(BASE, itemsize=itemsize, checkpointing=again, micro_batch_tokens=10**6)
    predicted, found = m_step_beside_plan(folder_of(name), s)
    assert 0.97 * found <= predicted <= 1.08 * found


@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("prefix, budget", [(126, 900), (1000, 4000)])
@pytest.mark.parametrize("name", BY_KIND)
def test_a_shared_prefix_takes_no_more_than_the_plan_says(  # type: ignore[no-untyped-def]
    folder_of, name: str, prefix: int, budget: int, again: bool
) -> None:
    """A micro-batch filled by rows whose prefix is computed once; one row a problem, hence the most keys."""
    s = replace(BASE, problems=40, samples=1, prompt_tokens=prefix + 30, new_tokens=24, checkpointing=again)
    pairs = [((*(1,) * prefix, *range(10 + i, 40 + i)), (3,) * 24) for i in range(s.problems)]
    predicted, found = m_step_beside_plan(folder_of(name), replace(s, micro_batch_tokens=budget), pairs)
    assert 0.5 * predicted < found <= predicted


@pytest.mark.parametrize(
    "change",
    [
        {"problems": 8, "batch_rows": 32, "prompt_tokens": 2, "new_tokens": 20},
        {"samples": 1, "problems": 16, "prompt_tokens": 200, "new_tokens": 4},
        {"problems": 8, "batch_rows": 32, "prompt_tokens": 2, "new_tokens": 40},
    ],
    ids=["step", "prompts", "layer"],
)
@pytest.mark.parametrize("itemsize", [4, 2], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", BY_KIND)
def test_an_e_step_takes_what_the_plan_says(  # type: ignore[no-untyped-def]
    folder_of, name: str, itemsize: int, change: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits a product copies a layer's keys where no tensor is seen: here the copy is one."""
    if itemsize == 2:
        attention = decoder._attention

        def copying(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
            k.clone()
            return attention(q, k, *rest)

        monkeypatch.setattr(decoder, "_attention", copying)
    plan, found = sample_beside_plan(folder_of(name), replace(BASE, itemsize=itemsize, merged=True, **change))
    assert 0.96 * found <= sum(plan.values()) <= 1.1 * found
