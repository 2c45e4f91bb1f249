"""From a named source to problems: which rows train, which are held out, in which order.

Every shuffle here sorts by a hash of the problem's text. The order then depends on no library's generator,
and a row added to a file moves hardly any other to another side. Evaluation and validation rows are the same
under every ``run.seed``: seeds can be compared, and no adapter is tested on what another seed trained it on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from empg_lite.core.bundled import BUNDLED
from empg_lite.core.errors import DataError, MissingInput
from empg_lite.core.rationale import Problem, problem_id
from empg_lite.core.safe_text import encodable
from empg_lite.data.files import Row, find_file, read_rows
from empg_lite.data.gym import gym_problems
from empg_lite.data.tiny import DIFFICULTY, tiny_problems
from empg_lite.recipe.schema import GYM, DataSection, Recipe
from empg_lite.rewards.functions import unreadable_gold
from empg_lite.rewards.spec import parse_spec

_MATH = ("DigitalLearningGmbH/MATH-lighteval", None)
_HUB = {"gsm8k": ("openai/gsm8k", "main"), "math": _MATH, "math-hard": _MATH}
_QUESTION_COLUMNS = ("question", "problem", "prompt")
_ANSWER_COLUMNS = ("gold", "answer", "solution")
_MATH_HARD_LEVEL = "Level 5"


@dataclass(frozen=True)
class Splits:
    """The rows of a run; no problem stands in two of them.

    Attributes:
        train, validation: in file order; validation is held out of the training rows.
        evaluation: what accuracies are reported on.
        dropped: how many rows were left out because they were a ``duplicate`` of an earlier one, an
            ``evaluation`` row among the training rows, published with ``no_answer``, or ``bad`` where
            ``data.skip_bad_rows`` leaves them out.
    """

    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]
    evaluation: tuple[Problem, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)


def load_splits(recipe: Recipe) -> Splits:
    """Training, validation and evaluation rows of a recipe.

    Raises:
        MissingInput: a file or dataset is not there.
        DataError: naming ``file:line: field``, or that no training row is left.
    """
    data = recipe.data
    if data.path and not data.eval_path and not os.path.isdir(data.path):
        rows, dropped = _read(data, data.split, data.path)
        train, evaluation = _cut(rows, _evaluation_size(len(rows)), "evaluation")
    else:
        train, dropped = _read(data, data.split, data.path)
        evaluation, also_dropped = _read(data, data.eval_split, data.eval_path or data.path)
        dropped += also_dropped
    shared = {problem.id for problem in find_overlap(train, evaluation)}
    train = [problem for problem in train if problem.id not in shared]
    dropped += Counter(evaluation=len(shared))
    held_out = min(100, len(train) // 10) if data.validation is None else data.validation
    if not train:
        raise DataError(
            f"no training row is left, {len(shared)} are evaluation rows", data.path or data.source
        )
    if held_out >= len(train):
        what = f"{held_out} of {len(train)} training rows would be held out"
        raise DataError(what, f"{data.path or data.source}: data.validation", "lower it, or bring more rows")
    train, validation = _cut(train, held_out, "validation")
    return Splits(tuple(train), tuple(validation), tuple(evaluation), dict(dropped))


def load_problems(data: DataSection, split: str) -> list[Problem]:
    """The problems of one split, in file order, each text once.

    ``data.split`` and ``data.eval_split`` are what training and evaluation read (validation rows included);
    another name is looked up in the folder or on the hub.

    Raises:
        MissingInput: there is no such split.
        DataError: naming ``file:line: field``.
    """
    single = data.path is not None and not os.path.isdir(data.path)
    if single and split not in (data.split, data.eval_split):
        known = f"{data.split} and {data.eval_split}"
        raise MissingInput(
            f"no split {split!r}", f"{data.path}", f"a single file holds {known}; name a folder"
        )
    if single and not data.eval_path:
        rows, _ = _read(data, data.split, data.path)
        train, evaluation = _cut(rows, _evaluation_size(len(rows)), "evaluation")
        return train if split == data.split else evaluation
    evaluates = split == data.eval_split and split != data.split
    return _read(data, split, (data.eval_path if evaluates else None) or data.path)[0]


def load_solutions(data: DataSection, column: str | None = None) -> dict[str, str]:
    """Worked solutions of the training rows, as they stand in the file, by problem id.

    Args:
        column: where they stand; None is ``solution``, or else where the answers are.

    Raises:
        MissingInput: there is no such split, or its problems come without files.
        DataError: naming ``file:line: field``.
    """
    if data.source in BUNDLED or data.source.startswith(GYM):
        what = f"the {data.source} problems come without written solutions"
        raise MissingInput(what, "data.source", "name a source with files, as gsm8k or local")
    found: dict[str, str] = {}
    for row in _rows(data, data.split, data.path):
        question = row.fields[_column(row, data.question_column, _QUESTION_COLUMNS, "question")]
        named = column or ("solution" if "solution" in row.fields else data.answer_column)
        cell = row.fields[_column(row, named, _ANSWER_COLUMNS, "answer")]
        if isinstance(question, str) and isinstance(cell, str):
            found.setdefault(problem_id(question.strip()), cell.strip())
    return found


def digest_of(problems: Sequence[Problem]) -> str:
    """SHA-256 of the questions and golds, in their order."""
    text = json.dumps([(p.id, p.gold) for p in problems])  # an id is a hash of the question
    return hashlib.sha256(text.encode()).hexdigest()


def subset(problems: Sequence[Problem], limit: int | None) -> list[Problem]:
    """At most ``limit`` problems, in file order: always the same ones, and not the first of a sorted file."""
    return _cut(problems, min(limit, len(problems)), "subset")[1] if limit is not None else list(problems)


def find_overlap(a: Iterable[Problem], b: Iterable[Problem]) -> list[Problem]:
    """The problems of ``a`` that ``b`` holds too, whatever the case, spacing and width of their letters."""
    known = {_normalized(problem.question) for problem in b}
    return [problem for problem in a if _normalized(problem.question) in known]


class ProblemStream:
    """Endless problems, each epoch in a fresh seeded order. The position is the whole state.

    A step never holds a problem twice: at the seam of two epochs one that has just been taken is passed over.
    """

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self._problems = tuple(problems)
        self._seed = seed
        self._epoch, self._order = -1, self._problems

    def __len__(self) -> int:
        """Problems of one epoch."""
        return len(self._problems)

    def take(self, position: int, n: int) -> list[Problem]:
        """The ``n`` problems of the step that begins at ``position`` (problems taken before it).

        Raises:
            DataError: there are fewer than ``n`` problems.
        """
        if n > len(self._problems):
            what = f"{n} problems a step, and {len(self._problems)} training rows"
            raise DataError(what, "sampler.problems_per_step", "lower it, or bring more rows")
        taken: dict[str, Problem] = {}
        while len(taken) < n:
            problem = self._at(position)
            taken.setdefault(problem.id, problem)
            position += 1
        return list(taken.values())

    def _at(self, position: int) -> Problem:
        epoch, index = divmod(position, len(self._problems))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, tuple(_shuffled(self._problems, f"{self._seed}/{epoch}"))
        return self._order[index]


def _shuffled(problems: Iterable[Problem], salt: str) -> list[Problem]:
    """A permutation that depends on the salt and the texts only."""
    return sorted(problems, key=lambda p: hashlib.sha256(f"{salt}/{p.id}".encode()).digest())


def _cut(problems: Sequence[Problem], count: int, salt: str) -> tuple[list[Problem], list[Problem]]:
    """Hold out the last ``count`` problems of a shuffle; both parts stay in file order."""
    held = {problem.id for problem in _shuffled(problems, salt)[len(problems) - count :]}
    return [p for p in problems if p.id not in held], [p for p in problems if p.id in held]


def _evaluation_size(rows: int) -> int:
    return min(200, max(1, rows // 10))


def _normalized(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# --- rows -----------------------------------------------------------------------------------------


def _read(data: DataSection, split: str, path: str | None) -> tuple[list[Problem], Counter[str]]:
    """The problems of a split, each text once, and how many rows were dropped for which reason."""
    if data.source in BUNDLED:
        return _bundled(data.source, split), Counter()
    if data.source.startswith(GYM):
        problems, left_out = gym_problems(data.source, split)
        return problems, Counter(left_out)
    rows = _rows(data, split, path)
    seen: dict[str, tuple[Problem, str]] = {}
    dropped: Counter[str] = Counter()
    broken: list[DataError] = []
    reward = parse_spec(data.reward).correctness if data.reward else None
    for row in rows:
        try:
            if row.error:
                raise row.error
            problem = _problem(row, data)
            if problem and reward and (why := unreadable_gold(reward, problem.gold, problem.question)):
                raise DataError(why, f"{row.where}: answer", "correct it, or name another data.reward")
        except DataError as error:
            broken.append(error)
            continue
        if data.source == "math-hard" and _level(row) != _MATH_HARD_LEVEL:
            continue
        if problem is None:
            dropped["no_answer"] += 1
        elif problem.id not in seen:
            seen[problem.id] = problem, row.where
        elif problem.gold == seen[problem.id][0].gold:
            dropped["duplicate"] += 1
        else:
            what = f"the same question has another answer than at {seen[problem.id][1]}"
            broken.append(DataError(what, f"{row.where}: answer", "remove one of the rows"))
    if broken and not data.skip_bad_rows:
        raise _all_of(broken)
    dropped["bad"] += len(broken)
    if not seen:
        what = f"no row has {'an answer' if data.source == 'math' else f'the level {_MATH_HARD_LEVEL!r}'}"
        raise DataError(what, f"{rows[0].where}: level", "check that this is the right file")
    return [problem for problem, _ in seen.values()], dropped


#: Unusable rows that one error names.
MOST_NAMED = 20


def _all_of(broken: Sequence[DataError]) -> DataError:
    """The first error of a file's rows, and where the others are."""
    first, others = broken[0], broken[1:]
    if not others:
        return first
    places = ", ".join(e.where.split(": ")[0].rpartition(":")[2] for e in others[: MOST_NAMED - 1])
    more = f", and {len(others) - MOST_NAMED + 1} more" if len(others) >= MOST_NAMED else ""
    todo = f"{first.todo}; also unusable: lines {places}{more}; data.skip_bad_rows leaves them out"
    return DataError(first.what, first.where, todo)


def _rows(data: DataSection, split: str, path: str | None) -> list[Row]:
    """The rows of a split as they stand in its file, or on the hub where no path is set."""
    if not path:
        return _hub_rows(data, split)
    return read_rows(find_file(Path(path), split, _file_stem(data.source)))


def _file_stem(source: str) -> str:
    return "math" if source == "math-hard" else source.rpartition("/")[2]


def _bundled(name: str, split: str) -> list[Problem]:
    try:
        return tiny_problems(split, DIFFICULTY[name])
    except ValueError as error:
        raise MissingInput(str(error), "data.split", "use train and test") from None


def _hub_rows(data: DataSection, split: str) -> list[Row]:
    import datasets

    name, config = _HUB.get(data.source, (data.source, data.hub_config))
    try:
        table = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        todo = "put its files into a folder and set data.path, or go online"
        raise MissingInput(f"dataset {name} cannot be loaded ({reason})", "data.source", todo) from error
    rows = [Row(fields, f"{name}/{split}:{number}") for number, fields in enumerate(table, 1)]
    if not rows:
        raise DataError("no rows in the dataset", f"{name}/{split}:1", "name another data.split")
    return rows


def _problem(row: Row, data: DataSection) -> Problem | None:
    """A row as a problem; None for the rows of MATH whose solution was published with an empty box.

    Raises:
        DataError: naming the place and the column.
    """
    asked = _column(row, data.question_column, _QUESTION_COLUMNS, "question")
    answered = _column(row, data.answer_column, _ANSWER_COLUMNS, "answer")
    question = row.fields[asked]
    if not isinstance(question, str):
        what = f"the question is {_kind(question)}, not text"
        raise DataError(what, f"{row.where}: {asked}", "write it as text, or name another column")
    question = _checked_text(question, f"{row.where}: {asked}")
    gold = _gold(row.fields[answered], answered, data.source, f"{row.where}: {answered}")
    if gold is None:
        return None
    subject = row.fields.get("subject", row.fields.get("type"))
    meta = {"level": _level(row), "subject": subject if isinstance(subject, str) else None}
    known = {k: v for k, v in meta.items() if v}
    if data.source == "local":  # what else your rows say is for your own reward function
        read = {asked, answered, *_QUESTION_COLUMNS, *_ANSWER_COLUMNS}
        others = {k: v for k, v in row.fields.items() if k not in read and _is_json(v)}
        known = others | known
    return Problem(problem_id(question), question, gold, known)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _column(row: Row, named: str | None, known: tuple[str, ...], what: str) -> str:
    candidates = (named,) if named else known
    for column in candidates:
        if column in row.fields:
            return column
    here = ", ".join(map(repr, list(row.fields)[:8])) or "none"
    raise DataError(f"no column {' or '.join(candidates)}", f"{row.where}: {what}",
                    f"columns here: {here}; name one in data.{what}_column")  # fmt: skip


def _gold(value: Any, column: str, source: str, where: str) -> str | None:
    """The final answer in an answer cell: behind ``####``, else in the last box, else the whole cell."""
    if isinstance(value, float) and math.isfinite(value):
        value = (
            int(value) if value.is_integer() else value
        )  # Parquet makes integers floats beside an empty cell
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
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
        raise DataError(what, where, "mark the answer, or name another data.answer_column")
    return text


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` (braces matched) or ``\\boxed x``; None where there is none.

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
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # a brace behind a backslash is text
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return rest[1 : brace.start()]
    return None


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
        raise DataError("half of a surrogate pair, which is no text", where, "write the row again as UTF-8")
    return clean


def _kind(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "missing"
    return {bool: "true or false", dict: "an object", list: "a list"}.get(type(value), f"{value!r}"[:40])
