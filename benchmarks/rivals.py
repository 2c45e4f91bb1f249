"""The graders that ours is measured beside: math-verify as it comes, and a naive compare of strings."""

from __future__ import annotations

import logging
import multiprocessing
import re
from collections.abc import Sequence
from multiprocessing.connection import Connection

Pair = tuple[str, str]


def last_box(text: str) -> str | None:
    """The content of the last box, braces matched; MATH's gold answers are found so."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return None
    rest = re.sub(r"^\\[bf]*(?:oxed|ox)\s*", "", text[start:])
    if not rest.startswith("{"):
        return rest.split("$")[0].strip()
    depth = 0
    for index, char in enumerate(rest):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return rest[1:index]
    return rest[1:]


def naive(pairs: Sequence[Pair]) -> list[bool]:
    """The last box or the last number, compared as a string."""

    def answer(text: str) -> str:
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        box = last_box(text)
        found = box if box is not None else numbers[-1] if numbers else text
        return found.strip().strip("$").replace(",", "").removesuffix(".")

    return [answer(prediction) == gold.strip().strip("$").replace(",", "") for gold, prediction in pairs]


def _math_verify_child(pipe: Connection) -> None:

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    pipe.send(None)
    while True:
        gold, prediction = pipe.recv()
        pipe.send(bool(verify(parse(gold), parse(prediction))))


def math_verify(pairs: Sequence[Pair]) -> list[bool]:
    """Parse and verify by default, in a process killed after 15 s (their own limit is 5 s a call)."""
    context = multiprocessing.get_context("spawn")
    verdicts: list[bool] = []
    pipe: Connection | None = None
    child = None
    for gold, prediction in pairs:
        if pipe is None:
            pipe, theirs = context.Pipe()
            child = context.Process(target=_math_verify_child, args=(theirs,), daemon=True)
            child.start()
            pipe.recv()
        pipe.send((gold, prediction))
        answered = pipe.poll(15)
        verdicts.append(bool(pipe.recv()) if answered else False)
        if not answered and child is not None:
            child.kill()
            pipe = None
    if child is not None:
        child.kill()
    return verdicts
