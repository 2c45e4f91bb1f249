"""The reference engine: the backend's own ``generate``, with our draws and our stops hooked in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from empg_lite.core.control import stop_point
from empg_lite.policy.policy import Policy
from empg_lite.sampler.base import (
    Completion,
    Engine,
    OnCompletion,
    OnToken,
    Prompt,
    SampleWork,
    check_finite,
)
from empg_lite.sampler.draw import Decoding, draw
from empg_lite.sampler.stops import StopRule


class _Hook:
    """Logits processor and stopping criterion in one: both see the same growing rows.

    As a processor it draws each row's token and leaves it the only one possible, so that greedy
    ``generate`` emits it. As a criterion it says which rows have stopped, and ``grew`` is told of the others'
    tokens.
    """

    def __init__(
        self,
        prompt_width: int,
        keys: Tensor,
        decoding: Decoding,
        stop: StopRule,
        grew: Callable[[int, Sequence[int]], None] | None,
    ) -> None:
        self.width, self.keys, self.decoding, self.stop, self.grew = prompt_width, keys, decoding, stop, grew
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
            elif self.grew and self.ended[row] is None and len(ids) < self.decoding.max_new_tokens:
                self.grew(row, ids)
        return torch.tensor([end is not None for end in self.ended], device=input_ids.device)


def _told(grew: OnToken, places: Sequence[tuple[int, int]]) -> Callable[[int, Sequence[int]], None]:
    """``grew`` by the row of a batch."""
    return lambda row, ids: grew(*places[row], ids)


class GenerateSampler(Engine):
    """``model.generate`` over left-padded prompts, each repeated for its samples."""

    def __init__(self, policy: Policy, batch_rows: int | None = None) -> None:
        super().__init__(policy, batch_rows)
        self._stop = StopRule(policy.tokenizer, policy.stop_ids, policy.template.stop)

    def draw(
        self, prompts: Sequence[Prompt], decoding: Decoding, ended: OnCompletion, grew: OnToken | None
    ) -> None:
        """See ``base.Engine``; completions end with their batch."""
        rows = [(prompt.ids, key) for prompt in prompts for key in prompt.keys]
        places = [(i, k) for i, prompt in enumerate(prompts) for k in range(len(prompt.keys))]
        size = self.batch_rows or len(rows)
        done = 0
        with self.policy.sampling():
            for start in range(0, len(rows), size):
                here = places[start : start + size]
                watch = None if grew is None else _told(grew, here)
                for completion in self._generate(rows[start : start + size], decoding, watch):
                    ended(*places[done], completion)
                    done += 1

    def _generate(
        self,
        rows: Sequence[tuple[tuple[int, ...], int]],
        decoding: Decoding,
        grew: Callable[[int, Sequence[int]], None] | None,
    ) -> list[Completion]:
        from transformers import LogitsProcessorList, StoppingCriteriaList
        from transformers.generation import LogitsProcessor, StoppingCriteria

        policy = self.policy
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([[policy.pad_id] * (width - len(ids)) + list(ids) for ids, _ in rows])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in rows])
        keys = torch.tensor([key for _, key in rows], device=policy.device)
        hook = _Hook(width, keys, decoding, self._stop, grew)

        class Processor(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                return hook.process(input_ids, scores)

        class Criterion(StoppingCriteria):
            def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
                return hook.finished(input_ids, scores, **kwargs)

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
            logits_processor=LogitsProcessorList([Processor()]),
            stopping_criteria=StoppingCriteriaList([Criterion()]),
        )
        check_finite(hook.logprobs)
        completions = []
        for row, tokens in enumerate(out[:, width:].tolist()):
            end = hook.ended[row]
            kept = tokens[:end]
            completions.append(
                Completion(
                    tuple(kept),
                    self._stop.text(kept),
                    "length" if end is None else "stop",
                    tuple(hook.logprobs[row]),
                )
            )
        self.work += SampleWork(
            prompt_tokens=sum(len(ids) for ids, _ in rows),
            row_steps=len(rows) * (out.shape[1] - width),
            tokens=sum(len(c.ids) for c in completions),
        )
        return completions
