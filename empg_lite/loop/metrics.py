"""The metrics of a step: its samples, its fit, its cost.

``docs/files.md`` explains each name; names follow TRL where the quantity is the same, EM's own are under
``em/``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from empg_lite.core.rationale import FAILURES, flatten
from empg_lite.core.sizes import shared_prefix
from empg_lite.em import effective_sample_size, group_signal
from empg_lite.loop.estep import reward_matrix

if TYPE_CHECKING:
    from empg_lite.core.rationale import Group, Rationale
    from empg_lite.core.slots import Ended, Slot
    from empg_lite.em import Drift
    from empg_lite.loop.estep import Drawn
    from empg_lite.loop.mstep import FitStats
    from empg_lite.run.checkpoint import TrainState


def estep_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards, signal, lengths and grader failures of a step's samples.

    Mean rewards exclude grader failures; lengths are in tokens, stops included.
    """
    rows = flatten(groups)
    rewards, valid = reward_matrix(groups)
    graded = rewards[valid]
    lengths = [len(r.completion_ids) for r in rows]
    right = [n for r, n in zip(rows, lengths, strict=True) if r.reward and not r.failed]
    texts = {(r.problem_id, r.completion) for r in rows if r.reward and not r.failed}
    reasons = Counter(r.reason for r in rows)
    signal = group_signal(rewards, valid)
    return {
        "reward": float(graded.mean()) if len(graded) else 0.0,
        "reward_std": float(graded.std()) if len(graded) > 1 else 0.0,
        "frac_reward_zero_std": signal.pop("frac_reward_zero_std"),
        **{f"em/{name}": value for name, value in signal.items()},
        "em/frac_wrong_paid": _wrong_paid(groups),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/mean_length_right": sum(right) / len(right) if right else 0.0,
        "completions/distinct_right": len(texts) / len(right) if right else 0.0,
        "completions/clipped_ratio": reasons["truncated"] / len(rows),
        **{f"reasons/{name}": reasons[name] / len(rows) for name in sorted(filter(None, reasons))},
        "reasons/failed": sum(reasons[name] for name in FAILURES) / len(rows),
    }


def _wrong_paid(groups: Sequence[Group]) -> float:
    """Share of problems with no right answer but different rewards: shaping gone wrong."""
    wrong = [[r for r in g.rationales if not r.failed] for g in groups]
    paid = [rows for rows in wrong if not any(r.correct for r in rows) and len({r.reward for r in rows}) > 1]
    return len(paid) / len(groups)


def turn_metrics(
    rows: Sequence[Rationale], ended: Sequence[Ended], slots: Sequence[Slot]
) -> dict[str, float]:
    """How the problems of a step's slots fared (``sampler.tries``).

    ``reward`` says little here: hard problems are asked more often. ``em/right_first``, over the problems
    that were opened, estimates the accuracy at temperature 1; it is missing where none was.

    Args:
        ended: problems that left their slots in this step.
        slots: after it.
    """
    first = [r.correct for r in rows if r.tries == 1 and not r.failed]
    solved = [e.tries for e in ended if e.solved]
    return {
        **({"em/right_first": sum(first) / len(first)} if first else {}),
        "em/finished": len(ended),
        "em/solved": len(solved),
        "em/given_up": len(ended) - len(solved),
        **({"em/tries_solved": sum(solved) / len(solved)} if solved else {}),
        "em/slots_open": sum(slot.tries > 0 for slot in slots),
    }


def mixture_metrics(rows: Sequence[Rationale], policy_step: int) -> dict[str, float]:
    """Origin, age and effective number of the rows that a step fits.

    Age is the number of optimizer steps between the policy that drew a row and the one being fitted, which
    has taken ``policy_step``; it is known if the row's own ``policy_step`` is >= 0.

    Args:
        rows: at least one, weighed.
    """
    ages = [abs(policy_step - r.policy_step) for r in rows if r.policy_step >= 0]
    origins = Counter(r.origin for r in rows)
    return {
        "em/weight_max": max(abs(r.weight or 0.0) for r in rows),
        "em/ess": effective_sample_size(torch.tensor([r.weight for r in rows if not r.failed])),
        "em/frac_text": origins["text"] / len(rows),
        "em/frac_stale": sum(age > 0 for age in ages) / len(rows),
        "em/staleness": sum(ages) / len(ages) if ages else 0.0,
        "em/staleness_max": float(max(ages, default=0)),
    }


def sampling_metrics(drawn: Drawn) -> dict[str, Any]:
    """What sampling a step took."""
    rows, own, total = flatten(drawn.groups), drawn.own_work, drawn.work
    assert own is not None and total is not None, "with_work comes first"
    tokens = sum(len(r.completion_ids) for r in rows)
    return {
        "entropy": drawn.nats / max(tokens, 1),
        "em/context_tokens": context_tokens(rows),
        "time/prompt_tokens": total.prompt_tokens,
        "time/row_steps": total.row_steps,
        "time/refresh": own.refresh_seconds,
        "time/graphs_captured": total.graphs_captured,
        "time/graphs_replayed": total.graphs_replayed,
        "time/eager_steps": total.eager_steps,
        "time/tokens_per_second": tokens / drawn.sample_seconds,
    }


def fit_metrics(stats: FitStats, rate: float, state: TrainState, rows: int) -> dict[str, Any]:
    """What an M-step did.

    Args:
        rate: learning rate of the step.
        state: after it.
        rows: all rows of the step.
    """
    return {
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "learning_rate": rate,
        "num_tokens": state.num_tokens,
        "em/rows_fitted": stats.rows_fitted,
        "em/rows_skipped": rows - stats.rows_fitted,
        "em/updates": stats.updates,
        "em/policy_step": state.policy_step,
        "em/skipped_nonfinite": stats.skipped_nonfinite,
        **_loss_scale(stats),
        "time/tokens_computed": stats.tokens_computed,
        "time/tokens_padded": stats.tokens_padded,
        **_drift_metrics(stats.drift),
    }


def _loss_scale(stats: FitStats) -> dict[str, float]:
    """For float16: the loss scale after the step, and how often it was halved."""
    if stats.loss_scale is None:
        return {}
    return {"em/loss_scale": stats.loss_scale, "em/loss_scale_halvings": stats.scale_halvings}


def context_tokens(rows: Sequence[Rationale]) -> int:
    """Keys that the completions' tokens attended to one by one: entries read from one layer's KV cache.

    What all prompts share is left out, because one product can read it for all rows.
    """
    prefix = shared_prefix(list({r.prompt_ids for r in rows}))
    tokens = [(len(r.prompt_ids) - prefix, len(r.completion_ids)) for r in rows]
    return sum(n * prompt + n * (n - 1) // 2 for prompt, n in tokens)


def _drift_metrics(drift: Drift | None) -> dict[str, float]:
    if drift is None:
        return {}
    return {
        "em/kl_old": drift.k3,
        "em/kl_old_k1": drift.k1,
        "em/dlogp_right": drift.right,
        "em/dlogp_wrong": drift.wrong,
        "em/logratio_max": drift.largest,
    }


def memory_metrics(predicted: int) -> dict[str, float]:
    """Peak memory so far in MiB, of the process and of a GPU; and the plan's figure for it."""
    import resource

    peak = {
        "memory/peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "memory/predicted_mb": predicted / 2**20,
    }
    if torch.cuda.is_available():
        peak["memory/peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return peak
