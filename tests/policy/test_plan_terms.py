"""Each term of the memory plan against the tensors that it counts."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_model import build_model, load_fixture_policy
from plan_measured import (
    kept_by_a_block,
    loaded,
    m_step_beside_plan,
    most_alive,
    pairs_of,
    sample_beside_plan,
)
from plan_settings import BASE, FIXTURE

from empg_lite.core import sizes
from empg_lite.loop.batching import packed_batches
from empg_lite.policy import load_policy, logprobs
from empg_lite.policy.adapter import make_adamw
from empg_lite.policy.memory import terms as t
from empg_lite.policy.memory.shape import KNOWN, Shape, read_shape
from empg_lite.policy.memory.terms import Settings
from empg_lite.policy.merged import MergedCopy
from empg_lite.recipe.schema import ModelSection
from empg_lite.sampler import Decoding
from empg_lite.sampler.draw import draw

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


@pytest.fixture(scope="module")
def wide_mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture model with an MLP five times as wide as a token, as Qwen2.5's are."""
    return build_model(tmp_path_factory.mktemp("wide"), intermediate=5 * FIXTURE.hidden)


@pytest.fixture(scope="module")
def large_vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture model with 8,000 tokens: next to a draw all else is small."""
    return build_model(tmp_path_factory.mktemp("vocab"), vocab=8000, intermediate=5 * FIXTURE.hidden)


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
def test_micro_batches_stay_within_the_plan(wide_mlp: Path, budget: int) -> None:
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
            "attention, decoding step",
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
    model = {"draw": large_vocab, "attention, decoding step": model_dir}.get(terms, wide_mlp)
    plan, found = sample_beside_plan(model, s)
    assert set(terms.split(", ")) & set(plan)
    assert 0.96 * found <= sum(plan.values()) <= (1.04 if itemsize == 4 else 1.1) * found


def test_closing_up_takes_what_the_plan_says(model_dir: Path) -> None:
    """Half of the rows' keys of one layer, where rows are long."""
    s = replace(BASE, problems=8, batch_rows=32, prompt_tokens=2, new_tokens=80)
    plan, found = sample_beside_plan(model_dir, s)
    assert "closing up" in plan and 0.96 * found <= sum(plan.values()) <= 1.04 * found


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
    """The larger cache (evaluation decodes one row a prompt: here twice as many as the step) and what prompts
    may share, the copy if there is one, and the pool: a draw, a decoding step, without a copy a linear."""
    s = replace(BASE, device="cuda", itemsize=2, four_bit=True, merged=True, batch_rows=32, evaluates=True)
    row = 64 * t.cache_bytes_per_token(FIXTURE, 2) + 64 * 2
    pool = t.graph_pool(FIXTURE, s, 32)
    cache = 32 * row + 40 * t.cache_bytes_per_token(FIXTURE, 2)
    assert t.held_by_sampler(FIXTURE, s) == t.sampler_copy(FIXTURE, s) + cache + pool
    live = replace(s, merged=False)
    linear = t.unpacked_linear(FIXTURE, s)
    assert t.held_by_sampler(FIXTURE, live) == cache + pool + linear
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
    assert (s.row_tokens, s.cache_len, replace(s, device="cpu").cache_len) == (65, 72, 65)


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

    def loss(padded: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return padded.sum()

    vocab, d, one = 40_000, 8, torch.ones(1)
    hidden = torch.randn(rows, d, dtype=dtype, requires_grad=True)
    weight, targets = torch.randn(vocab, d, dtype=dtype), torch.arange(rows)
    found = most_alive(lambda: logprobs.head_loss(hidden, weight, targets, [rows], one, loss).backward())
    s = replace(BASE, itemsize=dtype.itemsize, problems=rows, samples=1, prompt_tokens=1, new_tokens=1)
    s = replace(s, micro_batch_tokens=rows)
    assert t.head_chunk(replace(FIXTURE, vocab=vocab, hidden=d), s) == pytest.approx(found, rel=0.01)
