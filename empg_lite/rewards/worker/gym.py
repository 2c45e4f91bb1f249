"""Reasoning Gym inside a worker: making a task's entries, and asking the task's own scorer.

Some scorers hand the answer to Python's evaluator, directly or by sympy's parser, and the answer is a model's
text. Here the evaluator sees no more than literals, arithmetic and the functions of a calculator.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy

#: An answer that is right nowhere.
NONSENSE = "qwrtp zxcvb"
_SAFE_NODES = (
    ast.Expression,
    ast.Constant,
    ast.List,
    ast.Tuple,
    ast.Name,
    ast.Load,
    ast.BinOp,
    ast.operator,
    ast.UnaryOp,
    ast.unaryop,
)
#: What may be called: sympy's numbers and symbols, and elementary functions.
_SAFE_CALLS = frozenset(
    "Symbol Integer Float Rational Abs sqrt cbrt exp log ln factorial sin cos tan sec csc cot asin acos atan "
    "sinh cosh tanh asinh acosh atanh erf erfi Ei Si Ci li gamma Integral".split()
)


class TaskUnusable(Exception):
    """A task cannot be used: what is wrong, and what to do."""


class Task:
    """One task with its parameters.

    Args:
        name, params: as Reasoning Gym's ``create_dataset`` takes them.
        seed, size: of the entries to make; a scorer alone needs neither.

    Raises:
        TaskUnusable: Reasoning Gym is not installed, or knows no such task or parameters.
    """

    def __init__(self, name: str, params: Mapping[str, Any], seed: int = 0, size: int = 1) -> None:
        try:
            from reasoning_gym.factory import DATASETS, create_dataset
        except ImportError as error:
            raise TaskUnusable(
                f"Reasoning Gym is not installed ({error})", "pip install 'empg-lite[gym]'"
            ) from None
        if name not in DATASETS:
            close = difflib.get_close_matches(name, sorted(DATASETS), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "docs/rewards.md lists them"
            raise TaskUnusable(f"Reasoning Gym has no task {name!r}", hint)
        try:
            self._dataset = create_dataset(name, seed=seed, size=size, **params)
        except Exception as error:  # whatever a task's own validation raises
            text = " ".join(str(error).split()) or type(error).__name__
            raise TaskUnusable(
                f"the task {name} refuses its parameters: {text}", "see the task's configuration"
            ) from None

    def entry(self, index: int) -> dict[str, Any]:
        """Entry ``index`` as JSON, or why it cannot be used: ``{"entry": ...}`` or ``{"refused": why}``.

        ``altogether`` beside ``refused`` says that the task is of no use, whatever its other entries are.
        """
        random.seed(index)  # some tasks draw from the shared generators too
        numpy.random.seed(index)
        made = self._dataset[index]
        entry = {key: made[key] for key in ("question", "answer", "metadata")}
        if not isinstance(entry["answer"], str) or not entry["answer"].strip():
            return {"refused": "it has no single right answer"}
        try:
            entry = json.loads(json.dumps(entry, allow_nan=False))
        except (TypeError, ValueError) as error:
            return {"refused": f"its entries cannot be carried as JSON ({error})"}
        score = self._score(entry["answer"], entry)
        if score != 1.0:
            return {"refused": f"its own answer scores {score:g} once carried as JSON"}
        nonsense = self.score({**entry, "gold": entry["answer"], "answer": NONSENSE})
        if nonsense.get("score") == 1.0:
            return {"refused": "nonsense scores 1", "altogether": True}
        return {"entry": entry}

    def score(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The task's own verdict on an answer, in [0, 1], or why it cannot read it."""
        entry = {"question": request["question"], "answer": request["gold"], "metadata": request["metadata"]}
        try:
            score = self._score(request["answer"], entry)
        except MemoryError:
            raise
        except Exception as error:
            if self._score(entry["answer"], entry) != 1.0:
                raise  # it cannot read the right answer either: not the answer's fault
            return {"unreadable": f"{type(error).__name__}: {error}"[:300]}
        if not 0.0 <= score <= 1.0:
            return {"error": f"the task's scorer returned {score!r}, which is outside [0, 1]"}
        return {"score": score}

    def _score(self, answer: str, entry: dict[str, Any]) -> float:
        with guarded_evaluator():
            return float(self._dataset.score_answer(answer, entry))

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to one request."""
        return self.entry(request["index"]) if request["op"] == "entry" else self.score(request)


@contextmanager
def guarded_evaluator() -> Iterator[None]:
    """Python's evaluator refuses, in here, what is more than a calculator's input."""
    evaluate = builtins.eval

    def guarded(source: object, *namespaces: Any) -> Any:
        if not isinstance(source, str) or not harmless(source):
            raise ValueError("refused to run an answer as a program")
        return evaluate(source, *namespaces)

    builtins.eval = guarded
    try:
        yield
    finally:
        builtins.eval = evaluate


def harmless(source: str) -> bool:
    """Whether a text is an expression of literals, names, arithmetic and calls of known functions.

    >>> harmless("[1, 2 * x]"), harmless("sqrt(x)/2"), harmless("print(x)"), harmless("x.y")
    (True, True, False, False)
    """
    try:
        tree = ast.parse(source.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if not (isinstance(node.func, ast.Name) and node.func.id in _SAFE_CALLS) or node.keywords:
                return False
        elif not isinstance(node, _SAFE_NODES):
            return False
    return True
