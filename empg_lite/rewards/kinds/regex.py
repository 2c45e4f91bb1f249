r"""``regex:PATTERN``: the last match of the first group is the gold answer; without a group, any match.

The pattern runs in a worker, because matching can take forever.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from empg_lite.rewards.kind import Case, Kind, Outcome, WorkerRequest
from empg_lite.rewards.math import Answer, quoted


class Regex(Kind):
    """Searches the text for the user's pattern."""

    name = "regex"
    needs = r"a pattern, as in 'regex:answer: (\d+)'"
    known_spec = r"regex:n = (\d+)"
    known_answers = (
        ("7", "n = 3, then n = 7", "equal"),
        ("3", "n = 3, then n = 7", "different"),
        ("3", "m = 3", "no_answer"),
    )

    def argument_error(self, argument: str) -> str | None:
        try:
            re.compile(argument)
        except (re.error, RecursionError, OverflowError) as error:
            return f": not a regular expression: {error}"
        return super().argument_error(argument)

    def grade(self, case: Case, argument: str) -> WorkerRequest:
        has_group = re.compile(argument).groups > 0

        def read(result: Mapping[str, Any]) -> Outcome:
            match = result["match"]
            if match is None:
                return Outcome("no_answer")
            if not has_group:
                return Outcome("equal", Answer("", "pattern"))
            group = (match["group"] or "").strip()
            if not group:
                return Outcome("no_answer")
            return Outcome("equal" if group == case.gold.strip() else "different", Answer(group, "pattern"))

        request = {"op": "regex", "pattern": argument, "text": case.prediction}
        return WorkerRequest(request, read, setup={"kind": "regex"})

    def explain(self, case: Case, argument: str) -> list[str]:
        return [
            f"searched the text for the pattern {quoted(argument)}",
            "the first group of the last match, stripped, must be the gold answer to the letter; a pattern "
            "without a group only has to match",
        ]


KIND = Regex()
