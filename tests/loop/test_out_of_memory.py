"""Memory that runs out, in the M-step and in the E-step: fewer rows at once, nothing else."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import sys
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import SETTINGS, sgd
from fixture_model import load_fixture_policy
from fixture_recipe import quick_recipe
from little_memory import only, rows_at_once
from rationales import rationale
from run_files import events
from safetensors.torch import load_file
from sampling import ids_of, prompts_of, same_but_for_rounding

from empg_lite.core.errors import OutOfMemory, explained, is_out_of_memory
from empg_lite.loop import mstep
from empg_lite.loop.train import TrainOptions, train
from empg_lite.policy.policy import Policy
from empg_lite.run.checkpoint import list_checkpoints, stored_state
from empg_lite.sampler import Decoding, make_sampler
from empg_lite.sampler.decoder import Decoder

# --- what running out of memory looks like -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_mean_that_memory_ran_out(error: BaseException, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one
    assert (explained(error).exit_code == 71) is is_one


def test_torch_s_own_words_on_a_cpu() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert is_out_of_memory(raised.value)


# --- out of memory in the M-step ---------------------------------------------------------------------------


Sizes = list[int]


def many() -> list[Any]:
    """24 rows of 9 or 10 tokens and all kinds of weights, every fourth zero; each prompt is its own."""
    found = []
    for i in range(24):
        prompt = (1 + i, 2 + i, 3, 4)
        completion = (*range(40 + i, 44 + i + i % 2), 256)
        weight = 0.0 if i % 4 == 3 else (i % 5 - 1.5) / 2
        found.append(
            rationale(
                problem_id=f"p{i}",
                prompt_ids=prompt,
                completion_ids=completion,
                sample_index=0,
                weight=weight,
            )
        )
    return found


def gradient(model_dir: Path, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, Any]:
    """The step's whole gradient, as the change that plain SGD at rate 1 makes."""
    policy = load_fixture_policy(model_dir)
    policy.model.to(dtype)
    policy.dtype = dtype
    values = list(policy.trainable().values())
    before = torch.cat([p.detach().flatten().clone() for p in values])
    given = dataclasses.replace(
        SETTINGS, micro_batch_tokens=tokens, learning_rate=1.0, max_grad_norm=math.inf
    )
    stats = mstep.m_step(policy, sgd(policy), many(), given)
    return before - torch.cat([p.detach().flatten() for p in values]), stats


BARS = {torch.float64: 1e-12, torch.float32: 1e-6}
ALL = 10_000


@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_the_gradient_does_not_know_the_micro_batch(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Budgets for 1, 2, 4 and all rows; room for 8, 4, 2, 1; memory that runs out in the middle."""
    found: dict[str, torch.Tensor] = {}

    def take(name: str, tokens: int, most: int, at: int = 0) -> Sizes:
        sizes: Sizes = []
        with monkeypatch.context() as patch:
            patch.setattr(Policy, "completion_loss", only(most, sizes, at))
            found[name], stats = gradient(model_dir, tokens, dtype)
        assert stats.updates == 1
        return sizes

    assert take("all", ALL, 99) == [18]
    for n, tokens in ((1, 10), (2, 20), (4, 40)):
        assert set(take(f"{n} rows", tokens, 99)) <= {n, 18 % n} and len(found) > 1
    for most in (8, 4, 2, 1):
        sizes = take(f"room for {most}", ALL, most)
        assert sizes[0] == -18 and max(sizes) <= most and sum(s < 0 for s in sizes) >= 2
    for n, at in ((2, 5), (4, 3), (8, 2)):  # part of the gradient is there already
        sizes = take(f"{n} rows, then half", 10 * n, 99, at)
        assert [s < 0 for s in sizes].index(True) == at - 1 and sum(s for s in sizes[at:]) == 18
    whole = found.pop("all")
    errors = {name: float((g - whole).norm() / whole.norm()) for name, g in found.items()}
    print(f"\nM1: {dtype}: largest relative error {max(errors.values()):.1e} over {len(errors)} layouts")
    assert max(errors.values()) <= BARS[dtype], errors


def test_control_a_mean_of_means_and_gradients_that_are_kept(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = gradient(model_dir, ALL, torch.float64)

    def error(given: torch.Tensor) -> float:
        return float((given - whole).norm() / whole.norm())

    real = Policy.completion_loss
    with monkeypatch.context() as patch:  # each micro-batch's own mean
        patch.setattr(
            Policy, "completion_loss", lambda self, pairs, *rest: real(self, pairs, *rest) * 4 / len(pairs)
        )
        assert error(gradient(model_dir, 40, torch.float64)[0]) > 0.05
    with monkeypatch.context() as patch:  # what was summed before memory ran out, counted twice
        patch.setattr(torch.optim.Optimizer, "zero_grad", lambda self, **_: None)
        patch.setattr(Policy, "completion_loss", only(99, [], at=3))
        assert error(gradient(model_dir, 40, torch.float64)[0]) > 0.05


def test_a_smaller_size_is_recorded_and_used_again(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = tmp_path / "run", quick_recipe(tmp_path, model_dir)
    monkeypatch.setattr(Policy, "completion_loss", only(1, []))
    train(recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": 1})}), run)
    monkeypatch.undo()
    shrunk = [e for e in events(run) if e["event"] == "micro_batch_shrunk"]
    assert len(shrunk) >= 1 and shrunk[-1]["new"] < shrunk[0]["old"]
    budgets: list[int] = []
    real = mstep.m_step
    monkeypatch.setattr(
        "empg_lite.loop.learner.m_step",
        lambda *a, **k: budgets.append(a[3].micro_batch_tokens) or real(*a, **k),
    )
    train(recipe, run, TrainOptions(resume=True))
    assert set(budgets) == {shrunk[-1]["new"]}, "no step of the resumed run tried the larger size"
    assert stored_state(list_checkpoints(run)[-1]).micro_batch_tokens == shrunk[-1]["new"]


def test_where_one_row_does_not_fit_the_run_ends_with_a_checkpoint(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    """In the second step: the first is saved, though ``save_every`` would not have, and it resumes."""
    quick_recipe(tmp_path, model_dir)
    run, straight, path = tmp_path / "run", tmp_path / "straight", tmp_path / "fixture.yaml"
    settings = ["--set", "run.eval_every=0", "--set", "run.save_every=100", "--set", "run.keep=5"]
    command = ["train", "--recipe", path, *settings, "--output-dir"]
    assert cli(*command, straight)[0] == 0
    real, steps = Policy.completion_loss, 0

    def loss(self: Policy, pairs: Any, *rest: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 2:  # of the preflight's and the first step's fits, one each
            raise torch.OutOfMemoryError("pretended")
        return real(self, pairs, *rest)

    monkeypatch.setattr(Policy, "completion_loss", loss)
    code, _, err = cli(*command, run)
    monkeypatch.undo()
    last = err.strip().splitlines()[-1]
    assert code == 71
    for words in ("one rationale at a time", "tokens", "max_new_tokens", "step-000001 is saved"):
        assert words in last
    assert [p.name for p in list_checkpoints(run)] == ["step-000001"]
    assert cli(*command, run, "--resume")[0] == 0
    newest = [list_checkpoints(r)[-1] / "adapter_model.safetensors" for r in (run, straight)]
    one, other = (load_file(p) for p in newest)
    assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in other)


def test_what_did_not_fit_is_free_before_the_retry(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is held holds its frames, and they the activations: the retry would run out again."""
    policy = load_fixture_policy(model_dir)
    real, tried, alive = Policy.completion_loss, list[Any](), list[bool]()

    def loss(self: Policy, pairs: Any, *rest: Any) -> Any:
        alive.append(any(reference() is not None for reference in tried))
        activations = real(self, pairs, *rest)  # and all that its graph keeps
        if len(tried) < 2:
            tried.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("pretended")
        return activations

    monkeypatch.setattr(Policy, "completion_loss", loss)
    gc.disable()  # reference counts alone must free it: nobody waits for a collection
    try:
        stats = mstep.m_step(policy, sgd(policy), many(), SETTINGS)
    finally:
        gc.enable()
    assert len(tried) == 2 and not any(alive)
    assert stats.micro_batch_tokens == SETTINGS.micro_batch_tokens // 4  # halved once for each refusal


@pytest.mark.parametrize("engine", ["native", "generate"])
def test_a_decoder_that_did_not_fit_is_free_before_fewer_rows_are_tried(
    policy,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
) -> None:
    """And before the card's cache is emptied, which cannot give back what is still alive."""
    from empg_lite.sampler.base import Sampler

    tried: list[Any] = []
    emptied: list[bool] = []
    shrink = Sampler._shrink

    def watched(self: Sampler, *rest: Any) -> None:
        emptied.append(any(reference() is not None for reference in tried))
        shrink(self, *rest)

    def draw(self: Sampler, *_: Any) -> None:
        if len(tried) < 2:
            held = torch.zeros(8)
            tried.append(weakref.ref(held))
            raise torch.OutOfMemoryError("pretended")
        return real(self, *_)

    sampler = make_sampler(policy, engine, 64)
    real = type(sampler).draw
    monkeypatch.setattr(type(sampler), "draw", draw)
    monkeypatch.setattr(Sampler, "_shrink", watched)
    gc.disable()
    try:
        sampler.sample(prompts_of(policy, 8, 8), Decoding(4))
    finally:
        gc.enable()
    assert emptied == [False, False] and sampler.batch_rows == 16


@pytest.mark.slow
def test_with_a_real_shape_the_retry_begins_with_the_memory_that_was_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2.5-0.5B in NF4 with random weights, by the log of torch's CPU allocator."""
    from torch.profiler import ProfilerActivity, profile

    from empg_lite.policy import load_policy
    from empg_lite.recipe.schema import ModelSection

    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from shapes import SHAPES, write_model

    folder = write_model(tmp_path / "model", SHAPES["0.5B"], dtype=torch.bfloat16)
    section = ModelSection(name=str(folder), backend="transformers", dtype="bfloat16", load_in_4bit=True)
    policy = load_policy(section, "plain", seed=0, gradient_checkpointing=False)
    rows = [
        rationale(prompt_ids=(1, 2, 3), completion_ids=(*range(i, i + 40), 256), sample_index=i, weight=1.0)
        for i in range(4)
    ]
    given = dataclasses.replace(SETTINGS, micro_batch_tokens=256)
    real, moments = Policy.completion_loss, list[int]()

    def loss(self: Policy, pairs: Any, *rest: Any) -> Any:
        moments.append(time.time_ns())
        found = real(self, pairs, *rest)
        if len(moments) == 1:
            raise torch.OutOfMemoryError("pretended")
        return found

    monkeypatch.setattr(Policy, "completion_loss", loss)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        stats = mstep.m_step(policy, sgd(policy), rows, given)
    events = [e for e in log.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    first, second = (sum(e.nbytes() for e in events if e.start_ns() < at) for at in moments[:2])
    peak, now = 0, 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes() if e.start_ns() < moments[1] else 0
        peak = max(peak, now)
    print(f"\nalive before the first try {first:,} B, before the retry {second:,} B; the try took {peak:,} B")
    assert peak > 50_000_000, "the try was large enough to be seen"
    assert abs(second - first) < 100_000
    assert stats.micro_batch_tokens == 128


# --- out of memory in the E-step ---------------------------------------------------------------------------


@pytest.mark.parametrize("most", [32, 16, 8])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_fewer_rows_at_once_draw_the_same_samples(policy, monkeypatch, most: int, temperature: float) -> None:  # type: ignore[no-untyped-def]
    prompts, decoding = prompts_of(policy, 6, 16), Decoding(20, temperature)
    expected = make_sampler(policy, "native").sample(prompts, decoding)
    monkeypatch.setattr(Decoder, "__init__", rows_at_once(most))
    sampler = make_sampler(policy, "native")
    told: Counter[tuple[int, int]] = Counter()
    found = sampler.sample(prompts, decoding, lambda i, k, _: told.update([(i, k)]))
    same_but_for_rounding(policy, prompts, found, expected, decoding)
    assert set(told.values()) == {1} and len(told) == 96
    assert 8 <= sampler.batch_rows <= most
    monkeypatch.setattr(Decoder, "__init__", rows_at_once(sampler.batch_rows))
    assert ids_of(sampler.sample(prompts, decoding)) == ids_of(found), "and is remembered"


@pytest.mark.parametrize("engine", ["native", "generate"])
def test_memory_that_runs_out_halfway_through_costs_no_sample(policy, monkeypatch, engine: str) -> None:  # type: ignore[no-untyped-def]
    prompts, decoding = prompts_of(policy, 6, 8), Decoding(12)
    expected = make_sampler(policy, engine, 16).sample(prompts, decoding)
    sampler, calls = make_sampler(policy, engine, 16), 0
    target, name = (Decoder, "step") if engine == "native" else (type(sampler), "_generate")
    real = getattr(target, name)

    def failing(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (20 if engine == "native" else 2):
            raise torch.OutOfMemoryError("pretended")
        return real(self, *args)

    monkeypatch.setattr(target, name, failing)
    told: Counter[tuple[int, int]] = Counter()
    found = sampler.sample(prompts, decoding, lambda i, k, _: told.update([(i, k)]))
    assert ids_of(found) == ids_of(expected)
    assert set(told.values()) == {1} and len(told) == 48 and sampler.batch_rows == 8


def test_rows_shrunk_are_recorded_and_used_again(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = tmp_path / "run", quick_recipe(tmp_path, model_dir, "sampler.batch_rows=24")
    straight = tmp_path / "straight"
    train(recipe, straight)
    monkeypatch.setattr(Decoder, "__init__", rows_at_once(12))
    train(recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": 2})}), run)
    asked: list[int] = []
    real = Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", lambda *a: asked.append(a[5]) or real(*a))
    train(recipe, run, TrainOptions(resume=True))
    shrunk = [e for e in events(run) if e["event"] == "sampler_rows_shrunk"]
    assert [(e["old"], e["new"]) for e in shrunk] == [(24, 12)]
    assert max(asked) <= 12, "no larger size was tried again"
    for step in (1, 2, 3):
        texts = [
            [json.loads(line)["completion_ids"] for line in path.read_text("utf-8").splitlines()[1:]]
            for path in (r / "rollouts" / f"step-{step:06d}.jsonl" for r in (run, straight))
        ]
        assert texts[0] == texts[1]


def test_where_the_fewest_rows_do_not_fit_the_run_ends_with_a_checkpoint(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick_recipe(tmp_path, model_dir, "run.save_every=100")
    real, fits = Decoder.__init__, 0

    def init(self: Decoder, *args: Any) -> None:
        nonlocal fits
        fits += 1
        if fits > 2:  # preflight, step 1
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"
            )
        real(self, *args)

    monkeypatch.setattr(Decoder, "__init__", init)
    with pytest.raises(OutOfMemory, match="8 rows of .* tokens.*step-000001 is saved.*max_new_tokens"):
        train(recipe, tmp_path / "run")
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-000001"]
