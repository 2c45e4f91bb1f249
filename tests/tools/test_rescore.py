"""``score`` says an accuracy, whatever way the rationales were drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from stored_runs import HEADER, rationale

from empg_lite.run.rollouts import encode_rollouts
from empg_lite.tools.rescore import score_file


def test_of_tries_the_first_ones_are_an_accuracy(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """One problem is right at once, one at the fourth try: half of the problems, 40% of the draws."""
    file, answers = tmp_path / "r.jsonl", [(0, 1, "7"), (1, 1, "8"), (1, 2, "9"), (1, 3, "10"), (1, 4, "7")]
    rows = [
        rationale(f"Q{position}?", f"so #### {text}", right=text == "7", k=k, position=position, tries=tries)
        for k, (position, tries, text) in enumerate(answers)
    ]
    file.write_text(encode_rollouts(HEADER, rows), "utf-8")
    found = score_file(file, None)
    assert (found["reward"], found["right_first"]) == pytest.approx((0.4, 0.5))
    _, out, _ = cli("score", file)
    assert "50.0% right at first try, mean reward 40.0% of all tries" in out
    groups = [
        rationale("Q?", f"so #### {text}", right=text == "7", k=k) for k, (_, _, text) in enumerate(answers)
    ]
    file.write_text(encode_rollouts(HEADER, groups), "utf-8")
    found = score_file(file, None)
    assert found["reward"] == pytest.approx(0.4) and "right_first" not in found
