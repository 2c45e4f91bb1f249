"""A recipe over the fixture model, small enough to train in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from empg_lite.recipe.schema import Recipe

RECIPE = """\
model: {{name: {model}, backend: transformers, dtype: float32, load_in_4bit: false, lora_r: 4, lora_alpha: 8}}
data: {{source: local, path: {data}, prompt: {template}, reward: "regex:[a-m]", validation: 2}}
sampler: {{problems_per_step: 3, samples_per_problem: 8, max_new_tokens: 12}}
optim: {{learning_rate: 1e-2, warmup_steps: 2}}
run: {{steps: 3, eval_every: 2, save_every: 1}}
"""


def write_recipe(tmp_path: Path, model_dir: Path) -> Path:
    """A recipe over the fixture model and twenty additions: three steps of a second each.

    A completion earns 1 where it holds one of a-m and ends in a capital letter.
    """

    rows = [{"question": f"{a} + {b} = ?", "answer": str(a + b)} for a in range(5) for b in range(4)]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    # Random bytes seldom spell a stop token: capital letters end a completion, so that some are not cut off.
    template = tmp_path / "capitals.yaml"
    template.write_text(
        'text: "{question}"\nstop: [' + ", ".join(f'"{c}"' for c in ascii_uppercase) + "]\n", "utf-8"
    )
    path = tmp_path / "fixture.yaml"
    path.write_text(RECIPE.format(model=model_dir, data=data, template=template), "utf-8")
    return path


def quick_recipe(tmp_path: Path, model_dir: Path, *settings: str) -> Recipe:
    """``write_recipe`` read, of eight tokens and without evaluation, with changes of one's own."""
    from empg_lite.recipe.file import load_recipe

    path = write_recipe(tmp_path, model_dir)
    return load_recipe(str(path), ["run.eval_every=0", "sampler.max_new_tokens=8", *settings])
