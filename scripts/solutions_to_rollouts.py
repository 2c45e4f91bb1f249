"""Turn worked solutions into a rollout file that `empg-lite score` grades and `empg-lite fit` learns from.

    python scripts/solutions_to_rollouts.py --recipe gsm8k-0.5b --set data.path=FOLDER --out solutions.jsonl
    empg-lite score solutions.jsonl
    empg-lite fit solutions.jsonl --recipe gsm8k-0.5b --output-dir runs/from-solutions

One rationale a problem of the recipe's training split (validation and evaluation rows stay out), in the order
that the recipe's seed gives. The text is the row's `solution`, or its answer cell where that holds more than
the answer. GSM8K's calculator marks (`<<48/2=24>>`) are removed: a model is not to write them. Nothing is
graded here: `score` does it, by the reward that the recipe names.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from empg_lite.core.errors import DataError, EmpgError, UsageError
from empg_lite.core.rationale import Problem, Rationale
from empg_lite.core.safe_text import safe
from empg_lite.data.sources import ProblemStream, load_solutions, load_splits
from empg_lite.policy.templates import Template, load_template
from empg_lite.recipe.file import load_recipe
from empg_lite.recipe.schema import Recipe
from empg_lite.run import store
from empg_lite.run.rollouts import RolloutHeader, encode_rollouts

_CALCULATOR = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")


def as_completion(solution: str, prompt: str) -> str:
    """A solution as the model would have to write it after the prompt: a word needs a space before it."""
    text = _CALCULATOR.sub("", solution).strip()
    return text if prompt[-1:].isspace() else f" {text}"


def rationale(problem: Problem, solution: str, template: Template) -> Rationale:
    """An ungraded rationale, text only: `fit` tokenises it."""
    prompt = template.render(problem.question)
    return Rationale(
        problem_id=problem.id,
        question=problem.question,
        gold=problem.gold,
        prompt=prompt,
        prompt_ids=(),
        completion=as_completion(solution, prompt),
        completion_ids=(),
        finish_reason="stop",
        step=0,
        policy_step=-1,
        sample_index=0,
        meta=problem.meta,
    )


def convert(recipe: Recipe, out: Path, column: str | None = None) -> tuple[int, int]:
    """Write the file: (rationales in it, problems without a worked solution).

    Raises:
        UsageError: another file is there.
        MissingInput, DataError: what `load_splits` and `load_solutions` say, or there is no solution at all.
    """
    recipe = recipe.resolved()
    template = load_template(str(recipe.data.prompt))
    problems = load_splits(recipe).train
    solutions = load_solutions(recipe.data, column)
    rows = [
        rationale(p, solutions[p.id], template)
        for p in ProblemStream(problems, recipe.run.seed).take(0, len(problems))
        if solutions.get(p.id, p.gold) != p.gold
    ]
    if not rows:
        where = str(recipe.data.path or recipe.data.source)
        raise DataError(
            f"none of {len(problems)} rows holds more than its answer", where, "name the --column"
        )
    header = RolloutHeader("written", template=template.sha256, reward_name=recipe.data.reward)
    text = encode_rollouts(header, rows)
    if out.exists() and out.read_bytes() != text.encode():
        raise UsageError("another file is there", str(out), "name another --out")
    store.write_file(out, text)
    return len(rows), len(problems) - len(rows)


def main(argv: list[str] | None = None) -> int:
    """Exit codes are those of `empg-lite`."""
    first, _, rest = str(__doc__).partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", "-r", required=True, help="built-in recipe or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a recipe key")
    parser.add_argument("--seed", type=int, help="shorthand for --set run.seed=N")
    parser.add_argument("--column", help="where the solutions stand (default: solution, or the answer's)")
    parser.add_argument("--out", type=Path, default=Path("solutions.jsonl"), help="default: %(default)s")
    a = parser.parse_args(argv)
    try:
        count, without = convert(load_recipe(a.recipe, a.set, a.seed), a.out, a.column)
    except EmpgError as error:
        print(f"error: {' '.join(safe(str(error)).split())}", file=sys.stderr)
        return error.exit_code
    print(f"{count} rationales in {a.out}, {without} problems without a worked solution")
    return 0


if __name__ == "__main__":
    sys.exit(main())
