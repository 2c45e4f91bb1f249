r"""The language of rewards: ``math``, ``regex:answer: (\d+)``, ``math * concise:600 * boxed``.

    SPEC        = CORRECTNESS { " * " SHAPING }
                | CORRECTNESS { " + " SHAPING } " even when wrong"
    CORRECTNESS = gsm8k | math | exact | choice | gym | python:FILE.py[:FUNCTION][@sha256:HEX] | regex:PATTERN
    SHAPING     = concise:N | boxed

A pattern takes the rest of the text, whatever it holds: a regex is the one correctness that stands last,
behind its shaping terms. Shaping multiplies, so that a wrong answer earns nothing however well it is written.
Adding pays for wrong answers, and has to be asked for in words.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

CORRECTNESS = ("gsm8k", "math", "exact", "choice", "gym", "python", "regex")
SHAPING = ("concise", "boxed")
_NEEDS = {
    "regex": r"a pattern, as in 'regex:answer: (\d+)'",
    "python": "a file, as in 'python:reward.py'",
    "concise": "a length in characters, as in 'concise:600'",
}
_SIGN = re.compile(r"\s+([*+])\s+")
_ANYWAY = re.compile(r"\s+even when wrong\s*$")
_PYTHON = re.compile(r"(?P<file>.+?\.py)(?::(?P<function>[^\W\d]\w*))?(?:@sha256:(?P<sha256>[0-9a-f]{64}))?")


@dataclass(frozen=True, slots=True)
class Part:
    """One reward by name, with what stands behind its colon."""

    name: str
    argument: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.argument}" if self.argument else self.name


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
class Spec:
    """A reward as it is computed: correctness times its shaping terms, or with ``added`` their mean."""

    correctness: Part
    shaping: tuple[Part, ...] = ()
    added: bool = False

    def __str__(self) -> str:
        parts = [self.correctness, *self.shaping]
        if self.correctness.name == "regex":
            parts = [*self.shaping, self.correctness]
        return (" + " if self.added else " * ").join(map(str, parts)) + " even when wrong" * self.added

    @property
    def python(self) -> PythonRef | None:
        """The user's function, where the reward is one."""
        if self.correctness.name != "python":
            return None
        found = _PYTHON.fullmatch(self.correctness.argument)
        assert found is not None  # parse_spec saw to it
        return PythonRef(found["file"], found["function"] or "reward", found["sha256"])

    def with_python(self, ref: PythonRef) -> Spec:
        """The same with another function."""
        return replace(self, correctness=Part("python", str(ref)))


def reward_names() -> tuple[str, ...]:
    """What may say whether an answer is right."""
    return CORRECTNESS


def parse_spec(text: str) -> Spec:
    """Read a reward.

    Raises:
        ValueError: one line that names the part at fault and the nearest known name.
    """
    pieces, signs, rest = list[str](), list[str](), text
    while not rest.startswith("regex:") and (sign := _SIGN.search(rest)):
        pieces.append(rest[: sign.start()])
        signs.append(sign[1])
        rest = rest[sign.end() :]
    anyway = _ANYWAY.search(rest) if signs or not rest.startswith("regex:") else None
    pieces.append(rest[: anyway.start()] if anyway and "*" not in signs else rest)
    if len(set(signs)) > 1:
        raise ValueError(f"reward {text!r} mixes * and +: use one of them")
    if anyway and "+" not in signs:
        raise ValueError(f"reward {text!r}: 'even when wrong' belongs to terms joined by +")
    parts = [_part(piece if piece.startswith("regex") else piece.strip(), text) for piece in pieces]
    spec = _arranged(parts, text, added="+" in signs)
    if spec.added and not anyway:
        product = replace(spec, added=False)
        raise ValueError(
            f"reward {text!r} would pay for wrong answers: write '{product}', or end it in 'even when wrong'"
        )
    return spec


def _part(piece: str, text: str) -> Part:
    name, colon, argument = piece.partition(":")
    within = "" if piece == text else f" in {text!r}"
    known = (*CORRECTNESS, *SHAPING)
    if name not in known:
        close = difflib.get_close_matches(name.strip(), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
        if re.search(r"\w\s*[*+]\s*\w", piece):
            hint = "terms are joined by ' * ', with spaces"
        raise ValueError(f"unknown reward {piece!r}{within}; {hint}")
    if colon and name not in _NEEDS:
        raise ValueError(f"unknown reward {piece!r}{within}; did you mean {name!r}? It takes no argument")
    if name in _NEEDS and not _argument_fits(name, argument):
        raise ValueError(f"reward {piece!r}{within} needs {_NEEDS[name]}")
    if name == "regex":
        try:
            re.compile(argument)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"reward {piece!r}: not a regular expression: {error}") from None
    return Part(name, argument)


def _argument_fits(name: str, argument: str) -> bool:
    if name == "python":
        return _PYTHON.fullmatch(argument) is not None
    return re.fullmatch(r"[1-9]\d{0,8}", argument) is not None if name == "concise" else bool(argument)


def _arranged(parts: list[Part], text: str, *, added: bool) -> Spec:
    """Which part says whether the answer is right: the first one, or a pattern at the end."""
    right = [part for part in parts if part.name in CORRECTNESS]
    shaping = [part for part in parts if part.name in SHAPING]
    if len(right) > 1:
        raise ValueError(
            f"reward {text!r}: {right[0].name} and {right[1].name} both say what is right; keep one"
        )
    if not right or (right[0] is not parts[0] and right[0].name != "regex"):
        raise ValueError(
            f"reward {text!r} begins with {parts[0].name}, which does not say what is right: "
            f"begin with one of {', '.join(CORRECTNESS)}"
        )
    for part in shaping:
        if sum(other.name == part.name for other in shaping) > 1:
            raise ValueError(f"reward {text!r} names {part.name} twice")
    return Spec(right[0], tuple(shaping), added)


def with_absolute_file(text: str, base: Path) -> str:
    """The spec with the path of the user's file made absolute, seen from ``base``; others as they are."""
    try:
        spec = parse_spec(text)
    except ValueError:
        return text  # validation says what is wrong with it
    if spec.python is None:
        return text
    path = os.path.abspath(base / os.path.expanduser(spec.python.file))
    return str(spec.with_python(replace(spec.python, file=path)))


def check_reward(spec: str) -> None:
    """Raise ValueError, with one line saying what is wrong, unless ``spec`` names a reward."""
    parse_spec(spec)
