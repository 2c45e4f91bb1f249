"""The user's regular expression inside a worker, which needs no algebra and starts at once.

``{"op": "regex", "pattern", "text"}`` -> ``{"match": null | {"group": str | null}}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from empg_lite.rewards.worker.main import Answer


def load(setup: Mapping[str, Any]) -> Answer:
    """Nothing to load."""
    return _match


def _match(request: Mapping[str, Any]) -> dict[str, Any]:
    pattern = re.compile(request["pattern"])
    if not pattern.groups:
        return {"match": {"group": None} if pattern.search(request["text"]) else None}
    groups = [match.group(1) for match in pattern.finditer(request["text"])]
    return {"match": {"group": groups[-1]} if groups else None}
