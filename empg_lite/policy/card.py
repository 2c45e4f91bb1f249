"""Files published with an adapter or a merged model: tokenizer, template, stop tokens, model card."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.core.bundled import BUNDLED, PACKAGED, hub_name, is_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

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


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a model comes from.

    Attributes:
        revision: commit of the base model on the hub.
        after, before: results of the evaluations after and before training; None where there was none.
    """

    recipe: Any
    revision: str | None
    after: Mapping[str, Any] | None
    before: Mapping[str, Any] | None = None


def _of_sizes(stem: str, sizes: str, kind: str, license: str) -> dict[str, str]:
    """The license of a family's base and tuned models on the hub."""
    return {f"{stem}-{size}{suffix}": license for size in sizes.split() for suffix in ("", kind)}


#: Licenses of the tested base models; for others see their own cards.
_LICENSES = {
    **dict.fromkeys(BUNDLED, "apache-2.0"),
    **_of_sizes("Qwen/Qwen2.5", "0.5B 1.5B 7B", "-Instruct", "apache-2.0"),
    **_of_sizes("Qwen/Qwen2.5", "3B", "-Instruct", "qwen-research"),
    **_of_sizes("Qwen/Qwen3", "0.6B 1.7B 4B 8B", "-Base", "apache-2.0"),
    **_of_sizes("HuggingFaceTB/SmolLM2", "135M 360M 1.7B", "-Instruct", "apache-2.0"),
    **_of_sizes("meta-llama/Llama-3.2", "1B 3B", "-Instruct", "llama3.2"),
}


#: What to do with a card whose base model is a folder.
NAME_IT = "Write its name on the hub into the first lines, as `base_model: OWNER/NAME`"


def adapter_card(source: Provenance, agreement: Mapping[str, Any] | None = None) -> str:
    """The model card of a LoRA adapter.

    Args:
        agreement: what the export measured after reloading the adapter.
    """
    base = _base_of(source.recipe)
    usage = f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```"""
    return _card(source, f"LoRA adapter of {base}", "peft", ["lora"], usage, agreement or {})


def merged_card(source: Provenance, facts: Mapping[str, Any]) -> str:
    """The model card of a merged model; ``facts``: its type, what it was merged onto, measured agreement."""
    usage = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```"""
    if str(facts.get("dtype", "")).startswith("GGUF"):
        usage = "Runs in llama.cpp and software built on it."
    return _card(source, f"{_base_of(source.recipe)}, tuned", "transformers", [], usage, facts)


def _base_of(recipe: Any) -> str:
    """The base model's name; of a folder the last part: its path is nobody else's business."""
    name = recipe.model.name
    return Path(name).name if is_folder(name) else hub_name(name)


def _card(
    source: Provenance, title: str, library: str, tags: list[str], usage: str, facts: Mapping[str, Any]
) -> str:
    from huggingface_hub import ModelCardData

    recipe = source.recipe
    base = _base_of(recipe)
    license, local = _LICENSES.get(base), is_folder(recipe.model.name)
    data = ModelCardData(
        base_model=None if base in BUNDLED or local else base,  # the hub refuses a path
        library_name=library,
        license="apache-2.0" if license == "apache-2.0" else "other",
        license_name=None if license == "apache-2.0" else license,
        tags=["empg-lite", "em-policy-gradient", *tags],
    )
    where = f", a local folder. {NAME_IT}" if local else ""
    at = f" at commit `{source.revision}`" if source.revision else ""
    four_bit = ", held in NF4 during training" if recipe.model.load_in_4bit else ""
    if recipe.model.name in PACKAGED:
        four_bit += f", or its quantized copy in the Python package {PACKAGED[recipe.model.name].package}"
    terms = f"that of the base model ({license})" if license else "that of the base model: see its card"
    rows = "\n".join(
        _figures(source) + [f"| {k.replace('_', ' ')} | {_shown(k, v)} |" for k, v in facts.items()]
    )
    table = f"\n| figure | |\n|---|---|\n{rows}\n" if rows else "\nNot evaluated.\n"
    return f"""---
{data.to_yaml()}
---

# {title}

Trained with empg-lite by the EM Policy Gradient (arXiv 2504.18587, our reading of its abstract).

* Base: `{base}`{at}{four_bit}{where}
* LoRA: rank {recipe.model.lora_r}, alpha {recipe.model.lora_alpha}, all linear layers
* Data: `{recipe.data.source}`, split `{recipe.data.split}`; reward `{recipe.data.reward}`
* Method: {recipe.em.weighting} weights, {_sampled(recipe.sampler)}, {recipe.run.steps} steps, learning rate \
{recipe.optim.learning_rate:g}, seed {recipe.run.seed}
* License: {terms}
{table}
## Use

{usage}

The prompt is in `template.json`: replace `{{question}}`. An answer ends at one of the tokens in
`generation_config.json` or at one of the template's strings.
"""


def _sampled(sampler: Any) -> str:
    """What a step sampled."""
    p, k = sampler.problems_per_step, sampler.samples_per_problem
    if sampler.tries:
        return f"{p} x {k} rationales per step, each problem asked until right, at most {sampler.tries} times"
    return f"{p} problems x {k} rationales per step"


def _figures(source: Provenance) -> list[str]:
    rows = []
    for name, figures in (("before training", source.before), ("after training", source.after)):
        if figures is None:
            continue
        if "pass@1_ci95" in figures:
            low, high = figures["pass@1_ci95"]
            where = f"{figures['n']} {figures.get('split', '')} problems"
            accuracy = f"{figures['pass@1']:.1%} (95%: {low:.1%} to {high:.1%})"
            rows.append(f"| greedy accuracy {name}, {where} | {accuracy} |")
        for key, label in (
            ("t1_accuracy", "accuracy at temperature 1"),
            ("mean_length", "tokens per greedy answer"),
        ):
            if figures.get(key) is not None:
                rows.append(f"| {label} {name} | {_shown(key, figures[key])} |")
        if "validation accuracy" in figures:
            accuracy = f"{figures['validation accuracy']:.1%}"
            rows.append(f"| greedy accuracy on held-out training problems | {accuracy} |")
    return rows


def _shown(name: str, value: Any) -> str:
    if isinstance(value, float) and ("agreement" in name or "accuracy" in name or "reward" in name):
        return f"{value:.2%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
