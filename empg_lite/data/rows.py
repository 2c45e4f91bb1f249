"""The rows of a named source as problems: which column is the question, and what the final answer is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.core.bundled import PROBLEMS
from empg_lite.core.cells import (
    ANSWER_COLUMNS,
    QUESTION_COLUMNS,
    as_json,
    cell,
    checked_text,
    column_names,
    find_column,
    gold_text,
    has_system_message,
    question_text,
)
from empg_lite.core.errors import DataError, MissingInput
from empg_lite.core.rationale import Problem, problem_id
from empg_lite.data.files import Row, Table, find_files, read_files
from empg_lite.recipe.schema import GYM

if TYPE_CHECKING:
    from empg_lite.recipe.schema import DataSection

#: Columns that say no more than the question and the answer do: not in ``Problem.meta``.
_NOT_META = ("question", "problem", "prompt", "gold", "answer", "solution")
_MATH = ("DigitalLearningGmbH/MATH-lighteval", None)
_HUB = {"gsm8k": ("openai/gsm8k", "main"), "math": _MATH, "math-hard": _MATH}
_MATH_HARD_LEVEL = "Level 5"
#: Unusable rows that one error names.
MOST_NAMED = 20


@dataclass(frozen=True, slots=True)
class Loaded:
    """The problems of a split, each text once.

    Attributes:
        dropped: rows left out, by cause.
        notes: what was noticed about the files and their rows.
    """

    problems: list[Problem]
    dropped: Counter[str] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()


def read_problems(data: DataSection, split: str, path: str | None) -> Loaded:
    """The problems of a split.

    Raises:
        MissingInput: a file, dataset or split is missing.
        DataError: naming ``file:line: field``.
    """
    if data.source in PROBLEMS:
        from empg_lite.data.tiny import DIFFICULTY, tiny_problems

        return Loaded(tiny_problems(split, DIFFICULTY[data.source]))
    if data.source.startswith(GYM):
        from empg_lite.data.gym import gym_problems

        problems, left_out = gym_problems(data.source, split)
        return Loaded(problems, Counter(left_out))
    table = source_rows(data, split, path)
    kept: dict[str, tuple[Problem, str]] = {}
    dropped: Counter[str] = Counter()
    broken: list[DataError] = []
    for row in table.rows:
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
        raise combined(broken, "; data.skip_bad_rows skips them")
    dropped["bad"] += len(broken)
    if not kept:
        what = f"no row has {'an answer' if data.source == 'math' else f'the level {_MATH_HARD_LEVEL!r}'}"
        raise DataError(what, f"{table.rows[0].where}: level", "check that this is the right file")
    notes = (*table.notes, *_system_messages(table.rows, data, split))
    return Loaded([problem for problem, _ in kept.values()], dropped, notes)


def source_rows(data: DataSection, split: str, path: str | None) -> Table:
    """The rows of a split as stored: in local files, or on the hub if ``path`` is empty."""
    if path:
        stem = "math" if data.source == "math-hard" else data.source.rpartition("/")[2]
        return read_files(find_files(Path(path), split, stem))
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
    return Table(rows)


def column_of(row: Row, named: str | None, known: tuple[str, ...], what: str) -> str:
    """The column to read: ``named`` by the recipe, else the first of ``known``; either may be a dotted path.

    Raises:
        DataError: the row does not have it; ``what`` is ``question`` or ``answer``.
    """
    candidates = (named,) if named else known
    if column := find_column(row.fields, candidates, answer=what == "answer"):
        return column
    here = ", ".join(map(repr, list(column_names(row.fields))[:8])) or "none"
    todo = f"columns here: {here}; set data.{what}_column"
    raise DataError(f"no column {' or '.join(candidates)}", f"{row.where}: {what}", todo)


def _system_messages(rows: Sequence[Row], data: DataSection, split: str) -> list[str]:
    """A note if the questions come with system messages, which are not part of a problem."""
    known = (data.question_column,) if data.question_column else QUESTION_COLUMNS
    asked = ((row, find_column(row.fields, known)) for row in rows if not row.error)
    count = sum(has_system_message(cell(row.fields, column)) for row, column in asked if column)
    return (
        [f"{count} questions of {split} come with a system message, left out: data.prompt sets it"]
        if count
        else []
    )


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
    question = question_text(cell(row.fields, asked), f"{row.where}: {asked}")
    where = f"{row.where}: {answered}"
    gold = gold_text(cell(row.fields, answered), answered, where, worked=data.source == "gsm8k")
    if not gold and data.source in ("math", "math-hard"):
        return None
    gold = checked_text(gold, where)
    subject = row.fields.get("subject", row.fields.get("type"))
    meta = {"level": _level(row), "subject": subject if isinstance(subject, str) else None}
    meta = {k: v for k, v in meta.items() if v}
    if data.source == "local":  # the other columns are for the user's reward function
        meta = _other_columns(row, {asked, answered, *_NOT_META}) | meta
    return Problem(problem_id(question), question, gold, meta)


def _other_columns(row: Row, read: set[str]) -> dict[str, Any]:
    """The columns not yet ``read``, as JSON types; what has none, such as an image, is left out."""
    found = {}
    for name, value in row.fields.items():
        if name not in read:
            with suppress(TypeError, ValueError, RecursionError):
                found[name] = as_json(value)
    return found


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
        raise DataError(what, f"{where}: answer", "correct one of the two")
    return False


def combined(broken: Sequence[DataError], hint: str = "") -> DataError:
    """The first of several row errors, with the locations of the others, and a hint for them."""
    first, others = broken[0], broken[1:]
    if not others:
        return first
    places = ", ".join(e.where.split(": ")[0].rpartition(":")[2] for e in others[: MOST_NAMED - 1])
    more = f", and {len(others) - MOST_NAMED + 1} more" if len(others) >= MOST_NAMED else ""
    return DataError(first.what, first.where, f"{first.todo}; also unusable: lines {places}{more}{hint}")


def _level(row: Row) -> str | None:
    level = row.fields.get("level")
    if isinstance(level, int) and not isinstance(level, bool):
        return f"Level {level}"
    return level if isinstance(level, str) else None
