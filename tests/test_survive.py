"""Out of memory, not a number, no signal, told to stop: what a run does, and what it leaves."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import mmap
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import linear_regression
from typing import Any

import pytest
import torch
from conftest import load_fixture_policy, write_recipe
from crash_harness import PHASES, Ended, Plant, digest, side_by_side
from test_sampler import ids_of, prompts_of, same_but_for_rounding
from test_steps import SETTINGS, rationale, sgd

from empg_lite import mstep
from empg_lite.checkpoint import list_checkpoints, stored_state
from empg_lite.errors import GraderUnusable, NumericalStop, OutOfMemory, explained, is_out_of_memory
from empg_lite.metrics import read_metrics
from empg_lite.policy.policy import Policy
from empg_lite.recipe_file import load_recipe
from empg_lite.rewards import Grader
from empg_lite.sampler import Decoding, make_sampler
from empg_lite.sampler.decoder import Decoder
from empg_lite.scoring import with_code
from empg_lite.store import verify_dir
from empg_lite.train import TrainOptions, train
from empg_lite.view import View

slow = pytest.mark.slow


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


def only(most: int, sizes: Sizes, at: int = 0) -> Callable[..., Any]:
    """``completion_loss`` of a machine that has room for so many rows, and once runs out at call ``at``."""
    real = Policy.completion_loss

    def loss(self: Policy, pairs: Any, reduce: Any) -> Any:
        sizes.append(len(pairs))
        if len(pairs) > most or len(sizes) == at:
            sizes[-1] *= -1  # refused
            raise torch.OutOfMemoryError("pretended")
        return real(self, pairs, reduce)

    return loss


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
            Policy, "completion_loss", lambda self, pairs, loss: real(self, pairs, loss) * 4 / len(pairs)
        )
        assert error(gradient(model_dir, 40, torch.float64)[0]) > 0.05
    with monkeypatch.context() as patch:  # what was summed before memory ran out, counted twice
        patch.setattr(torch.optim.Optimizer, "zero_grad", lambda self, **_: None)
        patch.setattr(Policy, "completion_loss", only(99, [], at=3))
        assert error(gradient(model_dir, 40, torch.float64)[0]) > 0.05


def quick_recipe(tmp_path: Path, model_dir: Path, *settings: str) -> Any:
    path = write_recipe(tmp_path, model_dir)
    return load_recipe(str(path), ["run.eval_every=0", "sampler.max_new_tokens=8", *settings])


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines()]


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
        "empg_lite.learner.m_step", lambda *a, **k: budgets.append(a[3].micro_batch_tokens) or real(*a, **k)
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

    def loss(self: Policy, pairs: Any, reduce: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 2:  # of the preflight's and the first step's fits, one each
            raise torch.OutOfMemoryError("pretended")
        return real(self, pairs, reduce)

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


def load_file(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


# --- out of memory in the E-step ---------------------------------------------------------------------------


def rows_at_once(most: int) -> Callable[..., None]:
    """A decoder's ``__init__`` on a machine with room for so many rows."""
    real = Decoder.__init__

    def init(self: Decoder, *args: Any) -> None:
        if args[4] > most:
            raise torch.OutOfMemoryError("pretended")
        real(self, *args)

    return init


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


# --- not a number ------------------------------------------------------------------------------------------


def poison(steps: set[int], value: float, where: str) -> Callable[[], None]:
    """In a child: the loss or one gradient of these M-steps becomes ``value``."""

    def change() -> None:
        real, count = mstep._Fitter._backward, 0

        def backward(self: Any, weights: Any) -> Any:
            nonlocal count
            loss, computed, padded = real(self, weights)
            if type(self.optimizer).__name__ == "SGD":  # the preflight's
                return loss, computed, padded
            count += 1
            if count in steps:
                if where == "loss":
                    loss = value
                else:
                    next(p for p in self.policy.trainable().values() if p.grad is not None).grad[0, 0] = value
            return loss, computed, padded

        mstep._Fitter._backward = backward  # type: ignore[method-assign]

    return change


def no_nan_on_disk(run: Path) -> None:
    for path in run.rglob("*"):
        if path.suffix in (".json", ".jsonl"):
            text = path.read_text("utf-8")
            assert "NaN" not in text and "Infinity" not in text, path
        if path.suffix == ".safetensors":
            for name, tensor in load_file(path).items():
                assert torch.isfinite(tensor.double()).all(), (path, name)


def files_of(checkpoint: Path) -> list[bytes]:
    return [(checkpoint / n).read_bytes() for n in ("adapter_model.safetensors", "optimizer.safetensors")]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_no_number_moves_nothing(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, value: float, where: str
) -> None:
    monkeypatch.setattr(mstep._Fitter, "_backward", mstep._Fitter._backward)  # put back afterwards
    recipe = quick_recipe(tmp_path, model_dir, "run.steps=4", "run.keep=9")
    run = tmp_path / "run"
    poison({2, 3}, value, where)()
    train(recipe, run)
    one, two, three, four = (files_of(p) for p in list_checkpoints(run))
    assert one == two == three != four
    records = read_metrics(run / "metrics.jsonl")
    assert [r["em/skipped_nonfinite"] for r in records] == [0, 1, 1, 0]
    assert [r["em/updates"] for r in records] == [1, 0, 0, 1]
    assert [r["loss"] is None for r in records] == [False, True, True, False]
    assert [e["step"] for e in events(run) if e["event"] == "nonfinite_gradient"] == [2, 3]
    no_nan_on_disk(run)


def test_three_in_a_row_end_the_run_as_it_was_before_them(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mstep._Fitter, "_backward", mstep._Fitter._backward)
    recipe = quick_recipe(tmp_path, model_dir, "run.steps=9", "run.keep=9", "run.save_every=1")
    run = tmp_path / "run"
    poison(set(range(3, 99)), math.nan, "gradient")()
    with pytest.raises(NumericalStop, match="3 gradients of 5 steps.*lower optim.learning_rate") as raised:
        train(recipe, run)
    assert raised.value.exit_code == 75
    found = list_checkpoints(run)
    assert files_of(found[-1]) == files_of(found[1]) != files_of(found[0])
    no_nan_on_disk(run)


def test_logits_that_are_no_numbers_end_it_with_what_was_there(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third step's sampling: the first two are saved, though ``save_every`` would not have."""
    recipe, run = quick_recipe(tmp_path, model_dir, "run.save_every=100"), tmp_path / "run"
    real = Policy.head_weight.fget  # type: ignore[attr-defined]

    def weight(self: Policy) -> torch.Tensor:
        steps = len(read_metrics(run / "metrics.jsonl"))
        return real(self) * (math.nan if steps == 2 else 1.0)  # type: ignore[no-any-return]

    monkeypatch.setattr(Policy, "head_weight", property(weight))
    with pytest.raises(NumericalStop, match="logits are not finite.*step-000002 is saved") as raised:
        train(recipe, run)
    monkeypatch.undo()
    assert raised.value.exit_code == 75
    assert [p.name for p in list_checkpoints(run)] == ["step-000002"]
    no_nan_on_disk(run)
    assert train(recipe, run, TrainOptions(resume=True))["steps"] == 3


def test_three_of_twenty_end_it_too(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mstep._Fitter, "_backward", mstep._Fitter._backward)
    recipe = quick_recipe(tmp_path, model_dir, "run.steps=9", "sampler.max_new_tokens=4")
    poison({1, 3, 5}, math.inf, "loss")()
    with pytest.raises(NumericalStop, match=r"3 gradients of \d steps were not finite, 1 in a row"):
        train(recipe, tmp_path / "run")


# --- nothing to learn --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "weighting", "code", "updates", "said"),
    [
        ("regex:never-said", "posterior", 77, 0, "rationales earned anything"),
        ("regex:(?s).*", "posterior", 0, 12, "rationales are right"),
        ("regex:(?s).*", "centered", 77, 0, "rationales are right"),
        ("regex:(?s).*", "loo", 77, 0, "rationales are right"),
    ],
)
def test_rewards_that_say_nothing(
    tmp_path: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    reward: str,
    weighting: str,
    code: int,
    updates: int,
    said: str,
) -> None:
    """Every completion ends here: the fixture's reward is replaced, and truncation switched off with it."""
    from empg_lite import train as module
    from empg_lite.sampler.native import _Batch

    ended = _Batch._completion
    monkeypatch.setattr(_Batch, "_completion", lambda self, row, reason: ended(self, row, "stop"))
    monkeypatch.setattr(module, "refuse_hopeless", lambda *_: None)  # the loop's own stop is asked about
    settings = ("run.steps=12", f"em.weighting={weighting}", f"data.reward={reward}")
    recipe, run = quick_recipe(tmp_path, model_dir, *settings, "sampler.max_new_tokens=3"), tmp_path / "run"
    found = 0
    try:
        train(recipe, run)
    except Exception as error:
        found = explained(error).exit_code
    assert found == code
    records = read_metrics(run / "metrics.jsonl")
    assert sum(r["em/updates"] for r in records) == updates and len(records) == (12 if code == 0 else 10)
    health = [e for e in events(run) if e["event"] == "health" and e["step"] <= 2]
    assert any(said in e["what"] for e in health)
    moved = [load_file(p / "adapter_model.safetensors") for p in list_checkpoints(run)[-1:]][0]
    assert any(bool(t.any()) for n, t in moved.items() if "lora_B" in n) is (updates > 0)


@pytest.mark.parametrize(("broken", "code"), [(10, 69), (6, 69), (4, 0)])
def test_a_grader_that_fails_stops_the_run_after_two_steps(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, broken: int, code: int
) -> None:
    """No verdict on ``broken`` tenths of the answers: noise above a half, a warning below."""
    from empg_lite import preflight as module

    mine, spec = tmp_path / "mine.py", f"python:{tmp_path / 'mine.py'}"
    mine.write_text(
        "n = 0\ndef reward(completion, gold, question, meta):\n    global n\n    n += 1\n"
        f"    if n % 10 < {broken}:\n        raise ValueError('a bad day')\n    return n % 2\n",
        "utf-8",
    )
    settings = ("run.steps=3", "run.eval_every=0", "run.save_every=1", f"data.reward={spec}")
    recipe, user_code = with_code(quick_recipe(tmp_path, model_dir, *settings), True)
    if code:
        with pytest.raises(GraderUnusable, match="the grader failed on .* of the answers · reward"):
            train(recipe, tmp_path / "refused", TrainOptions(code=user_code))
        assert not read_metrics(tmp_path / "refused" / "metrics.jsonl")
        monkeypatch.setattr(module, "FAILURES_STOP", 1.0)  # as if it broke only once the run was under way
    run, found = tmp_path / "run", 0
    try:
        train(recipe, run, TrainOptions(code=user_code))
    except GraderUnusable as error:
        found = error.exit_code
        assert "of the answers of two steps" in str(error) and "a bad day" in str(error)
    assert found == code and len(read_metrics(run / "metrics.jsonl")) == (2 if code else 3)
    assert any("grader failed" in e["what"] for e in events(run) if e["event"] == "health")
    assert list_checkpoints(run) and verify_dir(list_checkpoints(run)[-1]) is None


def test_all_cut_off_is_said_within_two_steps(tmp_path: Path, model_dir: Path, cli: Any) -> None:
    recipe = write_recipe(tmp_path, model_dir)
    recipe.with_name("capitals.yaml").write_text('text: "{question}"\nstop: []\n', "utf-8")
    two_steps = ("--force", "--set", "run.steps=2")
    code, out, _ = cli("train", "--recipe", recipe, "--output-dir", tmp_path / "run", *two_steps)
    assert code == 0
    assert re.search(r"(9\d|100)% of the rationales were cut off at 12 tokens, which earns 0", out)
    assert "raise sampler.max_new_tokens, to 24" in out
    assert sum(r.get("em/updates", 0) for r in read_metrics(tmp_path / "run" / "metrics.jsonl")) == 0


# --- told to stop ------------------------------------------------------------------------------------------


def stopped_at(plant: Plant, seed: int, signum: int, seconds: float) -> list[Any]:
    """[exit code, what was said, phase, seconds until it ended, checkpoints whole, digest when resumed]."""
    rng, run = random.Random(seed), plant.fresh()
    while True:
        pid = plant.start(run)
        time.sleep(rng.uniform(0.05, 1.0) * seconds)
        phase, sent = plant.phase[0], time.perf_counter()
        os.kill(pid, signum)
        ended = plant.wait(pid)
        took = time.perf_counter() - sent
        if ended.code in (0, 128 + signum):
            break
        assert ended.code == -signum, ended  # before its handlers were there
        shutil.rmtree(run, ignore_errors=True)
    whole = all(verify_dir(p) is None for p in list_checkpoints(run))
    resumed = plant.run(run)
    found = digest(run) if resumed.code == 0 else resumed.said
    shutil.rmtree(run)
    return [ended.code, ended.said, PHASES[phase], took, whole, found]


@pytest.mark.parametrize("each", [10, pytest.param(150, marks=slow)])
def test_a_signal_saves_and_the_run_resumes_to_the_same(
    plant: Plant, straight_child: tuple[Ended, str], each: int
) -> None:
    started = time.perf_counter()
    plant.run(plant.fresh())
    seconds = time.perf_counter() - started
    jobs = [
        lambda s=s, n=n: own_phase(plant, s, n, seconds)
        for s in range(each)
        for n in (signal.SIGINT, signal.SIGTERM)
    ]
    found = side_by_side(jobs)
    stopped = [f for f in found if f[0] != 0]
    phases = Counter(f[2] for f in stopped)
    slowest = max(f[3] for f in stopped)
    print(f"\nI1: {len(found)} signals, {len(stopped)} stopped, {dict(phases)}, slowest {slowest:.2f} s")
    assert [f for f in found if not f[4] or f[5] != straight_child[1]] == []
    assert len(stopped) > len(found) / 2  # the others had ended by themselves
    for _, said, *_ in stopped:
        assert "repeat the command with --resume" in said and "\n" not in said
        assert "is saved" in said or "before the first step" in said
    assert len(phases) > 2
    if each > 100:
        assert set(phases) >= set(PHASES) - {"other"}


def own_phase(plant: Plant, seed: int, signum: int, seconds: float) -> list[Any]:
    plant.phase = mmap.mmap(-1, 1)
    return stopped_at(plant, seed, signum, seconds)


def test_a_second_signal_ends_at_once_and_harms_nothing(
    plant: Plant, straight_child: tuple[Ended, str]
) -> None:
    """Both at the same instant, wherever it is: the last checkpoint stays whole, and the run resumes."""
    slowest = 0.0
    for seed in range(10):
        rng, run = random.Random(seed), plant.fresh()
        pid = plant.start(run)
        time.sleep(rng.uniform(0.08, 0.2))
        os.kill(pid, signal.SIGINT)
        time.sleep(rng.uniform(0, 0.003))
        os.kill(pid, signal.SIGINT)
        sent = time.perf_counter()
        assert plant.wait(pid).code in (0, 130, -signal.SIGINT)
        slowest = max(slowest, time.perf_counter() - sent)
        assert all(verify_dir(p) is None for p in list_checkpoints(run))
        assert plant.run(run).code == 0 and digest(run) == straight_child[1]
        shutil.rmtree(run)
    print(f"\nI1: the slowest of ten ended {slowest:.3f} s after the second signal")


def test_control_without_the_stop_points_the_step_is_finished(plant: Plant) -> None:
    """Decoding steps taken after the signal: none or one where the loop asks, else all that were left."""
    from empg_lite import control

    after = mmap.mmap(-1, 1)

    def counting(polls: bool) -> Callable[[], None]:
        def change() -> None:
            real, steps = Decoder.step, 0

            def step(self: Decoder, n: int, seen: int) -> None:
                nonlocal steps
                steps += 1
                after[0] += steps > 4
                if steps == 4:
                    os.kill(os.getpid(), signal.SIGTERM)
                real(self, n, seen)

            Decoder.step = step  # type: ignore[method-assign]
            if not polls:
                control._listened = _Deaf()

        return change

    taken = {}
    for polls in (True, False):
        after[0] = 0
        assert plant.run(plant.fresh(), change=counting(polls)).code == 143
        taken[polls] = after[0]
    assert taken[True] == 0 and taken[False] > 4


class _Deaf(list[int]):
    def append(self, signum: int) -> None:
        pass


# --- over a long time --------------------------------------------------------------------------------------


def held() -> dict[str, int]:
    """Resident bytes, open files, threads and children of this process."""
    status = Path("/proc/self/status").read_text("utf-8")
    found = {n: int(re.search(rf"^{n}:\s+(\d+)", status, re.M)[1]) for n in ("VmRSS", "Threads")}  # type: ignore[index]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text("utf-8").split()
    files = len(os.listdir("/proc/self/fd"))
    return {
        "rss": found["VmRSS"] * 1024,
        "threads": found["Threads"],
        "files": files,
        "children": len(children),
    }


@slow
def test_three_hundred_steps_hold_no_more_than_fifty(plant: Plant, model_dir: Path, tmp_path: Path) -> None:
    """In a child of its own: what other tests left behind must not hide what this one adds."""

    def soak() -> list[Any]:
        recipe = quick_recipe(tmp_path, model_dir, "run.steps=300", "run.save_every=10", "run.keep=3")
        run, seen = tmp_path / "run", []

        class Watch(View):
            def step(self, record: Any, total: int) -> None:
                if record["step"] % 50 == 0:
                    gc.collect()
                    seen.append(held())

        train(recipe, run, TrainOptions(force=True), view=Watch())
        size = sum(f.stat().st_size for f in (run / "checkpoints").rglob("*") if f.is_file())
        one = sum(f.stat().st_size for f in list_checkpoints(run)[-1].iterdir())
        return [seen, size / one]

    ((seen, kept),) = side_by_side([soak])
    steps = [50 * (n + 1) for n in range(len(seen))]
    slope = linear_regression(steps, [s["rss"] for s in seen]).slope * 100 / 2**20  # least squares
    print(
        f"\nR1: {slope:.2f} MB per 100 steps after step 50; {seen[0]} -> {seen[-1]}; {kept:.2f} checkpoints"
    )
    assert len(seen) == 6 and slope < 1.0
    assert len({(s["threads"], s["files"], s["children"]) for s in seen}) == 1
    assert kept == pytest.approx(3, rel=0.1)


@slow
def test_a_hundred_thousand_gradings_hold_no_more(plant: Plant) -> None:
    def soak() -> list[Any]:
        with Grader() as grader:
            seen = []
            for n in range(100_000):
                # One in a hundred asks a worker.
                hard = n % 100 == 0
                gold, said = (
                    ("2*x + 2", f"\\boxed{{2(x+1) + {n % 7} - {n % 7}}}") if hard else ("42", f"#### {n}")
                )
                grader.grade("math" if hard else "gsm8k", gold, said)
                if (n + 1) % 20_000 == 0:
                    gc.collect()
                    seen.append(held())
            return seen

    (seen,) = side_by_side([soak])
    grown = (seen[-1]["rss"] - seen[0]["rss"]) / 2**20
    print(f"\nR1: 100,000 gradings, {grown:.2f} MB more than after 20,000; {seen[-1]}")
    assert grown < 1.0
    assert len({(s["threads"], s["files"], s["children"]) for s in seen}) == 1
