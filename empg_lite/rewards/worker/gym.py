"""Reasoning Gym inside a worker: makes a task's entries and asks the task's own scorer.

``{"op": "entry", "index"}`` -> ``{"entry": {...}}`` or ``{"refused": why, "altogether": bool}``,
``{"op": "score", "answer", "gold", "question", "metadata"}`` -> ``{"score": number}`` or
``{"unreadable": why}``.

Some scorers pass the answer, which is a model's text, to Python's evaluator, directly or through sympy's
parser. In here the evaluator accepts only literals, arithmetic and the functions of a calculator.
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

from empg_lite.rewards.worker.main import Answer, Broken

#: An answer that no task should accept.
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
#: Functions that may be called: sympy's numbers and symbols, and elementary functions.
_SAFE_CALLS = frozenset(
    "Symbol Integer Float Rational Abs sqrt cbrt exp log ln factorial sin cos tan sec csc cot asin acos atan "
    "sinh cosh tanh asinh acosh atanh erf erfi Ei Si Ci li gamma Integral".split()
)


def load(setup: Mapping[str, Any]) -> Answer:
    """The task of ``{"task", "params"}``, with ``seed`` and ``size`` where entries are to be made."""
    task = Task(setup["task"], setup["params"], setup.get("seed", 0), setup.get("size", 1))
    return lambda request: task.entry(request["index"]) if request["op"] == "entry" else task.score(request)


class Task:
    """One task with its parameters.

    Args:
        name, params: as Reasoning Gym's ``create_dataset`` takes them.
        seed, size: of the entries to make; the scorer needs neither.

    Raises:
        Broken: Reasoning Gym is not installed, or knows no such task or parameters.
    """

    def __init__(self, name: str, params: Mapping[str, Any], seed: int = 0, size: int = 1) -> None:
        where = f"gym:{name}"
        try:
            from reasoning_gym.factory import DATASETS, create_dataset
        except ImportError as error:
            what = f"Reasoning Gym is not installed ({error})"
            raise Broken(what, where, "pip install 'empg-lite[gym]'") from None
        if name not in DATASETS:
            close = difflib.get_close_matches(name, sorted(DATASETS), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "docs/rewards.md lists them"
            raise Broken(f"Reasoning Gym has no task {name!r}", where, hint)
        try:
            self._dataset = create_dataset(name, seed=seed, size=size, **params)
        except Exception as error:  # whatever a task's own validation raises
            text = " ".join(str(error).split()) or type(error).__name__
            what = f"the task {name} refuses its parameters: {text}"
            raise Broken(what, where, "see the task's configuration") from None

    def entry(self, index: int) -> dict[str, Any]:
        """Entry ``index`` as JSON, or why it cannot be used: ``{"entry": ...}`` or ``{"refused": why}``.

        ``altogether`` in addition to ``refused`` means that the whole task is unusable.
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
        """The task's own score for an answer, in [0, 1], or why it cannot read the answer."""
        entry = {"question": request["question"], "answer": request["gold"], "metadata": request["metadata"]}
        try:
            score = self._score(request["answer"], entry)
        except MemoryError:
            raise
        except Exception as error:
            if self._score(entry["answer"], entry) != 1.0:
                raise  # it cannot read the right answer either, so the answer is not at fault
            return {"unreadable": f"{type(error).__name__}: {error}"[:300]}
        if not 0.0 <= score <= 1.0:
            return {"error": f"the task's scorer returned {score!r}, which is outside [0, 1]"}
        return {"score": score}

    def _score(self, answer: str, entry: dict[str, Any]) -> float:
        with guarded_evaluator():
            return float(self._dataset.score_answer(answer, entry))


@contextmanager
def guarded_evaluator() -> Iterator[None]:
    """Within this context Python's evaluator refuses everything but a calculator's input."""
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
