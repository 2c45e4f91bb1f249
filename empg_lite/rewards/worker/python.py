"""The user's own reward function inside a worker, run from exactly the bytes that were hashed.

``{"op": "call", "completion", "gold", "question", "meta"}`` -> ``{"terms": {name: number}}``.
"""

from __future__ import annotations

import base64
import importlib.abc
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from types import CodeType
from typing import Any

from empg_lite.rewards.worker.main import Answer, Broken

MODULE = "empg_user_reward"


def load(setup: Mapping[str, Any]) -> Answer:
    """Run the user's module; see ``UserCode.worker_setup``."""
    path = setup["path"]
    try:
        function = load_function(setup)
    except BaseException as error:  # including SystemExit
        todo = "repair it; `empg-lite grade --reward python:FILE.py --allow-code` tries it alone"
        raise Broken(f"the reward file cannot be loaded: {describe(error, path)}", path, todo) from None
    return lambda request: call_function(function, request, path)


class _CheckedBytes(importlib.abc.InspectLoader):
    """Loads a module from these bytes; reads neither the file nor a bytecode cache again."""

    def __init__(self, source: bytes, path: str) -> None:
        self._source, self._path = source, path

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self._source)

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._source, self._path)


def load_function(setup: Mapping[str, Any]) -> Callable[..., Any]:
    """Run the module and return its function.

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
    _check_signature(function, name)
    return function


def _check_signature(function: Callable[..., Any], name: str) -> None:
    """Raise TypeError unless the function can be called as ``call_function`` does."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return
    try:
        signature.bind(completion="", gold="", question="", meta={})
    except TypeError as error:
        expected = f"def {name}(completion, gold, question, meta)"
        raise TypeError(f"{name}{signature}: {error}; define `{expected}`") from None


def call_function(function: Callable[..., Any], request: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Call the function: ``{"terms": {"correct": ..., ...}}``, or ``{"error": why}``."""
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
    except BaseException as error:  # including SystemExit: every request gets a reply
        return {"error": describe(error, path)}


def checked_terms(given: object) -> dict[str, float]:
    """The return value as terms in [0, 1], including ``correct``.

    Raises:
        TypeError, ValueError: it is something else.
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
    """An exception in one line, with the line of the user's file that raised it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return text[:300] + (f" ({Path(path).name}:{lines[-1]})" if lines else "")
