"""The memory plan: counted terms against real tensors, real allocations and each other."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import load_fixture_policy
from fixture_model import build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from empg_lite import sizes
from empg_lite.batching import packed_batches
from empg_lite.errors import DataError, MissingInput, OutOfMemory, UsageError
from empg_lite.plan import (
    Machine,
    Settings,
    Shape,
    advise,
    card,
    choose,
    machine,
    plan_recipe,
    predict,
    read_shape,
    refuse_unfit,
    shape_of,
    this_machine,
    with_sizes,
)
from empg_lite.plan import terms as t
from empg_lite.plan.choose import KEYS, SHARE
from empg_lite.plan.machine import LIBRARIES
from empg_lite.plan.shape import KNOWN
from empg_lite.policy import load_policy, logprobs
from empg_lite.policy.adam import make_adamw
from empg_lite.policy.merged import MergedCopy
from empg_lite.policy.packing import pack, packed_hidden
from empg_lite.policy.policy import Policy
from empg_lite.recipe import ModelSection, Recipe
from empg_lite.recipe_file import builtin_recipes, load_recipe
from empg_lite.sampler import Decoding, Prompt, choose_engine, make_sampler
from empg_lite.sampler.draw import draw

FIXTURE = Shape(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16, vocab=259, tied=True)
BASE = Settings(
    itemsize=4,
    four_bit=False,
    lora_r=4,
    adam_8bit=False,
    problems=4,
    samples=4,
    prompt_tokens=40,
    new_tokens=24,
    batch_rows=16,
    merged=False,
    micro_batch_tokens=16 * 64,
    checkpointing=False,
    evaluates=False,
    device="cpu",
)
CPU = Machine("cpu", 10**12)


# --- exact where it can be ------------------------------------------------------------------------


def test_known_shapes_have_the_published_sizes() -> None:
    """Parameters in all, and keys and values of a 16-bit token, as published for Qwen2.5."""
    for name, billions, kv in (
        ("0.5B", 0.494, 12),
        ("1.5B", 1.544, 28),
        ("3B", 3.086, 36),
        ("7B", 7.616, 56),
    ):
        shape = KNOWN[name]
        params = shape.linear_params + shape.embedding_params + shape.small_params
        assert params / 1e9 == pytest.approx(billions, abs=5e-4)
        assert t.cache_bytes_per_token(shape, 2) == kv * 1024


@pytest.mark.parametrize("four_bit", [False, True])
def test_weights_are_those_of_a_loaded_model(model_dir: Path, four_bit: bool) -> None:
    """To the byte: every parameter, and the scales and tables beside NF4 weights."""
    policy = load_fixture_policy(model_dir, load_in_4bit=four_bit)
    s, shape = replace(BASE, four_bit=four_bit), read_shape(str(model_dir))
    assert shape == FIXTURE
    total, lora = 0, 0
    for name, p in policy.model.named_parameters():
        if "lora_" in name:
            lora += p.nbytes
            continue
        total += p.nbytes
        state = getattr(p, "quant_state", None)
        if state is not None:
            inner = state.state2
            held = (state.absmax, state.code, state.offset, inner.absmax, inner.code)
            total += sum(tensor.nbytes for tensor in held)
    assert t.linear_weights(shape, s) + t.embeddings(shape, s) == total
    assert t.adapter(shape, s) == lora


def test_moments_and_gradient_are_adams(model_dir: Path) -> None:
    policy = load_fixture_policy(model_dir)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-3)
    for p in policy.trainable().values():
        p.grad = torch.zeros_like(p)
    grad = sum(p.grad.nbytes for p in policy.trainable().values() if p.grad is not None)
    optimizer.step()
    kept = [v for state in optimizer.state.values() for v in state.values() if v.numel() > 1]
    assert t.moments(FIXTURE, BASE) == sum(v.nbytes for v in kept)
    assert t.gradient(FIXTURE, BASE) == grad


def test_moments_in_8_bits(tmp_path: Path) -> None:
    """Matrices above and below 4,096 elements: rank 40 of a model 64 wide, k and v 32."""
    policy = load_policy(
        ModelSection(
            name=str(build_model(tmp_path)),
            backend="transformers",
            load_in_4bit=False,
            lora_r=40,
            lora_alpha=40,
        ),
        "plain",
        seed=0,
    )
    optimizer = make_adamw(list(policy.trainable().values()), 1e-3, eight_bit=True)
    for p in policy.trainable().values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert {v.dtype for v in kept} == {torch.uint8, torch.float32}
    held = {v.data_ptr(): v.nbytes for v in kept}  # the two codes are shared by all matrices
    assert t.moments(FIXTURE, replace(BASE, lora_r=40, adam_8bit=True)) == sum(held.values())


Pairs = list[tuple[tuple[int, ...], tuple[int, ...]]]


def kept_by(policy: Policy, layers: int, pairs: Pairs) -> int:
    """Bytes that autograd saves in a forward pass: storages, each once, no parameters."""
    del policy.causal.model.layers[layers:]
    parameters = {
        p.untyped_storage().data_ptr() for p in (*policy.model.parameters(), *policy.model.buffers())
    }
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = (storage.nbytes(), x)  # held, or its place would be given out again
        return x

    with (
        policy.training(),
        policy.autocast(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        packed_hidden(policy.network, pack(pairs))
    return sum(n for n, _ in seen.values())


def kept_by_a_block(model: Path, s: Settings, pairs: Pairs) -> int:
    """Two layers minus one, without the cast copies of the LoRA weights."""
    two, one = (kept_by(loaded(model, s), n, pairs) for n in (2, 1))
    return two - one - (0 if s.itemsize == 4 else 2 * t.adapter_params(FIXTURE, s) // FIXTURE.layers)


def pairs_of(s: Settings) -> Pairs:
    """A whole step at its longest: P prompts that differ, K completions of each."""
    prompts = [(1,) * (s.prompt_tokens - 1) + (2 + i,) for i in range(s.problems)]
    return [(prompt, (2,) * s.new_tokens) for prompt in prompts for _ in range(s.samples)]


@pytest.mark.parametrize(
    "dtype, four_bit, problems, samples, new_tokens",
    [
        ("float32", False, 4, 4, 24),
        ("bfloat16", True, 4, 4, 24),
        ("float32", True, 6, 1, 9),
        ("bfloat16", False, 6, 1, 9),
    ],
)
def test_a_block_keeps_what_autograd_saves(
    model_dir: Path, dtype: str, four_bit: bool, problems: int, samples: int, new_tokens: int
) -> None:
    """To the byte."""
    s = replace(BASE, itemsize=4 if dtype == "float32" else 2, four_bit=four_bit)
    s = replace(s, problems=problems, samples=samples, new_tokens=new_tokens)
    assert kept_by_a_block(model_dir, s, pairs_of(s)) == t.kept_block(FIXTURE, s)


@pytest.mark.parametrize("itemsize", [4, 2], ids=["fp32", "bf16"])
def test_attention_keeps_padded_rows(model_dir: Path, itemsize: int) -> None:
    """Prompts of 5 and 30 tokens, completions of 2 to 20: all places count, to the byte."""
    prompts = [(1,) * 5, (2,) * 30]
    pairs = [(prompts[i % 2], (3,) * n) for i, n in enumerate((20, 2, 7, 3, 12, 2))]
    s, tokens, rows = replace(BASE, itemsize=itemsize), 35 + sum(len(c) - 1 for _, c in pairs), len(pairs)
    places = 2 * 30 + rows * 19  # a completion's last token predicts nothing
    queries = places * (2 * FIXTURE.queries * itemsize + 4 * FIXTURE.heads)
    keys = (places + rows * 30) * 2 * FIXTURE.keys * itemsize
    expected = tokens * t.block_bytes_per_token(FIXTURE, s) + queries + keys
    assert kept_by_a_block(model_dir, s, pairs) == expected


class _Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, of those made within this mode: each storage counts once.

    What the libraries take for themselves while they compute is left out: for 16-bit products it is another
    amount on each processor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if torch.is_tensor(x) and (name := x.untyped_storage()._cdata) not in self._known | given:
                self._known.add(name)
                self.now += x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self._gone, name, x.untyped_storage().nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


def most_alive(work: Callable[[], object]) -> int:
    """The most bytes of tensors that are alive at once among those that ``work`` makes."""
    with _Live() as counted:
        work()
    return counted.most


@pytest.fixture(scope="module")
def wide_mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture model with an MLP five times as wide as a token, as Qwen2.5's are."""
    return build_model(tmp_path_factory.mktemp("wide"), intermediate=5 * FIXTURE.hidden)


@pytest.fixture(scope="module")
def large_vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture model with 8,000 tokens: next to a draw all else is small."""
    return build_model(tmp_path_factory.mktemp("vocab"), vocab=8000, intermediate=5 * FIXTURE.hidden)


def loaded(model: Path, s: Settings) -> Policy:
    """A policy as these settings have it."""
    section = ModelSection(
        name=str(model),
        backend="transformers",
        dtype="float32" if s.itemsize == 4 else "bfloat16",
        load_in_4bit=s.four_bit,
        lora_r=s.lora_r,
        lora_alpha=8,
    )
    return load_policy(section, "plain", seed=0, gradient_checkpointing=s.checkpointing)


def m_step_beside_plan(model: Path, s: Settings, pairs: Pairs | None = None) -> tuple[int, int]:
    """Bytes of one M-step: predicted, alive. By default on a whole step's longest rows."""
    from empg_lite.mstep import FitSettings, m_step
    from empg_lite.rationale import Rationale

    policy = loaded(model, s)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-3)
    row = dict(question="", gold="", prompt="", completion="", finish_reason="stop", reward=1.0, weight=1.0)
    row |= dict(problem_id="", policy_step=0, reason="equal", sample_index=0, step=1)
    made = pairs or pairs_of(s)
    rows = [Rationale(prompt_ids=p, completion_ids=c, **row) for p, c in made]  # type: ignore[arg-type]
    fit = FitSettings(1e-3, 1.0, 1, 0.005, "tokens", s.new_tokens, s.micro_batch_tokens)
    m_step(policy, optimizer, rows[:1], fit)  # Adam's moments are there from now on
    found = most_alive(lambda: m_step(policy, optimizer, rows, fit))
    return sum(predict(read_shape(str(model)), s, CPU).phases["M-step"].values()), found


WHOLE_STEP = 10**6


@pytest.mark.parametrize(
    "change",
    [{}, {"new_tokens": 100}, {"samples": 1, "problems": 16}, {"prompt_tokens": 200, "new_tokens": 4}],
    ids=["plain", "long", "one", "prompts"],
)
@pytest.mark.parametrize(
    "itemsize, checkpointing", [(4, False), (2, False), (2, True)], ids=["fp32", "bf16", "again"]
)
def test_an_m_step_allocates_what_the_plan_says(
    wide_mlp: Path, change: dict[str, int], itemsize: int, checkpointing: bool
) -> None:
    s = replace(BASE, itemsize=itemsize, checkpointing=checkpointing, micro_batch_tokens=WHOLE_STEP, **change)
    predicted, found = m_step_beside_plan(wide_mlp, s)
    assert predicted == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("change", [{}, {"checkpointing": True}, {"itemsize": 2}, {"new_tokens": 200}])
def test_an_m_step_with_a_narrow_mlp(model_dir: Path, change: dict[str, Any]) -> None:
    """Twice the width of a token: there the forward pass comes near to what going back takes."""
    predicted, found = m_step_beside_plan(model_dir, replace(BASE, micro_batch_tokens=WHOLE_STEP, **change))
    assert predicted == pytest.approx(found, rel=0.08)


@pytest.mark.parametrize("budget", [64, 150, 300])
def test_a_part_of_a_step_takes_no_more_than_the_plan_says(wide_mlp: Path, budget: int) -> None:
    """Micro-batches of a row, a problem's rows cut, a problem and more, of lognormal lengths."""
    s, r = replace(BASE, micro_batch_tokens=budget), random.Random(0)
    pairs = [(prompt, (3,) * lognormal(r, 12, 0.5, 24)) for prompt, _ in pairs_of(s)]
    predicted, found = m_step_beside_plan(wide_mlp, s, pairs)
    assert found <= predicted <= 2 * found


def lognormal(r: random.Random, mean: float, sigma: float, most: int) -> int:
    """A length of at least 2."""
    return max(2, min(most, round(r.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))))


def kept_of_a_step(shape: Shape, s: Settings, mean: float, sigma: float, spread: float) -> int:
    """Bytes that the largest micro-batch of a step keeps, of all blocks and the mask, without checkpointing.

    Args:
        mean: of prompts and completions, as a share of the longest; ``spread``: of the problems' own means
        (sigma).
    """
    r, rows = random.Random(0), dict[int, tuple[tuple[int, ...], int]]()
    for problem in range(s.problems):
        prompt = (problem,) * lognormal(r, mean * s.prompt_tokens, 0.4, s.prompt_tokens)
        own = mean * s.new_tokens * math.exp(r.gauss(0, spread))
        rows |= {len(rows) + k: (prompt, lognormal(r, own, sigma, s.new_tokens)) for k in range(s.samples)}
    most = 0
    for batch in packed_batches(rows, s.micro_batch_tokens):
        prompts = {rows[i][0] for i in batch}
        completions = [rows[i][1] - 1 for i in batch]
        prompt_width, width = max(map(len, prompts)), max(completions)
        tokens = sum(map(len, prompts)) + sum(completions)
        places = len(prompts) * prompt_width + len(batch) * width
        queries = places * (2 * shape.queries * s.itemsize + 4 * shape.heads)
        keys = (places + len(batch) * prompt_width) * 2 * shape.keys * s.itemsize
        block = tokens * t.block_bytes_per_token(shape, s) + queries + keys
        columns = -(-(prompt_width + width) // 8) * 8
        mask = len(batch) * width * shape.heads // shape.kv_heads * columns * s.itemsize
        most = max(most, shape.layers * block + mask)
    return most


@pytest.mark.parametrize("tokens", [2048, 4096, 16_384])
@pytest.mark.parametrize("name", ["0.5B", "3B"])
def test_padding_is_counted(name: str, tokens: int) -> None:
    """GSM8K's step by lengths as they come: a third of the longest in the mean, scattered more and less, and
    nearly all at the limit. Where rows are a tenth of it and scatter widely, one micro-batch holds the whole
    step, and the plan falls short by a seventh: if memory runs out then, the micro-batch is halved."""
    shape = KNOWN[name]
    s = replace(BASE, itemsize=2, four_bit=True, lora_r=32, problems=32, samples=8, device="cuda")
    s = replace(s, prompt_tokens=512, new_tokens=512, micro_batch_tokens=tokens)
    planned = shape.layers * t.kept_block(shape, s) + t.attention_mask(shape, s)
    usual = [kept_of_a_step(shape, s, *how) for how in ((0.35, 0.5, 0), (0.35, 0.5, 0.4), (0.7, 0.5, 0.3))]
    wide = [kept_of_a_step(shape, s, *how) for how in ((0.35, 0.8, 0.4), (0.2, 0.5, 0.3))]
    assert 0.8 * planned < max(usual) <= planned
    assert max(wide) <= planned
    assert kept_of_a_step(shape, s, 0.1, 0.8, 0.5) < 1.2 * planned


def sample_beside_plan(model: Path, s: Settings) -> tuple[dict[str, int], int]:
    """An E-step on a step's longest rows: the plan's terms, bytes alive. One prompt is shorter, so that
    ``generate`` pads; one row in eight ends at its second token, so that places close up."""
    sampler = make_sampler(loaded(model, s), s.engine, s.batch_rows, s.merged)
    lengths = [s.prompt_tokens - (i == 0) for i in range(s.problems)]
    prompts = [Prompt((1,) * n, tuple(range(s.samples))) for n in lengths]

    def sample() -> None:
        seen = itertools.count()
        early = range(s.batch_rows, s.batch_rows * 9 // 8)  # the first rows, at their second token
        stop = SimpleNamespace(stopped=lambda ids: next(seen) in early, text=lambda ids: "")
        sampler._stop = stop  # type: ignore[attr-defined]
        sampler.sample(prompts, Decoding(s.new_tokens))

    return predict(read_shape(str(model)), s, CPU).phases["E-step"], most_alive(sample)


@pytest.mark.parametrize(
    "change, terms",
    [
        (
            {"problems": 8, "batch_rows": 32, "prompt_tokens": 2, "new_tokens": 20},
            "decoding step",
        ),
        ({"problems": 16, "batch_rows": 64, "prompt_tokens": 2, "new_tokens": 4}, "draw"),
        ({"samples": 1, "problems": 16, "prompt_tokens": 200, "new_tokens": 4}, "prompts' pass"),
        ({"samples": 4, "problems": 16, "prompt_tokens": 300, "new_tokens": 4}, "prompts' pass"),
        (
            {"problems": 8, "batch_rows": 32, "prompt_tokens": 2, "new_tokens": 40},
            "attention, closing up",
        ),
    ],
    ids=["step", "draw", "prompts", "pieces", "layer"],
)
@pytest.mark.parametrize(
    "itemsize, merged", [(4, False), (4, True), (2, False)], ids=["fp32", "merged", "bf16"]
)
def test_an_e_step_takes_what_the_plan_says(
    model_dir: Path,
    wide_mlp: Path,
    large_vocab: Path,
    change: dict[str, Any],
    terms: str,
    itemsize: int,
    merged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of its moments where it costs most. In 16 bit the plan has the keys' copy too that a product
    makes."""
    if change["prompt_tokens"] == 300:
        monkeypatch.setitem(sizes.PREFILL_TOKENS, "cpu", 900)
    s = replace(BASE, itemsize=itemsize, merged=merged, **change)
    model = {"draw": large_vocab, "attention, closing up": model_dir}.get(terms, wide_mlp)
    plan, found = sample_beside_plan(model, s)
    assert set(terms.split(", ")) & set(plan)
    assert 0.96 * found <= sum(plan.values()) <= (1.04 if itemsize == 4 else 1.1) * found


@pytest.mark.parametrize(
    "change, vocab, term",
    [
        ({"problems": 16, "batch_rows": 64, "prompt_tokens": 2, "new_tokens": 4}, 8000, "draw"),
        ({"samples": 1, "problems": 16, "prompt_tokens": 200, "new_tokens": 4}, 259, "prompts' pass"),
        (
            {"samples": 1, "problems": 16, "prompt_tokens": 4, "new_tokens": 40},
            259,
            "attention and last draw",
        ),
    ],
    ids=["draw", "prompts", "attention"],
)
@pytest.mark.parametrize("itemsize", [4, 2], ids=["fp32", "bf16"])
def test_generate_takes_what_the_plan_says(
    wide_mlp: Path, large_vocab: Path, change: dict[str, Any], vocab: int, term: str, itemsize: int
) -> None:
    """Beside small logits and caches the integers show, which do not count."""
    s = replace(BASE, itemsize=itemsize, engine="generate", **change)
    plan, found = sample_beside_plan(large_vocab if vocab > 259 else wide_mlp, s)
    assert term in plan
    assert 0.94 * found <= sum(plan.values()) <= 1.02 * found


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("itemsize", [4, 2], ids=["fp32", "bf16"])
def test_a_merged_copy_takes_what_the_plan_says(model_dir: Path, four_bit: bool, itemsize: int) -> None:
    """Making it: all that stays, and the largest linear on its way."""
    s = replace(BASE, itemsize=itemsize, four_bit=four_bit, merged=True)
    policy, made = loaded(model_dir, s), []
    found = most_alive(lambda: made.append(MergedCopy(policy.causal, policy.dtype)))
    assert t.sampler_copy(FIXTURE, s) + t.merged_linear(FIXTURE, s) == pytest.approx(found, rel=0.01)


def test_what_graphs_hold() -> None:
    """The larger cache (evaluation decodes one row a prompt: here twice as many as the step), the copy if
    there is one, and the pool: a draw, a decoding step, without a copy a linear for it."""
    s = replace(BASE, device="cuda", itemsize=2, four_bit=True, merged=True, batch_rows=32, evaluates=True)
    row = 64 * t.cache_bytes_per_token(FIXTURE, 2) + 64 * 2
    pool = t.graph_pool(FIXTURE, s, 32)
    assert t.held_by_sampler(FIXTURE, s) == t.sampler_copy(FIXTURE, s) + 32 * row + pool
    live = replace(s, merged=False)
    linear = t.unpacked_linear(FIXTURE, s)
    assert t.held_by_sampler(FIXTURE, live) == 32 * row + pool + linear
    assert t.held_by_sampler(FIXTURE, replace(live, evaluates=False)) < 17 * row + pool + linear
    assert t.drawing(FIXTURE, s, 32) < pool - t.GRAPH_WORKSPACE < 3 * t.drawing(FIXTURE, s, 32)
    for other in (replace(s, device="cpu"), replace(live, engine="generate")):
        assert (
            not t.held_by_sampler(FIXTURE, other)
            and "graph pool" not in dict(t.phases(FIXTURE, other))["E-step"]
        )
    for phase in ("E-step", "evaluation"):
        assert dict(t.phases(FIXTURE, s))[phase]["graph pool"] == pool
    # A pool of 512 rows at Qwen's vocabulary: most of it one chunk of logits, 441 rows of them.
    qwen = t.graph_pool(KNOWN["0.5B"], replace(s, batch_rows=512), 512)
    assert 441 * 151_936 * 10 < qwen < 0.8e9


def test_a_cache_on_a_gpu_is_aligned() -> None:
    s = replace(BASE, prompt_tokens=41, device="cuda", itemsize=2)
    assert (s.row_tokens, s.room, replace(s, device="cpu").room) == (65, 72, 65)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draw_allocates_what_the_plan_says(dtype: torch.dtype) -> None:
    """Beside the logits that it is given; a V of 50,000 makes all else small."""
    logits, keys = torch.randn(8, 50_000).to(dtype), torch.arange(8)
    found = most_alive(lambda: draw(logits, keys, 0, Decoding(1))) + logits.nbytes
    s = replace(BASE, itemsize=dtype.itemsize)
    assert t.drawing(replace(FIXTURE, vocab=50_000), s, 8) == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [150, 300, 600])
def test_a_head_allocates_what_the_plan_says(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less than a chunk, a chunk and a piece, several: forward and backward, beside the hidden states.

    Chunks of 209 rows: the 16-bit product's scratch, 130 KB whatever the size, is small beside them.
    """
    monkeypatch.setitem(sizes.LOGIT_CHUNK, "cpu", 1 << 23)

    def loss(at: slice, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.sum()

    vocab, d = 40_000, 8
    hidden = torch.randn(rows, d, dtype=dtype, requires_grad=True)
    weight, targets = torch.randn(vocab, d, dtype=dtype), torch.arange(rows)
    found = most_alive(lambda: logprobs.head_loss(hidden, weight, targets, loss).backward())
    s = replace(BASE, itemsize=dtype.itemsize, problems=rows, samples=1, prompt_tokens=1, new_tokens=1)
    s = replace(s, micro_batch_tokens=rows)
    assert t.head_chunk(replace(FIXTURE, vocab=vocab, hidden=d), s) == pytest.approx(found, rel=0.01)


# --- properties -----------------------------------------------------------------------------------

SHAPES = st.sampled_from([FIXTURE, *KNOWN.values()])
SETTINGS = st.builds(
    Settings,
    itemsize=st.sampled_from([2, 4]),
    four_bit=st.booleans(),
    lora_r=st.integers(1, 64),
    problems=st.integers(1, 64),
    samples=st.integers(1, 16),
    prompt_tokens=st.integers(1, 2048),
    new_tokens=st.integers(1, 2048),
    batch_rows=st.integers(1, 512),
    merged=st.booleans(),
    micro_batch_tokens=st.integers(1, 20_000),
    checkpointing=st.booleans(),
    evaluates=st.booleans(),
    device=st.sampled_from(["cpu", "cuda"]),
    engine=st.sampled_from(["native", "native", "generate", "unsloth"]),
    expands_keys=st.booleans(),
)


@given(SHAPES, SETTINGS)
@settings(max_examples=60, deadline=None)
def test_more_work_never_takes_less(shape: Shape, s: Settings) -> None:
    peak = predict(shape, s, CPU).peak
    for name in ("lora_r", "prompt_tokens", "new_tokens", "batch_rows", "micro_batch_tokens", "problems"):
        assert predict(shape, replace(s, **{name: 2 * getattr(s, name)}), CPU).peak >= peak, name
    assert predict(shape, replace(s, merged=True, four_bit=True), CPU).peak >= 0
    assert predict(shape, replace(s, evaluates=True), CPU).peak >= peak
    assert predict(replace(shape, layers=shape.layers + 1), s, CPU).peak > peak


def test_a_merged_copy_is_written_beside_the_graphs() -> None:
    """Cache and pool are there then, on a GPU. (The larger moment is chosen with them on both sides.)"""
    s = replace(BASE, itemsize=2, merged=True, evaluates=True, device="cuda")
    for rows in (8, 56, 112, 224):
        terms = dict(t.phases(KNOWN["7B"], replace(s, batch_rows=rows)))["evaluation"]
        assert {"KV cache", "graph pool", "merged copy"} < set(terms)
        assert sum(terms.values()) >= t.held_by_sampler(KNOWN["7B"], replace(s, batch_rows=rows)) + max(
            t.merged_linear(KNOWN["7B"], s), t.drawing(KNOWN["7B"], s, rows)
        )


@given(SHAPES, SETTINGS)
@settings(max_examples=60, deadline=None)
def test_a_peak_is_what_stays_and_the_largest_phase(shape: Shape, s: Settings) -> None:
    plan = predict(shape, s, CPU)
    kept = sum(plan.stays.values())
    assert plan.peak - kept == max(sum(terms.values()) for terms in plan.phases.values())
    phase, term = plan.largest
    everything = plan.stays | plan.phases[phase]
    assert plan.totals[phase] == plan.peak and everything[term] == max(everything.values())
    assert ("evaluation" in plan.phases) == s.evaluates


@given(SHAPES, SETTINGS, st.integers(10**6, 3 * 10**10))
@settings(max_examples=150, deadline=None)
def test_the_advice_really_fits_and_is_not_larger_than_it_must_be(
    shape: Shape, s: Settings, free: int
) -> None:
    plan = predict(shape, s, Machine("cuda", free))
    change = advise(plan)
    if plan.fits:
        assert change == {}
        return
    if change is None:  # then the least of everything does not fit either
        least = dict(batch_rows=8, micro_batch_tokens=256, new_tokens=128, prompt_tokens=128)
        least = {name: min(value, getattr(s, name)) for name, value in least.items()}
        s = replace(s, merged=False, checkpointing=True, four_bit=True, **least)
        assert not predict(shape, s, plan.machine).fits
        return
    assert change and predict(shape, replace(s, **change), plan.machine).fits
    for name in change:  # each part of it is needed
        rest = {k: v for k, v in change.items() if k != name}
        assert not predict(shape, replace(s, **rest), plan.machine).fits, (name, change)


# --- recipes --------------------------------------------------------------------------------------


def header_card(path: Path) -> str | None:
    """The smallest card that a recipe's header names."""
    found = re.search(r"^# Card:\s+(\d+)(?:-\d+)? GB", path.read_text("utf-8"), re.MULTILINE)
    return f"{found[1]}GB" if found else None


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_a_shipped_recipe_fits_the_card_its_header_names(name: str) -> None:
    recipe = load_recipe(name)
    size = header_card(builtin_recipes()[name])
    machine = card(size) if size else Machine("cpu", 4 * 10**9)
    assert size or name.startswith("tiny")
    plan = plan_recipe(recipe, read_shape(recipe.model.name), machine)
    assert plan.fits and plan.peak <= SHARE * machine.free
    assert (
        plan.settings.micro_batch_tokens >= plan.settings.row_tokens or not size
    )  # rows are not fitted one by one


def test_auto_takes_what_the_card_gives() -> None:
    """More memory: more rows and tokens, and activations kept instead of computed again."""
    recipe, shape = load_recipe("gsm8k-1.5b"), KNOWN["1.5B"]
    small, large = (plan_recipe(recipe, shape, card(size)).settings for size in ("6GB", "40GB"))
    assert small.checkpointing and not large.checkpointing
    assert small.batch_rows < large.batch_rows
    fixed = load_recipe("gsm8k-1.5b", ["sampler.batch_rows=24", "optim.micro_batch_tokens=1000"])
    kept = plan_recipe(fixed, shape, card("40GB")).settings
    assert (kept.batch_rows, kept.micro_batch_tokens) == (24, 1000)


def test_a_micro_batch_stops_growing_where_it_gains_nothing() -> None:
    """On a CPU much earlier than on a card (docs/LOG.md), whatever the memory; below that it is what fits."""
    recipe, shape = load_recipe("gsm8k-0.5b"), KNOWN["0.5B"]
    for device, most in (("cpu", 1024), ("cuda", 16_384)):
        assert plan_recipe(recipe, shape, Machine(device, 10**12)).settings.micro_batch_tokens == most
        short = plan_recipe(recipe, shape, Machine(device, 3 * 10**9))
        assert 256 < short.settings.micro_batch_tokens <= most and short.fits


@pytest.mark.parametrize("merged", [True, False])
def test_the_sampler_stays_where_the_m_step_fits_beside_it(merged: bool) -> None:
    """From one byte of room on; the plan fits either way, and neither a CPU nor ``generate`` keeps
    anything."""
    shape, s = KNOWN["0.5B"], replace(BASE, device="cuda", itemsize=2, merged=merged, evaluates=True)
    s = replace(s, batch_rows=64, micro_batch_tokens=16_384, problems=64)
    held = t.held_by_sampler(shape, s)
    roomy = predict(shape, s, Machine("cuda", 10**12))
    alone = predict(shape, s, Machine("cuda", 1))
    assert roomy.keeps_sampler and roomy.totals["M-step"] == alone.totals["M-step"] + held
    enough = -(-roomy.peak * 10 // 9)  # SHARE of it may be used
    assert predict(shape, s, Machine("cuda", enough)).keeps_sampler
    tight = predict(shape, s, Machine("cuda", enough - 2))
    assert tight.fits and not tight.keeps_sampler and tight.totals == alone.totals
    assert not alone.keeps_sampler and not predict(shape, replace(s, device="cpu"), CPU).keeps_sampler
    other = replace(s, engine="generate", merged=False)
    assert not predict(shape, other, Machine("cuda", 10**12)).keeps_sampler


def test_rows_beyond_a_step_are_given_up_to_keep_activations() -> None:
    """They would serve the evaluation only."""
    recipe, machine = load_recipe("gsm8k-0.5b"), card("16GB")
    s = plan_recipe(recipe, KNOWN["0.5B"], machine).settings
    assert s.batch_rows == s.problems * s.samples == 256 and not s.checkpointing
    more = load_recipe("gsm8k-0.5b", ["sampler.batch_rows=512"])
    plan = plan_recipe(more, KNOWN["0.5B"], machine)
    assert plan.keeps_sampler and plan.settings.checkpointing


@pytest.mark.parametrize("name", ["gsm8k-0.5b", "gsm8k-1.5b", "gsm8k-3b", "gsm8k-7b", "math-hard-3b"])
def test_auto_prefers_sizes_with_which_the_sampler_stays(name: str) -> None:
    """On all cards where it can at half of the rows or more; there micro-batches are large enough all the
    same."""
    recipe = load_recipe(name)
    shape, needed, kept = read_shape(recipe.model.name), 256, set[bool]()
    for size in range(5, 81, 3):
        plan = plan_recipe(recipe, shape, card(f"{size}GB"))
        s = plan.settings
        if plan.fits:
            kept.add(plan.keeps_sampler)
        if plan.keeps_sampler:
            larger = replace(s, micro_batch_tokens=choose.ENOUGH_TOKENS)
            assert (
                s.micro_batch_tokens >= choose.ENOUGH_TOKENS or not predict(shape, larger, plan.machine).fits
            )
            more = replace(s, batch_rows=4 * s.batch_rows, micro_batch_tokens=256, checkpointing=True)
            assert s.batch_rows >= needed or not predict(shape, more, plan.machine).fits
    assert kept == {True} or kept == {True, False}


def test_each_phase_takes_the_whole_card_where_the_sampler_cannot_stay() -> None:
    """No larger micro-batch fits, nor do twice the rows."""
    plan = plan_recipe(load_recipe("gsm8k-1.5b"), KNOWN["1.5B"], card("4GB"))
    s = plan.settings
    assert plan.fits and not plan.keeps_sampler and s.micro_batch_tokens >= choose.ENOUGH_TOKENS
    for name in ("micro_batch_tokens", "batch_rows"):
        assert not predict(KNOWN["1.5B"], replace(s, **{name: 2 * getattr(s, name)}), plan.machine).fits


def test_a_t4_writes_keys_out() -> None:
    """Known by its generation; a card given by its size, by the recipe's type."""

    def expands(dtype: str, machine: Machine) -> bool:
        recipe = load_recipe("gsm8k-0.5b-t4", [f"model.dtype={dtype}"])
        return plan_recipe(recipe, KNOWN["0.5B"], machine).settings.expands_keys

    assert expands("float16", card("15GB")) and not expands("auto", card("15GB"))
    old, new = (Machine("cuda", 10**10, sm80) for sm80 in (False, True))
    assert expands("auto", old) and expands("float32", old)
    assert not expands("float16", new) and not expands("float16", CPU)
    s = replace(BASE, device="cuda", itemsize=2, prompt_tokens=512, micro_batch_tokens=4096)
    wide, shape = replace(s, expands_keys=True), KNOWN["0.5B"]
    assert t.kept_block(shape, wide) - t.kept_block(shape, s) == 4 * 512 * 2 * (896 - 128) * 2


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("15000, 7.5", Machine("cuda", 15_000 * 2**20 - LIBRARIES, False)),
        ("80000, 9.0", Machine("cuda", 80_000 * 2**20 - LIBRARIES, True)),
        ("80000, 12.0", Machine("cuda", 80_000 * 2**20 - LIBRARIES, True)),
        ("100, [N/A]", Machine("cuda", 0, None)),
        ("No devices were found", None),
    ],
)
def test_the_driver_tells_memory_and_generation(
    answer: str, expected: Machine | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=answer + "\n"))
    assert this_machine() == expected or (expected is None and this_machine().device == "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert this_machine().device == "cpu"


def test_another_engine_has_a_plan_of_its_own() -> None:
    """It samples from the policy's own modules, keeps nothing, and holds the logits of all rows at once."""
    for engine in ("auto", "native", "generate", "unsloth"):
        asked = load_recipe("gsm8k-0.5b", [f"sampler.engine={engine}"])
        assert choose.engine_of(asked) == choose_engine(engine)
    shape, plans = KNOWN["0.5B"], {}
    for engine in ("native", "generate", "unsloth"):
        recipe = load_recipe("gsm8k-0.5b", [f"sampler.engine={engine}", "sampler.batch_rows=128"])
        plans[engine] = plan_recipe(recipe, shape, card("24GB"))
        assert plans[engine].settings.engine == engine
    assert plans["native"].settings.merged and plans["native"].keeps_sampler
    for engine in ("generate", "unsloth"):
        assert not plans[engine].settings.merged and not plans[engine].keeps_sampler
        assert plans[engine].totals["E-step"] > plans["native"].totals["E-step"]
    assert t.generated_cache(shape, plans["unsloth"].settings, 8) > t.generated_cache(
        shape, plans["generate"].settings, 8
    )
    forced = load_recipe("gsm8k-0.5b", ["sampler.engine=generate", "sampler.merged=true"])
    assert not plan_recipe(forced, shape, card("24GB")).settings.merged


def test_plan_and_run_agree(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same free memory: the same sizes, written into the recipe that a run keeps."""
    from empg_lite import learner

    tight: list[int] = []
    for free in (4 * 10**6, 12 * 10**6, 10**12, 10**9):
        monkeypatch.setattr(learner.plan, "return_freed_blocks", lambda free=free: tight.append(free))
        monkeypatch.setattr(learner.plan, "free_memory", lambda device, free=free: free)
        recipe = load_recipe(str(recipe_file), ["sampler.problems_per_step=64", "sampler.max_new_tokens=200"])
        built = learner.build_learner(recipe)
        plan = plan_recipe(recipe, read_shape(recipe.model.name), Machine("cpu", free))
        assert built.recipe.sampler.batch_rows == plan.settings.batch_rows
        assert built.recipe.optim == with_sizes(recipe, plan.settings).optim
        assert built.planned == plan and 10**8 < built.held < 4 * 10**9  # of the process, before
    assert (plan.settings.batch_rows, plan.settings.micro_batch_tokens) == (512, 1024)  # the roomy case
    assert tight == [4 * 10**6, 12 * 10**6]  # where the peak is more than half of what is free


def test_the_libraries_are_held_before_the_model(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``memory/predicted_mb`` is the plan and what the process held: without them it was below every peak."""
    from empg_lite import learner

    order: list[str] = []

    def noted(owner: Any, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: order.append(name) or real(*a, **k))

    noted(learner, "import_libraries")
    noted(learner.plan, "resident_memory")
    noted(learner, "load_policy")
    learner.build_learner(load_recipe(str(recipe_file)))
    assert order == ["import_libraries", "resident_memory", "load_policy"]


def test_memory_is_kept_to_where_it_is_scarce_or_much() -> None:
    plan = plan_recipe(load_recipe("tiny", ["sampler.batch_rows=8"]), read_shape("tiny"), CPU)

    def large(peak: int, machine: Machine) -> bool:
        return replace(plan, stays={"weights": peak}, phases={"M-step": {}}, machine=machine).is_large

    assert not large(10**9, CPU) and large(10**9 + 1, CPU)
    assert not large(10**6, Machine("cpu", 2 * 10**6)) and large(10**6 + 1, Machine("cpu", 2 * 10**6))
    assert not large(10**10, Machine("cuda", 1))


@pytest.mark.parametrize("asked", [True, False])
def test_freed_blocks_go_back_where_memory_is_tight(asked: bool) -> None:
    """Blocks of 8 MB, freed below one that is kept: glibc's own limit has been raised by a block of 31 MB."""
    code = (
        "import ctypes, sys\nfrom empg_lite.plan import machine\n"
        "if sys.argv[1] == 'True': machine.return_freed_blocks()\n"
        "c = ctypes.CDLL(None); c.malloc.restype = ctypes.c_void_p; c.free.argtypes = [ctypes.c_void_p]\n"
        "def make(mb):\n"
        "    p = c.malloc(mb << 20); ctypes.memset(p, 1, mb << 20); return p\n"
        "c.free(make(31)); rows = [make(8) for _ in range(20)]; kept = make(8)\n"
        "before = machine.resident_memory(); [c.free(p) for p in rows]\n"
        "print(before - machine.resident_memory())"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(asked)], env=environment, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) > 150 * 2**20) is asked


def test_what_cannot_fit_is_refused_before_loading(
    recipe_file: Path, tmp_path: Path, cli, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    from empg_lite import learner

    monkeypatch.setattr(learner.plan, "free_memory", lambda device: 100_000)
    code, _, err = cli("train", "-r", recipe_file, "-o", tmp_path / "run")
    assert code == 71 and "memory plan" in err and "--force" in err and len(err.strip().splitlines()) == 1
    quick = ("--set", "run.steps=1", "--set", "run.eval_every=0")
    code, _, _ = cli("train", "-r", recipe_file, "-o", tmp_path / "run", "--force", *quick)
    assert code == 0
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["memory/predicted_mb"] > 100 and record["memory/peak_rss_mb"] > 100


def test_a_refusal_names_phase_term_and_setting() -> None:
    recipe = load_recipe("gsm8k-3b", ["sampler.batch_rows=512"])
    shape, machine = KNOWN["3B"], card("12GB")
    with pytest.raises(OutOfMemory, match=r"E-step .* KV cache .*--set sampler.batch_rows=128"):
        refuse_unfit(plan_recipe(recipe, shape, machine))
    fixed = load_recipe("gsm8k-3b", ["sampler.batch_rows=128"])
    refuse_unfit(plan_recipe(fixed, shape, machine))


# --- the command ----------------------------------------------------------------------------------


def test_the_command_answers_offline_without_torch(tmp_path: Path) -> None:
    """A fresh process with an empty model cache: no torch, no transformers, no socket."""
    code = (
        "import socket, sys\n"
        "def no(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = no\n"
        "from empg_lite.cli import main\n"
        "try: main(['plan', '-r', 'gsm8k-7b', '--gpu-memory', '24GB', '--json'])\n"
        "except SystemExit as end: print(end.code, {'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )
    result, end = done.stdout.splitlines()
    assert end == "0 set()"
    facts = json.loads(result)
    assert facts["fits"] and not facts["change"] and facts["peak"] <= facts["usable"] < 24e9


def test_the_command_says_no_and_what_to_set(cli) -> None:  # type: ignore[no-untyped-def]
    words = ("plan", "-r", "gsm8k-7b", "--gpu-memory", "12GB", "--set", "sampler.batch_rows=256")
    code, out, _ = cli(*words, "--json")
    facts = json.loads(out.splitlines()[-1])
    assert code == 1 and not facts["fits"] and facts["change"]
    code, out, _ = cli(*words)
    assert code == 1 and "does not fit" in out and facts["change"][0] in out
    changes = [word for change in facts["change"] for word in ("--set", change)]
    code, out, _ = cli(*words, *changes)
    assert code == 0 and "does not fit" not in out


def test_bad_input_is_one_line(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for size in ("lots", "0.2GB", "-8GB", "8 XB"):
        code, _, err = cli("plan", "--gpu-memory", size)
        assert code == 2 and "--gpu-memory" in err
    code, _, err = cli("plan", "--set", "model.name=nobody/nothing")
    assert code == 66 and "config.json" in err
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "hidden_size": 64}')
    code, _, err = cli("plan", "--set", f"model.name={tmp_path}")
    assert code == 65 and "num_attention_heads" in err


def test_sizes_of_memory() -> None:
    assert card("8GB").free == card("8").free == card(" 8000 MB").free == 8 * 10**9 - 600_000_000
    assert card("8GiB").free - card("8GB").free == 8 * (2**30 - 10**9)
    with pytest.raises(UsageError):
        card("8TB")


def test_shapes_from_configs() -> None:
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 259,
    }
    assert shape_of(config, "here") == replace(FIXTURE, tied=False)
    assert shape_of(config | {"head_dim": 32}, "here").head_dim == 32
    for bad in (None, 0, "64"):
        with pytest.raises(DataError, match="hidden_size"):
            shape_of(config | {"hidden_size": bad}, "here")
    assert read_shape("Qwen/Qwen2.5-3B-Instruct") == KNOWN["3B"]
    with pytest.raises(MissingInput):
        read_shape("Qwen/Qwen2.5-14B")


def test_every_setting_that_advice_may_name_is_a_recipe_key() -> None:
    for name, key in KEYS.items():
        section, _, field = key.partition(".")
        known = field in Recipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        assert known or name == "merged", key
