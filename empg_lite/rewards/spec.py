r"""The language of rewards: ``math``, ``regex:answer: (\d+)``, ``math * concise:600 * boxed``.

    SPEC        = CORRECTNESS { " * " SHAPING }
                | CORRECTNESS { " + " SHAPING } " even when wrong"
    CORRECTNESS = gsm8k | math | exact | choice | gym | python:FILE.py[:FUNCTION][@sha256:HEX] | regex:PATTERN
    SHAPING     = concise:N | boxed

A pattern takes the rest of the text, whatever it contains, so a regex comes last, after its shaping terms.
Shaping multiplies, so a wrong answer earns nothing however well it is written. Adding pays for wrong
answers, so the spec has to say so.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from empg_lite.rewards.registry import NAMES, kind_of

if TYPE_CHECKING:
    from empg_lite.rewards.kind import Kind

SHAPING = ("concise", "boxed")
_SIGN = re.compile(r"\s+([*+])\s+")
_ANYWAY = re.compile(r"\s+even when wrong\s*$")


@dataclass(frozen=True, slots=True)
class Part:
    """One reward by name, with the text after its colon."""

    name: str
    argument: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.argument}" if self.argument else self.name


@dataclass(frozen=True, slots=True)
class Spec:
    """A reward: correctness times its shaping terms, or with ``added`` the mean of them all."""

    correctness: Part
    shaping: tuple[Part, ...] = ()
    added: bool = False

    def __str__(self) -> str:
        parts = [self.correctness, *self.shaping]
        if self.correctness.name == "regex":
            parts = [*self.shaping, self.correctness]
        return (" + " if self.added else " * ").join(map(str, parts)) + " even when wrong" * self.added

    @property
    def kind(self) -> Kind:
        """What decides whether an answer is right."""
        return kind_of(self.correctness.name)


@lru_cache(maxsize=64)
def parse_spec(text: str) -> Spec:
    """Read a reward.

    Raises:
        ValueError: one line that names the invalid part and the nearest known name.
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
    known = (*NAMES, *SHAPING)
    if name not in known:
        close = difflib.get_close_matches(name.strip(), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
        if re.search(r"\w\s*[*+]\s*\w", piece):
            hint = "terms are joined by ' * ', with spaces"
        raise ValueError(f"unknown reward {piece!r}{within}; {hint}")
    takes_argument = name == "concise" or (name in NAMES and kind_of(name).needs)
    if colon and not takes_argument:
        raise ValueError(f"unknown reward {piece!r}{within}; did you mean {name!r}? It takes no argument")
    error = kind_of(name).argument_error(argument) if name in NAMES else _shaping_error(name, argument)
    if error:
        raise ValueError(f"reward {piece!r}{within}{error}")
    return Part(name, argument)


def _shaping_error(name: str, argument: str) -> str | None:
    if name == "concise" and not re.fullmatch(r"[1-9]\d{0,8}", argument):
        return " needs a length in characters, as in 'concise:600'"
    return None


def _arranged(parts: list[Part], text: str, *, added: bool) -> Spec:
    """The spec whose correctness is the first part, or a pattern at the end."""
    correct = [part for part in parts if part.name in NAMES]
    shaping = [part for part in parts if part.name in SHAPING]
    if len(correct) > 1:
        raise ValueError(
            f"reward {text!r}: {correct[0].name} and {correct[1].name} both say what is right; keep one"
        )
    if not correct or (correct[0] is not parts[0] and correct[0].name != "regex"):
        raise ValueError(
            f"reward {text!r} begins with {parts[0].name}, which does not say what is right: "
            f"begin with one of {', '.join(NAMES)}"
        )
    for part in shaping:
        if sum(other.name == part.name for other in shaping) > 1:
            raise ValueError(f"reward {text!r} names {part.name} twice")
    return Spec(correct[0], tuple(shaping), added)


def check_reward(spec: str) -> None:
    """Raise ValueError, with a one-line message, unless ``spec`` is a valid reward."""
    parse_spec(spec)
