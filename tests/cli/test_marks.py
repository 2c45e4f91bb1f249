"""Rationales on a terminal."""

from __future__ import annotations

from stored_runs import rationale

from empg_lite.cli.marks import stored_panel


def test_a_stored_rationale_says_which_try_it_was() -> None:
    def title(**more: int) -> str:
        return str(stored_panel(rationale("Q?", "#### 7", right=True, k=5, **more)).title)

    assert title().endswith("· step 1 · sample 5")  # fixed groups
    assert title(position=40, tries=3).endswith("· step 1 · sample 5 · try 3")
