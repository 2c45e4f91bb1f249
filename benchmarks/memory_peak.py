"""How much memory the M-step takes at a real model's vocabulary, beside a loop that holds all logits.

    python benchmarks/memory_peak.py [--json]

A random model with the vocabulary of Qwen2.5 (151,936) and 128 hidden units, 8 rows of 64 completion tokens,
float32, on a CPU. Each rival has a process of its own; counted is the peak of its resident memory during one
step, over what was resident just before it. The peak is the kernel's own high-water mark (``VmHWM``), reset
before the step by writing 5 to ``/proc/self/clear_refs``: Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from machine import headline, last_line
from shapes import Shape, write_model
from timing import circumstances, table

#: MB over what was resident before the step that the task allows.
BAR = 60.0
SHAPE = Shape(hidden=128, intermediate=384, layers=4, heads=4, kv_heads=2, vocab=151_936)
ROWS, PROMPT, COMPLETION = 8, 32, 64
RIVALS = {"empg": "m_step", "loop": "padded loop, all logits at once"}
MB = 1e6


def resident(field: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process, MB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) * 1024 / MB


def peak_of(work: Callable[[], Any]) -> float:
    """MB that ``work`` needs at most, over what is resident before it."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve as a cushion
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def measure(rival: str, folder: Path) -> float:
    """The peak of one step, in this process."""
    import torch
    from hand_loop import padded_step

    from empg_lite.loop.mstep import m_step

    torch.set_num_threads(1)
    learner, rationales = prepared(folder)
    policy, settings = learner.policy, learner.fit_settings()
    for parameter in policy.model.parameters():
        parameter.sum()  # weights that are mapped from their file are resident only once they were read
    if rival == "empg":
        return peak_of(lambda: m_step(policy, learner.optimizer, rationales, settings))
    rate = settings.learning_rate
    return peak_of(lambda: padded_step(policy, learner.optimizer, rationales, rows=ROWS, rate=rate))


def prepared(folder: Path) -> tuple[Any, list[Any]]:
    """A learner over the model, and rows of random tokens, weight 1 each: two problems."""
    import random

    from setting import tiny_recipe

    from empg_lite.core.rationale import Rationale
    from empg_lite.loop.learner import build_learner

    r = random.Random(0)
    learner = build_learner(tiny_recipe(f"model.name={folder}"))
    prompts = [tuple(r.randrange(256) for _ in range(PROMPT)) for _ in range(2)]
    return learner, [
        Rationale(
            problem_id=f"p{i * 2 // ROWS}",
            question="q",
            gold="1",
            prompt="q",
            prompt_ids=prompts[i * 2 // ROWS],
            completion="",
            completion_ids=tuple(r.randrange(SHAPE.vocab) for _ in range(COMPLETION)),
            finish_reason="stop",
            step=1,
            policy_step=0,
            sample_index=i % (ROWS // 2),
            weight=1.0,
        )
        for i in range(ROWS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--measure", nargs=2, metavar=("RIVAL", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure(arguments.measure[0], Path(arguments.measure[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), SHAPE)
        peaks = {name: _in_process(name, folder) for name in RIVALS}
    where = circumstances("transformers", "peft")
    if arguments.json:
        print(json.dumps({"machine": where, "peak_mb": peaks, "bar_mb": BAR}))
        return
    print(headline(where))
    print(f"{ROWS} rows of {PROMPT} + {COMPLETION} tokens, vocabulary {SHAPE.vocab:,}, float32")
    rows = [(RIVALS[n], f"{mb:.0f} MB", f"<= {BAR:g} MB" if n == "empg" else "-") for n, mb in peaks.items()]
    print(table(("one M-step", "peak over before", "bar"), rows))


def _in_process(rival: str, folder: str) -> float:
    return float(last_line([sys.executable, __file__, "--measure", rival, folder]))


if __name__ == "__main__":
    main()
