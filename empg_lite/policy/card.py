"""What lies beside an adapter so that others can use it: tokenizer, template, stop tokens, model card."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from empg_lite.policy.policy import Policy


def tokenizer_files(policy: Policy) -> dict[str, bytes]:
    """The tokenizer's files, stop tokens (``generation_config.json``) and prompt (``template.json``)."""
    with tempfile.TemporaryDirectory() as folder:
        policy.tokenizer.save_pretrained(folder)
        files = {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}
    stops = {"eos_token_id": sorted(policy.stop_ids), "pad_token_id": policy.pad_id}
    template = {"text": policy.template.text, "stop": list(policy.template.stop), "end": policy.template.end}
    return files | {
        "generation_config.json": json.dumps(stops, indent=1).encode(),
        "template.json": json.dumps(template, indent=1).encode(),
    }


def model_card(recipe: Any, policy: Policy, figures: Mapping[str, Any]) -> str:
    """A Markdown card: base, data, method, figures as measured."""
    plain = {name: value for name, value in figures.items() if not isinstance(value, dict)}
    rows = "\n".join(f"| {name} | {value} |" for name, value in plain.items())
    return f"""---
base_model: {policy.name}
library_name: peft
tags: [empg-lite, em-policy-gradient, lora]
---

# LoRA adapter of {policy.name}

Trained with empg-lite by the EM Policy Gradient (arXiv 2504.18587, our reading of its abstract) on
`{recipe.data.source}` with the `{recipe.data.reward}` reward, {recipe.em.weighting} weights,
{recipe.sampler.problems_per_step} problems x {recipe.sampler.samples_per_problem} rationales a step.

| figure | value |
|---|---|
{rows}

Prompt: `template.json` (replace `{{question}}`). Stops: the tokens in `generation_config.json` and the
template's strings.
"""
