"""Reasoning Gym as a data source: ``gym:TASK`` or ``gym:TASK?PARAMETER=VALUE&...``.

Entries are generated in the worker process that also scores them. It fixes the hash seed and the global
random generators, so a task always yields the same entries, and the library is never imported here. Only
entries whose own answer scores 1 after a round trip through JSON are used, since a rollout file carries
exactly that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any
from urllib.parse import parse_qsl

from empg_lite.core.errors import DataError, GraderUnusable, MissingInput
from empg_lite.core.rationale import Problem, problem_id
from empg_lite.recipe.schema import GYM
from empg_lite.rewards.worker.pool import Reply, WorkerPool

#: Size and first seed of each split; entry i of a task is generated from seed + i.
SPLITS = {"train": (1_000, 0), "test": (200, 1_000_000)}
_ENTRY_SECONDS = 60.0
_WORKERS = 2
#: Entries generated first: a task is rejected if none of them is usable.
_PROBE = 8


def parse_source(source: str) -> tuple[str, dict[str, Any]]:
    """Task and parameters of ``gym:TASK?NAME=VALUE&...``; a value is JSON if it parses, else text.

    Raises:
        ValueError: it is malformed.

    >>> parse_source("gym:chain_sum?min_terms=2&max_terms=4")
    ('chain_sum', {'min_terms': 2, 'max_terms': 4})
    """
    task, question_mark, query = source.removeprefix(GYM).partition("?")
    if not task.isidentifier():
        raise ValueError(f"no task in {source!r}: write it like gym:chain_sum?min_terms=2")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(question_mark))
    except ValueError:
        raise ValueError(f"{query!r} is not NAME=VALUE&NAME=VALUE") from None
    names = [name for name, _ in pairs]
    for name in names:
        if name in ("seed", "size"):
            raise ValueError(f"{name} is fixed by the split")
        if names.count(name) > 1:
            raise ValueError(f"{name} is given twice")
    return task, {name: _value(text) for name, text in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def gym_problems(source: str, split: str) -> tuple[list[Problem], dict[str, int]]:
    """The problems of a split, each text once, and the number of dropped entries by cause.

    ``Problem.meta["gym"]`` holds what reward ``gym`` needs: ``task``, ``params``, the entry's ``metadata``.

    Raises:
        MissingInput: Reasoning Gym is not installed, or no such split.
        DataError: no such task or parameter, or a task whose entries cannot be scored from a file.
    """
    if split not in SPLITS:
        raise MissingInput(f"no split {split!r}", "data.split", f"use {' and '.join(SPLITS)}")
    if find_spec("reasoning_gym") is None:
        raise MissingInput("Reasoning Gym is not installed", source, "pip install 'empg-lite[gym]'")
    try:
        task, params = parse_source(source)
    except ValueError as error:
        raise DataError(str(error), "data.source") from None
    entries, unusable = _entries(source, task, params, split)
    problems: dict[str, Problem] = {}
    for entry in entries:
        question = entry["question"]
        meta = {"gym": {"task": task, "params": params, "metadata": entry["metadata"]}}
        problem = Problem(problem_id(question), question, entry["answer"], meta)
        problems.setdefault(problem.id, problem)
    return list(problems.values()), {"duplicate": len(entries) - len(problems), "no_answer": unusable}


def _entries(
    source: str, task: str, params: Mapping[str, Any], split: str
) -> tuple[list[dict[str, Any]], int]:
    size, seed = SPLITS[split]
    setup = {"kind": "gym", "task": task, "params": params, "seed": seed, "size": size}
    pool = WorkerPool(workers=_WORKERS, time_limit=_ENTRY_SECONDS, memory_limit=1 << 30, setup=setup)
    try:
        replies = pool.run([{"op": "entry", "index": index} for index in range(_PROBE)])
        if all("entry" not in reply.result for reply in replies):
            raise _unusable(task, source, replies[0])
        replies += pool.run([{"op": "entry", "index": index} for index in range(_PROBE, size)])
    except GraderUnusable as error:  # the task does not load
        raise DataError(error.what, "data.source", error.todo) from None
    finally:
        pool.close()
    for index, reply in enumerate(replies):
        if reply.failure:
            what = f"entry {index} cannot be generated: {_why(reply)}"
            raise DataError(what, source, "choose easier parameters")
        if reply.result.get("altogether"):
            raise _unusable(task, source, reply)
    entries = [reply.result["entry"] for reply in replies if "entry" in reply.result]
    return entries, len(replies) - len(entries)


def _unusable(task: str, source: str, reply: Reply) -> DataError:
    what = f"the task {task} cannot be used: {_why(reply)}"
    return DataError(what, source, "docs/rewards.md lists the unusable tasks")


def _why(reply: Reply) -> str:
    return str(reply.error or reply.result.get("refused") or reply.failure)
