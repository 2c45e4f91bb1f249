"""The memory plan: counted terms against real tensors, real allocations and each other."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
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

from empg_lite.errors import DataError, MissingInput, OutOfMemory, UsageError
from empg_lite.plan import (
    Machine,
    Settings,
    Shape,
    advise,
    card,
    plan_recipe,
    predict,
    read_shape,
    refuse_unfit,
    shape_of,
    with_sizes,
)
from empg_lite.plan import terms as t
from empg_lite.plan.choose import KEYS, SHARE
from empg_lite.plan.shape import KNOWN
from empg_lite.policy import load_policy, logprobs
from empg_lite.policy.adam import make_adamw
from empg_lite.policy.merged import MergedCopy
from empg_lite.policy.packing import pack, packed_hidden
from empg_lite.policy.policy import Policy
from empg_lite.recipe import ModelSection, Recipe
from empg_lite.recipe_file import builtin_recipes, load_recipe
from empg_lite.sampler import Decoding, NativeSampler, Prompt, native
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


def kept_by(policy: Any, layers: int, pairs: list[Any]) -> int:
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


def pairs_of(s: Settings) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A whole step at its longest: P prompts that differ, K completions of each."""
    prompts = [(1,) * (s.prompt_tokens - 1) + (2 + i,) for i in range(s.problems)]
    return [(prompt, (2,) * s.new_tokens) for prompt in prompts for _ in range(s.samples)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("problems, samples, new_tokens", [(4, 4, 24), (6, 1, 9)])
def test_a_block_keeps_what_autograd_saves(
    model_dir: Path, dtype: str, four_bit: bool, problems: int, samples: int, new_tokens: int
) -> None:
    """Two layers minus one: to the byte, the cast copies of the LoRA weights apart."""
    s = replace(BASE, itemsize=4 if dtype == "float32" else 2, four_bit=four_bit)
    s = replace(s, problems=problems, samples=samples, new_tokens=new_tokens)
    two, one = (kept_by(loaded(model_dir, s), n, pairs_of(s)) for n in (2, 1))
    cast = 0 if dtype == "float32" else 2 * t.adapter_params(FIXTURE, s) // FIXTURE.layers
    assert two - one == t.kept_block(FIXTURE, s) + cast


def peak_allocated(work: Callable[[], object]) -> int:
    """The most bytes alive at once among those that torch's CPU allocator gave out during ``work``."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        most = max(most, now)
    return most


@pytest.fixture(scope="module")
def wide_mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture model with an MLP five times as wide as a token, as Qwen2.5's are."""
    return build_model(tmp_path_factory.mktemp("wide"), intermediate=5 * FIXTURE.hidden)


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


def m_step_beside_plan(model: Path, s: Settings) -> tuple[int, int]:
    """Bytes of one M-step on a whole step's longest rows: predicted, allocated."""
    from empg_lite.mstep import FitSettings, m_step
    from empg_lite.rationale import Rationale

    policy = loaded(model, s)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-3)
    row = dict(question="", gold="", prompt="", completion="", finish_reason="stop", reward=1.0, weight=1.0)
    row |= dict(problem_id="", policy_step=0, reason="equal", sample_index=0, step=1)
    rows = [Rationale(prompt_ids=p, completion_ids=c, **row) for p, c in pairs_of(s)]  # type: ignore[arg-type]
    fit = FitSettings(1e-3, 1.0, 1, 0.005, "tokens", s.new_tokens, s.micro_batch_tokens)
    m_step(policy, optimizer, rows[:1], fit)  # Adam's moments are there from now on
    found = peak_allocated(lambda: m_step(policy, optimizer, rows, fit))
    return sum(predict(read_shape(str(model)), s, CPU).phases["M-step"].values()), found


WHOLE_STEP = 10**6


@pytest.mark.parametrize(
    "change",
    [{}, {"new_tokens": 200}, {"samples": 1, "problems": 16}, {"prompt_tokens": 200, "new_tokens": 4}],
    ids=["plain", "long", "one", "prompts"],
)
@pytest.mark.parametrize("itemsize", [4, 2], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "again"])
def test_an_m_step_allocates_what_the_plan_says(
    wide_mlp: Path, change: dict[str, int], itemsize: int, checkpointing: bool
) -> None:
    s = replace(BASE, itemsize=itemsize, checkpointing=checkpointing, micro_batch_tokens=WHOLE_STEP, **change)
    predicted, found = m_step_beside_plan(wide_mlp, s)
    assert predicted == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("change", [{}, {"checkpointing": True}, {"itemsize": 2}, {"new_tokens": 400}])
def test_an_m_step_with_a_narrow_mlp(model_dir: Path, change: dict[str, Any]) -> None:
    """Twice the width of a token: there the forward pass comes near to what going back takes."""
    predicted, found = m_step_beside_plan(model_dir, replace(BASE, micro_batch_tokens=WHOLE_STEP, **change))
    assert predicted == pytest.approx(found, rel=0.08)


@pytest.mark.parametrize("budget", [64, 150, 300])
def test_a_part_of_a_step_takes_no_more_than_the_plan_says(wide_mlp: Path, budget: int) -> None:
    """Micro-batches of a row, a problem's rows cut, a problem and more; the plan takes full ones."""
    predicted, found = m_step_beside_plan(wide_mlp, replace(BASE, micro_batch_tokens=budget))
    assert found <= predicted <= 1.25 * found


@pytest.mark.parametrize(
    "change, vocab, terms",
    [
        (
            {"problems": 8, "batch_rows": 32, "prompt_tokens": 8, "new_tokens": 150},
            259,
            "closing up, attention",
        ),
        ({"problems": 16, "batch_rows": 64, "prompt_tokens": 2, "new_tokens": 4}, 8000, "draw"),
        ({"samples": 1, "problems": 16, "prompt_tokens": 200, "new_tokens": 4}, 259, "prompts' pass"),
    ],
    ids=["layer", "draw", "prompts"],
)
@pytest.mark.parametrize("itemsize", [4, 2], ids=["fp32", "bf16"])
@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
def test_an_e_step_allocates_what_the_plan_says(
    tmp_path: Path, change: dict[str, Any], vocab: int, terms: str, itemsize: int, merged: bool
) -> None:
    """Each of its moments where it costs most. One row in eight ends early, so that places close up."""
    s = replace(BASE, itemsize=itemsize, merged=merged, **change)
    model = build_model(tmp_path, vocab=vocab)
    sampler = NativeSampler(loaded(model, s), s.batch_rows, merged)
    prompts = [Prompt((1,) * s.prompt_tokens, tuple(range(s.samples))) for _ in range(s.problems)]

    def sample() -> None:
        seen = itertools.count()
        early = range(s.batch_rows, s.batch_rows * 9 // 8)  # the first rows, at their second token
        stop = SimpleNamespace(stopped=lambda ids: next(seen) in early, text=lambda ids: "")
        sampler._stop = stop  # type: ignore[assignment]
        sampler.sample(prompts, Decoding(s.new_tokens))

    sample()  # libraries set themselves up
    plan = predict(read_shape(str(model)), s, CPU).phases["E-step"]
    assert set(terms.split(", ")) & set(plan)
    assert sum(plan.values()) == pytest.approx(peak_allocated(sample), rel=0.04)


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("itemsize", [4, 2], ids=["fp32", "bf16"])
def test_a_merged_copy_takes_what_the_plan_says(model_dir: Path, four_bit: bool, itemsize: int) -> None:
    """Making it: all that stays, and the largest linear on its way."""
    s = replace(BASE, itemsize=itemsize, four_bit=four_bit, merged=True)
    policy, made = loaded(model_dir, s), []
    found = peak_allocated(lambda: made.append(MergedCopy(policy.causal, policy.dtype)))
    assert t.sampler_copy(FIXTURE, s) + t.merged_linear(FIXTURE, s) == pytest.approx(found, rel=0.01)


def test_what_graphs_hold_is_the_copy_and_the_larger_cache() -> None:
    """Evaluation decodes one row a prompt: here twice as many as the step."""
    s = replace(BASE, device="cuda", merged=True, batch_rows=32, evaluates=True)
    cache = 32 * 64 * t.cache_bytes_per_token(FIXTURE, 4)
    assert t.held_by_sampler(FIXTURE, s) == t.sampler_copy(FIXTURE, s) + cache
    assert t.held_by_sampler(FIXTURE, replace(s, evaluates=False)) == t.sampler_copy(FIXTURE, s) + cache // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draw_allocates_what_the_plan_says(dtype: torch.dtype) -> None:
    """Beside the logits that it is given; a V of 50,000 makes all else small."""
    logits, keys = torch.randn(8, 50_000).to(dtype), torch.arange(8)
    found = peak_allocated(lambda: draw(logits, keys, 0, Decoding(1))) + logits.nbytes
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
    for chunks in (logprobs.CHUNK_ELEMENTS, t.HEAD_CHUNK):
        monkeypatch.setitem(chunks, "cpu", 1 << 23)

    def loss(at: slice, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.sum()

    vocab, d = 40_000, 8
    hidden = torch.randn(rows, d, dtype=dtype, requires_grad=True)
    weight, targets = torch.randn(vocab, d, dtype=dtype), torch.arange(rows)
    found = peak_allocated(lambda: logprobs.head_loss(hidden, weight, targets, loss).backward())
    s = replace(BASE, itemsize=dtype.itemsize, problems=rows, samples=1, prompt_tokens=1, new_tokens=1)
    s = replace(s, micro_batch_tokens=rows)
    assert t.head_chunk(replace(FIXTURE, vocab=vocab, hidden=d), s) == pytest.approx(found, rel=0.01)


def test_constants_of_others_are_theirs() -> None:
    assert t.HEAD_CHUNK == logprobs.CHUNK_ELEMENTS
    assert (t.MIN_ROWS, t.IDLE) == (native.MIN_ROWS, native.IDLE)


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


def test_what_graphs_address_stays_where_the_m_step_fits_beside_it() -> None:
    """From one byte of room on; the plan fits either way, and a CPU keeps nothing."""
    shape, s = KNOWN["0.5B"], replace(BASE, device="cuda", itemsize=2, merged=True, evaluates=True)
    s = replace(s, batch_rows=64)
    held = 2 * (shape.linear_params + 24 * (896 + 2 * 128)) + 64 * 64 * 12 * 1024  # 12 KiB a token
    roomy = predict(shape, s, Machine("cuda", 10**12))
    alone = predict(shape, s, Machine("cuda", 1))
    assert roomy.keeps_sampler and roomy.totals["M-step"] == alone.totals["M-step"] + held
    enough = -(-roomy.peak * 10 // 9)  # SHARE of it may be used
    assert predict(shape, s, Machine("cuda", enough)).keeps_sampler
    tight = predict(shape, s, Machine("cuda", enough - 2))
    assert tight.fits and not tight.keeps_sampler and tight.totals == alone.totals
    assert not alone.keeps_sampler and not predict(shape, s, CPU).keeps_sampler
    assert not predict(shape, replace(s, merged=False), Machine("cuda", 10**12)).keeps_sampler


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
    assert (plan.settings.batch_rows, plan.settings.micro_batch_tokens) == (128, 1024)  # the roomy case
    assert tight == [4 * 10**6, 12 * 10**6, 10**12, 10**9]  # auto takes what there is, or 512 rows: over 1 GB


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
        "import sys, torch\nfrom empg_lite import plan\n"
        "if sys.argv[1] == 'True': plan.return_freed_blocks()\n"
        "make = lambda mb: torch.ones(mb * 2**18)\n"
        "make(31); rows = [make(8) for _ in range(20)]; kept = make(8)\n"
        "before = plan.resident_memory(); del rows\n"
        "print(before - plan.resident_memory())"
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
    code, _, _ = cli("train", "-r", recipe_file, "-o", tmp_path / "run", "--force")
    assert code == 0
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["memory/predicted_mb"] > 100 and record["memory/peak_rss_mb"] > 100


def test_a_refusal_names_phase_term_and_setting() -> None:
    recipe = load_recipe("gsm8k-3b", ["sampler.batch_rows=512"])
    shape, machine = KNOWN["3B"], card("12GB")
    with pytest.raises(OutOfMemory, match=r"evaluation .* prompts' pass .*--set sampler.batch_rows=64"):
        refuse_unfit(plan_recipe(recipe, shape, machine))
    fixed = load_recipe("gsm8k-3b", ["sampler.batch_rows=64"])
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
