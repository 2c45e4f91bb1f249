"""YAML 1.2 as plain values with line numbers, minus everything a settings file does not need.

ruamel.yaml does the parsing and builds the values (``1e-5`` is a number, ``no`` is text). Its composer is
extended to reject anchors, aliases, tags, directives, further documents, duplicate keys, and input too large
or too deep to be hand-written. It does so event by event, before any value is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import Event, ScalarEvent, StreamEndEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode
from ruamel.yaml.reader import ReaderError

from empg_lite.core.safe_text import safe

MAX_BYTES = 1_000_000
MAX_VALUES = 1_000
MAX_DEPTH = 8
_MAX_NUMBER = 40  # characters
_STRING = "tag:yaml.org,2002:str"
_TYPED = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float")}


@dataclass
class YamlFault(Exception):
    """What is wrong with a YAML text, on which line (1-based), under which dotted key, and how to fix it."""

    what: str
    line: int
    key: str = ""
    todo: str = ""


def read_text(path: Path) -> str:
    """The text of a settings file, without its byte order mark.

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
        line = data.count(b"\n", 0, error.start) + 1
        raise YamlFault("not UTF-8 text", line, todo="save it as UTF-8") from None


def parse_yaml(text: str) -> tuple[Any, dict[str, int]]:
    """The value of a YAML text (dict, list, str, int, float, bool, None) and the line of each dotted key.

    Raises:
        YamlFault: it is not YAML, or uses a feature that settings files do not need.
    """
    reader = YAML(typ="safe", pure=True)
    reader.Composer = _StrictComposer
    try:
        return reader.load(text), reader.composer.lines
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = f"not YAML ({safe(' '.join(str(error.problem or error.context).split()))})"
        line = mark.line + 1 if mark else 1
        raise YamlFault(what, line, todo="check quotes, colons and indentation") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlFault("a character that YAML does not allow", line, todo="remove it") from None


class _StrictComposer(Composer):
    """Checks every event before ruamel composes it; ``lines`` maps each dotted key to its line."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self.lines: dict[str, int] = {}
        self._keys: list[str] = []  # of the value being composed, from the outermost mapping
        self._count = 0

    def compose_document(self) -> Any:
        start = self.parser.peek_event()
        if start.version or start.tags:
            raise self._fault("YAML directives are not supported", start, "remove the % line")
        node = super().compose_document()
        if not self.parser.check_event(StreamEndEvent):
            after = self.parser.peek_event()
            raise self._fault("a second YAML document", after, "remove the --- and what follows it")
        return node

    def compose_node(self, parent: Any, index: Any) -> Any:
        """``index``: None for a mapping's key, the key's node for its value, an int in a sequence."""
        event = self.parser.peek_event()
        if isinstance(parent, MappingNode) and index is None:
            return self._compose_key(parent, event)
        if not isinstance(index, ScalarNode):
            return self._compose_value(parent, index, event)
        self._keys.append(index.value)
        node = self._compose_value(parent, index, event)
        self._keys.pop()
        return node

    def _compose_key(self, mapping: MappingNode, event: Any) -> ScalarNode:
        if not isinstance(event, ScalarEvent) or event.anchor or event.tag:
            raise self._fault("a key must be a plain word", event)
        key = super().compose_node(mapping, None)
        key.tag = _STRING  # also where it looks like a number
        self._keys.append(key.value)
        for other, _ in mapping.value:
            if other.value == key.value:
                first = other.start_mark.line + 1
                raise self._fault(f"duplicate key, first on line {first}", event, "keep one")
        self.lines[".".join(self._keys)] = event.start_mark.line + 1
        self._keys.pop()
        return key

    def _compose_value(self, parent: Any, index: Any, event: Any) -> Any:
        self._count += 1
        if self.depth > MAX_DEPTH or self._count > MAX_VALUES:
            much = "nested too deep" if self.depth > MAX_DEPTH else "too many values"
            raise self._fault(much, event, "check that this is the right file")
        if event.anchor:  # an alias has one too
            raise self._fault("anchors and aliases are not supported", event, "write the value out")
        if event.tag:
            raise self._fault("tags are not supported", event, "remove the !")
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor: Any) -> Any:
        event = self.parser.peek_event()
        node = super().compose_scalar_node(anchor)
        if node.tag not in _TYPED:  # dates and merge keys are text
            node.tag = _STRING
        elif len(node.value) > _MAX_NUMBER:
            raise self._fault("a number with too many digits", event, "write a shorter one")
        return node

    def _fault(self, what: str, event: Event, todo: str = "") -> YamlFault:
        return YamlFault(what, event.start_mark.line + 1, ".".join(self._keys), todo)
