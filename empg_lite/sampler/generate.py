"""The reference engine: the backend's own ``generate``, with this package's draws and stops hooked in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from empg_lite.core.control import stop_point
from empg_lite.sampler.base import Completion, Sampler, SampleWork, check_finite
from empg_lite.sampler.draw import Decoding, draw

if TYPE_CHECKING:
    from empg_lite.core.rationale import FinishReason
    from empg_lite.sampler.base import OnCompletion, OnToken, Prompt, Turns
    from empg_lite.sampler.stops import StopRule

#: Called with (row, tokens so far).
OnRow = Callable[[int, Sequence[int]], None]


class _Hook:
    """Logits processor and stopping criterion in one: both see the same growing rows.

    As a processor it draws each row's token and masks all others, so that greedy ``generate`` emits it. As a
    criterion it says which rows have stopped and reports the others' tokens.
    """

    def __init__(
        self, prompt_width: int, keys: Tensor, decoding: Decoding, stop: StopRule, on_row: OnRow | None
    ) -> None:
        self.width, self.keys, self.decoding, self.stop = prompt_width, keys, decoding, stop
        self.on_row = on_row
        self.logprobs: list[list[float]] = [[] for _ in keys]
        self.ended: list[int | None] = [None] * len(keys)  # completion length at which a row stopped

    def process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, chosen = draw(scores, self.keys, input_ids.shape[1] - self.width, self.decoding)
        for row, logprob in enumerate(chosen.tolist()):
            if self.ended[row] is None:
                self.logprobs[row].append(logprob)
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens[:, None], 0.0)

    def finished(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        stop_point()
        completions = input_ids[:, self.width :].tolist()
        for row, ids in enumerate(completions):
            if self.ended[row] is None and self.stop.stopped(ids):
                self.ended[row] = len(ids)
            elif self.on_row and self.ended[row] is None and len(ids) < self.decoding.max_new_tokens:
                self.on_row(row, ids)
        return torch.tensor([end is not None for end in self.ended], device=input_ids.device)


class GenerateSampler(Sampler):
    """``model.generate`` over left-padded prompts, each repeated for its samples."""

    def draw(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        on_completion: OnCompletion,
        on_token: OnToken | None,
    ) -> None:
        """See ``base.Sampler``; completions are reported when their batch ends."""
        rows = [(prompt.ids, key) for prompt in prompts for key in prompt.keys]
        indices = [(i, k) for i, prompt in enumerate(prompts) for k in range(len(prompt.keys))]
        size = self.batch_rows or len(rows)
        with self.policy.sampling():
            for start in range(0, len(rows), size):
                here = indices[start : start + size]
                on_row = None if on_token is None else _by_row(on_token, here)
                completions = self._generate(rows[start : start + size], decoding, on_row)
                for index, completion in zip(here, completions, strict=True):
                    on_completion(*index, completion)

    def draw_turns(self, turns: Turns, decoding: Decoding) -> None:
        """In waves: all slots draw one sample, then the next."""
        with self.policy.sampling():
            while wave := [(i, ask) for i in range(len(turns)) if (ask := turns.ask(i))]:
                size = self.batch_rows or len(wave)
                for start in range(0, len(wave), size):
                    part = wave[start : start + size]
                    completions = self._generate([(ask.prompt, ask.key) for _, ask in part], decoding, None)
                    for (slot, _), completion in zip(part, completions, strict=True):
                        turns.ended(slot, completion)

    def _generate(
        self, rows: Sequence[tuple[tuple[int, ...], int]], decoding: Decoding, on_row: OnRow | None
    ) -> list[Completion]:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        policy = self.policy
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([[policy.pad_id] * (width - len(ids)) + list(ids) for ids, _ in rows])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in rows])
        keys = torch.tensor([key for _, key in rows], device=policy.device)
        hook = _Hook(width, keys, decoding, self._stop, on_row)
        out = policy.model.generate(
            input_ids=ids.to(policy.device),
            attention_mask=mask.to(policy.device),
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            pad_token_id=policy.pad_id,
            eos_token_id=sorted(policy.stop_ids),
            logits_processor=LogitsProcessorList([hook.process]),
            stopping_criteria=StoppingCriteriaList([hook.finished]),
        )
        check_finite(hook.logprobs)
        completions = []
        for tokens, end, logprobs in zip(out[:, width:].tolist(), hook.ended, hook.logprobs, strict=True):
            kept = tuple(tokens[:end])
            reason: FinishReason = "length" if end is None else "stop"
            completions.append(Completion(kept, self._stop.text(kept), reason, tuple(logprobs)))
        self.work += SampleWork(
            prompt_tokens=sum(len(ids) for ids, _ in rows),
            row_steps=len(rows) * (out.shape[1] - width),
            tokens=sum(len(c.ids) for c in completions),
        )
        return completions


def _by_row(on_token: OnToken, indices: Sequence[tuple[int, int]]) -> OnRow:
    """``on_token`` for the rows of a batch."""
    return lambda row, ids: on_token(*indices[row], ids)
