"""``benchmarks/baselines.py``: GRPO, Dr.GRPO and RLOO against TRL's trainers, RAFT against its definition.

The trainers are real ones, built on the fixture model. Three of their methods are replaced: sampling, grading
and the forward pass give the lengths, rewards and log-probabilities of a draw. What turns rewards into
advantages, and log-probabilities into a loss, is TRL's code. All in float64.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from exact import agree, close
from torch import Tensor

from empg_lite.em import denominator, em_weights, m_step_loss

WITH_RATIO = ("grpo", "dr_grpo", "rloo")
SEEDS = range(30)
#: TRL corrects its standard deviation by K / (K - 1) in float32; all else agrees to the last digits.
TOLERANCE = {"grpo": 1e-7, "dr_grpo": 1e-12, "rloo": 1e-12}
#: Not the longest completion of a draw, so that Dr.GRPO's constant cannot pass for a length.
MAX_NEW_TOKENS = 11


@pytest.fixture
def baselines(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("baselines")


@pytest.fixture(scope="module")
def trainers(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One trainer a method. TRL is imported here, and the global random numbers it seeds are put back."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        methods = (*WITH_RATIO, "cispo")
        return {m: build_trainer(m, model_dir, tmp_path_factory.mktemp("trl")) for m in methods}
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def build_trainer(method: str, model_dir: Path, folder: Path) -> Any:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert trl.__version__ == "1.10.0", f"compared with TRL 1.10.0, not {trl.__version__}"
    own: dict[str, Any] = {"normalize_advantages": False}
    config, trainer = trl.RLOOConfig, trl.RLOOTrainer
    if method != "rloo":
        own = {"loss_type": method, "scale_rewards": "group" if method == "grpo" else "none"}
        config, trainer = trl.GRPOConfig, trl.GRPOTrainer
    return trainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        reward_funcs=len,
        train_dataset=Dataset.from_list([{"prompt": "1 + 1 ="}]),
        args=config(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            num_generations=2,
            per_device_train_batch_size=2,
            max_completion_length=MAX_NEW_TOKENS,
            beta=0.0,
            epsilon=0.2,
            epsilon_high=1.2 if method == "cispo" else 0.2,  # CISPO's is the cap itself
            **own,
        ),
    )


# --- draws -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """One step: rewards (P, K), mask (B, T), log-probabilities now and at sampling (B, T)."""

    rewards: Tensor
    mask: Tensor
    new: Tensor
    old: Tensor


def draw(seed: int) -> Draw:
    """Ragged rows, some of them empty; binary, graded and equal rewards; finite rubbish outside the mask.

    The old log-probabilities equal the new ones in every third draw: the first pass.
    """
    rng = np.random.default_rng(seed)
    p, k, t = int(rng.integers(1, 5)), int(rng.integers(2, 9)), int(rng.integers(1, 8))
    lengths = rng.integers(0, t + 1, p * k)
    lengths[0] = t  # TRL draws no empty completion, and takes the type of the ids from the first
    rewards = rng.random((p, k)) if seed % 2 else rng.integers(0, 2, (p, k)).astype(float)
    rewards[0] = rng.choice([rewards[0], np.full(k, 0.1), np.zeros(k)])
    new = -np.exp(rng.normal(size=(p * k, t)))
    old = new + (rng.normal(scale=0.4, size=new.shape) if seed % 3 else 0.0)
    mask = np.arange(t) < lengths[:, None]
    return Draw(*(torch.tensor(x) for x in (rewards, mask, new, old)))


def test_the_draws_reach_every_case() -> None:
    """Ratios on both sides of the clip under advantages of both signs, for tokens and for sequences."""
    seen = set()
    for seed in SEEDS:
        step = draw(seed)
        sign = (step.rewards - step.rewards.mean(1, keepdim=True)).flatten().sign()
        log_ratio = torch.where(step.mask, step.new - step.old, 0.0)
        for level, ratio in (("token", log_ratio.exp()), ("sequence", log_ratio.sum(1, keepdim=True).exp())):
            side = (ratio > 1.2).int() - (ratio < 0.8).int()
            seen |= {(level, int(a), int(s)) for a, row in zip(sign, side, strict=True) for s in row}
        seen |= {"first pass"} if torch.equal(step.new, step.old) else {"later pass"}
        seen |= {"empty row"} if bool((step.mask.sum(1) == 0).any()) else set()
        seen |= {"equal rewards"} if bool((step.rewards.std(1) == 0).any()) else set()
    sides = {(level, a, s) for level in ("token", "sequence") for a in (-1, 1) for s in (-1, 0, 1)}
    assert seen >= sides | {"first pass", "later pass", "empty row", "equal rewards"}


# --- the two implementations -------------------------------------------------------------------------

#: Advantages (B,), loss, and its gradient by the log-probabilities (B, T).
Result = tuple[Tensor, Tensor, Tensor]


def trl(trainer: Any, step: Draw, parts: int = 1) -> Result:
    """TRL's result, accumulated over ``parts`` micro-batches of equally many rows."""
    rows, rloo = len(step.mask), "RLOO" in type(trainer).__name__
    leaf, current = step.new.clone().requires_grad_(), torch.arange(rows)

    def forward(*_: object, **__: object) -> tuple[Tensor, Tensor, None]:
        """Scoring runs without gradients, on the policy that sampled; the loss runs with them."""
        logprobs = (leaf if torch.is_grad_enabled() else step.old)[current]
        return logprobs, torch.zeros(logprobs.shape), None

    completions = [[5] * int(n) for n in step.mask.sum(1)]
    sampled: tuple[Any, ...] = ([[1]] * rows, completions, None, [""] * rows, None, {}, None, None)
    if rloo:
        sampled = ([[1]] * rows, completions, [""] * rows)
    trainer._generate = lambda prompts: sampled
    trainer._calculate_rewards = lambda *_: step.rewards.reshape(-1, 1)
    trainer._get_per_token_logps_and_entropies = forward
    trainer.num_generations = step.rewards.shape[1]
    # With one iteration GRPO keeps no old log-probabilities: it detaches the new ones.
    trainer.num_iterations = 1 if torch.equal(step.new, step.old) else 2
    trainer.current_gradient_accumulation_steps = parts
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": "x"} for _ in range(rows)])
    assert torch.equal(inputs["completion_mask"].bool(), step.mask)
    assert ("old_logps" if rloo else "old_per_token_logps") in inputs or trainer.num_iterations == 1
    total = torch.zeros((), dtype=torch.float64)
    for current in torch.arange(rows).chunk(parts):  # noqa: B007 (forward reads it)
        part = {name: x[current] if x.ndim else x for name, x in inputs.items()}
        loss = trainer.compute_loss(trainer.model, part)
        if rloo:  # leaves this to the training step of transformers
            loss = loss / parts
        loss.backward()
        total += loss.detach()
    assert leaf.grad is not None
    return inputs["advantages"], total, leaf.grad


def share(baselines: ModuleType, method: str, step: Draw, rows: Tensor, of: int | None = None) -> Tensor:
    """The loss of one micro-batch in a step of ``of`` rows, or of all."""
    return baselines.policy_loss(
        method,
        step.new[rows],
        step.old[rows],
        step.mask[rows],
        baselines.advantages(method, step.rewards).flatten()[rows],
        rows=of or len(step.mask),
        max_new_tokens=MAX_NEW_TOKENS,
    )


def ours(baselines: ModuleType, method: str, step: Draw, parts: list[Tensor] | None = None) -> Result:
    """The result of ``benchmarks/baselines.py``, accumulated over micro-batches given as row numbers."""
    step = replace(step, new=step.new.clone().requires_grad_())
    total = torch.zeros((), dtype=torch.float64)
    for rows in parts or [torch.arange(len(step.mask))]:
        loss = share(baselines, method, step, rows)
        loss.backward()
        total += loss.detach()
    assert step.new.grad is not None
    return baselines.advantages(method, step.rewards).flatten(), total, step.new.grad


def compare(baselines: ModuleType, trainers: dict[str, Any], method: str) -> None:
    """Advantages, loss and gradient of every draw; TRL's as one batch, and as K micro-batches of P rows."""
    tolerance = {"rtol": TOLERANCE[method], "atol": TOLERANCE[method]}
    for step in map(draw, SEEDS):
        mine = ours(baselines, method, step)
        for parts in (1, step.rewards.shape[1]):
            for a, b in zip(mine, trl(trainers[method], step, parts), strict=True):
                torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("method", WITH_RATIO)
def test_advantages_loss_and_gradient_are_trls(
    baselines: ModuleType, trainers: dict[str, Any], method: str
) -> None:
    compare(baselines, trainers, method)


# --- deliberate errors, each put into the module and seen by the same comparison ----------------------


def population_std(_: str, rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-4)


def batch_mean(_: str, rewards: Tensor) -> Tensor:
    return rewards - rewards.mean()


def upper_clip_only(ratio: Tensor, advantages: Tensor) -> Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(max=1.2) * advantages)


def lower_clip_only(ratio: Tensor, advantages: Tensor) -> Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(min=0.8) * advantages)


def clip_without_minimum(ratio: Tensor, advantages: Tensor) -> Tensor:
    return -ratio.clamp(0.8, 1.2) * advantages


def no_ratio(ratio: Tensor, advantages: Tensor) -> Tensor:
    return -ratio.log() * advantages


def other(name: str, method: str) -> Callable[[ModuleType], Any]:
    """The module's own function ``name``, asked for another method."""

    def make(baselines: ModuleType) -> Any:
        right = getattr(baselines, name)
        return lambda _, *args, **options: right(method, *args, **options)

    return make


def per_micro_batch(baselines: ModuleType) -> Any:
    right = baselines.policy_loss
    return lambda *args, **options: right(*args, **options | {"rows": int(args[3].any(1).sum())})


@pytest.mark.parametrize(
    ("method", "name", "error"),
    [
        *((m, "CLIP", 1e9) for m in WITH_RATIO),
        *((m, "CLIP", 0.21) for m in WITH_RATIO),
        *((m, "_clipped", f) for m in WITH_RATIO for f in (upper_clip_only, lower_clip_only)),
        *((m, "_clipped", f) for m in WITH_RATIO for f in (clip_without_minimum, no_ratio)),
        *((m, "advantages", batch_mean) for m in WITH_RATIO),
        *((m, "policy_loss", per_micro_batch) for m in WITH_RATIO),  # empty rows left out of the mean
        ("grpo", "STD_FLOOR", 1e-6),
        ("grpo", "advantages", population_std),
        ("grpo", "advantages", other("advantages", "dr_grpo")),
        ("dr_grpo", "advantages", other("advantages", "grpo")),
        ("dr_grpo", "advantages", other("advantages", "rloo")),  # K - 1 for K
        ("rloo", "advantages", other("advantages", "dr_grpo")),  # the group mean holds the row itself
        ("grpo", "policy_loss", other("policy_loss", "dr_grpo")),  # a constant for the length
        ("dr_grpo", "policy_loss", other("policy_loss", "grpo")),  # the length for the constant
        ("rloo", "policy_loss", other("policy_loss", "grpo")),  # token ratios for the sequence's
    ],
)
def test_a_deliberate_error_is_seen(
    baselines: ModuleType,
    trainers: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    name: str,
    error: Any,
) -> None:
    made = error(baselines) if getattr(error, "__name__", "") in ("make", "per_micro_batch") else error
    monkeypatch.setattr(baselines, name, made)
    with pytest.raises(AssertionError, match="not close"):
        compare(baselines, trainers, method)


# --- micro-batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*WITH_RATIO, "raft"])
def test_micro_batches_add_up(baselines: ModuleType, method: str) -> None:
    caught = 0
    for seed in SEEDS:
        step = draw(seed)
        order = torch.randperm(len(step.mask), generator=torch.Generator().manual_seed(seed))
        parts = [p for p in order.tensor_split([1, 1 + len(order) // 3]) if len(p)]  # of unequal sizes
        whole, split = ours(baselines, method, step), ours(baselines, method, step, parts)
        for a, b in zip(whole, split, strict=True):
            close(a, b)
        # the error: the mean over micro-batches of the mean over their own rows
        own = [share(baselines, method, step, p, len(p)) / len(parts) for p in parts]
        caught += not agree(sum(own), whole[1])
    assert caught > 20  # the others have two rows, or nothing to fit


@pytest.mark.parametrize("method", [*WITH_RATIO, "raft"])
def test_nothing_outside_the_mask_counts(baselines: ModuleType, method: str) -> None:
    for seed in SEEDS:
        step = draw(seed)
        clean = ours(baselines, method, step)
        for garbage in (float("nan"), float("inf"), -float("inf")):
            new, old = (torch.where(step.mask, x, garbage) for x in (step.new, step.old))
            dirty = ours(baselines, method, Draw(step.rewards, step.mask, new, old))
            for a, b in zip(clean, dirty, strict=True):
                close(a, b)


# --- the package's own loss against TRL's ------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "weighting", "z"),
    [("dr_grpo", "centered", "max_length"), ("cispo", "centered", "tokens"), ("rloo", "loo", "rows")],
)
def test_a_first_pass_of_trl_is_an_m_step(
    trainers: dict[str, Any], method: str, weighting: str, z: str
) -> None:
    """At theta = old all ratios are 1: the gradients are the M-step's of the same weights (item 13)."""
    caught = 0
    for seed in SEEDS:
        later = draw(3 * seed + 1)
        first = replace(later, old=later.new)
        lengths = first.mask.sum(1).tolist()
        weights = em_weights(first.rewards, torch.ones_like(first.rewards) > 0, weighting=weighting).flatten()
        total = (
            len(lengths)
            if z == "rows"
            else denominator(lengths, normalization=z, max_new_tokens=MAX_NEW_TOKENS)
        )
        leaf = first.new.clone().requires_grad_()
        m_step_loss(leaf, first.mask, weights, total).backward()
        close(trl(trainers[method], first)[2], leaf.grad)
        caught += not agree(trl(trainers[method], later)[2], leaf.grad)
    assert caught > 20  # the error: the same on later passes; the others have no signal


# --- by the papers' definitions ----------------------------------------------------------------------


def test_advantages_by_hand(baselines: ModuleType) -> None:
    """mean 1/4, std with n - 1 exactly 1/2; a problem where all are equal counts nothing but under RAFT."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
    rewards = rewards.double()
    for method, first, equal in (
        ("grpo", [0.75 / 0.5001] + [-0.25 / 0.5001] * 3, 0.0),
        ("dr_grpo", [0.75] + [-0.25] * 3, 0.0),
        ("rloo", [1.0] + [-1 / 3] * 3, 0.0),
        ("raft", [1.0, 0.0, 0.0, 0.0], 1.0),
    ):
        close(baselines.advantages(method, rewards), [first, [equal] * 4, [0.0] * 4])
    close(baselines.advantages("raft", torch.tensor([[0.2, 0.9, 0.9, 0.0]])), [[0.0, 1.0, 1.0, 0.0]])


def test_advantages_by_loops(baselines: ModuleType) -> None:
    for seed in SEEDS:
        rewards = draw(seed).rewards
        every = [r for group in rewards.tolist() for r in group]
        for method in baselines.METHODS:
            slow = []
            for group in rewards.tolist():
                k, mean, best = len(group), sum(group) / len(group), max(group)
                std = (sum((r - mean) ** 2 for r in group) / (k - 1)) ** 0.5
                slow.append(
                    {
                        "grpo": [(r - mean) / (std + 1e-4) for r in group],
                        "dr_grpo": [r - mean for r in group],
                        "rloo": [r - (sum(group) - r) / (k - 1) for r in group],
                        "raft": [float(r == best and r > 0) for r in group],
                        "reinforce": [r - sum(every) / len(every) for r in group],
                    }[method]
                )
            close(baselines.advantages(method, rewards), slow)


def test_raft_fits_the_best_by_cross_entropy(baselines: ModuleType) -> None:
    """Loss, and gradient by the logits, of the cross-entropy over the tokens of each problem's best."""
    caught = 0
    for seed in SEEDS:
        step, g = draw(seed), torch.Generator().manual_seed(seed)
        logits = torch.randn(*step.mask.shape, 6, generator=g, dtype=torch.float64, requires_grad=True)
        tokens = torch.randint(6, step.mask.shape, generator=g)
        groups = step.rewards.tolist()
        best = [r > 0 and r == max(group) for group in groups for r in group]

        def fit(kept: Tensor, logits: Tensor = logits, tokens: Tensor = tokens) -> Tensor:
            nll = torch.nn.functional.cross_entropy(logits[kept], tokens[kept], reduction="sum")
            return nll / (len(kept) * MAX_NEW_TOKENS)

        logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        loss = share(baselines, "raft", replace(step, new=logprobs), torch.arange(len(step.mask)))
        (found,) = torch.autograd.grad(loss, logits)
        expected = fit(step.mask & torch.tensor(best)[:, None])
        close(loss, expected)
        close(found, torch.autograd.grad(expected, logits)[0])
        right = fit(step.mask & (step.rewards.flatten() > 0)[:, None])  # the error: all that earned anything
        caught += not agree(found, torch.autograd.grad(right, logits)[0])
    assert caught > 10  # graded rewards; binary ones make both the same


def test_raft_on_binary_rewards_is_the_raw_weighting(baselines: ModuleType) -> None:
    """Ties with the package: weights 0 and 1, the constant of ``max_length``."""
    for seed in range(0, 30, 2):
        step = draw(seed)
        rewards = step.rewards.round()
        weights = em_weights(rewards, torch.ones_like(rewards, dtype=torch.bool), weighting="raw")
        close(baselines.advantages("raft", rewards), weights)
        lengths = step.mask.sum(1).tolist()
        z = denominator(lengths, normalization="max_length", max_new_tokens=MAX_NEW_TOKENS)
        loss = m_step_loss(step.new, step.mask, weights.flatten(), z)
        mine = ours(baselines, "raft", Draw(rewards, step.mask, step.new, step.old))
        close(mine[1], loss)


def test_an_unknown_method_is_refused(baselines: ModuleType) -> None:
    with pytest.raises(ValueError, match="not one of grpo, dr_grpo, rloo, raft"):
        baselines.advantages("ppo", torch.rand(2, 3))
    rows = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="not one of grpo"):
        baselines.policy_loss("ppo", rows, rows, rows == 0, rows[:, 0], rows=2, max_new_tokens=3)
