"""The user's own reward function: read and hashed here, run in the worker from exactly the hashed bytes.

The parent never runs it. It reads the file once, pins its SHA-256 into the spec, and hands these very bytes
to the worker, so that nothing can change between the check and the use. What the file imports is not pinned.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.abc
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from types import CodeType
from typing import Any

from empg_lite.core.errors import DataError, EmpgError, MissingInput
from empg_lite.rewards.spec import PythonRef, parse_spec

MODULE = "empg_user_reward"


@dataclass(frozen=True, slots=True)
class UserCode:
    """A file's bytes, and the function in it; ``ref`` is pinned."""

    ref: PythonRef
    source: bytes


def read_code(ref: PythonRef, *, repin: bool = False) -> UserCode:
    """The file as it is now.

    Args:
        repin: take it although it is not the file that was pinned.

    Raises:
        MissingInput: there is no such file.
        DataError: it is not Python, lacks the function, or is not the file that was pinned.
    """
    try:
        source = Path(ref.file).read_bytes()
    except OSError as error:
        raise MissingInput(f"reward file cannot be read ({error.strerror})", ref.file) from None
    digest = hashlib.sha256(source).hexdigest()
    if ref.sha256 not in (None, digest) and not repin:
        raise DataError(
            f"the reward file changed: its sha256 is {digest}, {ref.sha256} was recorded",
            f"{ref.file}: data.reward",
            "put the old one back, or name the new one without @sha256; --resume: --allow-change data.reward",
        )
    try:
        names = _top_level_names(ast.parse(source, ref.file))
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        what = error.msg if isinstance(error, SyntaxError) else str(error)
        raise DataError(f"the reward file is not Python: {what}", f"{ref.file}{line}") from None
    if ref.function not in names:
        raise DataError(
            f"the reward file has no function {ref.function!r}",
            ref.file,
            "define `def reward(completion, gold, question, meta)`, or name another as FILE.py:NAME",
        )
    return UserCode(replace(ref, sha256=digest), source)


def worker_setup(code: UserCode) -> dict[str, str]:
    """What a worker is told before its first request; JSON carries no bytes."""
    source = base64.b64encode(code.source).decode("ascii")
    return {"path": code.ref.file, "function": code.ref.function, "source": source}


def pin(text: str, *, repin: bool = False) -> tuple[str, UserCode | None]:
    """A spec with the hash of the user's file in it, and the file; other specs as they are, and None.

    Raises:
        ValueError: it names no reward.
        MissingInput, DataError: see ``read_code``.
    """
    spec = parse_spec(text)
    if spec.python is None:
        return text, None
    code = read_code(spec.python, repin=repin)
    return str(spec.with_python(code.ref)), code


def refuse_code(ref: PythonRef, where: str, kind: type[EmpgError] = DataError) -> EmpgError:
    """What is said where nobody allowed the file to run. Data that ask for code are bad data."""
    code = read_code(ref, repin=True)
    return kind(
        f"the reward would run your code: {ref.file}, function {ref.function}, sha256 {code.ref.sha256}",
        where,
        "read it, then add --allow-code",
    )


def _top_level_names(tree: ast.Module) -> set[str]:
    """Every name that the module itself binds, also inside its if and try blocks."""
    names: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        else:
            waiting += ast.iter_child_nodes(node)
    return names


# --- in the worker --------------------------------------------------------------------------------


class _CheckedBytes(importlib.abc.InspectLoader):
    """Loads a module from bytes in hand; neither the file nor a bytecode cache is looked at again."""

    def __init__(self, source: bytes, path: str) -> None:
        self._source, self._path = source, path

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self._source)

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._source, self._path)


def load_function(setup: Mapping[str, Any]) -> Callable[..., Any]:
    """Run the module of a ``worker_setup`` and take the function out of it.

    Raises:
        Exception: whatever the module raises.
    """
    path, name, source = setup["path"], setup["function"], base64.b64decode(setup["source"])
    spec = importlib.util.spec_from_loader(MODULE, _CheckedBytes(source, path), origin=path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = path
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise TypeError(f"{name} is {type(function).__name__}, not a function")
    return function


def call_function(function: Callable[..., Any], request: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Ask the function: ``{"terms": {"correct": ..., ...}}``, or ``{"error": why}``."""
    try:
        given = function(
            completion=request["completion"],
            gold=request["gold"],
            question=request["question"],
            meta=request["meta"],
        )
        return {"terms": checked_terms(given)}
    except MemoryError:
        raise
    except BaseException as error:  # SystemExit too: a verdict is owed
        return {"error": describe(error, path)}


def checked_terms(given: object) -> dict[str, float]:
    """What a function returned, as terms in [0, 1] with ``correct`` among them.

    Raises:
        TypeError, ValueError: it returned something else.
    """
    if not isinstance(given, dict):
        return {"correct": _checked_number(given, "the function")}
    if "correct" not in given:
        raise ValueError(f"the function returned a dict without 'correct': {sorted(map(str, given))}")
    for name in given:
        if not isinstance(name, str) or not name.isidentifier():
            raise TypeError(f"the function returned a term named {name!r}: names are words")
    return {name: _checked_number(value, f"term {name!r}") for name, value in given.items()}


def _checked_number(value: object, whose: str) -> float:
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, Real):  # a bool is one
        raise TypeError(f"{whose} returned {type(value).__name__}, not a number, a bool or a dict of numbers")
    number = float(value)
    if not math.isfinite(number) or not 0 <= number <= 1:
        raise ValueError(f"{whose} returned {number!r}, which is outside [0, 1]")
    return number


def describe(error: BaseException, path: str) -> str:
    """An exception in one line, with the user's own line that it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return text[:300] + (f" ({Path(path).name}:{lines[-1]})" if lines else "")
