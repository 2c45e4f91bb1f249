"""Is this GPU good for training? ``pytest -m gpu`` answers in a minute or two.

Tests that need no GPU kernel also run on a CPU, unmarked: they compare the same code. There an out-of-memory
error is simulated; on a GPU it is real.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fixture_model import build_model
from fixture_recipe import quick_recipe
from little_memory import only, rows_at_once

from empg_lite.core.rationale import Rationale
from empg_lite.core.sizes import shared_prefix
from empg_lite.loop import mstep
from empg_lite.loop.train import train
from empg_lite.policy.policy import Policy
from empg_lite.sampler import Decoding, Prompt, make_sampler, sample_key
from empg_lite.sampler.decoder import Decoder
from empg_lite.sampler.native import NativeSampler

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_checks  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_report  # noqa: E402

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
needs_unsloth = pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed (extra `gpu`)"
)
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])
everywhere = pytest.mark.parametrize("device", ["cpu", GPU])
#: Minutes long without a card, because two processes load Unsloth.
with_unsloth = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=[pytest.mark.slow, pytest.mark.unsloth, needs_unsloth]),
        pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu, needs_unsloth]),
    ],
)


def load(folder: Path, device: str, dtype: str = "float32", four_bit: bool = False) -> Policy:
    """A policy on that device, its adapter not zero."""
    from empg_lite.policy import load_policy
    from empg_lite.recipe.schema import ModelSection

    section = ModelSection(
        name=str(folder), backend="transformers", dtype=dtype, load_in_4bit=four_bit, lora_r=4, lora_alpha=8
    )
    with ExitStack() as hidden:
        if device == "cpu":  # also where there is a card
            hidden.enter_context(patch("torch.cuda.is_available", lambda: False))
        policy = load_policy(section, "plain", seed=0)
    assert policy.device.type == device
    move_adapter(policy, 1)
    return policy


def move_adapter(policy: Policy, seed: int) -> None:
    """Add the same noise to the adapter on whatever device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> Callable[[str], Policy]:
    """The fixture model in float32 on a device, loaded once."""
    policies: dict[str, Policy] = {}

    def get(device: str) -> Policy:
        if device not in policies:
            policies[device] = load(model_dir, device)
        return policies[device]

    return get


def prompts_of(policy: Policy, n: int, k: int, prefix: str = "") -> list[Prompt]:
    """n prompts of different lengths that all begin with ``prefix``, k keys each."""
    texts = [prefix + chr(97 + i % 26) * (1 + 7 * i % 23) for i in range(n)]
    return [
        Prompt(policy.encode_prompt(text)[1], tuple(sample_key(0, 1, f"{i}", j) for j in range(k)))
        for i, text in enumerate(texts)
    ]


# --- sampling -----------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize(
    "prefix", ["", "What all prompts begin with is computed once."], ids=["apart", "prefixed"]
)
def test_greedy_tokens_by_graphs_step_by_step_and_by_generate(loaded: Any, device: str, prefix: str) -> None:
    policy = loaded(device)
    prompts = prompts_of(policy, 20, 1, prefix)
    assert shared_prefix([p.ids for p in prompts]) >= len(prefix)
    found = gpu_checks.three_ways(policy, prompts, Decoding(24, temperature=0.0))
    assert not [error for error in found.values() if isinstance(error, str)]
    for way, tokens in found.items():
        assert not gpu_checks.partings(prompts, found["generate"], tokens), way


@everywhere
@pytest.mark.parametrize("merged", [True, False])
def test_graphs_are_captured_and_replayed(loaded: Any, device: str, merged: bool) -> None:
    sampler = make_sampler(loaded(device), "native", merged=merged)
    for _ in range(2):
        before = sampler.work
        sampler.sample(prompts_of(loaded(device), 4, 8), Decoding(12))
        facts = gpu_checks.engine_facts(sampler)
    assert "graph_failure" not in facts and facts["eager_steps"] == 0
    if device == "cuda":
        again = sampler.work.since(before)
        assert facts["graphs_captured"] > 0 and again.graphs_captured == 0 and again.graphs_replayed > 10
    else:
        assert facts["graphs_captured"] == facts["graphs_replayed"] == 0


@everywhere
def test_samples_are_those_of_a_cpu(loaded: Any, device: str) -> None:
    """The same keys draw the same tokens, unless the random number lies on the edge between two."""
    plain, decoding = loaded("cpu"), Decoding(16)
    prompts = prompts_of(plain, 6, 16)
    expected = gpu_checks.ids_of(make_sampler(plain, "generate").sample(prompts, decoding))
    found = gpu_checks.ids_of(make_sampler(loaded(device), "native").sample(prompts, decoding))
    parted = gpu_checks.partings(prompts, found, expected)
    assert len(parted) <= 5, "of 96 samples"
    distances = [gpu_checks.edge_distance(plain, parting, decoding) for parting in parted]
    assert max(distances, default=0.0) < 1e-4


def test_control_other_numbers_are_not_on_an_edge(loaded: Any) -> None:
    """Samples of other keys part, and not by rounding: the test above can fail."""
    policy, decoding = loaded("cpu"), Decoding(16)
    prompts = prompts_of(policy, 6, 16)
    others = [replace(p, keys=tuple(key + 1 for key in p.keys)) for p in prompts]
    ours, theirs = (
        gpu_checks.ids_of(make_sampler(policy, "native").sample(p, decoding)) for p in (prompts, others)
    )
    parted = [p for p in gpu_checks.partings(prompts, ours, theirs)]
    assert len(parted) > 50
    assert sum(gpu_checks.edge_distance(policy, p, decoding) > 1e-3 for p in parted) > 40


@everywhere
@pytest.mark.parametrize("merged", [True, False])
def test_graphs_survive_what_happens_in_a_run(
    loaded: Any, device: str, merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory given back, the adapter off and on again, memory that ran out, weights that moved."""
    policy, decoding = loaded(device), Decoding(16)
    prompts = prompts_of(policy, 6, 8)
    sampler = make_sampler(policy, "native", 24, merged)

    def drawn() -> Any:
        return gpu_checks.ids_of(sampler.sample(prompts, decoding))

    def fresh() -> Any:
        return gpu_checks.ids_of(make_sampler(policy, "generate").sample(prompts, decoding))

    expected = drawn()
    nearly(policy, prompts, expected, fresh(), decoding)
    sampler.release()
    assert drawn() == expected
    with policy.reference():
        base = drawn()
        nearly(policy, prompts, base, fresh(), decoding)
    assert base != expected and drawn() == expected
    real, calls = Decoder.prefill, 0

    def failing(self: Decoder, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("pretended")
        real(self, *args)

    monkeypatch.setattr(Decoder, "prefill", failing)
    nearly(policy, prompts, drawn(), expected, decoding)
    assert calls > 2 and (sampler.batch_rows or 0) < 24
    kept = {name: p.detach().clone() for name, p in policy.trainable().items()}
    try:
        move_adapter(policy, 2)
        moved = drawn()
        nearly(policy, prompts, moved, fresh(), decoding)
        assert moved != expected
    finally:
        with torch.no_grad():
            for name, parameter in policy.trainable().items():
                parameter.copy_(kept[name])


def nearly(policy: Policy, prompts: list[Prompt], ours: Any, theirs: Any, decoding: Decoding) -> None:
    """The same samples but for rounding."""
    parted = gpu_checks.partings(prompts, ours, theirs)
    assert len(parted) <= 3 + sum(len(p.keys) for p in prompts) // 20
    assert all(gpu_checks.edge_distance(policy, p, decoding) < 1e-4 for p in parted)


# --- log-probabilities --------------------------------------------------------------------------------


PAIRS = [
    (tuple((7 * i + j) % 250 for j in range(5 + 9 * i)), tuple((11 * i + 3 * j) % 250 for j in range(12)))
    for i in range(6)
]
#: The same behind a prefix that packing shares.
PREFIXED = [((*range(100, 140), *prompt), completion) for prompt, completion in PAIRS]
both = pytest.mark.parametrize("pairs", [PAIRS, PREFIXED], ids=["apart", "prefixed"])


@everywhere
@both
def test_every_path_gives_the_same_logprobs(loaded: Any, device: str, pairs: Any) -> None:
    """One row alone, padded on the left and on the right, and packed."""
    ways = gpu_checks.logprob_ways(loaded(device), pairs)
    assert set(ways) >= {"alone", "left", "right", "packed"}
    assert all(gpu_checks.farthest(rows, ways["alone"]) < 1e-4 for rows in ways.values())
    shifted = [row[1:] + row[:1] for row in ways["alone"]]
    assert gpu_checks.farthest(shifted, ways["alone"]) > 0.1


@everywhere
@both
def test_logprobs_are_those_of_a_cpu(loaded: Any, device: str, pairs: Any) -> None:
    ours, plain = (gpu_checks.logprob_ways(loaded(d), pairs)["packed"] for d in (device, "cpu"))
    assert gpu_checks.farthest(ours, plain) < 1e-4


@pytest.mark.gpu
@needs_gpu
@both
def test_nf4_in_16_bits_stays_near_float32(tmp_path: Path, pairs: Any) -> None:
    """The kernels that training uses on a card, against the same weights in float32.

    Random weights make rounding loud: a CPU in bfloat16 is 0.78 nats away, an H200 0.79.
    """
    folder = build_model(tmp_path / "model", hidden=256, layers=4)
    dtype = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    exact = gpu_checks.logprob_ways(load(folder, "cuda", four_bit=True), pairs)
    found = gpu_checks.logprob_ways(load(folder, "cuda", dtype, four_bit=True), pairs)
    apart = [gpu_checks.farthest(found[way], exact["alone"]) for way in found]
    assert max(apart) < 1.5 and max(apart) < 2 * gpu_checks.farthest(found["alone"], exact["alone"]) + 0.02


# --- Unsloth ------------------------------------------------------------------------------------------


def run_job(job: gpu_parts.Job, folder: Path) -> list[dict[str, Any]]:
    """The rows of a job of the GPU benchmark, done in a process of its own on the device that there is."""
    rows = folder / f"{job.rival}.jsonl"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--job", job.dump(), str(folder), str(rows)]
    paths = os.pathsep.join([str(BENCHMARKS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, input="begin\n", capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = {(row["figure"], row.get("rows")): row for row in map(json.loads, rows.read_text().splitlines())}
    assert not [row["error"] for row in last.values() if "error" in row]
    return list(last.values())


def small_job(rival: str, *figures: str) -> gpu_parts.Job:
    """Two layers, few short rows."""
    return gpu_parts.cut(gpu_parts.Job("runs", rival, figures, 600.0))


@with_unsloth
def test_unsloth_beside_plain_transformers_in_a_process(tmp_path: Path, device: str) -> None:
    """Tokens by graphs, step by step and by ``generate``; log-probabilities of every path."""
    figures = ("train", "greedy", "logprobs")
    jobs = [small_job(rival, *figures) for rival in ("empg", "empg-unsloth")]
    rows = [row for job in jobs for row in run_job(job, tmp_path)]
    found = gpu_report.checks(rows)
    assert len(found) >= 8 and not [(who, what) for who, what, holds in found if not holds]
    assert {a["rival"] for a in gpu_report.agreement(rows)} == {"empg", "empg-unsloth"}


@with_unsloth
def test_reported_kernels_appear_in_a_profile_in_a_process(tmp_path: Path, device: str) -> None:
    """By torch's profiler: RMSNorm, RoPE, SwiGLU and NF4 of Unsloth, a fused attention, graphs."""
    (row,) = run_job(small_job("empg-unsloth", "kernels"), tmp_path)
    assert row["sampling"]["top"] and row["fitting"]["top"]
    assert (len(row["checks"]) >= 10) == (device == "cuda")
    assert not [what for what, holds in row["checks"].items() if not holds], row


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU])
def test_the_profile_of_plain_transformers_in_a_process(tmp_path: Path, device: str) -> None:
    """The same without Unsloth: what it would be said to lend is not found."""
    (row,) = run_job(small_job("empg", "kernels"), tmp_path)
    assert row["policy"]["kernels"] == ["plain torch"]
    kinds = row["sampling"]["kinds"] + row["fitting"]["kinds"]
    assert "NF4 dequantization" in kinds and "SwiGLU" not in kinds
    assert not [what for what, holds in row["checks"].items() if not holds], row


# --- 16 bits ------------------------------------------------------------------------------------------


@everywhere
def test_float16_trains(tmp_path: Path, model_dir: Path, device: str) -> None:
    """The loss scale finds its place, every step moves the weights."""
    recipe = quick_recipe(tmp_path, model_dir, "model.dtype=float16")
    with ExitStack() as hidden:
        if device == "cpu":
            hidden.enter_context(patch("torch.cuda.is_available", lambda: False))
        train(recipe, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [r for r in map(json.loads, lines) if "step_time" in r]
    assert [r["em/updates"] for r in steps] == [1, 1, 1]
    assert all(math.isfinite(r["grad_norm"]) and r["em/loss_scale"] >= 1 for r in steps)


# --- memory -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Policy]:
    """A model whose work takes memory worth counting, on a card; on a CPU the fixture model's size."""

    def get(device: str, vocab: int) -> Policy:
        sizes = {"hidden": 512, "layers": 6, "vocab": vocab} if device == "cuda" else {}
        return load(build_model(tmp_path_factory.mktemp("larger"), **sizes), device)

    return get


@contextmanager
def peak_of(work: Callable[[], Any]) -> Iterator[tuple[int, Any]]:
    """Bytes of the card that torch held at most during ``work``, and its result; 0 on a CPU."""
    if not torch.cuda.is_available():
        yield 0, work()
        return
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    result = work()
    yield torch.cuda.max_memory_reserved(), result


def long_rows(device: str) -> list[Rationale]:
    """Problems of four rows, all kinds of weights; on a card long enough to fill megabytes."""
    length, problems = (160, 16) if device == "cuda" else (6, 4)
    found = []
    for i in range(4 * problems):
        prompt = tuple(1 + (i // 4 + j) % 200 for j in range(length // 2))
        completion = (*(40 + (i + j) % 99 for j in range(length - i % 4)), 256)
        weight = 0.0 if i % 4 == 3 else (i % 5 - 1.5) / 2
        found.append(
            Rationale(f"p{i // 4}", "q", "1", "q", prompt, "", completion, "stop", 1, 0, i % 4, weight=weight)
        )
    return found


def gradient(policy: Policy, rows: list[Rationale], budget: int) -> tuple[torch.Tensor, mstep.FitStats]:
    """The step's gradient, as the movement by plain SGD at rate 1, taken back."""
    values = list(policy.trainable().values())
    before = [p.detach().clone() for p in values]
    settings = mstep.FitSettings(
        learning_rate=1.0, max_grad_norm=math.inf, passes=1, kl_stop=1e9, normalization="tokens",
        max_new_tokens=200, micro_batch_tokens=budget,
    )  # fmt: skip
    stats = mstep.m_step(policy, torch.optim.SGD(values, lr=1.0), rows, settings)
    moved = torch.cat([(b - p.detach()).flatten().cpu() for b, p in zip(before, values, strict=True)])
    with torch.no_grad():
        for p, b in zip(values, before, strict=True):
            p.copy_(b)
    return moved, stats


@everywhere
def test_a_fit_out_of_memory_is_split_and_gives_the_same(
    larger: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, rows = larger(device, vocab=8192), long_rows(device)
    whole = sum(r.tokens for r in rows)
    with peak_of(lambda: gradient(policy, rows, whole)) as (most, (expected, stats)):
        assert stats.micro_batch_tokens == whole
    with peak_of(lambda: gradient(policy, rows, whole // 8)) as (least, _):
        pass
    room: AbstractContextManager[None]
    if device == "cuda":
        assert most > 1.2 * least, "cutting must save memory, or nothing is tested"
        room = gpu_checks.capped((most + least) // 2)
    else:
        monkeypatch.setattr(Policy, "completion_loss", only(5, []))
        room = ExitStack()  # type: ignore[assignment]
    with room:
        found, stats = gradient(policy, rows, whole)
    assert whole // 64 <= stats.micro_batch_tokens < whole and stats.updates == 1
    assert float((found - expected).norm() / expected.norm()) < 1e-4


@everywhere
def test_samples_out_of_memory_are_drawn_in_parts_and_are_the_same(
    larger: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With few tokens to choose from, rounding seldom lies between a sample's number and an edge.
    policy, decoding = larger(device, vocab=259), Decoding(256 if device == "cuda" else 16)
    prompts = prompts_of(policy, 16, 16 if device == "cuda" else 4)

    def drawn(rows: int | None) -> tuple[Any, NativeSampler]:
        sampler = make_sampler(policy, "native", rows)
        found = gpu_checks.ids_of(sampler.sample(prompts, decoding))
        assert isinstance(sampler, NativeSampler)
        return found, sampler

    with peak_of(lambda: drawn(None)) as (most, (expected, sampler)):
        sampler.release()  # what its graphs keep must not count in the next peak
    with peak_of(lambda: drawn(16)) as (least, (_, sampler)):
        sampler.release()
    room: AbstractContextManager[None]
    if device == "cuda":
        assert most > 1.2 * least, "fewer rows must save memory, or nothing is tested"
        room = gpu_checks.capped((most + least) // 2)
    else:
        monkeypatch.setattr(Decoder, "__init__", rows_at_once(16))
        room = ExitStack()  # type: ignore[assignment]
    with room:
        found, sampler = drawn(None)
        again = gpu_checks.ids_of(sampler.sample(prompts, decoding))
    nearly(policy, prompts, found, expected, decoding)
    nearly(policy, prompts, again, expected, decoding)
    assert 8 <= (sampler.batch_rows or 0) < sum(len(p.keys) for p in prompts)
    assert sampler.graph_failure is None


@pytest.mark.gpu
@needs_gpu
def test_a_cap_is_a_cap() -> None:
    """Else the two tests above prove nothing; and it is taken off again."""
    gc.collect()
    torch.cuda.empty_cache()  # what it frees would be room under the cap
    with gpu_checks.capped(torch.cuda.memory_reserved() + (64 << 20)), pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
