"""Forced lengths: every rival draws rows of the same length, so that speeds compare like with like.

Random or half-trained weights end where they like, and a rival whose rows happen to be shorter would win.
Here the lengths come from a table, drawn once. A row's last token is the stop token, and no other token of
it is: that is all that a rival sees.

* The package's engines: the function that draws tokens is replaced by one that draws with it and then puts
  the stop token where the table says. Rows are told apart by their random key, so that batch order,
  compaction and the engine itself do not matter; the engine's own stop rule is at work, at its own price.
* ``generate``, called by hand or by TRL: the end token is one that is never drawn, a stopping criterion reads
  the table, and the rows that come out are ended the same way.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: The id of no token.
NEVER = 1 << 30


def draw_lengths(
    rows: int, *, mean: float = 36.0, sigma: float = 0.5, cap: int = 72, seed: int = 0
) -> list[int]:
    """Completion lengths in tokens, the stop included: lognormal, at least 2, at most ``cap``.

    Args:
        mean: of the distribution before it is cut at ``cap``.
        sigma: standard deviation of the logarithm.
    """
    r, mu = random.Random(seed), math.log(mean) - sigma**2 / 2
    return [max(2, min(cap, round(r.lognormvariate(mu, sigma)))) for _ in range(rows)]


@contextmanager
def forced_draws(ends: dict[int, int], stop_id: int, plain_id: int) -> Iterator[None]:
    """Within this, the package's engines end the row of random key ``key`` after ``ends[key]`` tokens.

    Args:
        stop_id: the token that ends a row.
        plain_id: what stands in for it where it is drawn too early.
    """
    from empg_lite.sampler import draw as home

    right = home.draw
    keys, order = torch.tensor(list(ends)).sort()
    lengths = torch.tensor(list(ends.values()))[order]

    def forced(
        logits: Tensor, row_keys: Tensor, position: Any, *rest: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        nonlocal keys, lengths
        keys, lengths = keys.to(row_keys.device), lengths.to(row_keys.device)
        tokens, logprobs = right(logits, row_keys, position, *rest, **more)
        last = lengths[torch.searchsorted(keys, row_keys)] == position + 1
        early = torch.where(tokens == stop_id, plain_id, tokens)
        return torch.where(last, stop_id, early), logprobs

    users = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("empg_lite.") and getattr(module, "draw", None) is right
    ]
    for module in users:
        module.draw = forced  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in users:
            module.draw = right  # type: ignore[attr-defined]


def end_rows(completions: Tensor, lengths: Sequence[int], stop_id: int, plain_id: int) -> Tensor:
    """``(B, T)`` tokens ended by the table: the stop token once a row, at its end, and from there on.

    Raises:
        AssertionError: a row has not been drawn to its end.
    """
    assert completions.shape == (len(lengths), max(lengths)), (tuple(completions.shape), max(lengths))
    at = torch.arange(completions.shape[1], device=completions.device)
    last = torch.tensor(lengths, device=completions.device)[:, None] - 1
    early = torch.where(completions == stop_id, plain_id, completions)
    return torch.where(at >= last, stop_id, early)


def forced_generate(
    generate: Callable[..., Tensor], lengths: Sequence[int], stop_id: int, plain_id: int
) -> Callable[..., Tensor]:
    """``model.generate`` with row ``i`` ended after ``lengths[i]`` tokens; end tokens do nothing else.

    Args:
        generate: a model's own; it takes ``input_ids``, and a ``generation_config`` or keywords.
    """
    from transformers import StoppingCriteriaList

    table = torch.tensor(lengths)

    def forced(input_ids: Tensor, **options: Any) -> Tensor:
        nonlocal table
        width, table = input_ids.shape[1], table.to(input_ids.device)
        assert len(input_ids) == len(table), "a length for each row"

        def over(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return ids.shape[1] - width >= table

        # An end token that is never drawn; with None, the model's own would come back.
        never = {"eos_token_id": NEVER}
        if (config := options.get("generation_config")) is None:
            options |= never
        else:
            config.update(**never)
        out = generate(input_ids=input_ids, stopping_criteria=StoppingCriteriaList([over]), **options)
        done = end_rows(out[:, width:], lengths, stop_id, plain_id)
        return torch.cat([out[:, :width], done], dim=-1)

    return forced
