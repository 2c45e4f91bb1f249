"""Splits of a named source: which rows train, which are held out, and in which order.

Every shuffle sorts by a hash of the problem text, so the order does not depend on any library's generator,
and adding a row to a file moves almost no other row to another split. Evaluation and validation rows do not
depend on ``run.seed``: seeds are comparable, and no adapter is tested on another seed's training rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from empg_lite.core.errors import DataError, MissingInput
from empg_lite.data.rows import read_problems

if TYPE_CHECKING:
    from empg_lite.core.rationale import Problem
    from empg_lite.recipe.schema import DataSection, Recipe


@dataclass(frozen=True)
class Splits:
    """The rows of a run; no problem is in two splits.

    Attributes:
        train, validation: in file order; validation is held out of the training rows.
        evaluation: the rows that accuracy is reported on.
        dropped: number of rows left out by cause: a ``duplicate`` of an earlier row, an ``evaluation`` row
            among the training rows, published with ``no_answer``, or ``bad`` (``data.skip_bad_rows``).
        notes: what was noticed about the files, for people.
    """

    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]
    evaluation: tuple[Problem, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load_splits(recipe: Recipe) -> Splits:
    """Training, validation and evaluation rows of a recipe.

    Raises:
        MissingInput: a file or dataset is missing.
        DataError: naming ``file:line: field``, or no training row is left.
    """
    data = recipe.data
    if data.path and not data.eval_path and not os.path.isdir(data.path):
        loaded = read_problems(data, data.split, data.path)
        rows, dropped, notes = loaded.problems, loaded.dropped, loaded.notes
        if len(rows) == 1:
            what = "one row is not enough: it would be held out for evaluation"
            raise DataError(what, data.path, "add rows, or set data.eval_path")
        train, evaluation = _cut(rows, _evaluation_size(len(rows)), "evaluation")
    else:
        loaded = read_problems(data, data.split, data.path)
        held = read_problems(data, data.eval_split, data.eval_path or data.path)
        train, evaluation = loaded.problems, held.problems
        dropped, notes = loaded.dropped + held.dropped, tuple(dict.fromkeys(loaded.notes + held.notes))
    shared = {problem.id for problem in find_overlap(train, evaluation)}
    train = [problem for problem in train if problem.id not in shared]
    dropped += Counter(evaluation=len(shared))
    held_out = min(100, len(train) // 10) if data.validation is None else data.validation
    if not train:
        what = f"no training row is left: all {len(shared)} are also evaluation rows"
        raise DataError(what, data.path or data.source, "choose another data.eval_path or data.eval_split")
    if held_out >= len(train):
        what = f"{held_out} of {len(train)} training rows would be held out"
        raise DataError(what, f"{data.path or data.source}: data.validation", "lower it, or add rows")
    train, validation = _cut(train, held_out, "validation")
    return Splits(tuple(train), tuple(validation), tuple(evaluation), dict(dropped), notes)


def load_problems(data: DataSection, split: str) -> list[Problem]:
    """The problems of one split, in file order, each text once.

    ``data.split`` and ``data.eval_split`` are the training rows (validation included) and the evaluation
    rows; any other name is looked up in the folder or on the hub.

    Raises:
        MissingInput: no such split.
        DataError: naming ``file:line: field``.
    """
    single = data.path is not None and not os.path.isdir(data.path)
    if single and split not in (data.split, data.eval_split):
        todo = f"a single file holds {data.split} and {data.eval_split}; use a folder"
        raise MissingInput(f"no split {split!r}", f"{data.path}", todo)
    if single and not data.eval_path:
        rows = read_problems(data, data.split, data.path).problems
        train, evaluation = _cut(rows, _evaluation_size(len(rows)), "evaluation")
        return train if split == data.split else evaluation
    evaluates = split == data.eval_split and split != data.split
    return read_problems(data, split, (data.eval_path if evaluates else None) or data.path).problems


def digest_of(problems: Sequence[Problem]) -> str:
    """SHA-256 of the questions and gold answers, in order."""
    text = json.dumps([(p.id, p.gold) for p in problems])  # an id is a hash of the question
    return hashlib.sha256(text.encode()).hexdigest()


def subset(problems: Sequence[Problem], limit: int | None) -> list[Problem]:
    """At most ``limit`` problems in file order: always the same ones, spread over the file."""
    return _cut(problems, min(limit, len(problems)), "subset")[1] if limit is not None else list(problems)


def find_overlap(a: Iterable[Problem], b: Iterable[Problem]) -> list[Problem]:
    """The problems of ``a`` that are also in ``b``, ignoring case, spacing and character width."""
    known = {_normalized(problem.question) for problem in b}
    return [problem for problem in a if _normalized(problem.question) in known]


class ProblemStream:
    """An endless stream of problems, reshuffled every epoch. The position is the whole state.

    A step never contains a problem twice: where two epochs meet, one that was just taken is skipped.
    """

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self._problems = tuple(problems)
        # The slots of ``sampler.tries`` drift apart: where epochs meet, they read several in turn.
        self._order = lru_cache(4)(lambda epoch: tuple(_shuffled(self._problems, f"{seed}/{epoch}")))

    def __len__(self) -> int:
        """Problems per epoch."""
        return len(self._problems)

    def take(self, position: int, n: int) -> list[Problem]:
        """The ``n`` problems of the step that starts at ``position`` (the number of problems before it).

        Raises:
            DataError: there are fewer than ``n`` problems.
        """
        if n > len(self._problems):
            what = f"{n} problems per step, but only {len(self._problems)} training rows"
            raise DataError(what, "sampler.problems_per_step", "lower it, or add rows")
        taken: dict[str, Problem] = {}
        while len(taken) < n:
            problem = self.at(position)
            taken.setdefault(problem.id, problem)
            position += 1
        return list(taken.values())

    def at(self, position: int) -> Problem:
        """The problem at a position."""
        epoch, index = divmod(position, len(self._problems))
        return self._order(epoch)[index]


def _shuffled(problems: Iterable[Problem], salt: str) -> list[Problem]:
    """A permutation that depends only on the salt and the problem texts."""
    return sorted(problems, key=lambda p: hashlib.sha256(f"{salt}/{p.id}".encode()).digest())


def _cut(problems: Sequence[Problem], count: int, salt: str) -> tuple[list[Problem], list[Problem]]:
    """Hold out the last ``count`` problems of a shuffle; both parts keep file order."""
    held = {problem.id for problem in _shuffled(problems, salt)[len(problems) - count :]}
    return [p for p in problems if p.id not in held], [p for p in problems if p.id in held]


def _evaluation_size(rows: int) -> int:
    return min(200, max(1, rows // 10))


def _normalized(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
