"""``sampler.tries`` by enumeration: stopping at a right answer leaves the expected EM gradient as it is.

One problem, a softmax policy over four outcomes, every sequence of draws: ``core.slots`` decides when to
stop, ``loop.estep.weigh`` weighs, the scores and the closed forms are plain NumPy. Deliberate errors in the
package follow below: each must make its oracles fail.
"""

from __future__ import annotations

import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact import close, rejects
from rationales import rationale
from test_em_mutations import mutate

from empg_lite.core import slots
from empg_lite.core.rationale import Rationale, flatten, group_rationales
from empg_lite.core.slots import Slot, Tries
from empg_lite.loop import estep

#: Two policies over four outcomes with shared parameters: logits ``FEATURES[x] @ THETA`` (3,).
FEATURES = np.random.default_rng(6).normal(size=(2, 4, 3))
THETA = np.array([0.4, -0.3, 0.6])
P = np.exp(FEATURES @ THETA) / np.exp(FEATURES @ THETA).sum(1, keepdims=True)  # (2, 4)
SCORES = FEATURES - (P[:, :, None] * FEATURES).sum(1, keepdims=True)  # (2, 4, 3) grad log pi

EASY = np.array([1.0, 0.0, 1.0, 1.0])
HARD = np.array([0.0, 0.0, 0.0, 1.0])
GRADED = np.array([0.0, 0.4, 0.7, 1.0])
#: A sequence of draws: its probability, and the rows.
Sequences = list[tuple[float, list[Rationale]]]


def success(rewards: np.ndarray, x: int = 0) -> tuple[float, np.ndarray]:
    """J and its gradient."""
    return float(P[x] @ rewards), (P[x] * rewards) @ SCORES[x]


def gradient_of_pass_at_k(rewards: np.ndarray, m: int) -> np.ndarray:
    """grad sum_{k<=M} pass@k / k, term by term."""
    j, grad_j = success(rewards)
    return sum((1 - j) ** (k - 1) * grad_j for k in range(1, m + 1))


def row(o: int, rewards: np.ndarray, slot: Slot, sample_index: int, **changes: object) -> Rationale:
    """The draw of outcome ``o`` in a slot, as ``loop.turns`` builds it."""
    return rationale(
        problem_id=f"p{slot.position}",
        completion_ids=(o,),
        sample_index=sample_index,
        reward=float(rewards[o]),
        reason="equal",
        weight=None,
        position=slot.position,
        tries=slot.tries + 1,
        **changes,
    )


def in_turns(rule: Tries, rewards: np.ndarray) -> Sequences:
    """Every sequence of draws of one problem, one draw a step, until the slot is freed."""
    done: Sequences = []

    def go_on(slot: Slot, chance: float, rows: list[Rationale]) -> None:
        assert len(rows) < 8, "a slot that is never freed"
        for o in range(4):
            drawn = row(o, rewards, slot, len(rows))
            after, ended = rule.after(slot, drawn)
            if ended:
                done.append((chance * P[0, o], [*rows, drawn]))
            else:
                go_on(after, chance * P[0, o], [*rows, drawn])

    go_on(Slot(0), 1.0, [])
    return done


def in_steps(rule: Tries, rewards: np.ndarray) -> Sequences:
    """The same in steps of K draws, carried over by ``after_step``; only the first problem's rows."""
    done: Sequences = []

    def step(slot: Slot, chance: float, rows: list[Rationale]) -> None:
        assert len(rows) < 12, "a slot that is never freed"
        for outcomes in itertools.product(range(4), repeat=rule.draws):
            now, drawn = slot, []
            for k, o in enumerate(outcomes):
                drawn.append(row(o, rewards, now, k, step=len(rows)))
                now, _ = rule.after(now, drawn[-1])
            (after,), ended = rule.after_step([slot], drawn)
            assert after == now
            assert bool(ended) == (after.position > 0)
            p, ours = chance * P[0, list(outcomes)].prod(), [r for r in drawn if r.position == 0]
            if ended:
                done.append((p, [*rows, *ours]))
            else:
                step(after, p, [*rows, *ours])

    step(Slot(0), 1.0, [])
    return done


def weighed(rows: Sequence[Rationale]) -> list[Any]:
    """By the package, as the draws of one step of one problem are."""
    return flatten(estep.weigh(group_rationales(rows), weighting="posterior"))


def expectation(sequences: Sequences, weigh: Callable[[list[float]], list[float]] | None = None) -> Any:
    """E[sum_i w_i grad log pi(z_i)]; weights by the package, or by a function of the rewards."""
    close(sum(p for p, _ in sequences), 1.0)
    total = np.zeros(3)
    if weigh:
        for p, rows in sequences:
            weights = weigh([float(r.reward or 0.0) for r in rows])
            total += p * sum(w * SCORES[0, r.completion_ids[0]] for w, r in zip(weights, rows, strict=True))
        return total
    rows = [replace(r, step=100 * n + r.step) for n, (_, drawn) in enumerate(sequences) for r in drawn]
    for r in weighed(rows):
        total += sequences[r.step // 100][0] * r.weight * SCORES[0, r.completion_ids[0]]
    return total


def share_of_right(rewards: list[float]) -> list[float]:
    """1/S for the right ones, S their number."""
    return [r / max(sum(rewards), 1) for r in rewards]


def drawn_until(
    stop: Callable[[list[float]], bool], rewards: np.ndarray, m: int, chunk: int = 1
) -> Sequences:
    """Every sequence of draws, in chunks, until ``stop`` says so of the rewards or M are drawn."""
    open_: Sequences = [(1.0, [])]
    done: Sequences = []
    while open_:
        p, rows = open_.pop()
        for outcomes in itertools.product(range(4), repeat=min(chunk, m - len(rows))):
            more = [*rows, *(row(o, rewards, Slot(0, len(rows) + i), 0) for i, o in enumerate(outcomes))]
            whole = len(more) == m or stop([float(r.reward or 0.0) for r in more])
            (done if whole else open_).append((p * P[0, list(outcomes)].prod(), more))
    return done


def sine(a: np.ndarray, b: np.ndarray) -> float:
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return float(np.sqrt(max(1 - cosine**2, 0.0)))


binary = pytest.mark.parametrize("rewards", [EASY, HARD], ids=["easy", "hard"])


def test_the_policy_is_a_policy() -> None:
    close(P.sum(1), np.ones(2))
    close(np.einsum("xo,xod->xd", P, SCORES), np.zeros((2, 3)))
    (easy, _), (hard, _) = success(EASY), success(HARD)
    assert 0.5 < easy < 0.6 and 0.1 < hard < 0.2
    step = 1e-6 * np.array([1.0, 0, 0])  # a difference quotient knows nothing of scores
    q = np.exp(FEATURES[0] @ (THETA + step)) / np.exp(FEATURES[0] @ (THETA + step)).sum()
    assert (q @ EASY - easy) / 1e-6 == pytest.approx(success(EASY)[1][0], rel=1e-4)


# --- the theorem --------------------------------------------------------------------------------------


@binary
@pytest.mark.parametrize("m", [1, 2, 4])
def test_a_problem_contributes_what_m_fixed_samples_do(rewards: np.ndarray, m: int) -> None:
    j, grad_j = success(rewards)
    sequences = in_turns(Tries(1, 1, m), rewards)
    cost = sum(p * len(rows) for p, rows in sequences)
    close(expectation(sequences), (1 - (1 - j) ** m) / j * grad_j)
    close(expectation(sequences), gradient_of_pass_at_k(rewards, m))
    close(cost, (1 - (1 - j) ** m) / j)
    fixed = drawn_until(lambda _: False, rewards, m)
    close(expectation(fixed, share_of_right), expectation(sequences))
    if m > 1:
        assert cost < m - 0.1
        rejects(expectation(sequences), gradient_of_pass_at_k(rewards, m - 1))


@binary
@pytest.mark.parametrize(("k", "m"), [(1, 4), (2, 3), (2, 4), (3, 2), (3, 4)])
def test_draws_of_several_steps_count_as_one_sequence(rewards: np.ndarray, k: int, m: int) -> None:
    sequences = in_steps(Tries(1, k, m), rewards)
    close(expectation(sequences), gradient_of_pass_at_k(rewards, m))
    j = success(rewards)[0]
    close(sum(p * len(rows) for p, rows in sequences), (1 - (1 - j) ** m) / j)
    for _, rows in sequences:  # what is carried over is wrong: it never teaches
        assert [r.tries for r in rows] == list(range(1, len(rows) + 1))
        assert not any(r.reward for r in rows[:-1])


@binary
@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("wanted", [1, 2])
def test_any_rule_that_stops_after_a_right_one(rewards: np.ndarray, chunk: int, wanted: int) -> None:
    """The theorem beyond this package: chunks, or a second right answer, with weights 1/S."""
    sequences = drawn_until(lambda seen: sum(seen) >= wanted, rewards, 4, chunk)
    close(expectation(sequences, share_of_right), gradient_of_pass_at_k(rewards, 4))
    early = drawn_until(lambda seen: len(seen) >= 2, rewards, 4, chunk)  # may stop without one
    rejects(expectation(early, share_of_right), gradient_of_pass_at_k(rewards, 4))


def walk(
    rule: Tries, rewards: np.ndarray, x: int = 0, failing: float = 0.0
) -> tuple[np.ndarray, float, float]:
    """Of a problem until it leaves its slot: E[gradient], E[graded draws], E[credit].

    By the slot's states instead of all sequences, so M may be large. The grader fails on a share ``failing``
    of the draws.
    """
    gradient, draws, credit = np.zeros(3), 0.0, 0.0
    chances: dict[Slot, float] = {Slot(0): 1.0}
    for _ in range(300):
        following: dict[Slot, float] = defaultdict(float)
        for slot, chance in chances.items():
            rows = [row(o, rewards, slot, 0, step=o) for o in range(4)]
            rows += [replace(r, step=4 + r.step, reward=0.0, reason="timeout") for r in rows if failing]
            for r in weighed(rows):
                o = r.completion_ids[0]
                p = chance * P[x, o] * (failing if r.failed else 1 - failing)
                gradient += p * r.weight * SCORES[x, o]
                draws += p * (not r.failed)
                credit += p * r.reward
                after, ended = rule.after(slot, r)
                if not ended:
                    following[after] += p
        chances = {slot: p for slot, p in following.items() if p > 1e-17}
        if not chances:
            return gradient, draws, credit
    raise AssertionError("a slot that is never freed")


def test_without_a_limit_a_problem_contributes_grad_log_j() -> None:
    for rewards in (EASY, HARD):
        j, grad_j = success(rewards)
        gradient, draws, _ = walk(Tries(1, 1, 400), rewards)
        close(gradient, grad_j / j)
        close(draws, 1 / j)
        gradient, *_ = walk(Tries(1, 1, 8), rewards)
        close(gradient, gradient_of_pass_at_k(rewards, 8))
        rejects(gradient, grad_j / j)


def test_grader_failures_change_nothing() -> None:
    """Neither tries nor weights, if they do not depend on the answer: the draw is made again."""
    for rewards in (EASY, HARD):
        gradient, draws, credit = walk(Tries(1, 1, 4), rewards, failing=0.3)
        for ours, without in zip((gradient, draws, credit), walk(Tries(1, 1, 4), rewards), strict=True):
            close(ours, without)
        close(gradient, gradient_of_pass_at_k(rewards, 4))


# --- a step -------------------------------------------------------------------------------------------


def test_a_step_of_two_slots() -> None:
    """Two slots, two draws each: every draw adds grad J of what its slot holds then."""
    rule, rewards = Tries(2, 2, 3), (EASY, HARD)
    start = (Slot(0, tries=1), Slot(1, tries=2))

    def kind(slot: Slot) -> int:
        return (slot.position + slot.position // 2) % 2  # positions 0 1 | 2 3: easy hard | hard easy

    chances, leaves = [], []
    for outcomes in itertools.product(range(4), repeat=4):
        now, rows, left = list(start), [], 0
        for k, o in enumerate(outcomes):
            slot = now[k // 2]
            rows.append(row(o, rewards[kind(slot)], slot, k, step=len(chances), meta={"x": kind(slot)}))
            now[k // 2], ended = rule.after(slot, rows[-1])
            left += bool(ended)
        after, ended_all = rule.after_step(start, rows[::-1])
        assert (list(after), len(ended_all)) == (now, left)
        assert [slot.position % 2 for slot in after] == [0, 1], "a slot walks its own part of the stream"
        chances.append(np.prod([P[r.meta["x"], r.completion_ids[0]] for r in rows]))
        leaves += rows
    close(sum(chances), 1.0)
    total = sum(
        chances[r.step] * r.weight * SCORES[r.meta["x"], r.completion_ids[0]] for r in weighed(leaves)
    )
    (j, easy), (_, hard) = success(EASY, 0), success(HARD, 1)
    close(total, (easy + j * hard + (1 - j) * easy) + (hard + easy))  # slot 1: its last try, then the next
    rejects(total, 2 * easy + 2 * hard)


def test_in_the_long_run_steps_ascend_the_mean_of_log_j() -> None:
    """The stationary state of a slot: a draw's gradient is what problems contribute over what they cost."""
    m, rewards = 60, (EASY, HARD)
    rule = Tries(1, 1, m)
    moves, gains = np.zeros((2 * m, 2 * m)), np.zeros((2 * m, 3))
    for x, tries, o in itertools.product(range(2), range(m), range(4)):
        after, _ = rule.after(Slot(x, tries), row(o, rewards[x], Slot(x, tries), 0))
        moves[x * m + tries, (after.position % 2) * m + after.tries] += P[x, o]
        gains[x * m + tries] += P[x, o] * rewards[x][o] * SCORES[x, o]
    system = np.vstack([moves.T - np.eye(2 * m), np.ones(2 * m)])
    held = np.linalg.lstsq(system, np.eye(2 * m + 1)[-1], rcond=None)[0]
    (j_easy, easy), (j_hard, hard) = (success(r, x) for x, r in enumerate(rewards))
    log_j = easy / j_easy + hard / j_hard
    assert np.abs(held @ gains - log_j / (1 / j_easy + 1 / j_hard)).max() < 1e-5  # M is not infinite
    assert sine(held @ gains, log_j) < 1e-4
    assert sine(held @ gains, easy + hard) > 0.3  # what fixed groups of raw or centered rewards ascend


# --- graded rewards, and a baseline ---------------------------------------------------------------------


@pytest.mark.parametrize("m", [3, 6, 100])
def test_graded_rewards_keep_the_direction_and_overshoot(m: int) -> None:
    """By Wald's identity E[sum R grad log pi] = E[draws] grad J = E[credit] grad log J.

    The credit ends between 1 and 2: this factor, another one for each problem, is the whole bias.
    """
    j, grad_j = success(GRADED)
    gradient, draws, credit = walk(Tries(1, 1, m), GRADED)
    close(gradient, draws * grad_j)
    close(gradient, credit * grad_j / j)
    rejects(gradient, grad_j / j)
    assert draws < 2.2
    assert 1.2 < credit < 1.26, "answered with more than needed"


def shares(rewards: list[float]) -> list[float]:
    """R / sum R: posterior weights over a problem's own draws."""
    return [r / sum(rewards) if sum(rewards) else 0.0 for r in rewards]


def centered(rewards: list[float]) -> list[float]:
    """R - mean R: a group's baseline."""
    return [r - sum(rewards) / len(rewards) for r in rewards]


def never(_: list[float]) -> bool:
    return False


def test_shares_of_graded_rewards_turn_the_gradient() -> None:
    """Fixed samples more than stopped ones, and plain weights R, which the package uses, not at all."""
    _, grad_j = success(GRADED)
    stopped = expectation(in_turns(Tries(1, 1, 5), GRADED), shares)
    fixed = expectation(drawn_until(never, GRADED, 5), shares)
    assert 0.005 < sine(stopped, grad_j) < 0.05 < sine(fixed, grad_j) < 0.25  # cosines .9999 and .980
    assert sine(expectation(in_turns(Tries(1, 1, 5), GRADED)), grad_j) < 1e-6


def test_a_baseline_does_not_survive_stopping() -> None:
    """Over fixed samples R - mean ascends J, for any rewards, by one factor for all problems.

    Stopped, graded rewards turn its gradient. Right-or-wrong ones do not, but scale it by a factor that
    depends on J: over two problems it ascends neither the mean of J nor that of log J.
    """
    rule, (_, graded) = Tries(1, 1, 5), success(GRADED)
    close(expectation(drawn_until(never, GRADED, 5), centered), 4 * graded)
    assert sine(expectation(in_turns(rule, GRADED), centered), graded) > 0.2
    total, mean_j, mean_log_j = np.zeros(3), np.zeros(3), np.zeros(3)
    for rewards in (EASY, HARD):
        j, grad_j = success(rewards)
        close(expectation(drawn_until(never, rewards, 5), centered), 4 * grad_j)
        stopped = expectation(in_turns(rule, rewards), centered)
        assert sine(stopped, grad_j) < 1e-6 and stopped @ grad_j > 0
        total, mean_j, mean_log_j = total + stopped, mean_j + grad_j, mean_log_j + grad_j / j
    assert min(sine(total, mean_j), sine(total, mean_log_j)) > 0.05


@binary
def test_a_constant_baseline_does_survive(rewards: np.ndarray) -> None:
    """It does not look at the other draws, so by Wald's identity it adds nothing in expectation."""
    sequences = in_turns(Tries(1, 1, 4), rewards)
    close(expectation(sequences, lambda seen: [r - 0.4 for r in seen]), expectation(sequences))


# --- deliberate errors ----------------------------------------------------------------------------------


def mutate_rule(old: str, new: str, patch: pytest.MonkeyPatch) -> None:
    """Give the methods of ``Tries`` the code they have where ``old`` reads ``new``."""
    source = inspect.getsource(slots)
    assert source.count(old) == 1, f"{source.count(old)} places hold: {old}"
    mutant: dict[str, Any] = {}
    exec(compile(source.replace(old, new), "mutant", "exec", dont_inherit=True), mutant)
    for name in ("after", "after_step"):
        patch.setattr(getattr(Tries, name), "__code__", getattr(mutant["Tries"], name).__code__)


def each(oracle: Callable[..., None], *arguments: Any) -> list[Callable[[], None]]:
    return [partial(oracle, *(a if isinstance(a, tuple) else (a,))) for a in arguments]


THEOREM = each(test_a_problem_contributes_what_m_fixed_samples_do, (EASY, 4), (HARD, 4))
CARRIED = each(test_draws_of_several_steps_count_as_one_sequence, (EASY, 2, 3), (HARD, 3, 2))
LOG_J = [test_without_a_limit_a_problem_contributes_grad_log_j]
FAILED = [test_grader_failures_change_nothing]
TWO_SLOTS = [test_a_step_of_two_slots]
GRADES = each(test_graded_rewards_keep_the_direction_and_overshoot, 6)

AFTER = "if credit < ANSWERED and tries < self.tries:"
KEPT = "Slot(slot.position, tries, credit)"
TURNS = "rationales[0].position is not None"
WEIGHT = "0.0 if r.failed else r.reward for r"

#: The error in words, right text, wrong text, oracles that must all fail.
IN_THE_RULE: list[tuple[str, str, str, list[Callable[[], None]]]] = [
    ("stops after a wrong one", AFTER, AFTER.replace("if", "if row.reward and"), THEOREM + CARRIED + LOG_J),
    ("never gives up", AFTER, "if credit < ANSWERED:", THEOREM + CARRIED),
    ("gives up a try early", "tries < self.tries", "tries < self.tries - 1", THEOREM + CARRIED + FAILED),
    ("asks on after a right one", AFTER, "if tries < self.tries:", THEOREM + CARRIED),
    ("a failure is a try", "if row.failed:", "if False:", FAILED),
    ("a failure frees the slot", "return slot, None", "return Slot(1), Ended(1, False)", FAILED),
    ("tries forgotten", KEPT, "Slot(slot.position, 0, credit)", THEOREM + CARRIED),
    ("credit forgotten", KEPT, "Slot(slot.position, tries, 0.0)", GRADES),
    ("any credit answers", "slot.credit + row.reward", "float(row.reward > 0)", GRADES),
    ("another slot's problem", "slot.position + self.slots", "slot.position + 1", TWO_SLOTS),
    ("rows as they came", "sorted(rows, key=lambda r: r.sample_index)", "rows", TWO_SLOTS),
    ("draws dealt in turn", "row.sample_index // self.draws", "row.sample_index % self.slots", TWO_SLOTS),
]
IN_THE_WEIGHTS: list[tuple[str, str, str, list[Callable[[], None]]]] = [
    ("divided by tries", WEIGHT, "0.0 if r.failed else r.reward / r.tries for r", THEOREM + CARRIED + LOG_J),
    ("the last of four tries dropped", WEIGHT, "r.reward if r.tries < 4 else 0.0 for r", THEOREM),
    ("posterior of a step's group", TURNS, "step < 0", THEOREM + CARRIED + TWO_SLOTS),
    ("rewards squared", WEIGHT, "r.reward**2 for r", GRADES),
]


@pytest.mark.parametrize(
    ("old", "new", "must_fail"), [pytest.param(*mutation[1:], id=mutation[0]) for mutation in IN_THE_RULE]
)
def test_an_error_in_the_rule_dies(
    old: str, new: str, must_fail: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate_rule(old, new, monkeypatch)
    dies(must_fail)


@pytest.mark.parametrize(
    ("old", "new", "must_fail"), [pytest.param(*mutation[1:], id=mutation[0]) for mutation in IN_THE_WEIGHTS]
)
def test_an_error_in_the_weights_dies(
    old: str, new: str, must_fail: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(estep, old, new, monkeypatch)
    dies(must_fail)


def dies(oracles: Sequence[Callable[[], None]]) -> None:
    for oracle in oracles:
        with pytest.raises(AssertionError) as failure:
            oracle()
        assert Path(failure.traceback[-1].path).is_relative_to(Path(__file__).parents[1])


def test_a_neutral_mutation_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the machinery itself breaks nothing."""
    mutate_rule(AFTER, AFTER.replace("if", "if True and"), monkeypatch)
    mutate(estep, WEIGHT, WEIGHT.replace("0.0", "0.0 * 1"), monkeypatch)
    for oracle in THEOREM + CARRIED + LOG_J + FAILED + TWO_SLOTS + GRADES:
        oracle()
