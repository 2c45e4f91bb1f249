"""The package stays a house that a reader can walk through: few entries, few floors, short functions."""

from __future__ import annotations

from typing import Any

import house
import pytest

GOALS = {
    "entries at the top level": 12,
    "circles of imports": 0,
    "floors of imports": 8,
    "functions over 60 lines": 0,
    "lines of train()": 50,
    "lines of loop/train.py, which has the step": 150,
    "our modules that loop.train imports": 45,
    "frames from train() to m_step_loss": 6,
}


@pytest.fixture(scope="module")
def measures() -> dict[str, Any]:
    return {m.name: m for m in [*house.from_source(), *house.from_runs()]}


@pytest.mark.parametrize("name", GOALS)
def test_the_goal_is_met(measures: dict[str, Any], name: str) -> None:
    """Or the recorded ceiling above it, which holds a reason and can only shrink."""
    found = measures[name]
    assert found.goal == GOALS[name]
    assert found.now <= found.limit, f"{found.now} > {found.limit}: {found.detail}"


def test_a_ceiling_goes_when_its_goal_is_met(measures: dict[str, Any]) -> None:
    for name, (_, reason) in house.CEILINGS.items():
        assert measures[name].goal < measures[name].now and reason, name


def test_the_measures_can_fail() -> None:
    arrows = {("a", "b"), ("b", "c"), ("a", "c")}
    assert house.longest_chain(arrows) == ["a", "b", "c"] and house.find_circle(arrows) is None
    assert house.find_circle(arrows | {("c", "a")}) == ["a", "b", "c", "a"]


def test_the_stack_is_that_of_a_real_step(measures: dict[str, Any]) -> None:
    """The frames come from a run: the M-step's module is among them, and every name is one of ours."""
    stack = measures["frames from train() to m_step_loss"].detail.split(" > ")
    assert any(name.startswith("loop.mstep:") for name in stack), stack
