"""What a sample costs under ``sampler.tries``, beside fixed groups and TRL's GRPOTrainer, on a CPU.

    python benchmarks/draws.py [--rounds 7] [--recipe tiny-hard]

One thread, one process. Every shape takes its E-step (sampling and grading) and its M-step in turn, all from
the same untrained policy, its slots going on from step to step; medians over the rounds, processor seconds.
TRL takes whole steps of 8 x 8 rows, each as long as the package's last ones of that shape.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, field
from statistics import median

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import torch  # noqa: E402
import trl_grpo  # noqa: E402
from arms import EStep, Setting, _learner  # noqa: E402
from machine import headline  # noqa: E402
from tables import table  # noqa: E402
from timing import circumstances  # noqa: E402

from empg_lite.core.rationale import flatten  # noqa: E402
from empg_lite.data.sources import ProblemStream, load_splits  # noqa: E402
from empg_lite.loop.estep import weigh  # noqa: E402
from empg_lite.loop.learner import Learner  # noqa: E402
from empg_lite.loop.mstep import m_step  # noqa: E402
from empg_lite.recipe.file import load_recipe  # noqa: E402
from empg_lite.rewards import Grader  # noqa: E402
from empg_lite.sampler import SampleWork, make_sampler  # noqa: E402

#: (engine, P, K, tries): fixed groups, then slots.
SHAPES = (
    ("native", 8, 8, None),
    ("native", 16, 4, None),
    ("native", 32, 2, None),
    ("native", 64, 1, None),
    ("native", 16, 4, 8),
    ("native", 32, 2, 8),
    ("native", 64, 1, 8),
    ("generate", 8, 8, None),
)


@dataclass
class Shape:
    """A shape being measured."""

    name: str
    learner: Learner
    e_step: EStep
    optimizer: torch.optim.Optimizer
    sampling: list[float] = field(default_factory=list)
    fitting: list[float] = field(default_factory=list)
    lengths: tuple[int, ...] = ()  # of the last step's rows
    tokens: int = 0
    rows: int = 0
    fitted: int = 0
    before: SampleWork = SampleWork()

    def take(self, step: int) -> None:
        """One step of both halves; nothing is learned."""
        started = time.process_time()
        groups = self.e_step.draw(step, 0)
        assert groups is not None
        self.sampling.append(time.process_time() - started)
        rows = flatten(weigh(groups, weighting="posterior"))
        self.lengths = tuple(len(r.completion_ids) for r in rows)
        self.tokens += sum(self.lengths)
        self.rows += len(rows)
        self.fitted += sum(r.weight != 0 for r in rows)
        started = time.process_time()
        m_step(self.learner.policy, self.optimizer, rows, self.learner.fit_settings())
        self.fitting.append(time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--recipe", default="tiny-hard")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(headline(circumstances("torch", "transformers")))
    train = load_splits(load_recipe(args.recipe).resolved()).train
    with Grader() as grader:
        shapes = []
        for engine, p, k, tries in SHAPES:
            setting = Setting(args.recipe, "empg", 2e-3, 0, problems=p, samples=k, tries=tries)
            learner, stream = _learner(setting), ProblemStream(train, 0)
            sampler = make_sampler(learner.policy, engine, 256)
            frozen = torch.optim.SGD(list(learner.policy.trainable().values()), lr=0.0)
            name = f"{p} x {k}" + f", tries {tries}" * bool(tries) + f", {engine}" * (engine != "native")
            shapes.append(Shape(name, learner, EStep(setting, learner, sampler, grader, stream), frozen))
        for step in range(1, args.rounds + 3):
            for shape in shapes:
                shape.take(step)
                if step == 2:  # two rounds warm up
                    shape.sampling, shape.fitting = [], []
                    shape.tokens = shape.rows = shape.fitted = 0
                    shape.before = shape.e_step.sampler.work
    base = next(s for s in shapes if s.name == "8 x 8")
    trl = trl_seconds(args.recipe, base.lengths, args.rounds)
    head = (
        "a step of 64|E-step, ms|of 8 x 8|tokens|us a token|row-steps a token|prompt tokens|fitted|M-step, ms"
        "|TRL's step takes"
    )
    print(table(head.split("|"), [_row(s, base, trl, args.rounds) for s in shapes]))
    print(f"TRL's whole step of 8 x 8 rows, {sum(base.lengths)} tokens: {1000 * trl:.0f} ms")


def trl_seconds(recipe: str, lengths: tuple[int, ...], rounds: int) -> float:
    """Median processor seconds of TRL's step, 8 x 8 rows of these lengths, half of them right."""
    setting = Setting(recipe, "empg", 2e-3, 0)
    learner = _learner(setting)
    policy = learner.policy
    problems = load_splits(learner.recipe).train[: setting.problems]
    plain = policy.tokenizer.encode(" is", add_special_tokens=False)[0]
    trainer = trl_grpo.build(
        policy, [policy.encode_prompt(p.question)[0] for p in problems], samples=setting.samples,
        max_new_tokens=learner.recipe.sampler.max_new_tokens, rows=16, rate=1e-9,
        rewards=[1.0, 0.0] * (len(lengths) // 2),
    )  # fmt: skip
    steps, seconds = trl_grpo.Steps(trainer, policy, lengths, plain), []
    for _ in range(rounds + 2):
        started = time.process_time()
        steps.step()
        seconds.append(time.process_time() - started)
    steps.close()
    return median(seconds[2:])


def _row(s: Shape, base: Shape, trl: float, rounds: int) -> list[str]:
    work = s.e_step.sampler.work.since(s.before)
    e_step = median(s.sampling)
    return [
        s.name,
        f"{1000 * e_step:.0f}",
        f"{e_step / median(base.sampling):.2f}",
        f"{s.tokens / rounds:.0f}",
        f"{1e6 * sum(s.sampling) / s.tokens:.0f}",
        f"{work.row_steps / s.tokens:.2f}",
        f"{work.prompt_tokens / rounds:.0f}",
        f"{s.fitted / rounds:.0f}",
        f"{1000 * median(s.fitting):.0f}",
        f"{trl / (e_step + median(s.fitting)):.2f} times as long",
    ]


if __name__ == "__main__":
    main()
