"""What has to hold before a speed means anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from hand_loop import generate, padded_loss
from torch import Tensor

from empg_lite.core.rationale import Rationale
from empg_lite.loop.learner import Learner
from empg_lite.loop.mstep import m_step
from empg_lite.policy.policy import Policy
from empg_lite.sampler import Decoding, Prompt, make_sampler

#: Relative difference allowed between two gradients in float32.
GRADIENT = 1e-5


def greedy_differences(
    policy: Policy, prompts: Sequence[tuple[int, ...]], max_new_tokens: int
) -> dict[str, int]:
    """For how many prompts each engine's greedy tokens are not those of ``model.generate``."""
    plain = dict(temperature=None, top_p=None, top_k=None, repetition_penalty=1.0)
    wanted = generate(
        policy, prompts, do_sample=False, max_new_tokens=max_new_tokens,
        eos_token_id=sorted(policy.stop_ids), **plain,
    )  # fmt: skip
    found = {}
    for engine in ("native", "generate"):
        rows = make_sampler(policy, engine).sample(
            [Prompt(ids, (n,)) for n, ids in enumerate(prompts)], Decoding(max_new_tokens, temperature=0.0)
        )
        found[engine] = sum(row[0].ids != ids for row, ids in zip(rows, wanted, strict=True))
    return found


class _Keep(torch.optim.Optimizer):
    """Keeps the gradient that it is given, and moves nothing."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.gradient = torch.zeros(())

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.gradient = _flat(self.param_groups[0]["params"])


def _flat(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])


def gradient_difference(learner: Learner, rationales: Sequence[Rationale]) -> float:
    """|m_step's gradient - that of one row after another, without padding| / |the latter|."""
    policy, parameters = learner.policy, list(learner.policy.trainable().values())
    keep = _Keep(parameters)
    m_step(policy, keep, rationales, replace(learner.fit_settings(), max_grad_norm=float("inf")))
    z = float(sum(len(r.completion_ids) for r in rationales))
    with policy.training():
        for p in parameters:
            p.grad = None
        for r in rationales:
            padded_loss(policy, [(r.prompt_ids, r.completion_ids)], [r.weight or 0.0], z).backward()
    wanted = _flat(parameters)
    for p in parameters:
        p.grad = None
    return float((keep.gradient - wanted).norm() / wanted.norm())
