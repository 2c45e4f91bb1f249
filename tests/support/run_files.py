"""What a run left on the disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from empg_lite.run.checkpoint import list_checkpoints
from empg_lite.run.journal import read_metrics, stable


def events(run: Path) -> list[dict[str, Any]]:
    """What ``events.jsonl`` of a run says, in order."""
    import json

    return [json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines()]


def digest(run: Path) -> tuple[str, str, str]:
    """What a resumed run must share with the straight one: adapter, optimiser, metrics without clocks."""
    newest = list_checkpoints(run)[-1]
    records = [stable(record) for record in read_metrics(run / "metrics.jsonl")]
    parts = [(newest / n).read_bytes() for n in ("adapter_model.safetensors", "optimizer.safetensors")]
    parts.append(json.dumps(records).encode())
    return tuple(hashlib.sha256(part).hexdigest() for part in parts)  # type: ignore[return-value]
