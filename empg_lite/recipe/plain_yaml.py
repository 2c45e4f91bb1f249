"""YAML 1.2 as plain values with line numbers, and nothing that a settings file does not need.

Under YAML 1.2 ``1e-5`` is a number and ``no`` is text. Anchors, aliases, tags, directives, further documents
and duplicate keys are refused, and so is a text too large or too deep to have been written by a person: the
values are built from ruamel's events, so nothing is expanded or constructed before it is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.reader import ReaderError

from empg_lite.core.safe_text import safe

MAX_BYTES = 1_000_000
MAX_VALUES = 1_000
MAX_DEPTH = 8
_MAX_NUMBER = 40  # characters


@dataclass
class YamlFault(Exception):
    """What is wrong with a YAML text, on which line (from 1), under which dotted key, and what to do."""

    what: str
    line: int
    key: str = ""
    todo: str = ""


def read_text(path: Path) -> str:
    """The text of a settings file, a byte order mark dropped.

    Raises:
        YamlFault: too large, or not UTF-8.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise YamlFault(f"larger than {MAX_BYTES:,} bytes", 1, todo="check that this is the right file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlFault(
            "not UTF-8 text", data.count(b"\n", 0, error.start) + 1, todo="save it as UTF-8"
        ) from None


def parse_yaml(text: str) -> tuple[Any, dict[str, int]]:
    """The value of a YAML text (dict, list, str, int, float, bool, None) and the line of each dotted key.

    Raises:
        YamlFault: it is not YAML, or uses what settings files do not.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        return _Builder(yaml, yaml.parse(text)).build()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = f"not YAML ({safe(' '.join(str(error.problem or error.context).split()))})"
        raise YamlFault(
            what, mark.line + 1 if mark else 1, "", "check quotes, colons and indentation"
        ) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlFault("a character that YAML does not allow", line, todo="remove it") from None


class _Builder:
    """Turns events into values; ``lines`` collects where each key stands."""

    def __init__(self, yaml: YAML, events: Iterator[Any]) -> None:
        self.yaml, self.events = yaml, events
        self.lines: dict[str, int] = {}
        self.count = 0

    def build(self) -> tuple[Any, dict[str, int]]:
        next(self.events)  # start of the stream
        first = next(self.events)
        if isinstance(first, StreamEndEvent):
            return None, self.lines
        if isinstance(first, DocumentStartEvent) and (first.version or first.tags):
            raise _fault("directives are not used here", first, todo="remove the % line")
        value = self._value(next(self.events), (), 0)
        next(self.events)  # end of the document
        after = next(self.events)
        if not isinstance(after, StreamEndEvent):
            raise _fault("a second YAML document", after, todo="remove what follows the ---")
        return value, self.lines

    def _value(self, event: Any, keys: tuple[str, ...], depth: int) -> Any:
        self.count += 1
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            much = "nested too deep" if depth > MAX_DEPTH else "too many values"
            raise _fault(much, event, keys, "check that this is the right file")
        if event.anchor:  # an alias has one too
            raise _fault("anchors and aliases are not used here", event, keys, "write the value out")
        if not isinstance(event, ScalarEvent | MappingStartEvent | SequenceStartEvent) or event.tag:
            raise _fault("tags are not used here", event, keys, "remove the !")
        if isinstance(event, MappingStartEvent):
            return self._mapping(keys, depth)
        if isinstance(event, SequenceStartEvent):
            return self._sequence(keys, depth)
        return self._scalar(event, keys)

    def _sequence(self, keys: tuple[str, ...], depth: int) -> list[Any]:
        values = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            values.append(self._value(event, keys, depth + 1))
        return values

    def _mapping(self, keys: tuple[str, ...], depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            if not isinstance(event, ScalarEvent) or event.anchor or event.tag:
                raise _fault("a key is a plain word", event, keys)
            name, path = event.value, (*keys, event.value)
            if name in values:
                first = self.lines[".".join(path)]
                raise _fault(f"written twice, first on line {first}", event, path, "keep one")
            self.lines[".".join(path)] = event.start_mark.line + 1
            values[name] = self._value(next(self.events), path, depth + 1)
        return values

    def _scalar(self, event: ScalarEvent, keys: tuple[str, ...]) -> Any:
        if event.style:  # quoted, or a block
            return event.value
        tag = self.yaml.resolver.resolve(ScalarNode, event.value, (True, False))
        if str(tag).rpartition(":")[2] not in (
            "null",
            "bool",
            "int",
            "float",
        ):  # dates and merge keys are text
            return event.value
        if len(event.value) > _MAX_NUMBER:
            raise _fault("a number of too many digits", event, keys, "write a shorter one")
        return self.yaml.constructor.construct_object(ScalarNode(tag, event.value))


def _fault(what: str, event: Event, keys: tuple[str, ...] = (), todo: str = "") -> YamlFault:
    return YamlFault(what, event.start_mark.line + 1, ".".join(keys), todo)
