"""The success memory of the benchmarks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from memory import SuccessMemory

from empg_lite.core.rationale import Group, Rationale


def group(pid: str, step: int, rewards: list[float | str]) -> Group:
    """A group; a text for a reward is a grader failure. Completions differ by (step mod 3, place)."""
    rows = [
        Rationale(
            problem_id=pid,
            question=pid,
            gold="1",
            prompt=pid,
            prompt_ids=(1,),
            completion=f"{step % 3}/{k}",
            completion_ids=(step % 3, k),
            finish_reason="stop",
            step=step,
            policy_step=2 * step,
            sample_index=k,
            reward=r if isinstance(r, float) else 0.0,
            reason=r if isinstance(r, str) else "equal" if r else "different",
        )
        for k, r in enumerate(rewards)
    ]
    return Group(pid, step, tuple(rows))


def places(groups: tuple[Group, ...]) -> list[tuple[str, int, int]]:
    """(problem, step, sample) of what came back."""
    return [(r.problem_id, r.step, r.sample_index) for g in groups for r in g.rationales]


def test_only_what_earned_nothing_is_helped_out() -> None:
    memory = SuccessMemory(1)
    memory.keep([group(pid, 1, [0.0, 1.0]) for pid in "abcde"])
    now = [
        group("a", 2, [0.0, 0.0]),  # unsolved
        group("b", 2, [0.0, 1.0]),  # solved
        group("c", 2, [0.0, 0.3]),  # not right, and not without a signal
        group("d", 2, [0.0, "timeout"]),  # the grader failed: nobody knows
        group("f", 2, [0.0, 0.0]),  # never solved
    ]
    (back,) = memory.recall(now)
    assert places((back,)) == [("a", 1, 1)]


History = list[tuple[str, list[float]]]


@settings(max_examples=100, deadline=None)
@given(
    history=st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=3)),
        max_size=12,
    ),
    size=st.integers(0, 3),
)
def test_it_holds_the_last_right_ones(history: History, size: int) -> None:
    """Against a search through the whole history, backwards."""
    memory, past = SuccessMemory(size), list[Rationale]()
    for step, (pid, rewards) in enumerate(history, 1):
        memory.keep([group(pid, step, list(rewards))])
        past += group(pid, step, list(rewards)).rationales
    for pid in "ab":
        expected: dict[tuple[int, ...], Rationale] = {}
        for r in reversed(past):
            if r.problem_id == pid and r.reward == 1.0 and len(expected) < size:
                expected.setdefault(r.completion_ids, r)
        found = memory.recall([group(pid, 99, [0.0])])
        assert sorted(places(found)) == sorted((pid, r.step, r.sample_index) for r in expected.values())
        assert all(len({r.step for r in g.rationales}) == 1 for g in found), "ages never mix in a group"
