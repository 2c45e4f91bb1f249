"""Small data files and recipes over them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from empg_lite.recipe.schema import DataSection, ModelSection, Recipe, RunSection


def a_recipe(seed: int = 0, **data: Any) -> Recipe:
    return Recipe(model=ModelSection(name="m"), data=DataSection(**data), run=RunSection(seed=seed))


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def numbered(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "answer": str(i)} for i in range(start, start + n)]
