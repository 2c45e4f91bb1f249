"""Reading what a run wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from empg_lite.run.checkpoint import list_checkpoints
from empg_lite.run.journal import read_metrics

#: Prefixes of metrics that are wall-clock or machine facts.
VOLATILE = ("step_time", "time/", "memory/")


def events(run: Path) -> list[dict[str, Any]]:
    """The records of a run's ``events.jsonl``, in order."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines()]


def stable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A metrics record without what may differ between an uninterrupted and a resumed run."""
    return {key: value for key, value in record.items() if not key.startswith(VOLATILE)}


def digest(run: Path) -> tuple[str, str, str]:
    """What a resumed run must share with an uninterrupted one: adapter, optimizer, metrics without clocks."""
    newest = list_checkpoints(run)[-1]
    records = [stable(record) for record in read_metrics(run / "metrics.jsonl")]
    parts = [(newest / n).read_bytes() for n in ("adapter_model.safetensors", "optimizer.safetensors")]
    parts.append(json.dumps(records).encode())
    return tuple(hashlib.sha256(part).hexdigest() for part in parts)  # type: ignore[return-value]
