"""The rows of a named source as problems: which column is the question, and what the final answer is."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.core.bundled import PROBLEMS
from empg_lite.core.errors import DataError, MissingInput
from empg_lite.core.rationale import Problem, problem_id
from empg_lite.core.safe_text import encodable
from empg_lite.data.files import Row, find_file, read_rows
from empg_lite.recipe.schema import GYM

if TYPE_CHECKING:
    from empg_lite.recipe.schema import DataSection

QUESTION_COLUMNS = ("question", "problem", "prompt")
ANSWER_COLUMNS = ("gold", "answer", "solution")
_MATH = ("DigitalLearningGmbH/MATH-lighteval", None)
_HUB = {"gsm8k": ("openai/gsm8k", "main"), "math": _MATH, "math-hard": _MATH}
_MATH_HARD_LEVEL = "Level 5"
#: Unusable rows that one error names.
MOST_NAMED = 20


def read_problems(data: DataSection, split: str, path: str | None) -> tuple[list[Problem], Counter[str]]:
    """The problems of a split, each text once, and the number of dropped rows by cause.

    Raises:
        MissingInput: a file, dataset or split is missing.
        DataError: naming ``file:line: field``.
    """
    if data.source in PROBLEMS:
        from empg_lite.data.tiny import DIFFICULTY, tiny_problems

        return tiny_problems(split, DIFFICULTY[data.source]), Counter()
    if data.source.startswith(GYM):
        from empg_lite.data.gym import gym_problems

        problems, left_out = gym_problems(data.source, split)
        return problems, Counter(left_out)
    rows = source_rows(data, split, path)
    kept: dict[str, tuple[Problem, str]] = {}
    dropped: Counter[str] = Counter()
    broken: list[DataError] = []
    for row in rows:
        try:
            problem = _checked_problem(row, data)
            if data.source == "math-hard" and _level(row) != _MATH_HARD_LEVEL:
                continue
            if problem is None:
                dropped["no_answer"] += 1
            elif _is_new(problem, row.where, kept):
                kept[problem.id] = problem, row.where
            else:
                dropped["duplicate"] += 1
        except DataError as error:
            broken.append(error)
    if broken and not data.skip_bad_rows:
        raise _combined(broken)
    dropped["bad"] += len(broken)
    if not kept:
        what = f"no row has {'an answer' if data.source == 'math' else f'the level {_MATH_HARD_LEVEL!r}'}"
        raise DataError(what, f"{rows[0].where}: level", "check that this is the right file")
    return [problem for problem, _ in kept.values()], dropped


def source_rows(data: DataSection, split: str, path: str | None) -> list[Row]:
    """The rows of a split as stored: in a local file, or on the hub if ``path`` is empty."""
    if path:
        stem = "math" if data.source == "math-hard" else data.source.rpartition("/")[2]
        return read_rows(find_file(Path(path), split, stem))
    import datasets

    name, config = _HUB.get(data.source, (data.source, data.hub_config))
    try:
        table = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        todo = "put its files in a folder and set data.path, or go online"
        raise MissingInput(f"dataset {name} cannot be loaded ({reason})", "data.source", todo) from error
    rows = [Row(fields, f"{name}/{split}:{number}") for number, fields in enumerate(table, 1)]
    if not rows:
        raise DataError("no rows in the dataset", f"{name}/{split}:1", "choose another data.split")
    return rows


def column_of(row: Row, named: str | None, known: tuple[str, ...], what: str) -> str:
    """The column to read: ``named`` by the recipe, else the first of ``known``.

    Raises:
        DataError: the row does not have it; ``what`` is ``question`` or ``answer``.
    """
    candidates = (named,) if named else known
    for column in candidates:
        if column in row.fields:
            return column
    here = ", ".join(map(repr, list(row.fields)[:8])) or "none"
    todo = f"columns here: {here}; set data.{what}_column"
    raise DataError(f"no column {' or '.join(candidates)}", f"{row.where}: {what}", todo)


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` (braces matched) or ``\\boxed x``; None if there is none.

    >>> last_boxed(r"first \\boxed{1}, then \\boxed{\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    rest = text[start + len("\\boxed") :].lstrip()
    if not rest.startswith("{"):
        token = re.match(r"\\[A-Za-z]+|[^\s{}$\\]", rest)
        return token.group() if token else None
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # an escaped brace is text
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return rest[1 : brace.start()]
    return None


# --- one row --------------------------------------------------------------------------------------


def _checked_problem(row: Row, data: DataSection) -> Problem | None:
    """``_problem``, with a gold answer that the recipe's reward can read.

    Raises:
        DataError: naming the place and the column.
    """
    if row.error:
        raise row.error
    problem = _problem(row, data)
    if problem and data.reward:
        from empg_lite.rewards import parse_spec

        if why := parse_spec(data.reward).kind.unreadable_gold(problem.gold, problem.question):
            raise DataError(why, f"{row.where}: answer", "correct it, or choose another data.reward")
    return problem


def _problem(row: Row, data: DataSection) -> Problem | None:
    """A row as a problem; None for the rows of MATH whose solution was published with an empty box."""
    asked = column_of(row, data.question_column, QUESTION_COLUMNS, "question")
    answered = column_of(row, data.answer_column, ANSWER_COLUMNS, "answer")
    question = row.fields[asked]
    if not isinstance(question, str):
        what = f"the question is {_kind(question)}, not text"
        raise DataError(what, f"{row.where}: {asked}", "write it as text, or choose another column")
    question = _checked_text(question, f"{row.where}: {asked}")
    gold = _gold(row.fields[answered], answered, data.source, f"{row.where}: {answered}")
    if gold is None:
        return None
    subject = row.fields.get("subject", row.fields.get("type"))
    meta = {"level": _level(row), "subject": subject if isinstance(subject, str) else None}
    meta = {k: v for k, v in meta.items() if v}
    if data.source == "local":  # the other columns are for the user's reward function
        read = {asked, answered, *QUESTION_COLUMNS, *ANSWER_COLUMNS}
        meta = {k: v for k, v in row.fields.items() if k not in read and _is_json(v)} | meta
    return Problem(problem_id(question), question, gold, meta)


def _gold(value: Any, column: str, source: str, where: str) -> str | None:
    """The final answer in an answer cell: after ``####``, else in the last box, else the whole cell."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        # Parquet stores integers as floats in a column with empty cells.
        value = str(int(value) if isinstance(value, float) and value.is_integer() else value)
    if not isinstance(value, str):
        raise DataError(f"the answer is {_kind(value)}, not text or a number", where, "write it as text")
    text = _checked_text(value, where)
    if "####" in text:
        return _checked_text(text.rpartition("####")[2], where)
    boxed = last_boxed(text)
    if boxed == "" and source in ("math", "math-hard"):
        return None
    if boxed is not None:
        return _checked_text(boxed, where)
    if column == "solution" or (source == "gsm8k" and "\n" in text):
        what = "a solution without a final answer: neither #### nor \\boxed{}"
        raise DataError(what, where, "mark the answer, or choose another data.answer_column")
    return text


def _is_new(problem: Problem, where: str, kept: dict[str, tuple[Problem, str]]) -> bool:
    """Whether this question was not seen before; False for an exact duplicate.

    Raises:
        DataError: it was seen with another answer.
    """
    if problem.id not in kept:
        return True
    earlier, at = kept[problem.id]
    if problem.gold != earlier.gold:
        what = f"the same question has another answer at {at}"
        raise DataError(what, f"{where}: answer", "remove one of the rows")
    return False


def _combined(broken: Sequence[DataError]) -> DataError:
    """The first of several row errors, with the locations of the others."""
    first, others = broken[0], broken[1:]
    if not others:
        return first
    places = ", ".join(e.where.split(": ")[0].rpartition(":")[2] for e in others[: MOST_NAMED - 1])
    more = f", and {len(others) - MOST_NAMED + 1} more" if len(others) >= MOST_NAMED else ""
    todo = f"{first.todo}; also unusable: lines {places}{more}; data.skip_bad_rows skips them"
    return DataError(first.what, first.where, todo)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _level(row: Row) -> str | None:
    level = row.fields.get("level")
    if isinstance(level, int) and not isinstance(level, bool):
        return f"Level {level}"
    return level if isinstance(level, str) else None


def _checked_text(text: str, where: str) -> str:
    clean = text.strip()
    if not clean or clean.lower() == "nan":
        raise DataError("the cell is empty", where, "fill it, or remove the row")
    if not encodable(clean):
        raise DataError("the text contains an unpaired surrogate", where, "rewrite the row as UTF-8")
    return clean


def _kind(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "missing"
    return {bool: "true or false", dict: "an object", list: "a list"}.get(type(value), f"{value!r}"[:40])
