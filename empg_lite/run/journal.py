"""The append-only logs of a run: metrics and events, as JSON Lines.

Names follow TRL where the quantity is the same; quantities specific to EM are under ``em/``. Only
``step_time``, ``time/*`` and ``memory/*`` may differ between an uninterrupted and a resumed run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from empg_lite.core.safe_text import without_passwords
from empg_lite.run import store

#: Longest text in an event, in characters: messages from user code and libraries are unbounded.
LONGEST = 4000


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, without an incomplete last line."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text("utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _short(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return without_passwords(value if len(value) <= LONGEST else f"{value[:LONGEST]} ...")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Journal:
    """Writes ``metrics.jsonl`` and ``events.jsonl``.

    Attributes:
        sinks: called with every metrics record after it is written.
    """

    def __init__(self, run: Path) -> None:
        self.sinks: list[Callable[[Mapping[str, Any]], None]] = []
        self._paths = {name: run / name for name in ("metrics.jsonl", "events.jsonl")}

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Log one record; non-finite numbers become null because JSON cannot express them."""
        finite = {k: _finite(v) for k, v in record.items()}
        store.append_line(self._paths["metrics.jsonl"], finite)
        for sink in self.sinks:
            sink(finite)

    def event(self, event: str, **facts: Any) -> None:
        """Log anything else: a resume, a back-off, a skipped step, a warning."""
        record = {"event": event, **{k: _short(v) for k, v in facts.items()}}
        store.append_line(self._paths["events.jsonl"], record)

    def lengths(self) -> dict[str, int]:
        """Current bytes of each log, for the checkpoint."""
        return {name: store.size(path) for name, path in self._paths.items()}

    def cut_back(self, lengths: Mapping[str, int]) -> None:
        """Drop what was logged after a checkpoint: those steps run again."""
        for name, path in self._paths.items():
            store.truncate(path, lengths.get(name, 0))
