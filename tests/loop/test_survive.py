"""Not a number, no signal, a grader that fails: what a run does, and what it leaves."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_recipe import quick_recipe, write_recipe
from run_files import events
from safetensors.torch import load_file

from empg_lite.core.errors import GraderUnusable, NumericalStop, explained
from empg_lite.loop import mstep
from empg_lite.loop.train import TrainOptions, train
from empg_lite.policy.policy import Policy
from empg_lite.recipe.reward import pin_reward
from empg_lite.run.checkpoint import list_checkpoints
from empg_lite.run.journal import read_metrics
from empg_lite.run.store import verify_dir

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


def overflow_above(most: float) -> Callable[..., Any]:
    """``_backward`` where 16-bit gradients overflow if the loss is scaled by more than ``most``."""
    real = mstep._Fitter._backward

    def backward(self: Any, weights: Any) -> Any:
        found = real(self, weights)
        if self.scaler is not None and self.scaler.get_scale() > most:
            next(p for p in self.policy.trainable().values() if p.grad is not None).grad[0, 0] = math.inf
        return found

    return backward


def with_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give runs the loss scaler of float16, in float32: powers of two change no digit."""
    from empg_lite.loop import begin as session

    real = session.build_learner

    def build(*given: Any, **options: Any) -> Any:
        learner = real(*given, **options)
        learner.scaler = torch.amp.GradScaler("cpu")
        return learner

    monkeypatch.setattr(session, "build_learner", build)


def test_a_loss_scale_that_is_too_large_is_halved_on_the_same_samples(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten times in a row from 65,536: the run goes on, draws what it would have drawn, and says how often."""
    straight, run, stopped = tmp_path / "straight", tmp_path / "run", tmp_path / "stopped"
    recipe = quick_recipe(tmp_path, model_dir, "run.steps=4")
    train(recipe, straight)
    with_scaler(monkeypatch)
    monkeypatch.setattr(mstep._Fitter, "_backward", overflow_above(64.0))
    train(recipe, run)
    records = read_metrics(run / "metrics.jsonl")
    assert [r["em/loss_scale_halvings"] for r in records] == [10, 0, 0, 0]
    assert [r["em/loss_scale"] for r in records] == [64.0] * 4
    assert [r["em/updates"] for r in records] == [1] * 4
    assert not any(r["em/skipped_nonfinite"] for r in records)
    halved = [(e["step"], e["times"], e["scale"]) for e in events(run) if e["event"] == "loss_scale_halved"]
    assert halved == [(1, 10, 64.0)]
    rollouts = [
        [(r / "rollouts" / f"step-{step:06d}.jsonl").read_bytes() for step in range(1, 5)]
        for r in (run, straight)
    ]
    assert rollouts[0] == rollouts[1]
    assert files_of(list_checkpoints(run)[-1]) == files_of(list_checkpoints(straight)[-1])

    # one that overflows at every scale is the gradient's fault: three steps in a row end the run
    monkeypatch.undo()
    with_scaler(monkeypatch)
    monkeypatch.setattr(mstep._Fitter, "_backward", overflow_above(0.0))
    with pytest.raises(NumericalStop, match="3 in a row"):
        train(recipe, stopped, TrainOptions(force=True))


def test_a_run_in_float16(tmp_path: Path, model_dir: Path) -> None:
    """The real type, with its real scaler, as on a T4: three steps that all move something."""
    recipe, run = quick_recipe(tmp_path, model_dir, "model.dtype=float16"), tmp_path / "run"
    train(recipe, run)
    records = read_metrics(run / "metrics.jsonl")
    assert [r["em/updates"] for r in records] == [1, 1, 1] and all(r["em/loss_scale"] >= 1 for r in records)
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
        ("regex:never-said", "posterior", 77, 0, "rationales earned a reward"),
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
    from empg_lite.loop import begin as module
    from empg_lite.sampler.schedule import Schedule

    ended = Schedule._completion
    monkeypatch.setattr(Schedule, "_completion", lambda self, row, reason: ended(self, row, "stop"))
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


@pytest.mark.parametrize(("broken", "code"), [(10, 69), (7, 69), (3, 0)])
def test_a_grader_that_fails_stops_the_run_after_two_steps(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, broken: int, code: int
) -> None:
    """No verdict on ``broken`` tenths of the answers: noise above a half, a warning below.

    The two workers count in one file: which of them is asked more depends on the machine.
    """
    from empg_lite.loop import preflight as module

    mine, spec = tmp_path / "mine.py", f"python:{tmp_path / 'mine.py'}"
    mine.write_text(
        f"asked = open({str(tmp_path / 'asked')!r}, 'ab', 0)\n"
        "def reward(completion, gold, question, meta):\n    asked.write(b'.')\n    n = asked.tell()\n"
        f"    if n % 10 < {broken}:\n        raise ValueError('a bad day')\n    return n % 2\n",
        "utf-8",
    )
    settings = ("run.steps=3", "run.eval_every=0", "run.save_every=1", f"data.reward={spec}")
    recipe, user_code = pin_reward(quick_recipe(tmp_path, model_dir, *settings), True)
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
        assert "of the answers in two steps" in str(error) and "a bad day" in str(error)
    assert found == code and len(read_metrics(run / "metrics.jsonl")) == (2 if code else 3)
    assert any("grader failed" in e["what"] for e in events(run) if e["event"] == "health")
    assert list_checkpoints(run) and verify_dir(list_checkpoints(run)[-1]) is None


def test_all_cut_off_is_said_within_two_steps(tmp_path: Path, model_dir: Path, cli: Any) -> None:
    recipe = write_recipe(tmp_path, model_dir)
    recipe.with_name("capitals.yaml").write_text('text: "{question}"\nstop: []\n', "utf-8")
    two_steps = ("--force", "--set", "run.steps=2")
    code, out, _ = cli("train", "--recipe", recipe, "--output-dir", tmp_path / "run", *two_steps)
    assert code == 0
    assert re.search(r"(9\d|100)% of the rationales were cut off at 12 tokens and earn 0", out)
    assert "raise sampler.max_new_tokens, to 24" in out
    assert sum(r.get("em/updates", 0) for r in read_metrics(tmp_path / "run" / "metrics.jsonl")) == 0
