"""The rule of the slots, case by case; ``tests/em/test_tries_oracles.py`` has its expectations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rationales import rationale

from empg_lite.core.rationale import Rationale
from empg_lite.core.slots import Ended, Slot, Tries


def row(reward: float, position: int = 0, sample_index: int = 0, reason: str = "equal") -> Rationale:
    return rationale(reward=reward, position=position, sample_index=sample_index, reason=reason)


def test_a_slot_goes_on_when_answered_or_given_up() -> None:
    rule = Tries(slots=4, draws=2, tries=3)
    assert rule.opened(10) == (Slot(10), Slot(11), Slot(12), Slot(13))
    assert rule.after(Slot(2), row(1.0)) == (Slot(6), Ended(1, solved=True))
    assert rule.after(Slot(2), row(0.0)) == (Slot(2, tries=1), None)
    assert rule.after(Slot(2, tries=2), row(0.0)) == (Slot(6), Ended(3, solved=False))
    assert rule.after(Slot(2, tries=2), row(1.0)) == (Slot(6), Ended(3, solved=True))
    assert rule.after(Slot(2, tries=9), row(0.0)) == (Slot(6), Ended(10, solved=False)), "M was lowered"
    for failure in ("timeout", "memory", "crash"):
        assert rule.after(Slot(2, tries=2), row(0.0, reason=failure)) == (Slot(2, tries=2), None)


def test_partial_credit_adds_up() -> None:
    rule = Tries(slots=1, draws=1, tries=20)
    slot, counts = Slot(0), 0
    while slot.position == 0:
        slot, ended = rule.after(slot, row(0.1))
        counts += 1
    assert counts == 10 and ended == Ended(10, solved=True), "ten tenths are one, whatever their rounding"
    assert rule.after(Slot(0, 1, 0.7), row(0.4)) == (Slot(1), Ended(2, solved=True))
    assert rule.after(Slot(0, 1, 0.5), row(0.4)) == (Slot(0, 2, 0.9), None)


def test_ungraded_rows_are_refused() -> None:
    with pytest.raises(AssertionError, match="graded rows only"):
        Tries(1, 1, 3).after(Slot(0), rationale(reward=None, reason=None))
    with pytest.raises(AssertionError, match="drawn in turns"):
        Tries(1, 1, 3).after_step([Slot(0)], [rationale(position=None)])


def test_rows_graded_again_keep_their_problems() -> None:
    """Another reward judges rows that are drawn already: it decides where the slot goes from the last one."""
    rule = Tries(slots=2, draws=2, tries=4)
    start = [Slot(0, tries=1), Slot(1)]
    # drawn: slot 0 wrong, wrong; slot 1 right, then the next problem, wrong
    as_drawn = [row(0.0, 0, 0), row(0.0, 0, 1), row(1.0, 1, 2), row(0.0, 3, 3)]
    assert rule.after_step(start, as_drawn) == ((Slot(0, tries=3), Slot(3, tries=1)), [Ended(1, True)])
    # graded again: slot 0's first row is right after all, slot 1's is not
    again = [row(1.0, 0, 0), row(0.0, 0, 1), row(0.0, 1, 2), row(0.0, 3, 3)]
    slots, ended = rule.after_step(start, again)
    assert slots == (Slot(0, tries=1), Slot(3, tries=1)) and ended == [Ended(2, True)]


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.lists(st.sampled_from([0.0, 0.0, 0.4, 1.0, None]), min_size=12, max_size=12),
    st.randoms(use_true_random=False),
)
def test_a_step_is_its_slots_one_by_one(
    p: int, k: int, m: int, rewards: list[float | None], chance: object
) -> None:
    """Whatever the order of its rows; no slot sees another, none leaves its part of the stream."""
    rule = Tries(p, k, m)
    now, rows, ended = list(rule.opened(0)), [], 0
    for i in range(p):
        for draw in range(k):
            reward = rewards[i * 3 + draw]
            reason = "timeout" if reward is None else "equal"
            rows.append(row(reward or 0.0, now[i].position, i * k + draw, reason))
            now[i], done = rule.after(now[i], rows[-1])
            ended += done is not None
    chance.shuffle(rows)  # type: ignore[attr-defined]
    slots, gone = rule.after_step(rule.opened(0), rows)
    assert list(slots) == now and len(gone) == ended
    assert [s.position % p for s in slots] == list(range(p))
    assert all(s.tries < m and s.credit < 1 for s in slots)
    graded = sum(not r.failed for r in rows)
    assert sum(s.tries for s in slots) + sum(e.tries for e in gone) == graded
