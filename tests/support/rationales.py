"""A handmade rationale and rollout header."""

from __future__ import annotations

from empg_lite.core.rationale import Rationale
from empg_lite.run.rollouts import RolloutHeader

HEADER = RolloutHeader("m", None, "a" * 64, "b", "c", {"temperature": 1.0}, 7, "gsm8k")


def rationale(**changes: object) -> Rationale:
    values = dict(
        problem_id="p1",
        question="1 + 1?",
        gold="2",
        prompt="Question: 1 + 1?\nAnswer:",
        prompt_ids=(1, 2),
        completion=" #### 2",
        completion_ids=(3, 4, 0),
        finish_reason="stop",
        step=3,
        policy_step=2,
        sample_index=0,
        reward=1.0,
        reason="equal",
        weight=2.0,
        extracted="2",
        rule="hash",
    )
    return Rationale(**(values | changes))  # type: ignore[arg-type]
