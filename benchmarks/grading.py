r"""How right and how fast the grader is, beside math-verify's defaults and a naive compare.

    python benchmarks/grading.py [--json] [--no-gmpy2]

Reads the real data beside the checkout (``../shared/data``, or ``$EMPG_SHARED/data``); one run, one fixed
configuration: reward ``math``, for GSM8K's own tables ``gsm8k``. Times are printed beside their bars and
decide nothing; the exit code is 1 where a count is beyond its bar.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from machine import machine
from rivals import last_box, math_verify, naive

from empg_lite.core.errors import GraderUnusable
from empg_lite.rewards import Grader

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("EMPG_SHARED", ROOT.parent / "shared")) / "data"

#: Labels that contradict a convention: a percent sign matters, and decimals are not rounded.
CONTRADICTED = {
    ("10", r"10\%"): "a percent sign matters",
    (r"$\frac{1}{3}$", "0.3333$"): "decimals are not rounded",
    (r"$\frac{1}{12}$", "$0.0833333333333333$"): "decimals are not rounded",
}
#: Recorded verdicts, a program's, that contradict a convention: gold -> why.
RECORDED_WRONG = {
    r"\text{4:30 p.m.}": r"the responses say the same, 4:30 \text{ p.m.}: its setting does not matter",
    "10{,}000": "a thousands separator does not matter",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One answer to grade; ``label`` is what a person, or for MATH a program, said of it."""

    gold: str
    prediction: str
    question: str | None = None
    label: bool = True

    @property
    def item(self) -> tuple[str, str, str | None]:
        """What ``Grader.grade_many`` takes."""
        return self.gold, self.prediction, self.question


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table; ``good`` is None where nothing is promised."""

    name: str
    ours: float | str
    others: tuple[float | str, ...] = ()
    bar: str = ""
    good: bool | None = None
    timed: bool = False


Judge = Callable[[Sequence[Row]], list[bool]]


def ours(grader: Grader, spec: str) -> Judge:
    """This project's grader with one reward."""
    return lambda rows: [v.reward == 1 for v in grader.grade_many(spec, [row.item for row in rows])]


def rival(grade: Callable[[Sequence[tuple[str, str]]], list[bool]], gold: str = "{}") -> Judge:
    """Another grader, which sees no question; ``gold`` is how it wants bare LaTeX."""
    return lambda rows: grade([(gold.format(row.gold), row.prediction) for row in rows])


# ---- counting ------------------------------------------------------------------------------------------


def set_aside(cases: Sequence[dict]) -> tuple[list[Row], list[tuple[dict, str]]]:
    """The labeled pairs that count, and those that do not, with the reason."""
    labels: dict[tuple[str, str], set[bool | None]] = {}
    for case in cases:
        labels.setdefault((case["gold"], case["prediction"]), set()).add(case["equal"])
    counted, aside = [], []
    for case in cases:
        pair = case["gold"], case["prediction"]
        if case["equal"] is None:
            aside.append((case, "no label"))
        elif "label_note" in case:
            aside.append((case, case["label_note"]))
        elif len(labels[pair]) > 1:
            aside.append((case, "stands with both labels"))
        elif pair in CONTRADICTED:
            aside.append((case, "contradicts a convention: " + CONTRADICTED[pair]))
        else:
            counted.append(Row(*pair, None, case["equal"]))
    return counted, aside


def errors(rows: Sequence[Row], verdicts: Sequence[bool]) -> tuple[list[Row], list[Row]]:
    """(false positives, false negatives)."""
    pairs = list(zip(rows, verdicts, strict=True))
    return [r for r, v in pairs if v and not r.label], [r for r, v in pairs if r.label and not v]


# ---- data ----------------------------------------------------------------------------------------------


def load(name: str) -> list[dict]:
    """A JSON-lines file of the data folder."""
    with (DATA / name).open(encoding="utf-8") as lines:  # str.splitlines would also cut at U+2028
        return [json.loads(line) for line in lines]


def gsm8k_solutions() -> list[Row]:
    """Model solutions with a person's label each."""
    return [
        Row(row["ground_truth"].rsplit("A:", 1)[1].strip(), s["solution"], row["question"], s["is_correct"])
        for row in load("gsm8k_model_solutions_dev.jsonl")
        for s in row.values()
        if isinstance(s, dict)
    ]


def math_outputs() -> list[Row]:
    """Model responses on MATH, eight a question, with a program's verdict each."""
    return [
        Row(row["gold"], row["response"], row["question"], row["score_qwen_grader"])
        for row in load("math_model_outputs_dev.jsonl")
    ]


def field_pairs() -> list[tuple[str, Row]]:
    """(reward, row) after public bug reports."""
    return [
        (row["reward"], Row(row["gold"], row["prediction"], None, bool(row["want"])))
        for row in load("field_cases_dev.jsonl")
    ]


def gold_answers() -> tuple[list[Row], list[Row]]:
    """(GSM8K, MATH): every gold answer as the prediction of itself."""
    parts = ("train", "test")
    gsm8k = [r["answer"].rsplit("####", 1)[1].strip() for p in parts for r in load(f"gsm8k_{p}.jsonl")]
    boxes = [last_box(r["solution"]) or "" for p in parts for r in load(f"math_{p}.jsonl")]
    return [Row(g, f"#### {g}") for g in gsm8k], [Row(g, rf"\boxed{{{g}}}") for g in boxes]


def mixed(solutions: Sequence[Row], outputs: Sequence[Row], golds: Sequence[Row]) -> list[Row]:
    """5,000 answers: 1,500 GSM8K solutions, 1,000 made algebraic pairs (half of them wrong), 500 MATH outputs
    (392, and 108 against the next question's gold), 2,000 MATH golds: half against themselves with other
    fractions, half against the next problem's."""
    algebra = [
        Row(rf"x^2{a + b:+}x{a * b:+}", rf"\boxed{{(x{a:+})(x{b + (n % 2):+})}}", None, n % 2 == 0)
        for n, (a, b) in enumerate((a, b) for a in range(2, 42) for b in range(2, 27))
    ]
    others = [Row(a.gold, b.prediction) for a, b in zip(outputs[8:116], outputs, strict=False)]
    same = [Row(g.gold, g.prediction.replace(r"\frac", r"\dfrac")) for g in golds[-1000:]]
    wrong = [Row(a.gold, b.prediction) for a, b in zip(golds[-2001:-1001], golds[-2000:-1000], strict=True)]
    return [*solutions[:1500], *algebra, *outputs, *others, *same, *wrong]


# ---- figures -------------------------------------------------------------------------------------------


def accuracy(grader: Grader, notes: list[str]) -> Iterable[Figure]:
    """Against labels: how often each grader is wrong, and on what ours is."""
    counted, aside = set_aside(load("grader_cases_dev.jsonl"))
    notes += [f"set aside: {c['gold']!r} = {c['prediction']!r}: {why}" for c, why in aside]
    rivals = rival(math_verify), rival(naive)
    judges: list[Judge] = [ours(grader, "math"), *rivals]
    wrong = [errors(counted, judge(counted)) for judge in judges]
    for kind, index, bar in (("false positives", 0, 2), ("false negatives", 1, 4)):
        own, *others = (len(w[index]) for w in wrong)
        yield Figure(f"{len(counted)} pairs, {kind}", own, tuple(others), f"<= {bar}", own <= bar)
        notes += [f"{kind}: {row.gold!r} = {row.prediction!r}" for row in wrong[0][index]]

    rows = gsm8k_solutions()
    agree = []
    for judge in (ours(grader, "gsm8k"), *rivals):
        positive, negative = errors(rows, judge(rows))
        agree.append(len(rows) - len(positive) - len(negative))
    bar, good = f"= {len(rows)}", agree[0] == len(rows)
    yield Figure(f"{len(rows)} GSM8K solutions, agree with people", agree[0], tuple(agree[1:]), bar, good)

    rows = math_outputs()
    judges[1] = rival(math_verify, "${}$")
    apart = [sum(errors(rows, judge(rows)), []) for judge in judges]
    own, *others = (len(rows) - len(wrong) for wrong in apart)
    yield Figure(f"{len(rows)} MATH outputs, agree with the record", own, tuple(others))
    own, *others = (len({row.question for row in wrong}) for wrong in apart)
    yield Figure("  questions with a disagreement", own, tuple(others))
    own, *others = (sum(row.gold not in RECORDED_WRONG for row in wrong) for wrong in apart)
    yield Figure("  disagree, record not against a convention", own, tuple(others), "<= 1", own <= 1)
    for gold in dict.fromkeys(row.gold for row in apart[0]):
        count, why = sum(row.gold == gold for row in apart[0]), RECORDED_WRONG.get(gold, "not explained")
        notes.append(f"recorded otherwise: {gold!r}, {count} outputs: {why}")


def field(grader: Grader, notes: list[str]) -> Iterable[Figure]:
    """Pairs after public bug reports of other graders, with the verdict that a reasonable user expects.

    The rivals have no ``choice``; those rows are counted for ours alone.
    """
    rows = field_pairs()
    specs = {spec: [row for s, row in rows if s == spec] for spec in dict.fromkeys(s for s, _ in rows)}
    found = [errors(part, ours(grader, spec)(part)) for spec, part in specs.items()]
    positive, negative = (sum((pair[index] for pair in found), []) for index in (0, 1))
    numbers = [row for spec, row in rows if spec != "choice"]
    judged = [errors(numbers, judge(numbers)) for judge in (rival(math_verify), rival(naive))]
    right, wrong = len(rows) - len(positive) - len(negative), len(positive)
    others = tuple(len(numbers) - len(a) - len(b) for a, b in judged)
    good = right >= 0.99 * len(rows)
    yield Figure(f"{len(rows)} field pairs, right (others: of {len(numbers)})", right, others, ">= 99%", good)
    accepted = tuple(len(a) for a, _ in judged)
    yield Figure("  wrong answers accepted", wrong, accepted, "= 0", wrong == 0)
    yield Figure("  right answers refused", len(negative), tuple(len(b) for _, b in judged))
    notes += [f"field pair: {row.gold!r} = {row.prediction!r}" for row in [*positive, *negative]]


def golds(grader: Grader, notes: list[str]) -> Iterable[Figure]:
    """Every gold answer against itself."""
    for name, spec, rows in zip(("GSM8K", "MATH"), ("gsm8k", "math"), gold_answers(), strict=True):
        missed = errors(rows, ours(grader, spec)(rows))[1]
        share = 1 - len(missed) / len(rows)
        yield Figure(f"{len(rows)} {name} golds equal themselves", f"{share:.2%}", (), "= 100%", not missed)
        notes += [f"gold differs from itself: {row.gold!r}" for row in missed[:5]]


def _timed(grader: Grader, spec: str, rows: Sequence[Row]) -> list[float]:
    """Milliseconds of each answer, one at a time."""
    times = []
    for row in rows:
        start = time.perf_counter()
        grader.grade(spec, *row.item)
        times.append(1000 * (time.perf_counter() - start))
    return times


def spellings(golds: Sequence[Row], solutions: Sequence[Row], outputs: Sequence[Row]) -> dict[str, list[Row]]:
    """The same answers found by different rules: (name, reward) -> rows."""
    plain = [row.gold for row in golds[:2000]]
    boxless = [
        (row, re.sub(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1", row.prediction)) for row in outputs
    ]
    return {
        "gsm8k #### 18": [Row(gold, f"#### {gold}") for gold in plain],
        "math a number in a sentence": [
            Row(gold, f"So in total he has {gold} apples left.") for gold in plain
        ],
        "math the answer is": [Row(gold, f"As 3 + 4 = 7.\nThe answer is {gold} eggs.") for gold in plain],
        "gsm8k GSM8K solution": list(solutions[:1500]),
        "gsm8k GSM8K solution, no announcement": [
            Row(row.gold, row.prediction.replace("A:", "So we have")) for row in solutions[:1500]
        ],
        "math MATH output, no box": [
            Row(row.gold, re.sub("answer", "result", text, flags=re.IGNORECASE), row.question)
            for row, text in boxless
        ],
    }


def _needs_worker(row: Row, closed: Grader) -> bool:
    try:
        closed.grade("math", *row.item)
    except GraderUnusable:
        return True
    return False


def speed(grader: Grader) -> Iterable[Figure]:
    """Times on this machine, workers already started."""
    gsm8k, math = gold_answers()
    plain = [Row(row.gold, rf"\boxed{{{row.gold}}}") for row in gsm8k]
    median = statistics.median(_timed(grader, "math", plain))
    yield Figure("plain numeric answer, median ms", round(median, 4), (), "<= 0.1", median <= 0.1, True)

    outputs = math_outputs()
    times = _timed(grader, "math", outputs)
    median, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
    yield Figure("MATH output, median ms", round(median, 2), (), "<= 3", median <= 3, True)
    yield Figure("  99th percentile ms", round(p99, 2), timed=True)
    closed = Grader(workers=1)
    closed.close()
    yield Figure(
        "  decided without a worker",
        f"{1 - sum(_needs_worker(row, closed) for row in outputs) / len(outputs):.1%}",
    )

    for name, rows in spellings(gsm8k, gsm8k_solutions(), outputs).items():
        spec, _, what = name.partition(" ")
        median = statistics.median(_timed(grader, spec, rows))
        yield Figure(f"{what}, median ms", round(median, 3), timed=True)

    rows = mixed(gsm8k_solutions(), outputs, math)
    hard = [row for row in rows if _needs_worker(row, closed)]
    times = _timed(grader, "math", hard[:500])
    median, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
    yield Figure("answer that a worker decides, median ms", round(median, 2), timed=True)
    yield Figure("  99th percentile ms", round(p99, 2), timed=True)
    start = time.perf_counter()
    grader.grade_many("math", [row.item for row in rows])
    seconds = time.perf_counter() - start
    yield Figure(f"{len(rows)} mixed answers, s", round(seconds, 2), (), "<= 10", seconds <= 10, True)
    yield Figure("  decided without a worker", f"{1 - len(hard) / len(rows):.1%}")


# ---- printing ------------------------------------------------------------------------------------------


def main() -> int:
    """Print the table; 1 where a count is beyond its bar."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--json", action="store_true", help="one object instead of the table")
    options.add_argument("--no-gmpy2", action="store_true", help="grade with Python's own integers")
    chosen = options.parse_args()
    if chosen.no_gmpy2:
        os.environ.update(SYMPY_GROUND_TYPES="python", MPMATH_NOGMPY="1")
    where, notes = machine(), []
    with Grader(workers=2) as grader:
        grader.grade_many("math", [(r"3\sqrt{5}", r"\boxed{\sqrt{45}}", None)] * 8)  # starts both workers
        figures = [*speed(grader), *accuracy(grader, notes), *field(grader, notes), *golds(grader, notes)]
    if chosen.json:
        print(json.dumps({"machine": where, "figures": [asdict(f) for f in figures], "notes": notes}))
    else:
        print(*(f"{key}: {value}" for key, value in where.items()), sep="\n")
        print(f"\n{'':46}{'ours':>9}{'math-verify':>13}{'naive':>8}  bar")
        for f in figures:
            others = [*map(str, f.others), "", ""][:2]
            mark = "" if f.good is None else "ok" if f.good else "MISSED"
            print(f"{f.name:46}{f.ours!s:>9}{others[0]:>13}{others[1]:>8}  {f.bar:8}{mark}")
        print("", *notes, sep="\n")
    return int(any(figure.good is False and not figure.timed for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
