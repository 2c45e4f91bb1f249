"""M-step: weighted maximum likelihood on the LoRA weights, one optimizer step per pass.

The denominator is counted over all rows before the first micro-batch, rows of weight 0 included, so the
micro-batch size only affects memory, never the math.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from empg_lite.core.control import stop_point
from empg_lite.core.errors import OutOfMemory, forget_frames, is_out_of_memory
from empg_lite.core.sizes import shared_prefix
from empg_lite.em import Drift, denominator, drift, m_step_loss
from empg_lite.loop.batching import packed_batches, whole_problems
from empg_lite.run.parallel import SINGLE, World

if TYPE_CHECKING:
    from empg_lite.core.rationale import Rationale
    from empg_lite.policy.packing import Ids
    from empg_lite.policy.policy import Policy

#: At this loss scale or below, a non-finite gradient is not the scale's fault.
LEAST_SCALE = 1.0


@dataclass(frozen=True, slots=True)
class FitSettings:
    """What the M-step needs of a recipe. ``learning_rate`` is that of this step."""

    learning_rate: float
    max_grad_norm: float
    passes: int
    kl_stop: float
    normalization: str
    max_new_tokens: int
    micro_batch_tokens: int


@dataclass(frozen=True, slots=True)
class FitStats:
    """What one M-step did.

    Attributes:
        updates: optimizer steps taken (0 if every weight is 0).
        skipped_nonfinite: passes whose gradient was not finite and was discarded.
        loss, grad_norm: of the first finite pass; None if there was none.
        drift: how far the policy moved during the fit; None if not measured.
        rows_fitted: rows of non-zero weight in the first pass.
        micro_batch_tokens: the budget at the end (smaller after an out-of-memory back-off).
        tokens_computed: tokens in forward and backward passes.
        tokens_padded: positions attention computed, including padding to the longest row of a micro-batch.
        loss_scale: for float16, at the end; None for other types.
        scale_halvings: how often it was halved and the gradient recomputed.
        seconds: wall time.
    """

    updates: int
    skipped_nonfinite: int
    loss: float | None
    grad_norm: float | None
    drift: Drift | None
    rows_fitted: int
    micro_batch_tokens: int
    tokens_computed: int
    tokens_padded: int
    loss_scale: float | None
    scale_halvings: int
    seconds: float


def m_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rationales: Sequence[Rationale],
    settings: FitSettings,
    *,
    scaler: torch.amp.GradScaler | None = None,
    measure_kl: bool = False,
    on_done: Callable[[int], None] | None = None,
    world: World = SINGLE,
) -> FitStats:
    """Fit the policy to weighted rationales, all rows of the step together.

    Args:
        rationales: every row of the step; those of weight 0 count in the denominator.
        scaler: loss scaling for float16.
        measure_kl: measure ``drift`` even if nothing else needs it.
        world: the processes; each is given all rationales and computes its share.

    Raises:
        OutOfMemory: a single row does not fit.
    """
    weights = [_weight(r) for r in rationales]
    lengths = [len(r.completion_ids) for r in rationales]
    z = denominator(lengths, normalization=settings.normalization, max_new_tokens=settings.max_new_tokens)
    fitter = _Fitter(policy, optimizer, rationales, z, settings, scaler, on_done, world)
    if not any(weights):
        # Not even an empty optimizer step: Adam's momentum would move the weights.
        return fitter.stats(Drift() if measure_kl else None)

    policy.prepare_fit()
    reuse = settings.passes > 1
    with policy.training():
        old = fitter.logprobs() if reuse or measure_kl else None
        for n_pass in range(settings.passes):
            if n_pass == 1:
                weights = [max(w, 0.0) for w in weights]  # the samples are being reused
            if n_pass and old is not None and fitter.drift(old).k3 > settings.kl_stop:
                break
            if any(weights):
                loss, norm = fitter.gradient(weights)
                while fitter.scale_too_large(loss, norm):
                    loss, norm = fitter.gradient(weights)
                fitter.update(loss, norm)
        return fitter.stats(fitter.drift(old) if old is not None else None)


def _weight(rationale: Rationale) -> float:
    assert rationale.weight is not None, "weigh before fitting"
    return rationale.weight


class _Fitter:
    """The rows of one M-step, in micro-batches of a token budget that shrinks when memory runs out."""

    def __init__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        rows: Sequence[Rationale],
        z: float,
        settings: FitSettings,
        scaler: torch.amp.GradScaler | None,
        on_done: Callable[[int], None] | None,
        world: World,
    ) -> None:
        self.policy, self.optimizer, self.rows, self.z = policy, optimizer, rows, z
        self.settings, self.scaler, self.on_done, self.world = settings, scaler, on_done, world
        self.budget = settings.micro_batch_tokens
        self.updates = self.nonfinite = self.fitted = self.computed = self.padded = self.halvings = 0
        self.first: tuple[float, float] | None = None  # loss, grad_norm
        self.started = time.perf_counter()

    def gradient(self, weights: Sequence[float]) -> tuple[float, float]:
        """Compute the whole step's gradient, unscaled and clipped, into the parameters' ``.grad``.

        Returns:
            The loss, and the gradient norm before clipping.
        """
        done = False
        while not done:
            with self._smaller_if_it_does_not_fit() as attempt:
                attempt.result = self._backward(weights)
            done = attempt.done
        loss, computed, padded = (sum(part) for part in zip(*self.world.gather(attempt.result), strict=True))
        self.computed, self.padded = self.computed + computed, self.padded + padded
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.world.sum_gradients(parameters)  # a sum, not a mean: the denominator is the whole step's
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return loss, float(torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm))

    def update(self, loss: float, norm: float) -> None:
        """One optimizer step by the gradient in the parameters; none where it is not finite."""
        finite = math.isfinite(norm) and math.isfinite(loss)
        self.first = self.first or ((loss, norm) if finite else None)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate
        if finite and self.scaler is not None:
            self.scaler.step(self.optimizer)
        elif finite:
            self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update(None if finite else self.scaler.get_scale())
        self.updates += finite
        self.nonfinite += not finite
        self.optimizer.zero_grad(set_to_none=True)

    def scale_too_large(self, loss: float, norm: float) -> bool:
        """Halve the loss scale if it made a 16-bit gradient overflow; the same samples are then fitted again.

        The scale starts high (65,536), so overflows are expected; a non-finite loss is not.
        """
        scaler = self.scaler
        if scaler is None or math.isfinite(norm) or not math.isfinite(loss):
            return False
        if scaler.get_scale() <= LEAST_SCALE:
            return False
        scaler.update(max(scaler.get_scale() / 2, LEAST_SCALE))
        self.halvings += 1
        return True

    def _backward(self, weights: Sequence[float]) -> tuple[float, int, int]:
        """Accumulate this process's share of the gradient; its loss, tokens and positions computed."""
        self.optimizer.zero_grad(set_to_none=True)
        kept = [i for i, w in enumerate(weights) if w != 0 and self.rows[i].completion_ids]
        self.fitted = self.fitted or len(kept)
        one = torch.ones((), device=self.policy.device)
        scale = one if self.scaler is None else self.scaler.scale(one)
        total, computed, padded = torch.zeros((), dtype=torch.float64, device=self.policy.device), 0, 0
        for batch in self._micro_batches(whole_problems(self.rows, kept, self.world)):
            self._stop_point()
            w = torch.tensor([weights[i] for i in batch], dtype=torch.float32, device=self.policy.device)
            # The loss scale is a power of two: it goes into the weights without rounding.
            loss = self.policy.completion_loss(
                self._pairs(batch), w * scale, partial(m_step_loss, denominator=self.z)
            )
            loss.backward()
            total += loss.detach() / scale
            tokens, places = self._size(batch)
            computed, padded = computed + tokens, padded + places
            if self.on_done:
                self.on_done(len(batch))
        return float(total), computed, padded

    def _stop_point(self) -> None:
        """Allow an interrupt until the first update; from then on the step is completed."""
        if not self.updates:
            stop_point()

    def logprobs(self) -> Tensor:
        """Trainer log-probs of every completion, right and wrong: (B, T) on the CPU, 0 in the padding."""

        def measure(mine: Sequence[int]) -> list[Tensor]:
            found = {i: torch.zeros(0) for i in mine}
            for batch in self._micro_batches([i for i in mine if self.rows[i].completion_ids]):
                self._stop_point()
                with torch.no_grad():
                    measured = self.policy.completion_logprobs(self._pairs(batch))
                found |= {i: row.cpu() for i, row in zip(batch, measured, strict=True)}
            return list(found.values())

        def backed_off(mine: Sequence[int]) -> list[Tensor]:
            done = False
            while not done:
                with self._smaller_if_it_does_not_fit() as attempt:
                    attempt.result = measure(mine)
                done = attempt.done
            return attempt.result

        return pad_sequence(self.world.share(range(len(self.rows)), backed_off), batch_first=True)

    def drift(self, old: Tensor) -> Drift:
        """Over all rows, relative to the log-probs at the start."""
        lengths = torch.tensor([len(r.completion_ids) for r in self.rows])
        mask = torch.arange(old.shape[1]) < lengths[:, None]  # (B, T)
        return drift(self.logprobs(), old, mask, torch.tensor([r.right for r in self.rows]))

    def stats(self, moved: Drift | None) -> FitStats:
        loss, norm = self.first or (None, None)
        return FitStats(
            updates=self.updates,
            skipped_nonfinite=self.nonfinite,
            loss=loss,
            grad_norm=norm,
            drift=moved,
            rows_fitted=self.fitted,
            micro_batch_tokens=self.budget,
            tokens_computed=self.computed,
            tokens_padded=self.padded,
            loss_scale=self.scaler.get_scale() if self.scaler else None,
            scale_halvings=self.halvings,
            seconds=time.perf_counter() - self.started,
        )

    def _pairs(self, batch: Sequence[int]) -> list[tuple[Ids, Ids]]:
        return [(self.rows[i].prompt_ids, self.rows[i].completion_ids) for i in batch]

    def _size(self, batch: Sequence[int]) -> tuple[int, int]:
        """Tokens the linear layers see in a micro-batch, and positions attention sees, padding included."""
        prompts = list({self.rows[i].prompt_ids for i in batch})  # once each
        prefix = 0 if self.policy.shared_prefix else shared_prefix(prompts)  # Unsloth's pass repeats it
        own = [len(ids) - prefix for ids in prompts]
        completions = [len(self.rows[i].completion_ids) - 1 for i in batch]  # the last token predicts nothing
        padded = prefix + len(own) * max(own) + len(completions) * max(completions)
        return prefix + sum(own) + sum(completions), padded

    def _micro_batches(self, rows: Sequence[int]) -> list[list[int]]:
        sizes = {i: (self.rows[i].prompt_ids, len(self.rows[i].completion_ids)) for i in rows}
        return packed_batches(sizes, self.budget)

    @contextmanager
    def _smaller_if_it_does_not_fit(self) -> Iterator[_Attempt]:
        """If memory runs out in the block, halve the micro-batch; the caller runs the block again.

        The result does not depend on the micro-batch. All processes halve together if one runs out of memory.

        Raises:
            OutOfMemory: every micro-batch was already a single row.
        """
        attempt, short = _Attempt(), None
        try:
            yield attempt
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            forget_frames(short := error)  # they hold the activations that did not fit
        attempt.done = not self.world.any(short is not None)
        if attempt.done:
            return
        sizes = [r.tokens for r in self.rows]
        if self.budget <= min(sizes):
            failure = OutOfMemory(
                f"out of memory with one rationale at a time, the longest of {max(sizes)} tokens",
                "M-step",
                "lower sampler.max_new_tokens, or set optim.gradient_checkpointing: true",
            )
            failure.between_steps = not self.updates
            raise failure from short
        self.optimizer.zero_grad(set_to_none=True)
        self.budget = max(self.budget // 2, 1)
        torch.cuda.empty_cache()


@dataclass(slots=True)
class _Attempt:
    """An attempt at something that may not fit in memory."""

    result: Any = None
    done: bool = False
