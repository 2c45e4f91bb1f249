"""Turn worked solutions into a rollout file that `empg-lite score` grades and `empg-lite fit` learns from.

    python scripts/solutions_to_rollouts.py --recipe gsm8k-0.5b --set data.path=FOLDER --out solutions.jsonl
    empg-lite score solutions.jsonl
    empg-lite fit solutions.jsonl --recipe gsm8k-0.5b --output-dir runs/from-solutions

One rationale per problem of the recipe's training split (without validation and evaluation rows), in the
order given by the recipe's seed. The text is the row's `solution`, or its answer cell if that holds more than
the answer. GSM8K's calculator annotations (`<<48/2=24>>`) are removed, so that the model does not learn to
write them. Nothing is graded here: `score` does that, with the recipe's reward.
"""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import suppress
from pathlib import Path

from empg_lite.core.bundled import PROBLEMS
from empg_lite.core.cells import ANSWER_COLUMNS, QUESTION_COLUMNS, cell, question_text, solution_text
from empg_lite.core.errors import DataError, EmpgError, MissingInput, UsageError
from empg_lite.core.rationale import Problem, Rationale, problem_id
from empg_lite.core.safe_text import safe
from empg_lite.data.rows import column_of, source_rows
from empg_lite.data.sources import ProblemStream, load_splits
from empg_lite.policy.templates import Template, load_template
from empg_lite.recipe.file import load_recipe
from empg_lite.recipe.schema import GYM, DataSection, Recipe
from empg_lite.run import store
from empg_lite.run.rollouts import RolloutHeader, encode_rollouts

_CALCULATOR = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")


def load_solutions(data: DataSection, column: str | None = None) -> dict[str, str]:
    """Worked solutions of the training rows, as stored, by problem ID.

    Args:
        column: where they are; None means ``solution``, or else the answer column.

    Raises:
        MissingInput: no such split, or a source without files.
        DataError: naming ``file:line: field``.
    """
    if data.source in PROBLEMS or data.source.startswith(GYM):
        what = f"the {data.source} problems have no written solutions"
        raise MissingInput(what, "data.source", "use a source with files, such as gsm8k or local")
    found: dict[str, str] = {}
    for row in source_rows(data, data.split, data.path).rows:
        if row.error:  # load_splits has refused it, unless data.skip_bad_rows says otherwise
            continue
        asked = column_of(row, data.question_column, QUESTION_COLUMNS, "question")
        named = column or ("solution" if "solution" in row.fields else data.answer_column)
        solution = solution_text(cell(row.fields, column_of(row, named, ANSWER_COLUMNS, "answer")))
        with suppress(DataError):
            question = question_text(cell(row.fields, asked), f"{row.where}: {asked}")
            if solution is not None:
                found.setdefault(problem_id(question), solution.strip())
    return found


def as_completion(solution: str, prompt: str) -> str:
    """A solution as the model would write it after the prompt: with a space before the first word."""
    text = _CALCULATOR.sub("", solution).strip()
    return text if prompt[-1:].isspace() else f" {text}"


def rationale(problem: Problem, solution: str, template: Template) -> Rationale:
    """An ungraded, text-only rationale: `fit` tokenizes it."""
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
        UsageError: another file exists at ``out``.
        MissingInput, DataError: from `load_splits` and `load_solutions`, or there is no solution at all.
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
        raise DataError(f"none of {len(problems)} rows contains more than its answer", where, "set --column")
    header = RolloutHeader("written", template=template.sha256, reward_name=recipe.data.reward)
    text = encode_rollouts(header, rows)
    if out.exists() and out.read_bytes() != text.encode():
        raise UsageError("another file exists", str(out), "choose another --out")
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
    parser.add_argument("--column", help="column of the solutions (default: solution, or the answer column)")
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
