r"""How long `empg-lite score` takes for 10,000 stored rationales, and how much memory.

    python benchmarks/rescore.py [--rationales N] [--json]

The rationales are made here, from a fixed seed: solutions of 100 to 200 words with plain numbers, fractions
and LaTeX as answers, a third of them wrong, some without an answer or cut off, and one in twenty that only
algebra can decide, in a worker. They are scored by a process of its own, as a person would do it. The last
line of the process is checked: a reward it must give, counted while the texts were made.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from machine import headline, last_line, machine

from empg_lite.core.rationale import Rationale, problem_id
from empg_lite.run.rollouts import RolloutHeader, encode_rollouts

#: Seconds that the task allows on two cores.
BAR = 30.0
SAMPLES = 8
WORDS = (
    "first we add both sides and then take what is left over to find how many remain so that the total of "
    "each part can be compared with half the sum which gives another equation for the unknown number"
).split()
Made = tuple[str, str]  # gold answer, the same answer as a solution would write it


def whole(r: random.Random) -> Made:
    """A plain number."""
    n = r.randrange(2, 100_000)
    return str(n), f"{n:,}"


def fraction(r: random.Random) -> Made:
    """A fraction, not reduced."""
    a, b, k = r.randrange(1, 50), r.randrange(51, 99), r.randrange(1, 4)
    return rf"\frac{{{a}}}{{{b}}}", f"{a * k}/{b * k}"


def latex(r: random.Random) -> Made:
    """Another setting of the same."""
    a, b = r.randrange(2, 99), r.randrange(2, 9)
    return rf"\left( {a}, \frac{{1}}{{{b}}} \right)", rf"({a},\dfrac{{1}}{{{b}}})"


def algebra(r: random.Random) -> Made:
    """Equal, but not before it is multiplied out."""
    a, b = r.randrange(2, 40), r.randrange(2, 40)
    return rf"x^2+{a + b}x+{a * b}", rf"(x+{a})(x+{b})"


#: Twenty problems hold this many of each.
KINDS: tuple[Callable[[random.Random], Made], ...] = (
    (whole,) * 11 + (fraction,) * 5 + (latex,) * 3 + (algebra,)
)


def rationales(count: int, seed: int = 0) -> tuple[list[Rationale], int]:
    """Rationales of ``count / 8`` problems, and how many of them are right."""
    r, rows, right = random.Random(seed), list[Rationale](), 0
    for i in range(count):
        if i % SAMPLES == 0:
            problem = i // SAMPLES
            gold, answer = KINDS[problem % len(KINDS)](r)
            question = f"Problem {problem}: what is it?"
        text = " ".join(r.choices(WORDS, k=r.randrange(100, 201)))
        fate = r.choices(("right", "wrong", "unanswered", "cut off"), (5, 3, 1, 1))[0]
        right += fate == "right"
        if fate in ("right", "wrong"):
            text += rf". The answer is $\boxed{{{answer if fate == 'right' else answer + '+1'}}}$."
        rows.append(
            Rationale(
                problem_id(question), question, gold, question, tuple(range(40)), text,
                tuple(r.randrange(150_000) for _ in range(200)), "length" if fate == "cut off" else "stop",
                1 + i // (SAMPLES * 32), 0, i % SAMPLES,
            )
        )  # fmt: skip
    return rows, right


def main() -> None:
    parser = argparse.ArgumentParser(description="Time `empg-lite score` on made-up rationales.")
    parser.add_argument("--rationales", type=int, default=10_000, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    arguments = parser.parse_args()
    rows, right = rationales(arguments.rationales)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rollouts.jsonl"
        file.write_text(encode_rollouts(RolloutHeader("made here"), rows), "utf-8")
        megabytes = file.stat().st_size / 2**20
        command = [sys.executable, "-m", "empg_lite", "score", str(file), "--reward", "math", "--json"]
        result = json.loads(last_line(command))
    result |= {"file_mb": round(megabytes, 1), "right": right, "file": file.name}
    if arguments.json:
        print(json.dumps({"machine": machine(), **result}))
    else:
        print(headline(machine()))
        print(f"{result['rationales']} rationales, {megabytes:.0f} MB, {right} right: {result['reasons']}")
        print(f"{result['seconds']:.1f} s (at most {BAR:g} on two idle cores)")
        print(f"peak memory {result['peak_rss_mb']:.0f} MB, a worker {result['peak_rss_mb_workers']:.0f} MB")
    found = result["reasons"].get("equal", 0)
    if found != right:
        sys.exit(f"{found} are called right, {right} are")


if __name__ == "__main__":
    main()
