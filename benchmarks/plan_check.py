"""The memory plan beside what real steps take: three CPU shapes above 1 GB, each in a process of its own.

``python benchmarks/plan_check.py`` builds random weights of each shape, loads them as ``train`` does, samples
and fits rows of full length, and compares the resident memory of each phase (over that after the imports)
with the plan. The high-water mark of the process is set back before each phase (``/proc/self/clear_refs``).
It ends with exit code 1 where the peak is more than 10% off.

The C library gives freed blocks back at once here, as the package has it where memory is tight. ``--keep``
leaves that out, to see what resident memory has otherwise: the blocks that are kept for the next request.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import import_from

BAR = 0.10


@dataclass(frozen=True, slots=True)
class Case:
    """A shape (``shape`` holds config.json's numbers) and the step to take with it."""

    name: str
    why: str
    shape: dict[str, int]
    dtype: str
    four_bit: bool
    problems: int
    samples: int
    prompt_tokens: int
    new_tokens: int


CASES = (
    Case(
        "0.5B",
        "Qwen2.5-0.5B's shape as recipes load it, short rows",
        dict(layers=24, hidden=896, intermediate=4864, heads=14, kv_heads=2, vocab=151_936),
        "bfloat16",
        True,
        problems=2,
        samples=4,
        prompt_tokens=24,
        new_tokens=8,
    ),
    Case(
        "wide",
        "shallow and wide, Qwen's vocabulary, many rows: logits",
        dict(layers=2, hidden=1280, intermediate=5120, heads=20, kv_heads=4, vocab=151_936),
        "float32",
        False,
        problems=8,
        samples=16,
        prompt_tokens=8,
        new_tokens=4,
    ),
    Case(
        "long",
        "long rows behind long prompts: activations",
        dict(layers=8, hidden=512, intermediate=2048, heads=8, kv_heads=2, vocab=2048),
        "float32",
        False,
        problems=2,
        samples=4,
        prompt_tokens=700,
        new_tokens=300,
    ),
)


def main() -> None:
    """Run every case, or be one (``--child``)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=[c.name for c in CASES], help="names; default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object a case instead of tables")
    parser.add_argument("--keep", action="store_true", help="let the C library keep freed blocks")
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        case = next(c for c in CASES if c.name == arguments.child[0])
        folder = Path(arguments.child[1])
        print(build(case, folder) if arguments.build else json.dumps(measure(case, folder, arguments.keep)))
        return
    results = [run(case, arguments.keep) for case in CASES if case.name in arguments.cases]
    for result in results:
        print(json.dumps(result) if arguments.json else table(result))
    raise SystemExit(0 if all(abs(r["ratio"] - 1) <= BAR for r in results) else 1)


def run(case: Case, keep: bool) -> dict[str, Any]:
    """One case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", case.name, folder]
        environment = import_from(CUDA_VISIBLE_DEVICES="")
        environment.pop("MALLOC_MMAP_THRESHOLD_", None)
        if keep:
            command.append("--keep")
        # The weights are made in a process of their own: what that takes must not count.
        subprocess.run([*command, "--build"], env=environment, check=True, stdout=subprocess.DEVNULL)
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def build(case: Case, folder: Path) -> None:
    """Random weights of the shape, with the bundled tokenizer."""
    import shutil

    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from empg_lite.core.bundled import model_path

    for file in model_path("tiny").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder / file.name)
    s = case.shape
    config = Qwen2Config(
        vocab_size=s["vocab"],
        hidden_size=s["hidden"],
        intermediate_size=s["intermediate"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        tie_word_embeddings=True,
        eos_token_id=527,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    model = model.to_empty(device="cpu").to(getattr(torch, case.dtype))
    model.tie_weights()  # or head and embedding are two matrices now, and are saved as two
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)


def measure(case: Case, folder: Path, keep: bool) -> dict[str, Any]:
    """Predicted and measured bytes of each phase, over what the process held after its imports."""
    import bitsandbytes  # noqa: F401  (imported here, or its memory would count as the model's)
    import peft  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    from empg_lite.loop import plan
    from empg_lite.loop.learner import build_learner
    from empg_lite.policy.memory import machine
    from empg_lite.policy.memory.shape import read_shape
    from empg_lite.recipe.schema import Recipe
    from empg_lite.sampler import Prompt

    recipe = Recipe.model_validate(_recipe(case, folder)).resolved()
    shape = read_shape(str(folder))
    planned = plan.plan_recipe(recipe, shape, machine.Machine("cpu", 10**12))
    if not keep:
        machine.return_freed_blocks()
    before = machine.resident_memory()
    _forget_peak()
    learner = build_learner(recipe)
    measured = {"loading": _peak() - before, "loaded": machine.resident_memory() - before}
    sampler = learner.sampler()
    sampler._stop = _Never()  # type: ignore[attr-defined]
    prompts = [
        Prompt((5,) * (case.prompt_tokens - i % 2), tuple(range(i, i + case.samples)))
        for i in range(case.problems)
    ]  # of two lengths, as real prompts are
    rows = _rows(case)
    learner.fit(rows)  # Adam's moments are there from now on
    for phase, work in (
        ("E-step", lambda: sampler.sample(prompts, learner.decoding)),
        ("M-step", lambda: learner.fit(rows)),
    ):
        _forget_peak()
        work()
        measured[phase] = _peak() - before
    peak = max(measured["E-step"], measured["M-step"])
    return {
        "case": asdict(case),
        "stays": planned.stays,
        "phases": planned.phases,
        "predicted": planned.totals,
        "measured": measured,
        "ratio": planned.peak / peak,
    }


def _recipe(case: Case, folder: Path) -> dict[str, Any]:
    rows = case.problems * case.samples
    return {
        "model": {
            "name": str(folder),
            "backend": "transformers",
            "dtype": case.dtype,
            "load_in_4bit": case.four_bit,
            "lora_r": 16,
        },
        "data": {
            "source": "local",
            "path": str(folder),
            "max_prompt_tokens": case.prompt_tokens,
            "prompt": "plain",
        },
        "sampler": {
            "problems_per_step": case.problems,
            "samples_per_problem": case.samples,
            "max_new_tokens": case.new_tokens,
            "batch_rows": rows,
        },
        "optim": {
            "micro_batch_tokens": rows * (case.prompt_tokens + case.new_tokens),
            "gradient_checkpointing": False,
        },
        "run": {"eval_every": 0},
    }


def _rows(case: Case) -> list[Any]:
    from empg_lite.core.rationale import Rationale

    return [
        Rationale(
            problem_id=str(i // case.samples),
            question="",
            gold="",
            prompt="",
            prompt_ids=(5,) * (case.prompt_tokens - 1) + (6 + i // case.samples,),
            completion="",
            completion_ids=(6,) * case.new_tokens,
            finish_reason="stop",
            step=1,
            policy_step=0,
            sample_index=i % case.samples,
            reward=1.0,
            reason="equal",
            weight=1.0,
        )
        for i in range(case.problems * case.samples)
    ]


class _Never:
    """No row ends before its last token."""

    def stopped(self, ids: Any) -> bool:
        return False

    def text(self, ids: Any) -> str:
        return ""


def _forget_peak() -> None:
    """Set the high-water mark of the resident memory back to what is held now."""
    import gc

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """High-water mark of the resident memory, in bytes."""
    status = Path("/proc/self/status").read_text("utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def table(result: dict[str, Any]) -> str:
    """Term by term predicted, measured by phase."""
    case, measured = result["case"], result["measured"]
    lines = [f"{case['name']}: {case['why']}"]
    lines += [f"  {term:28}{size / 1e6:9.0f} MB" for term, size in result["stays"].items()]
    lines.append(f"  {'loaded':28}{'':9}    measured{measured['loaded'] / 1e6:7.0f} MB")
    for phase, terms in result["phases"].items():
        lines += [f"    {term:26}{size / 1e6:9.0f} MB" for term, size in terms.items() if size]
        predicted, found = result["predicted"][phase], measured[phase]
        off = predicted / found - 1
        lines.append(f"  {phase:28}{predicted / 1e6:9.0f} MB measured{found / 1e6:7.0f} MB {off:+8.1%}")
    lines.append(f"  peak predicted / measured: {result['ratio']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
