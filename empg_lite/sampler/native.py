"""The engine of our own: each prompt is prefilled once for all its samples, finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from empg_lite.policy.policy import Policy
from empg_lite.rationale import FinishReason
from empg_lite.sampler.base import Completion, OnCompletion, Prompt, SampleWork, check_finite
from empg_lite.sampler.draw import Decoding, draw
from empg_lite.sampler.stops import StopRule

#: Matrix products over one or two rows take other CPU kernels and differ by 1e-6 from wider ones; a batch
#: that never gets narrower than this keeps a sample's numbers independent of its neighbours.
MIN_ROWS = 8


class NativeSampler:
    """KV-cache decoding over left-padded prompts.

    Args:
        batch_rows: most rows decoded at once; None for all.
    """

    def __init__(self, policy: Policy, batch_rows: int | None = None) -> None:
        self.policy, self.batch_rows = policy, batch_rows
        self.work = SampleWork()
        self._stop = StopRule(policy.tokenizer, policy.stop_ids, policy.template.stop)

    def sample(
        self, prompts: Sequence[Prompt], decoding: Decoding, on_completion: OnCompletion | None = None
    ) -> list[list[Completion]]:
        """See ``base.Sampler``."""
        results: dict[tuple[int, int], Completion] = {}
        # Prompts of like length share a batch: less padding. Results come back in the caller's order.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
        with self.policy.sampling():
            for batch in _batches(order, prompts, self.batch_rows):
                places = [(i, k) for i in batch for k in range(len(prompts[i].keys))]
                for row, completion in self._decode([prompts[i] for i in batch], decoding):
                    results[places[row]] = completion
                    if on_completion:
                        on_completion(*places[row], completion)
        return [[results[i, k] for k in range(len(prompt.keys))] for i, prompt in enumerate(prompts)]

    def _prefill(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Any]:
        """Each prompt once: logits after it ``(P, V)``, attention mask ``(P, T)``, cache."""
        width = max(len(p.ids) for p in prompts)
        pads = [width - len(p.ids) for p in prompts]
        policy = self.policy
        ids = torch.tensor([[policy.pad_id] * n + list(p.ids) for n, p in zip(pads, prompts, strict=True)])
        mask = torch.tensor([[0] * n + [1] * len(p.ids) for n, p in zip(pads, prompts, strict=True)])
        ids, mask = ids.to(policy.device), mask.to(policy.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = policy.backbone(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        return self._head(out.last_hidden_state[:, -1]), mask, out.past_key_values

    def _head(self, hidden: Tensor) -> Tensor:
        """(B, D) -> (B, V)."""
        return hidden.to(self.policy.head_weight.dtype) @ self.policy.head_weight.T

    def _decode(self, prompts: Sequence[Prompt], decoding: Decoding) -> Iterator[tuple[int, Completion]]:
        """(row, completion) of one batch as they end; rows count the prompts' keys in order."""
        policy = self.policy
        logits, mask, cache = self._prefill(prompts)
        self.work += SampleWork(prompt_tokens=sum(len(p.ids) for p in prompts))
        owner = [p for p, prompt in enumerate(prompts) for _ in prompt.keys]
        rows = len(owner)
        ids: list[list[int]] = [[] for _ in range(rows)]
        logprobs: list[list[float]] = [[] for _ in range(rows)]

        # `slots` says which row sits at each place of the batch; a finished row may stay as a filler.
        slots = list(range(rows)) + [rows - 1] * max(0, MIN_ROWS - rows)
        filler = [False] * rows + [True] * max(0, MIN_ROWS - rows)
        at = torch.tensor([owner[r] for r in slots], device=policy.device)
        cache.batch_select_indices(at)  # the K samples of a prompt start from copies of its cache
        logits, mask = logits[at], mask[at]
        keys = torch.tensor([key for p in prompts for key in p.keys], device=policy.device)[slots]
        length = mask.sum(-1, keepdim=True)  # (B, 1) position of the next token

        for position in range(decoding.max_new_tokens):
            tokens, chosen = draw(logits, keys, position, decoding)
            self.work += SampleWork(row_steps=len(slots), tokens=filler.count(False))
            for place, (row, token, logprob) in enumerate(
                zip(slots, tokens.tolist(), chosen.tolist(), strict=True)
            ):
                if not filler[place]:
                    ids[row].append(token)
                    logprobs[row].append(logprob)
                    filler[place] = self._stop.stopped(ids[row])
                    if filler[place]:
                        yield row, self._completion(ids[row], logprobs[row], "stop")
            alive = [place for place, idle in enumerate(filler) if not idle]
            if not alive or position + 1 == decoding.max_new_tokens:
                break
            keep = _compact(alive, len(slots))
            if len(keep) < len(slots):
                at = torch.tensor(keep, device=policy.device)
                cache.batch_select_indices(at)
                tokens, keys, mask, length = tokens[at], keys[at], mask[at], length[at]
                slots, filler = [slots[i] for i in keep], [filler[i] for i in keep]
            mask = torch.cat([mask, mask.new_ones(len(slots), 1)], dim=-1)
            out = policy.backbone(
                tokens[:, None],
                attention_mask=mask,
                position_ids=length,
                past_key_values=cache,
                use_cache=True,
            )
            logits, length = self._head(out.last_hidden_state[:, -1]), length + 1

        for place in alive:
            row = slots[place]
            yield row, self._completion(ids[row], logprobs[row], "length")

    def _completion(
        self, ids: Sequence[int], logprobs: Sequence[float], finish_reason: FinishReason
    ) -> Completion:
        check_finite([logprobs])
        return Completion(tuple(ids), self._stop.text(ids), finish_reason, tuple(logprobs))


def _compact(alive: list[int], width: int) -> list[int]:
    """Places that stay: all, until an eighth is finished (a copy has its price); never below MIN_ROWS."""
    if width - len(alive) < max(1, width // 8) or width <= MIN_ROWS:
        return list(range(width))
    living = set(alive)
    fillers = [place for place in range(width) if place not in living]
    return sorted(alive + fillers[: max(0, MIN_ROWS - len(alive))])


def _batches(order: Sequence[int], prompts: Sequence[Prompt], limit: int | None) -> list[list[int]]:
    """Cut ``order`` into batches of at most ``limit`` rows; a prompt's samples stay together."""
    batches: list[list[int]] = []
    rows = 0
    for i in order:
        k = len(prompts[i].keys)
        if not batches or (limit is not None and rows + k > limit):
            batches.append([])
            rows = 0
        batches[-1].append(i)
        rows += k
    return batches
