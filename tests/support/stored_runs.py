"""Run directories made by hand: what a report reads, without a model. Every number is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from empg_lite.core.rationale import Rationale, problem_id
from empg_lite.recipe.file import dump_recipe, load_recipe
from empg_lite.recipe.schema import Recipe
from empg_lite.run.rollouts import RolloutHeader, encode_rollouts

#: Fixed groups, whatever the demo samples by.
GROUPS = [
    "sampler.tries=null",
    "sampler.problems_per_step=16",
    "sampler.samples_per_problem=8",
    "optim.learning_rate=2e-3",
    "run.steps=25",
]
HEADER = RolloutHeader(model="tiny", reward_name="gsm8k")


def rationale(
    question: str, completion: str, *, right: bool, gold: str = "7", step: int = 1, k: int = 0, **more: Any
) -> Rationale:
    tokens = len(completion.split())
    return Rationale(
        problem_id=problem_id(question),
        question=question,
        gold=gold,
        prompt=question,
        prompt_ids=(1, 2),
        completion=completion,
        completion_ids=tuple(range(tokens)),
        finish_reason=more.pop("finish_reason", "stop"),
        step=step,
        policy_step=step - 1,
        sample_index=k,
        reward=more.pop("reward", float(right)),
        reason="equal" if right else "different",
        weight=float(right),
        extracted=more.pop("extracted", completion.split()[-1] if completion.split() else None),
        rule="hash",
        **more,
    )


def step_rows(step: int, seed: int = 0) -> list[Rationale]:
    """Four problems of four rationales: problem p has p right ones; every third one checks itself."""
    rng, rows = Random(1000 * seed + step), []
    for p in range(4):
        for k in range(4):
            check = " Let me check that: it is right." if (p + k) % 3 == 0 else ""
            text = f"{p} + {k} = {p + k}.{check}" + " so" * rng.randint(0, 5)
            rows.append(
                rationale(
                    f"Problem {p} of step {step}?",
                    f"{text} #### {7 if k < p else 8}",
                    right=k < p,
                    step=step,
                    k=k,
                )
            )
    return rows


def record(step: int, rows: list[Rationale]) -> dict[str, Any]:
    """A metrics record that says what the rows say."""
    lengths = [len(r.completion_ids) for r in rows]
    right = [len(r.completion_ids) for r in rows if r.right]
    return {
        "step": step,
        "reward": sum(r.reward or 0 for r in rows) / len(rows),
        "em/frac_all_right": 0.0,
        "em/frac_mixed": 0.75,
        "em/frac_all_wrong": 0.25,
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/mean_length_right": sum(right) / len(right),
        "completions/clipped_ratio": 0.0,
        "entropy": 1.0 / step,
        "loss": 0.1 * step,
        "num_tokens": 100 * step,
        "step_time": 2.0,
        "time/sample": 1.0,
        "time/score": 0.25,
        "time/fit": 0.5,
        "time/tokens_per_second": 50.0,
        "memory/peak_rss_mb": 900.0,
        "memory/predicted_mb": 1000.0,
        "health": [],
        **({"eval/accuracy": 0.1 * step, "eval/n": 40} if step % 2 == 0 else {}),
    }


def turn_record(step: int) -> dict[str, Any]:
    """What a step under ``sampler.tries`` adds to ``record``; in step 2 no problem was opened, nor solved."""
    solved, given_up = 0 if step == 2 else 2 + step, step - 1
    known = {"em/right_first": 0.125 * step, "em/tries_solved": 1.5} if solved else {}
    ended = {"em/finished": solved + given_up, "em/solved": solved, "em/given_up": given_up}
    return {**known, **ended, "em/slots_open": 3}


def make_run(
    folder: Path,
    *,
    steps: int = 4,
    seed: int = 0,
    change: Callable[[Recipe], Recipe] = lambda r: r,
    rows: Callable[[int], list[Rationale]] | None = None,
    metrics: Callable[[int], dict[str, Any]] = lambda step: {},
    answers: list[tuple[Rationale, Rationale]] | None = None,
) -> Path:
    """A finished run; without ``answers`` one that was never evaluated."""
    recipe = change(load_recipe("tiny", GROUPS, seed=seed).resolved())
    (folder / "rollouts").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        dump_recipe(recipe, "made by: empg-lite train --recipe tiny"), "utf-8"
    )
    (folder / "environment.json").write_text(json.dumps({"python": "3.x", "device": "cpu"}), "utf-8")
    drawn = {step: (rows or (lambda s: step_rows(s, seed)))(step) for step in range(1, steps + 1)}
    lines = [json.dumps(record(step, found) | metrics(step)) + "\n" for step, found in drawn.items()]
    (folder / "metrics.jsonl").write_text("".join(lines), "utf-8")
    for step, found in drawn.items():
        path = folder / "rollouts" / f"step-{step:06d}.jsonl"
        path.write_text(encode_rollouts(HEADER, found), "utf-8")
    for name, side in (("before", 0), ("after", 1)) if answers else ():
        own = [pair[side] for pair in answers or []]
        right = sum(r.right for r in own) / len(own)
        figures = {
            "step": side * steps,
            "split": "test",
            "n": len(own),
            "pass@1": right,
            "pass@1_ci95": [max(0.0, right - 0.1), min(1.0, right + 0.1)],
            "t1_accuracy": right / 2,
            "mean_length": 5.0,
            "mean_length_right": 6.0,
            "truncated": 0.0,
        }
        (folder / "eval" / name).mkdir(parents=True)
        (folder / "eval" / name / "figures.json").write_text(json.dumps(figures), "utf-8")
        (folder / "eval" / name / "greedy.jsonl").write_text(encode_rollouts(HEADER, own), "utf-8")
    return folder
