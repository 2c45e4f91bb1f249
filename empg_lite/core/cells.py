"""What the cells of a user's row say: the question, possibly as chat messages, and the final answer.

Training data and rollout files are read by the same rules, so a gold answer that training finds, ``score``
finds too. A column is a name or, for nested rows, a dotted path (``reward_model.ground_truth``).
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from empg_lite.core.errors import DataError
from empg_lite.core.safe_text import encodable

#: Columns of chats: a question, and its answer if it ends in one.
CHATS = ("messages", "conversations")
#: In the order in which they are tried.
QUESTION_COLUMNS = ("question", "problem", "prompt", *CHATS)
ANSWER_COLUMNS = ("gold", "answer", "solution", "ground_truth", "reward_model.ground_truth", *CHATS)
#: Columns whose text is a worked solution, which marks its final answer.
_WORKED = ("solution", *CHATS)
#: Who speaks in a message of the form ``{"from", "value"}``.
_ROLES = {"human": "user", "gpt": "assistant"}
#: Decimal digits that a double, and those that a single-precision float, keeps.
_DOUBLE, _SINGLE = 15, range(6, 10)
_SINGLE_MAX = 3.4e38
#: A double that needs this many digits fewer once rounded was computed, as 0.1 + 0.2 was.
_NOISE = 4
#: Longest number that is written without an exponent, in characters.
_PLAIN = 30


def cell(fields: Mapping[str, Any], column: str) -> Any:
    """The value of a column; of a dotted path, unless a column has that very name, what it leads to.

    Raises:
        KeyError: there is none.
    """
    if column in fields:
        return fields[column]
    head, dot, rest = column.partition(".")
    inner = fields[head]
    if not dot or not isinstance(inner, Mapping):
        raise KeyError(column)
    return cell(inner, rest)


def find_column(fields: Mapping[str, Any], known: Sequence[str], *, answer: bool = False) -> str | None:
    """The first of ``known`` that has a value, else the first that is there; None if none is.

    Args:
        answer: an answer is looked for: a chat that ends with the user has none.
    """
    found = [column for column in known if _has(fields, column, answer)]
    filled = (column for column in found if cell(fields, column) not in (None, ""))
    return next(filled, found[0] if found else None)


def _has(fields: Mapping[str, Any], column: str, answer: bool) -> bool:
    try:
        value = cell(fields, column)
    except KeyError:
        return False
    return not (answer and column in CHATS) or _said_last(value) is not None


def column_names(fields: Mapping[str, Any]) -> Iterator[str]:
    """The columns of a row, nested ones as dotted paths."""
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from (f"{name}.{inner}" for inner in value)
        else:
            yield name


# --- questions ------------------------------------------------------------------------------------


def question_text(value: Any, where: str) -> str:
    """The question in a cell: its text, or what the user says in a list of chat messages.

    A system message is left out, because ``data.prompt`` sets the prompt; so is the assistant's last word.

    Raises:
        DataError: it is neither, or a conversation of several turns.
    """
    if isinstance(value, str):
        return checked_text(value, where)
    messages = as_messages(value)
    if messages is None:
        todo = "write it as text, or choose another column"
        if isinstance(value, list):
            what = "the question is a list, but not one of messages with role and content as text"
            raise DataError(what, where, todo)
        raise DataError(f"the question is {kind_of(value)}, not text", where, todo)
    if messages and messages[-1][0] == "assistant":
        messages = messages[:-1]
    turns = [text for role, text in messages if role != "system"]
    if [role for role, _ in messages if role != "system"] != ["user"]:
        what = f"a conversation of {len(turns)} turns, where the question is one message of the user"
        raise DataError(what, where, "write the question as text in a column of its own")
    return checked_text(turns[0], where)


def as_messages(value: Any) -> list[tuple[str, str]] | None:
    """A list of ``{"role", "content"}``, or ``{"from", "value"}``, as (role, text) pairs; None where it is
    something else.

    The content may be a list of parts, if all of them are text.
    """
    if not isinstance(value, list):
        return None
    found = []
    for message in value:
        if not isinstance(message, Mapping):
            return None
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str):
            return None
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, Mapping)]
            texts = [text for text in parts if isinstance(text, str)]
            content = "".join(texts) if len(texts) == len(content) else None
        if not isinstance(content, str):
            return None
        role = role.strip().lower()
        found.append((_ROLES.get(role, role), content))
    return found


def has_system_message(value: Any) -> bool:
    """Whether a question cell holds a system message, which is not read."""
    return any(role == "system" and text.strip() for role, text in as_messages(value) or ())


def _said_last(value: Any) -> str | None:
    """What the assistant says last in a list of messages."""
    messages = as_messages(value)
    return messages[-1][1] if messages and messages[-1][0] == "assistant" else None


def solution_text(value: Any) -> str | None:
    """A worked solution: the cell's text, or what the assistant says last; None where it is neither."""
    return value if isinstance(value, str) else _said_last(value)


def completion_text(value: Any) -> Any:
    """The text of a completion that came as one message of the assistant; anything else unchanged."""
    messages = as_messages(value)
    return messages[0][1] if messages and [role for role, _ in messages] == ["assistant"] else value


# --- answers --------------------------------------------------------------------------------------


def gold_text(value: Any, column: str, where: str, *, worked: bool = False) -> str:
    r"""The final answer in an answer cell: after ``####``, else in the last box, else the whole cell.

    Args:
        worked: the cell holds a worked solution if it has several lines, whatever the column is called.

    Returns:
        The answer; "" where the last box is empty.

    Raises:
        DataError: it holds none.
    """
    if column in CHATS:
        value = _said_last(value)
    text = checked_text(_number_or_text(value, where), where)
    if "####" in text:
        return checked_text(text.rpartition("####")[2], where)
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    if column in _WORKED and (only := re.fullmatch(r"\$([^$]+)\$", text)):
        return checked_text(only[1], where)  # nothing but one formula
    if column in _WORKED or (worked and "\n" in text):
        what = "a solution without a final answer: neither #### nor \\boxed{}"
        raise DataError(what, where, "mark the answer, or choose another data.answer_column")
    return text


def _number_or_text(value: Any, where: str) -> str:
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool) and math.isfinite(value):
        return number_text(value)
    if not isinstance(value, str):
        raise DataError(f"the answer is {kind_of(value)}, not text or a number", where, "write it as text")
    return value


def number_text(value: float | Decimal) -> str:
    """A number as a person wrote it, without the noise of binary fractions.

    >>> [number_text(x) for x in (7, 72.0, 1.4000000000000001, 0.10000000149011612, Decimal("3.50"), 1e-7)]
    ['7', '72', '1.4', '0.1', '3.5', '0.0000001']
    """
    if isinstance(value, int) or value == int(value):
        return str(int(value))
    text = str(value) if isinstance(value, Decimal) else _without_noise(value)
    plain = f"{Decimal(text):f}".rstrip("0")
    return plain if len(plain) <= _PLAIN else text


def _without_noise(value: float) -> str:
    exact, rounded = repr(value), f"{value:.{_DOUBLE}g}"
    if float(rounded) != value and abs(value) < _SINGLE_MAX and _single(value) == value:
        shorter = (f"{value:.{digits}g}" for digits in _SINGLE)
        return next(text for text in shorter if _single(float(text)) == value)
    return rounded if len(rounded) <= len(exact) - _NOISE else exact


def _single(value: float) -> float:
    """The nearest single-precision number: what a float32 column holds."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` (braces matched) or ``\\boxed x``; None if there is none.

    >>> last_boxed(r"first \\boxed{1}, then \\boxed{\\frac{1}{2}}")
    '\\\\frac{1}{2}'
    """
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    rest = text[start + len("\\boxed") :].lstrip()
    if not rest.startswith("{"):
        token = re.match(r"\\[A-Za-z]+|[^\s{}$\\]", rest)
        return token.group() if token else None
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # an escaped brace is text
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return rest[1 : brace.start()]
    return None


# --- any cell -------------------------------------------------------------------------------------


def checked_text(text: str, where: str) -> str:
    """Text without the space around it.

    Raises:
        DataError: nothing is left, or it cannot be encoded.
    """
    clean = text.strip()
    if not clean or clean.lower() == "nan":
        raise DataError("the cell is empty", where, "fill it in")
    if not encodable(clean):
        raise DataError("the text contains an unpaired surrogate", where, "rewrite the row as UTF-8")
    return clean


def kind_of(value: Any) -> str:
    """What a value is, for an error message."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "missing"
    return {bool: "true or false", dict: "an object", list: "a list"}.get(type(value), f"{value!r}"[:40])


def as_json(value: Any) -> Any:
    """A cell as JSON types: decimals, dates and ids as text.

    Raises:
        TypeError, ValueError, RecursionError: it has none.
    """
    text = json.dumps(value, allow_nan=False, default=_plain)
    return value if isinstance(value, str | int | float | None) else json.loads(text)


def _plain(value: Any) -> str:
    if isinstance(value, Decimal | date | time | timedelta | UUID):
        return str(value)
    raise TypeError(type(value).__name__)


class NotKept(ValueError):
    """JSON that Python's reader would not keep as it is written."""


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values, as ``json.loads`` takes an ``object_pairs_hook``.

    Raises:
        NotKept: a key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise NotKept(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def finite(text: str) -> float:
    """A number, as ``json.loads`` takes a ``parse_float``.

    Raises:
        NotKept: it is too large for a double.
    """
    if math.isinf(value := float(text)):
        raise NotKept(f"the number {text[:20]} is out of range")
    return value
