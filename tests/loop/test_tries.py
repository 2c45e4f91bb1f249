"""``sampler.tries`` in the loop: the slots' rationales do not depend on engine, layout, processes or time."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fixture_recipe import quick_recipe
from little_memory import rows_at_once
from rationales import rationale
from run_files import digest, events

from empg_lite.core.errors import DataError, Interrupted
from empg_lite.core.rationale import Rationale, flatten, group_rationales
from empg_lite.core.slots import Slot
from empg_lite.core.view import View
from empg_lite.data.sources import ProblemStream, load_splits
from empg_lite.loop.estep import Drawn, weigh
from empg_lite.loop.learner import Learner, build_learner
from empg_lite.loop.train import TrainOptions, train
from empg_lite.loop.turns import Asking, draw_in_turns, slots_now
from empg_lite.recipe.file import load_recipe
from empg_lite.recipe.schema import Recipe
from empg_lite.rewards import Grader, Verdict
from empg_lite.rewards.scorer import Scorer
from empg_lite.run.checkpoint import checkpoint_path, list_checkpoints, stored_state
from empg_lite.run.journal import read_metrics
from empg_lite.run.parallel import World
from empg_lite.run.rollouts import read_rollouts
from empg_lite.sampler import make_sampler
from empg_lite.sampler.decoder import Decoder

P, K, M = 64, 2, 3


def recipe_of(folder: Path, model_dir: Path, *settings: str) -> Recipe:
    """64 slots over 80 problems: an epoch is over within three steps, at another one for each slot."""
    shape = (f"sampler.problems_per_step={P}", f"sampler.samples_per_problem={K}", f"sampler.tries={M}")
    recipe = quick_recipe(folder, model_dir, *shape, "run.keep=9", *settings)
    asked = [(a, b, "0" * (a * b % 7)) for a in range(10) for b in range(9)]  # of different lengths
    rows = [{"question": f"{zeros}{a} + {b} = ?", "answer": str(a + b)} for a, b, zeros in asked]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return recipe


def rows_of(run: Path) -> list[list[Rationale]]:
    """Of every step after the preflight."""
    paths = sorted((run / "rollouts").glob("step-*.jsonl"))
    return [list(read_rollouts(path)[0].rationales) for path in paths if "000000" not in path.name]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """Three steps without interruption; read only."""
    folder = tmp_path_factory.mktemp("tries")
    train(recipe_of(folder, model_dir), folder / "run")
    return folder


def stream_of(folder: Path) -> ProblemStream:
    """The training problems in their order."""
    recipe = load_recipe(str(folder / "run" / "recipe.yaml"))
    return ProblemStream(load_splits(recipe).train, recipe.run.seed)


# --- the rows ---------------------------------------------------------------------------------------------


def test_slots_ask_until_answered(straight: Path) -> None:
    """Every row by a simulation of the rule that knows nothing of ``core.slots``."""
    at, tries = {i: i for i in range(P)}, dict.fromkeys(range(P), 0)
    steps = rows_of(straight / "run")
    stream = stream_of(straight)
    carried = 0
    for number, rows in enumerate(steps, 1):
        assert sorted(r.sample_index for r in rows) == list(range(P * K))
        for r in sorted(rows, key=lambda r: r.sample_index):
            slot = r.sample_index // K
            carried += r.sample_index % K == 0 and r.tries > 1
            assert (r.position, r.tries) == (at[slot], tries[slot] + 1)
            assert r.problem_id == stream.at(at[slot]).id
            assert r.step == number and r.weight == r.reward in (0.0, 1.0)
            tries[slot] += 1
            if r.reward or tries[slot] == M:
                at[slot], tries[slot] = at[slot] + P, 0
        state = stored_state(checkpoint_path(straight / "run", number))
        assert [(s.position, s.tries) for s in state.slots] == [(at[i], tries[i]) for i in range(P)]
        assert state.position == max(at.values()) + 1
    everything = [r for rows in steps for r in rows]
    assert carried > 40 and max(at.values()) > 3 * P, "slots are carried over, and an epoch ends"
    assert {r.tries for r in everything} == {1, 2, 3}
    assert 0.1 < sum(bool(r.reward) for r in everything) / len(everything) < 0.7
    texts = Counter((r.step, r.problem_id, r.completion_ids) for r in everything)
    assert len(texts) > 0.9 * len(everything), "no two draws of a problem share their numbers"


def test_metrics_of_turns(straight: Path) -> None:
    before: list[Slot] = [Slot(i) for i in range(P)]
    for rows, record in zip(
        rows_of(straight / "run"), read_metrics(straight / "run" / "metrics.jsonl"), strict=True
    ):
        after = stored_state(checkpoint_path(straight / "run", record["step"])).slots
        first = [r.reward for r in rows if r.tries == 1]
        solved = [r.tries for r in rows if r.reward]
        gone = sum((new.position - old.position) // P for old, new in zip(before, after, strict=True))
        assert record["em/right_first"] == pytest.approx(sum(first) / len(first))
        assert (record["em/finished"], record["em/solved"]) == (gone, len(solved))
        assert record["em/given_up"] == gone - len(solved) == sum(not r.reward and r.tries == M for r in rows)
        assert record["em/tries_solved"] == pytest.approx(sum(solved) / len(solved))
        assert record["em/slots_open"] == sum(s.tries > 0 for s in after)
        assert record["reward"] == pytest.approx(len(solved) / (P * K))
        assert record["em/right_first"] != record["reward"], "hard problems are asked more often"
        assert record["em/rows_fitted"] == len(solved)
        ordered = sorted(rows, key=lambda r: r.sample_index)
        # Where epochs meet, a slot may come to the problem that it holds already.
        asked = [
            len(r.prompt_ids)
            for before_it, r in zip([None, *ordered], ordered, strict=False)
            if r.sample_index % K == 0 or (before_it and before_it.prompt_ids != r.prompt_ids)
        ]
        assert record["time/prompt_tokens"] == sum(asked), "a prompt runs once"
        assert P < len(asked) < P * K
        before = list(after)


# --- one step, drawn in other ways ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learner(straight: Path) -> Learner:
    """The learner of the straight run before its first step."""
    return build_learner(load_recipe(str(straight / "run" / "recipe.yaml")))


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as grader:
        yield grader


def drawn(
    learner: Learner,
    folder: Path,
    grader: Grader,
    engine: str = "native",
    batch_rows: int | None = None,
    step: int = 1,
) -> Drawn:
    """One step; from the second on, with the slots that the straight run had."""
    stream = stream_of(folder)
    slots = (
        stored_state(checkpoint_path(folder / "run", step - 1)).slots
        if step > 1
        else slots_now(learner, stream)
    )
    sampler = make_sampler(learner.policy, engine, batch_rows or P, False)
    return draw_in_turns(learner, sampler, grader, stream, slots, step=step, on_done=lambda n: None)


def bare(rows: Sequence[Rationale]) -> list[tuple[Any, ...]]:
    """What a step's rows are compared by."""
    return sorted(
        (r.sample_index, r.problem_id, r.position, r.tries, r.completion_ids, r.reward, r.reason)
        for r in rows
    )


@pytest.mark.parametrize(("engine", "batch_rows"), [("native", 8), ("native", 24), ("generate", 24)])
def test_the_first_step_however_it_is_drawn(
    straight: Path, learner: Learner, grader: Grader, engine: str, batch_rows: int
) -> None:
    found = drawn(learner, straight, grader, engine, batch_rows)
    assert bare(flatten(found.groups)) == bare(rows_of(straight / "run")[0])
    assert found.nats > 0


def test_late_verdicts_change_nothing(
    straight: Path, learner: Learner, grader: Grader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where rows wait for verdicts while others go on."""
    chance = random.Random(0)
    asked, left = Counter[bool](), defaultdict[tuple[int, int], int](lambda: chance.randint(0, 12))

    def ready(self: Asking, slot: int) -> bool:
        key = slot, len(self.rows[slot])
        left[key] -= 1
        asked[left[key] < 0] += 1
        return left[key] < 0

    monkeypatch.setattr(Asking, "ready", ready)
    found = drawn(learner, straight, grader)
    assert bare(flatten(found.groups)) == bare(rows_of(straight / "run")[0])
    assert asked[False] > 200


def test_two_processes_share_the_slots(
    straight: Path, learner: Learner, grader: Grader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both shares drawn here, one after the other (``test_parallel.py`` launches two processes)."""
    shares: list[list[int]] = []

    class Both(World):
        def share(self, items: Any, work: Any) -> Any:
            parts = []
            for rank in range(2):
                shares.append(list(World(rank, 2).mine(items)))
                parts.append(work(shares[-1]))
            return [parts[i % 2][i // 2] for i in range(len(items))]

    monkeypatch.setattr(learner, "world", Both())
    found = drawn(learner, straight, grader)
    assert bare(flatten(found.groups)) == bare(rows_of(straight / "run")[0])
    assert shares == [list(range(0, P, 2)), list(range(1, P, 2))]


def test_a_failed_grade_neither_frees_a_slot_nor_counts(
    straight: Path, learner: Learner, grader: Grader, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Grader.submit

    def submit(self: Grader, reward: str, case: Any) -> Future[Verdict]:
        if len(case.prediction) % 3:
            return real(self, reward, case)
        failed: Future[Verdict] = Future()
        failed.set_result(Verdict(0.0, "timeout", None, None, "", 0.0, error="too slow"))
        return failed

    monkeypatch.setattr(Grader, "submit", submit)
    found = drawn(learner, straight, grader)
    assert found.grader_error == "too slow"
    groups = weigh(found.groups, weighting="posterior")
    again = 0
    by_slot = defaultdict[int, list[Rationale]](list)
    for r in sorted(flatten(groups), key=lambda r: r.sample_index):
        by_slot[r.sample_index // K].append(r)
    for first, second in by_slot.values():
        if first.failed:
            assert (second.position, second.tries) == (first.position, 1) and first.weight == 0
            assert second.completion_ids != first.completion_ids or len(first.completion_ids) == 1
            again += 1
        else:
            expected = (first.position + P, 1) if first.reward else (first.position, 2)
            assert (second.position, second.tries) == expected
    assert again > 3
    rule = learner.recipe.tries
    assert rule is not None
    slots, ended = rule.after_step([Slot(i) for i in range(P)], flatten(groups))
    graded = [r for r in flatten(groups) if not r.failed]
    assert sum(s.tries for s in slots) + sum(e.tries for e in ended) == len(graded) < P * K


# --- weights, slots -----------------------------------------------------------------------------------------


def test_rows_drawn_in_turns_weigh_their_reward() -> None:
    """Not their share of the problem's reward, which is what rows of fixed groups weigh."""
    rows = [
        rationale(sample_index=k, reward=r, reason=why, position=5, tries=k + 1)
        for k, (r, why) in enumerate([(0.0, "different"), (0.25, "equal"), (0.0, "timeout"), (1.0, "equal")])
    ]
    (group,) = weigh(group_rationales(rows), weighting="posterior")
    assert [r.weight for r in group.rationales] == [0.0, 0.25, 0.0, 1.0]
    stale = weigh(group_rationales(rows), weighting="posterior", current_step=9, max_age=3)
    assert [r.weight for r in flatten(stale)] == [0.0] * 4
    fixed = [replace(r, position=None, tries=0) for r in rows]
    assert [r.weight for r in flatten(weigh(group_rationales(fixed), weighting="posterior"))] == [
        0.0,
        pytest.approx(0.6),
        0.0,
        pytest.approx(2.4),
    ]


def test_slots_before_a_step(straight: Path, learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(straight)
    held = tuple(Slot(i + 7, tries=1) for i in range(P))
    monkeypatch.setattr(learner.state, "slots", held)
    assert slots_now(learner, stream) == held
    monkeypatch.setattr(learner.state, "slots", held[1:])  # of another number of slots
    monkeypatch.setattr(learner.state, "position", 300)
    assert slots_now(learner, stream) == tuple(Slot(300 + i) for i in range(P))
    with pytest.raises(DataError, match=f"{P} problems per step, but only 9 training rows"):
        slots_now(learner, ProblemStream(stream.take(0, 9), 0))


def test_the_prompts_are_those_of_all_problems_within_reach(straight: Path, learner: Learner) -> None:
    """If every draw is right, a slot comes to K problems in a step; the cache must have room for each."""
    stream, tokens = stream_of(straight), learner.policy.encode_prompt
    ids = [tokens(stream.at(at).question)[1] for at in range(3 * P)]
    later = 0
    with Grader() as grader:
        for i in range(P):
            asking = Asking(learner, stream, Scorer(grader, "regex:a"), [i], [Slot(i)], 1)
            assert asking.prompts == [ids[i], ids[i + P]]
            later += len(ids[i + P]) > len(ids[i])
    assert later > 10


# --- whole runs ------------------------------------------------------------------------------------------


def assert_same(run: Path, straight: Path) -> None:
    """Rationales, adapter, optimizer and slots to the last digit."""
    assert rows_of(run) == rows_of(straight / "run")
    assert digest(run)[:2] == digest(straight / "run")[:2]
    last = [stored_state(list_checkpoints(folder)[-1]) for folder in (run, straight / "run")]
    assert last[0].slots == last[1].slots and last[0].position == last[1].position


class DiesIn(View):
    """Raises in a step after so many rationales: a kill, or whatever else ends a step."""

    def __init__(self, step: int, after: int, error: BaseException) -> None:
        self.left, self.after, self.error = step, after, error

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        self.left -= name == "sampling"
        seen = 0

        def on_done(n: int) -> None:
            nonlocal seen
            seen += n
            if self.left == 0 and name == "sampling" and seen >= self.after:
                raise self.error

        yield on_done


class Killed(BaseException):
    """No one catches it."""


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 70, P * K])
def test_killed_in_every_step_and_resumed_equals_straight(
    straight: Path, tmp_path: Path, model_dir: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of each step, and of each fit: then the rollouts, and so the verdicts, are known."""
    recipe, run = recipe_of(tmp_path, model_dir), tmp_path / "run"

    def dies(*_: Any, **__: Any) -> None:
        raise Killed

    for _ in range(3):
        with pytest.raises(Killed):
            train(recipe, run, TrainOptions(resume=True), DiesIn(1, after, Killed()))
        with pytest.raises(Killed), monkeypatch.context() as patch:
            patch.setattr(Learner, "fit", dies)
            train(recipe, run, TrainOptions(resume=True))
        with pytest.raises(Killed):
            train(recipe, run, TrainOptions(resume=True), DiesIn(2, after, Killed()))
            raise Killed  # after the last step
    train(recipe, run, TrainOptions(resume=True))
    assert_same(run, straight)
    assert digest(run) == digest(straight / "run")


class Signals(DiesIn):
    """A real SIGINT in the middle of a step."""

    def __init__(self, step: int, after: int) -> None:
        super().__init__(step, after, Killed())

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        with super().phase(name, total, done) as on_done:

            def done(n: int) -> None:
                try:
                    on_done(n)
                except Killed:
                    self.left = -1
                    os.kill(os.getpid(), signal.SIGINT)

            yield done


@pytest.mark.slow
def test_interrupted_in_a_step_and_resumed_equals_straight(
    straight: Path, tmp_path: Path, model_dir: Path
) -> None:
    """The checkpoint that an interruption saves holds the slots of before the step."""
    recipe, run = recipe_of(tmp_path, model_dir, "run.save_every=99"), tmp_path / "run"
    with pytest.raises(Interrupted, match="stopped before the first step"):
        train(recipe, run, TrainOptions(resume=True), Signals(1, 50))
    with pytest.raises(Interrupted, match="stopped after step 1; step-000001 is saved"):
        train(recipe, run, TrainOptions(resume=True), Signals(2, 50))
    first = stored_state(checkpoint_path(straight / "run", 1))
    assert stored_state(checkpoint_path(run, 1)).slots == first.slots
    train(recipe, run, TrainOptions(resume=True))
    assert_same(run, straight)
    assert digest(run) == digest(straight / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["sampler.batch_rows=8"],
        ["sampler.batch_rows=24"],
        ["sampler.merged=true"],
        ["sampler.engine=generate"],
    ],
    ids="".join,
)
def test_layout_and_engine_change_nothing(
    straight: Path, tmp_path: Path, model_dir: Path, settings: list[str]
) -> None:
    train(recipe_of(tmp_path, model_dir, *settings), tmp_path / "run")
    assert_same(tmp_path / "run", straight)


@pytest.mark.slow
def test_little_memory_changes_nothing(
    straight: Path, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "__init__", rows_at_once(20))
    train(recipe_of(tmp_path, model_dir, "sampler.engine=native"), tmp_path / "run")
    assert_same(tmp_path / "run", straight)
    assert 8 <= stored_state(list_checkpoints(tmp_path / "run")[-1]).batch_rows <= 20
    assert any(e["event"] == "sampler_rows_shrunk" for e in events(tmp_path / "run"))
