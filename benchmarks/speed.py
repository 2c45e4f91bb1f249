"""How fast the package is beside transformers' ``generate``, a plain loop and TRL's GRPOTrainer, on a CPU.

    python benchmarks/speed.py [--repeats N] [--json]

One thread, one process, the bundled model, 16 problems x 8 rows, lengths from a table, the rivals in turn.
Before anything is timed, results are compared; where they differ the exit code is 1. Times decide nothing:
they are printed beside what is aimed at.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import trl_grpo
from forced import forced_generate
from gate import GRADIENT, gradient_difference, greedy_differences
from hand_loop import generate, padded_step
from machine import headline
from setting import OurStep, Setting, ends_of, prompts_of, sample, tiny_learner, tiny_setting, weighed
from timing import Spent, Spread, circumstances, in_turn, ratios, table

from empg_lite.core.rationale import Rationale
from empg_lite.data.sources import load_splits
from empg_lite.loop.learner import Learner
from empg_lite.loop.mstep import m_step
from empg_lite.rewards import Grader
from empg_lite.sampler import make_sampler

#: Rows of a rival's micro-batch: of 16, 32, 128 the quickest for both (for the loop, 8 saves another 4%).
MICRO_BATCH = 16


@dataclass(frozen=True, slots=True)
class Row:
    """A comparison: seconds of both, how many times faster ours is, and what is aimed at."""

    what: str
    rival: str
    theirs: Spread
    ours: Spread
    wall: Spread
    cpu: Spread
    target: float | None

    @classmethod
    def of(
        cls, what: str, rival: str, theirs: Sequence[Spent], ours: Sequence[Spent], target: float | None
    ) -> Row:
        """From the paired runs."""
        wall, cpu = ratios(theirs, ours)
        return cls(
            what,
            rival,
            Spread.of([s.wall for s in theirs]),
            Spread.of([s.wall for s in ours]),
            wall,
            cpu,
            target,
        )


def gate(learner: Learner, setting: Setting, rationales: Sequence[Rationale]) -> list[str]:
    """What differs and should not; nothing where all is well."""
    policy, wrong = learner.policy, []
    problems = load_splits(learner.recipe).train[:64]
    ids = [policy.encode_prompt(p.question)[1] for p in problems]
    for engine, rows in greedy_differences(policy, ids, setting.max_new_tokens).items():
        if rows:
            wrong.append(
                f"greedy tokens of engine {engine} are not generate's for {rows} of {len(ids)} prompts"
            )
    for silent in (False, True):
        off = gradient_difference(learner, weighed(rationales, setting.rewards(silent)))
        if not off < GRADIENT:
            wrong.append(
                f"the gradient differs from the per-row loop's by {off:.1e}, silent groups: {silent}"
            )
    return wrong


def e_step(learner: Learner, setting: Setting, repeats: int) -> tuple[list[Row], list[str]]:
    """Sampling alone: tokens drawn, their lengths by the table."""
    policy = learner.policy
    prompts = prompts_of(policy, setting)
    repeated = [p.ids for p in prompts for _ in p.keys]
    stop, counted = policy.tokenizer.eos_token_id, dict[str, list[int]]()
    plain = policy.model.generate

    def by_hand() -> None:
        policy.model.generate = forced_generate(plain, setting.lengths, stop, setting.plain_id)
        torch.manual_seed(0)
        rows = generate(
            policy, repeated, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
            repetition_penalty=1.0, max_new_tokens=setting.max_new_tokens,
        )  # fmt: skip
        policy.model.generate = plain
        counted["generate by hand"] = [len(row) for row in rows]

    def engine(name: str) -> Callable[[], None]:
        sampler = make_sampler(policy, name)
        return lambda: counted.update(
            {name: [len(r.completion_ids) for r in sample(learner, sampler, setting)]}
        )

    spent = in_turn(
        {"hand": by_hand, "native": engine("native"), "generate": engine("generate")}, repeats=repeats
    )
    wrong = [
        f"{name}: lengths are not the table's (forced.py hooks the function that draws)"
        for name, lengths in counted.items()
        if lengths != list(setting.lengths)
    ]
    return [
        Row.of("E-step, engine native", "HF generate", spent["hand"], spent["native"], 2.2),
        Row.of("E-step, engine generate", "HF generate", spent["hand"], spent["generate"], None),
    ], wrong


def m_step_rows(
    learner: Learner, trainer: Any, setting: Setting, rationales: Sequence[Rationale], rows: int, repeats: int
) -> list[Row]:
    """Fitting alone, all on the same rows: loss, backward, clip, optimizer."""
    policy, found = learner.policy, list[Row]()
    parameters = list(policy.trainable().values())
    for silent in (False, True):
        given = weighed(rationales, setting.rewards(silent))
        settings = learner.fit_settings()
        optimizers = [torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0) for _ in range(3)]
        spent = in_turn(
            {
                "loop": lambda o=optimizers[0], g=given: padded_step(policy, o, g, rows=rows, rate=1e-6),
                "trl": lambda o=optimizers[1], g=given: trl_grpo.loss_step(
                    trainer, policy, o, g, rows=rows, rate=1e-6
                ),
                "ours": lambda o=optimizers[2], g=given, s=settings: m_step(policy, o, g, s),
            },
            repeats=repeats,
        )
        what = f"M-step, {'half' if silent else 'none'} of the rows at weight 0"
        found.append(Row.of(what, "padded loop", spent["loop"], spent["ours"], None if silent else 2.0))
        found.append(Row.of(what, "TRL loss", spent["trl"], spent["ours"], None))
    return found


def whole_steps(setting: Setting, rows: int, repeats: int) -> tuple[list[Row], list[str]]:
    """A step from prompts to updated weights, TRL's in its own training loop."""
    found, wrong = list[Row](), list[str]()
    with Grader() as grader:
        for silent in (False, True):
            ours = OurStep(tiny_learner(), setting, grader, silent=silent)
            theirs = trl_steps(setting, rows, setting.rewards(silent))
            spent = in_turn({"trl": theirs.step, "ours": ours.step}, repeats=repeats)
            what = f"whole step, {'half' if silent else 'none'} of the rows at weight 0"
            found.append(Row.of(what, "TRL GRPOTrainer", spent["trl"], spent["ours"], 3.0 if silent else 2.0))
            for name, tokens in (("TRL", theirs.tokens), ("ours", ours.tokens)):
                if tokens != setting.tokens:
                    wrong.append(f"{what}: {name} drew {tokens} tokens, the table has {setting.tokens}")
            theirs.close()
    return found, wrong


def trl_trainer(learner: Learner, setting: Setting, rows: int, rewards: Sequence[float]) -> Any:
    """A trainer of TRL's over the learner's policy, set to the setting's step."""
    prompts = [learner.policy.encode_prompt(p.question)[0] for p in setting.problems]
    return trl_grpo.build(
        learner.policy, prompts, samples=setting.samples, max_new_tokens=setting.max_new_tokens,
        rows=rows, rate=learner.recipe.optim.learning_rate, rewards=rewards,
    )  # fmt: skip


def trl_steps(setting: Setting, rows: int, rewards: Sequence[float]) -> trl_grpo.Steps:
    """TRL's loop over a policy of its own."""
    learner = tiny_learner()
    trainer = trl_trainer(learner, setting, rows, rewards)
    return trl_grpo.Steps(trainer, learner.policy, setting.lengths, setting.plain_id)


def show(rows: Sequence[Row], setting: Setting) -> str:
    """The table; tokens a second where only sampling is timed."""

    def speed(spread: Spread, what: str) -> str:
        rate = f" = {setting.tokens / spread.median:.0f} tok/s" if what.startswith("E-step") else ""
        return f"{spread} s{rate}"

    head = ("what", "rival", "rival takes", "ours takes", "ratio, wall", "ratio, CPU time", "aim")
    return table(
        head,
        [
            (
                r.what, r.rival, speed(r.theirs, r.what), speed(r.ours, r.what), str(r.wall), str(r.cpu),
                f">= {r.target:g}" if r.target else "-",
            )
            for r in rows
        ],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed rounds (two more warm up)")
    parser.add_argument("--micro-batch", type=int, default=MICRO_BATCH, metavar="ROWS", help="of the rivals")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    learner = tiny_learner()
    setting = tiny_setting(learner)
    assert len(ends_of(prompts_of(learner.policy, setting), setting)) == setting.rows
    where = circumstances("transformers", "peft", "trl")
    rationales = sample(learner, make_sampler(learner.policy, "native"), setting)
    wrong = gate(learner, setting, rationales)
    if wrong:
        sys.exit("\n".join(wrong))
    rows, repeats = arguments.micro_batch, arguments.repeats
    found, wrong = e_step(learner, setting, repeats)
    trainer = trl_trainer(learner, setting, rows, setting.rewards(False))
    found += m_step_rows(learner, trainer, setting, rationales, rows, repeats)
    whole, uneven = whole_steps(setting, rows, repeats)
    found, wrong = found + whole, wrong + uneven
    if arguments.json:
        print(json.dumps({"machine": where, "tokens": setting.tokens, "rows": [asdict(r) for r in found]}))
    else:
        print(headline(where))
        print(
            f"{setting.rows} rows, {setting.tokens} completion tokens, {repeats} rounds: median (least-most)"
        )
        print(show(found, setting))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
