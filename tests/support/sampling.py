"""Prompts for the samplers, and the comparison of two samplers."""

from __future__ import annotations

import torch

from empg_lite.sampler import Decoding, Prompt, sample_key
from empg_lite.sampler.draw import uniforms


def prompts_of(policy, n: int, k: int, seed: int = 0) -> list[Prompt]:  # type: ignore[no-untyped-def]
    """n prompts of different lengths, k keys each."""
    texts = [chr(97 + i % 26) * (1 + 7 * i % 23) for i in range(n)]
    return [
        Prompt(policy.encode_prompt(text)[1], tuple(sample_key(seed, 1, f"{i}", j) for j in range(k)))
        for i, text in enumerate(texts)
    ]


def ids_of(results):  # type: ignore[no-untyped-def]
    return [[c.ids for c in row] for row in results]


def same_but_for_rounding(policy, prompts, ours, theirs, decoding: Decoding) -> None:  # type: ignore[no-untyped-def]
    """At least 99.9% of the tokens are drawn alike, and where two samples part, rounding can have done it.

    There the random number lies within 1e-5 of the edge between the two tokens, by the model's own forward
    pass: logits that are off by 1e-4 move an edge by as much.
    """
    alike = total = 0
    for prompt, row, other in zip(prompts, ids_of(ours), ids_of(theirs), strict=True):
        for key, a, b in zip(prompt.keys, row, other, strict=True):
            total += len(b)
            at = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), None)
            alike += len(b) if at is None else at
            if at is None:
                assert len(a) == len(b)
                continue
            with torch.no_grad():
                logits = policy.model(torch.tensor([[*prompt.ids, *b[:at]]])).logits[0, -1].double()
            edges = (logits / decoding.temperature).softmax(-1).cumsum(-1)
            low, high = sorted((a[at], b[at]))
            u = uniforms(torch.tensor([key]), at).item()
            assert abs(edges[low] - u) < 1e-5 and abs(edges[high - 1] - u) < 1e-5
            total -= len(b) - at - 1  # what follows another token has to be other
    assert alike >= 0.999 * total
