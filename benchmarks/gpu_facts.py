"""What a job's figures say: of a run's files, of a plan, of a profile, of drawn tokens, of pytest's lines."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_checks import greedy_gap, partings, three_ways

from empg_lite.policy.policy import Policy
from empg_lite.sampler import Decoding, Prompt

Facts = dict[str, Any]


def compared(policy: Policy, questions: Sequence[str], tokens: int) -> Facts:
    """How many greedy completions of each way differ from those by graphs, and by how much at the most.

    ``gap``: between the logits of the two tokens where the samples part, in spacings of the computing type.
    """
    prompts = [Prompt(policy.encode_prompt(q)[1], (n,)) for n, q in enumerate(questions)]
    ways = three_ways(policy, prompts, Decoding(tokens, temperature=0.0))
    first = ways.pop("graphs")
    if isinstance(first, str):
        return {"graphs": {"error": first}}
    found: Facts = {}
    for name, drawn in ways.items():
        if isinstance(drawn, str):
            found[name] = {"error": drawn}
            continue
        parted = partings(prompts, first, drawn)
        gaps = [gap / spacing for gap, spacing in (greedy_gap(policy, p) for p in parted)]
        found[name] = {"of": len(prompts), "differ": len(parted), "gap": max(gaps, default=0.0)}
    return found


def same_tokens(ways: Mapping[str, Facts], exact: bool = False) -> bool:
    """Whether all ways drew the same, in 16 bits but for ties: gaps of a few spacings."""
    if any("error" in facts for facts in ways.values()):
        return False
    return all(not facts["differ"] if exact else facts["gap"] <= 8 for facts in ways.values())


def run_facts(run: Path) -> Facts:
    """What a run directory says of how it was computed, and that it learned something finite."""
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [r for r in map(json.loads, lines) if "step_time" in r]
    environment = json.loads((run / "environment.json").read_text("utf-8"))
    last = records[-1]
    shown = {k: v for k, v in last.items() if k.split("/")[0] in ("engine", "kernels", "attention", "time")}
    finite = all(r["em/updates"] and r["grad_norm"] is not None for r in records)
    return {
        "last_step": shown | {"step_time": last["step_time"]},
        "environment": {k: environment[k] for k in environment if k not in ("inputs", "platform")},
        "checks": {f"{len(records)} steps moved the weights": finite},
    }


def plan_facts(learner: Any) -> Facts:
    """The memory that the plan expects, and the settings it chose."""
    planned, recipe = learner.planned, learner.recipe
    return {
        "planned_gb": planned.peak / 1e9,
        "keeps_sampler": planned.keeps_sampler,
        "merged": recipe.sampler.merged,
        "batch_rows": recipe.sampler.batch_rows,
        "budget": recipe.optim.micro_batch_tokens,
        "checkpointing": recipe.optim.gradient_checkpointing,
    }


#: What Unsloth lends, by the package's name for it, and the kind of kernel that has to be seen then.
LENT = {"add_norm": "RMSNorm", "rotate": "RoPE", "swiglu": "SwiGLU"}


def kernel_checks(found: Mapping[str, Any], *, unsloth: bool) -> dict[str, bool]:
    """What has to be seen in a profile: the kernels that the policy names, graphs, a fused attention."""
    sampling, fitting = found["sampling"], found["fitting"]
    replayed = found["engine"]["graphs_replayed"] - found["replayed_before"]["graphs_replayed"]
    checks = {
        "graphs are replayed": replayed > 0,
        "NF4 is dequantized by a kernel": "NF4 dequantization" in sampling["kinds"] + fitting["kinds"],
    }
    for name, half in (("sampling", sampling), ("fitting", fitting)):
        seen = set(half["attention"])
        checks[f"attention of {name} is fused"] = bool({"flash", "efficient", "flex"} & seen)
        checks[f"no unfused attention in {name}"] = "math" not in seen
        checks[f"no cuDNN attention in {name}"] = "cudnn" not in seen
    said = found["policy"]
    if unsloth:
        checks["nothing of Unsloth's is left out"] = not said["notes"]
    for name in set(said["kernels"]) & set(LENT):
        checks[f"Unsloth's {LENT[name]} in sampling"] = LENT[name] in sampling["kinds"]
    for kind in LENT.values() if said["fit"].startswith("unsloth") else ():
        checks[f"Unsloth's {kind} in fitting"] = kind in fitting["kinds"]
    return checks


def test_result(line: str) -> tuple[str, str] | None:
    """The test's name and how it ended, from a line of ``pytest -v``."""
    found = re.match(r"\S+?\.py::(.+?) (PASSED|FAILED|SKIPPED|ERROR)\b", line)
    return (found[1], found[2].lower()) if found else None


def counted(ended: Mapping[str, str]) -> Facts:
    """How many tests ended in which way, and the names of those that failed."""
    failed = [name for name, how in ended.items() if how in ("failed", "error")]
    passed, skipped = (sum(h == how for h in ended.values()) for how in ("passed", "skipped"))
    counts = {"passed": passed, "failed": len(failed), "skipped": skipped}
    return {**counts, "failures": failed, "checks": {"tests marked gpu": not failed}}
