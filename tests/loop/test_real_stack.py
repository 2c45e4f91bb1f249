"""The main job on real input: GSM8K and MATH, the real Qwen2.5 tokenizer, the 0.5B architecture in NF4.

The weights are random (real ones cannot be had offline): accuracy means nothing here, all else does.
Half an hour on two idle cores: ``pytest -m slow tests/loop/test_real_stack.py -s``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from backends import assert_sound, run_probe

pytestmark = [pytest.mark.slow, pytest.mark.shared]

BACKENDS = [
    "transformers",
    pytest.param(
        "unsloth",
        marks=[
            pytest.mark.unsloth,
            pytest.mark.skipif(
                importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed"
            ),
        ],
    ),
]
SMALL = [
    "model.dtype=bfloat16",  # NF4 without a fused kernel is slow on a CPU, slower still in float32
    "sampler.problems_per_step=2",
    "sampler.samples_per_problem=4",
    "sampler.max_new_tokens=48",
]


@pytest.fixture(scope="module")
def half_b(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    """Qwen2.5-0.5B with random weights: its config and tokenizer files, 988 MB of bf16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("half-b")
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "base/tokenizer_config.json"):
        shutil.copy(shared / "tokenizer-qwen2.5" / name, folder / Path(name).name)
    shutil.copy(shared / "qwen2.5_config_files" / "Qwen2.5-0.5B.json", folder / "config.json")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


class Cli:
    """``empg-lite`` in a process of its own, as a user runs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: object) -> dict:  # type: ignore[type-arg]
        command = [sys.executable, "-m", "empg_lite", *map(str, arguments), "--json"]
        started = time.monotonic()
        threads = {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "passive"}
        env = {**os.environ, **threads, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        print(f"\n{time.monotonic() - started:6.1f} s  empg-lite {' '.join(map(str, arguments))[:150]}")
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


def settings(half_b: Path, shared: Path, backend: str, dataset: str, *more: str) -> list[str]:
    pairs = [
        f"model.name={half_b}",
        f"model.backend={backend}",
        f"data.path={shared}/{dataset}_train.jsonl",
        f"data.eval_path={shared}/{dataset}_test.jsonl",
        "run.eval_every=0",
        *SMALL,
        *more,
    ]
    return [part for pair in pairs for part in ("--set", pair)]


def records(run: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("recipe", "dataset"), [("gsm8k-0.5b", "gsm8k"), ("math-hard-1.5b", "math")])
def test_no_signal_is_said_and_nothing_moves(
    cli: Cli, half_b: Path, shared: Path, tmp_path: Path, backend: str, recipe: str, dataset: str
) -> None:
    """b (i): random weights are never right."""
    arguments = settings(half_b, shared, backend, dataset)
    result = cli("train", "--recipe", recipe, "--force", "--max-steps", 1, "-o", "run", *arguments)
    (record,) = records(tmp_path / "run")
    print(
        f"peak {record['memory/peak_rss_mb']:.0f} MB, step {record['step_time']:.1f} s, "
        f"{result['seconds_total']} s in all"
    )
    assert (record["reward"], record["em/frac_all_wrong"], record["em/updates"]) == (0.0, 1.0, 0)
    assert record["loss"] is None and result["steps"] == 1


def lora_b(folder: Path) -> dict[str, float]:
    from safetensors.torch import load_file

    return {
        n: float(t.abs().max())
        for n, t in load_file(folder / "adapter_model.safetensors").items()
        if "lora_B" in n
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_steps_checkpoint_resume_eval_chat(
    cli: Cli, half_b: Path, shared: Path, tmp_path: Path, backend: str
) -> None:
    """b (ii): a template whose stops random text meets, and a reward that it sometimes earns."""
    (tmp_path / "stops.yaml").write_text('text: "Question: {question}\\nAnswer:"\nstop: ["a"]\n')
    more = [
        f"data.prompt={tmp_path}/stops.yaml",
        "data.reward=regex:[e-z]e",
        "run.save_every=1",
        "run.eval_limit=4",
    ]
    arguments = ["--recipe", "gsm8k-0.5b", *settings(half_b, shared, backend, "gsm8k", *more)]
    first = cli("train", "-o", "run", "--max-steps", 1, *arguments)
    second = cli("train", "-o", "run", "--max-steps", 2, "--resume", *arguments)
    assert (first["steps"], second["steps"]) == (1, 2)
    from empg_lite.run.rollouts import read_rollouts

    rows = [
        r
        for n in (1, 2)
        for r in read_rollouts(tmp_path / "run" / "rollouts" / f"step-{n:06d}.jsonl")[0].rationales
    ]
    earned, stopped = sum(r.reward for r in rows) / 16, sum(r.finish_reason == "stop" for r in rows) / 16
    steps = records(tmp_path / "run")
    print(f"reward {earned:.0%}, stopped {stopped:.0%}, grad norms {[s['grad_norm'] for s in steps]}")
    print(
        f"peak {steps[-1]['memory/peak_rss_mb']:.0f} MB, steps {[round(s['step_time'], 1) for s in steps]} s"
    )
    assert 0.2 <= earned <= 0.8 and stopped >= 0.9
    assert [s["step"] for s in steps] == [1, 2]
    assert all(s["grad_norm"] > 0 and s["em/updates"] == 1 for s in steps)
    moved = lora_b(tmp_path / "run" / "adapter")
    assert len(moved) == 24 * 7 and min(moved.values()) > 0
    figures = cli("eval", "run")
    assert figures["n"] == 4 and 0 <= figures["pass@1"] <= 1
    reply = cli("chat", "run", "--prompt", "What is 2 + 2?", "--gold", "4")
    assert reply["tuned"]["tokens"] > 0 and reply["tuned"]["reward"] in (0.0, 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fit_on_gsm8k_solutions_lowers_their_nll(
    cli: Cli, half_b: Path, shared: Path, tmp_path: Path, backend: str
) -> None:
    """b (iii): 16 of GSM8K's own solutions as rollouts; the loss of a step is their NLL a token."""
    rows = [json.loads(line) for line in (shared / "gsm8k_train.jsonl").read_text().splitlines()[:16]]
    texts = [
        {"question": r["question"], "completion": " " + r["answer"], "gold": r["answer"].split("#### ")[1]}
        for r in rows
    ]
    (tmp_path / "theirs.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    scored = cli("score", "theirs.jsonl", "--reward", "gsm8k")
    assert scored["reward"] == 1.0 and scored["rationales"] == 16
    more = [
        "data.prompt=plain",
        "sampler.problems_per_step=16",
        "optim.learning_rate=0.001",
        "optim.warmup_steps=0",
    ]
    arguments = settings(half_b, shared, backend, "gsm8k", *more)
    cli("fit", "theirs.jsonl", "theirs.jsonl", "--recipe", "gsm8k-0.5b", "-o", "run", *arguments)
    first, second = records(tmp_path / "run")
    print(
        f"NLL {first['loss']:.4f} -> {second['loss']:.4f} nats a token, "
        f"peak {second['memory/peak_rss_mb']:.0f} MB"
    )
    assert second["loss"] < first["loss"] - 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_mechanics_of_the_real_shape(half_b: Path, tmp_path: Path, backend: str) -> None:
    """c at 0.5B: sampled = recomputed, own engine = reference; NF4 bytes stay, every LoRA B moves."""
    facts = run_probe(backend, half_b, True, 2, 2, 8, cwd=tmp_path)
    print({k: facts[k] for k in ("gap_batch", "gap_alone", "loss", "grad_norm")})
    assert facts["nf4"] and len(facts["adapters"]) == 24 * 7 * 2
    assert_sound(facts)
