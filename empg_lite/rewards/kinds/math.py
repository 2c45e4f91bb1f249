"""``math``: the answer means the same as the gold one, by algebra where needed."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from empg_lite.rewards.kind import Case, Kind, Outcome, WorkerRequest
from empg_lite.rewards.math import Answer, Pair, comparison_steps, extract, quoted, reading_steps

#: Longest answer that is compared as mathematics, in characters.
MAX_ANSWER = 2_000
#: A gold cell with one of these announces its answer; another one is the answer.
_ANNOUNCED = re.compile(r"^\s*A\s*:|####|boxed|fbox|answer|\bans\b|答案|</think", re.IGNORECASE)
_PLAIN = re.compile(r"[-+\d.,/\s]*")
#: Words: a number stands in a sentence. Formulas have none.
_PROSE = re.compile(r"^A\s*:|[A-Za-z]{2,}[\s.,:]|\s[A-Za-z]{2,}")
_HEADING = re.compile(r"\W*(?:step|part|case|question|problem)\s+\d", re.IGNORECASE)
#: Rules that guess: the last value of a text is no gold answer.
_GUESSES = frozenset({"last_math", "last_number"})


@functools.lru_cache(maxsize=1024)  # the K rationales of a problem share its gold answer
def _read_gold(gold: str, numeric: bool) -> Answer:
    bare = Answer(gold.strip(), "whole")
    said = numeric and "\\" not in gold and _PROSE.search(gold)
    if _PLAIN.fullmatch(gold) or not (said or _ANNOUNCED.search(gold)):
        return bare
    answer = extract(gold, numeric=numeric)
    return bare if answer is None or (answer.rule == "whole" and "<" not in gold) else answer


def _pair(gold: str, answer: Answer, question: str | None) -> Pair:
    """What is compared: the box alone, or with the base beside it where that is meant."""
    pair = Pair.of(gold, answer.text, question)
    if answer.beside and pair.equal() is False:
        return Pair.of(gold, answer.text + answer.beside, question)
    return pair


class Math(Kind):
    """Decides plain answers here and sends the rest to the algebra worker.

    Attributes:
        numeric: every answer is a number, so "the answer is ..." is read for its number.
    """

    name = "math"
    written = r"\boxed{{{}}}"
    numeric: ClassVar[bool] = False
    known_answers = (
        ("18", "so 18.\n#### 18", "equal"),
        ("18", "so 17.\n#### 17", "different"),
        ("1,234", r"The total is \boxed{1234}.", "equal"),
        ("1234", r"\boxed{1,234}", "equal"),
        ("-3", r"\boxed{3}", "different"),
        ("-3", r"\boxed{-3}", "equal"),
        ("0.5", r"\boxed{\frac{1}{2}}", "equal"),
        ("1/3", r"\boxed{0.33}", "different"),
        ("7", r"\boxed{7.0}", "equal"),
        ("7", r"\boxed{70}", "different"),
        ("18", "", "no_answer"),
        ("18", r"\boxed{}", "no_answer"),
        # The rest needs a worker.
        (r"3\sqrt{5}", r"\boxed{\sqrt{45}}", "equal"),
        (r"3\sqrt{5}", r"\boxed{\sqrt{46}}", "different"),
        (r"\frac{\sqrt{3}}{3}", r"\boxed{\frac{1}{\sqrt{3}}}", "equal"),
        (r"x^2+2x+1", r"\boxed{(x+1)^2}", "equal"),
        (r"x^2+2x+1", r"\boxed{(x-1)^2}", "different"),
        (r"2^{10}\pi", r"\boxed{1024\pi}", "equal"),
    )

    def grade(self, case: Case, argument: str) -> Outcome | WorkerRequest:
        answer = extract(case.prediction, numeric=self.numeric)
        if answer is None:
            return Outcome("no_answer" if case.prediction.strip() or case.gold.strip() else "equal")
        gold = self._gold(case.gold)
        if max(len(gold), len(answer.text)) > MAX_ANSWER:
            return Outcome("equal" if gold == answer.text else "too_long", answer)
        pair = _pair(gold, answer, case.question)
        if pair.blank:
            same = pair.gold.lower() == pair.prediction.lower()
            return Outcome("equal", answer) if same else Outcome("no_answer")
        equal = pair.equal()
        if equal is not None:
            return Outcome("equal" if equal else "different", answer)

        def read(result: Mapping[str, Any]) -> Outcome:
            if "unparsable" in result:
                return Outcome("parse", answer)
            return Outcome("equal" if result["equal"] else "different", answer)

        return WorkerRequest({"op": "equal", **pair._asdict()}, read, answer)

    def explain(self, case: Case, argument: str) -> list[str]:
        answer = extract(case.prediction, numeric=self.numeric)
        steps = reading_steps(case.prediction, answer)
        if answer is None:
            return steps
        gold = self._gold(case.gold)
        if gold != case.gold.strip():
            steps.append(f"read the gold answer {quoted(gold)} from a worked solution")
        if max(len(gold), len(answer.text)) > MAX_ANSWER:
            return [*steps, f"an answer over {MAX_ANSWER} characters is compared as text only"]
        pair = _pair(gold, answer, case.question)
        if pair.blank:
            return [
                *steps,
                "an empty answer, infinity or 'nan' is correct only where the gold answer is the same",
            ]
        return steps + comparison_steps(pair)

    def read_gold(self, gold: str) -> tuple[str, str]:
        """Read as an answer is read where the cell announces one: boxed, or at the end of a solution."""
        answer = _read_gold(gold, self.numeric)
        return answer.text, answer.rule

    def unreadable_gold(self, gold: str, question: str) -> str | None:
        text, rule = self.read_gold(gold)
        shown = f"the {self.name} reward reads no answer in {quoted(gold[:80])}"
        if _braces_open(text):
            return f"{shown}: its braces do not match"
        guessed = text if self._only_guessed(gold, text, rule) else None
        found = extract(gold) if guessed is None and rule == "whole" and not self.numeric else None
        if found and found.rule in _GUESSES and re.search(r"[\d$\\]", gold):
            guessed = found.text
        if guessed is not None:
            return f"{shown}: {quoted(guessed)} only stands in it; write the answer alone"
        written = self.written_gold(text)
        assert written is not None
        outcome = self.grade(Case(gold, written, question), "")
        return shown if isinstance(outcome, Outcome) and outcome.reason == "no_answer" else None

    def _only_guessed(self, gold: str, text: str, rule: str) -> bool:
        """True where the cell has a heading for an answer, or prose with a value somewhere."""
        marked = "####" in gold and rule != "hash" and "box" not in rule
        return (
            bool(_HEADING.match(gold)) or marked or (rule in _GUESSES and not self.numeric and text != gold)
        )

    def _gold(self, gold: str) -> str:
        return self.read_gold(gold)[0]


def _braces_open(text: str) -> bool:
    """True where braces do not match; escaped ones do not count."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return True
    return depth > 0


KIND = Math()
