"""One JSON object a step.

Names follow TRL where the quantity is the same; EM's own stand under ``em/``. Only ``step_time``, ``time/*``
and ``memory/*`` may differ between a straight and a resumed run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from empg_lite.core.safe_text import without_passwords
from empg_lite.run import store

#: Names whose values are wall-clock or machine facts.
VOLATILE = ("step_time", "time/", "memory/")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a torn last line is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text("utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def stable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what may differ between a straight and a resumed run."""
    return {key: value for key, value in record.items() if not key.startswith(VOLATILE)}


#: Characters of a text in an event: what a user's function or a library says has no bound.
LONGEST = 4000


def _short(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return without_passwords(value if len(value) <= LONGEST else f"{value[:LONGEST]} ...")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Journal:
    """The append-only logs of a run: ``metrics.jsonl`` and ``events.jsonl``.

    Attributes:
        sinks: told of every metrics record too, once it is written.
    """

    def __init__(self, run: Path) -> None:
        self.sinks: list[Callable[[Mapping[str, Any]], None]] = []
        self._paths = {name: run / name for name in ("metrics.jsonl", "events.jsonl")}

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One object a step; a number that is not finite is null: JSON has no other name for it."""
        finite = {k: _finite(v) for k, v in record.items()}
        store.append_line(self._paths["metrics.jsonl"], finite)
        for sink in self.sinks:
            sink(finite)

    def event(self, event: str, **facts: Any) -> None:
        """Something that is not a step: a resume, a back-off, a skipped step, a warning."""
        record = {"event": event, **{k: _short(v) for k, v in facts.items()}}
        store.append_line(self._paths["events.jsonl"], record)

    def lengths(self) -> dict[str, int]:
        """Bytes of each log now; goes into the checkpoint."""
        return {name: store.size(path) for name, path in self._paths.items()}

    def cut_back(self, lengths: Mapping[str, int]) -> None:
        """Forget what was logged after a checkpoint: it is about to happen again."""
        for name, path in self._paths.items():
            store.truncate(path, lengths.get(name, 0))
