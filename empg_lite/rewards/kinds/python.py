"""``python:FILE.py[:FUNCTION][@sha256:HEX]``: the user's own function, which runs in a worker.

This process never runs it. It reads the file once, pins its SHA-256 into the spec, and sends exactly these
bytes to the worker, so nothing can change between the check and the use. What the file imports is not pinned.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from empg_lite.core.errors import DataError, EmpgError, MissingInput
from empg_lite.rewards.kind import Ask, Case, GradeMany, Kind, Outcome, WorkerRequest, expect
from empg_lite.rewards.spec import Part, Spec, parse_spec

_REFERENCE = re.compile(
    r"(?P<file>.+?\.py)(?::(?P<function>[^\W\d]\w*))?(?:@sha256:(?P<sha256>[0-9a-f]{64}))?"
)


class Python(Kind):
    """Asks the function; the answer is extracted for the record only."""

    name = "python"
    needs = "a file, as in 'python:reward.py'"

    def argument_error(self, argument: str) -> str | None:
        return None if _REFERENCE.fullmatch(argument) else f" needs {self.needs}"

    def grade(self, case: Case, argument: str) -> WorkerRequest:
        from empg_lite.rewards.math import extract  # only when something is graded

        answer = extract(case.prediction)

        def read(result: Mapping[str, Any]) -> Outcome:
            terms = dict(result["terms"])
            score = terms.pop("correct")
            return Outcome("equal" if score == 1 else "different", answer, score, terms)

        request = {
            "op": "call",
            "completion": case.prediction,
            "gold": case.gold,
            "question": case.question or "",
            "meta": dict(case.meta or {}),
        }
        return WorkerRequest(request, read, answer, {"kind": "python"})

    def explain(self, case: Case, argument: str) -> list[str]:
        return [f"asked your function {argument}"]

    def self_test(self, grade_many: GradeMany, ask: Ask) -> None:
        """Only the user knows what the function should return; that it loads is all there is to test."""
        reply = ask({"kind": "python"}, {"op": "ping"})
        expect(reply.failure is None, "the function's worker does not answer")


KIND = Python()


@dataclass(frozen=True, slots=True)
class PythonRef:
    """A function in a file; ``sha256`` (hex, of the file's bytes) once it is pinned."""

    file: str
    function: str = "reward"
    sha256: str | None = None

    def __str__(self) -> str:
        function = "" if self.function == "reward" else f":{self.function}"
        return f"{self.file}{function}" + (f"@sha256:{self.sha256}" if self.sha256 else "")


@dataclass(frozen=True, slots=True)
class UserCode:
    """A file's bytes and the function in it; ``ref`` is pinned."""

    ref: PythonRef
    source: bytes

    def worker_setup(self) -> dict[str, str]:
        """What a worker has to load; JSON carries no bytes."""
        source = base64.b64encode(self.source).decode("ascii")
        return {"path": self.ref.file, "function": self.ref.function, "source": source}


def python_ref(spec: Spec) -> PythonRef | None:
    """The user's function, where the reward is one."""
    if spec.correctness.name != "python":
        return None
    found = _REFERENCE.fullmatch(spec.correctness.argument)
    assert found is not None  # parse_spec has checked it
    return PythonRef(found["file"], found["function"] or "reward", found["sha256"])


def _with_ref(spec: Spec, ref: PythonRef) -> str:
    return str(replace(spec, correctness=Part("python", str(ref))))


def with_absolute_file(text: str, base: Path) -> str:
    """The spec with the path of the user's file made absolute, relative to ``base``; others unchanged."""
    try:
        spec = parse_spec(text)
    except ValueError:
        return text  # validation reports what is wrong with it
    ref = python_ref(spec)
    if ref is None:
        return text
    return _with_ref(spec, replace(ref, file=os.path.abspath(base / os.path.expanduser(ref.file))))


def read_code(ref: PythonRef, *, repin: bool = False) -> UserCode:
    """The file as it is now.

    Args:
        repin: accept a file that differs from the pinned one.

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
            "restore the old file, or name the new one without @sha256; --resume: --allow-change data.reward",
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


def pin(text: str, *, repin: bool = False) -> tuple[str, UserCode | None]:
    """A spec with the hash of the user's file in it, and the file; other specs unchanged, and None.

    Raises:
        ValueError: the spec is invalid.
        MissingInput, DataError: see ``read_code``.
    """
    spec = parse_spec(text)
    ref = python_ref(spec)
    if ref is None:
        return text, None
    code = read_code(ref, repin=repin)
    return _with_ref(spec, code.ref), code


def refuse_code(ref: PythonRef, where: str, kind: type[EmpgError] = DataError) -> EmpgError:
    """The error for a file that nobody allowed to run. Data that ask for code are bad data."""
    code = read_code(ref, repin=True)
    return kind(
        f"the reward would run your code: {ref.file}, function {ref.function}, sha256 {code.ref.sha256}",
        where,
        "read it, then add --allow-code",
    )


def _top_level_names(tree: ast.Module) -> set[str]:
    """Every name that the module itself binds, including inside its if and try blocks."""
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
