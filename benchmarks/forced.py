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
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: The id of no token.
NEVER = 1 << 30
#: Rows that a table of lengths has room for; it is never enlarged, for graphs hold its address.
ROWS = 1 << 13


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


class Table:
    """Where each row ends, on one device: ``(ROWS,)`` random keys in rising order and lengths beside them.

    A captured graph replays what it recorded: it reads these two tensors at their addresses for as long as it
    lives. So there is one table a device for the whole process, and a new set of lengths is written into it.
    The places behind the last row hold the largest key there is: a key that no row has (an idle place of a
    decoder keeps its last one) finds a length of 0, never an index beyond the end.
    """

    def __init__(self, device: torch.device) -> None:
        self.keys = torch.full((ROWS,), torch.iinfo(torch.int64).max, device=device)
        self.lengths = torch.zeros(ROWS, dtype=torch.int64, device=device)

    def write(self, ends: dict[int, int]) -> None:
        """Take these lengths in place of the ones before."""
        assert len(ends) < ROWS, f"at most {ROWS - 1} rows have a length"
        rows = sorted(ends.items())
        padding = ROWS - len(rows)
        keys = [key for key, _ in rows] + [torch.iinfo(torch.int64).max] * padding
        self.keys.copy_(torch.tensor(keys))
        self.lengths.copy_(torch.tensor([length for _, length in rows] + [0] * padding))

    def ended(self, row_keys: Tensor, position: int | Tensor) -> Tensor:
        """``(B,)``: is the token at ``position`` the row's last one?"""
        at = torch.searchsorted(self.keys, row_keys)
        return (self.keys[at] == row_keys) & (self.lengths[at] == position + 1)


#: One table a device, never replaced: see ``Table``.
_TABLES: dict[torch.device, Table] = {}


def table_on(device: torch.device) -> Table:
    """The device's table."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _TABLES:
        _TABLES[device] = Table(device)
    return _TABLES[device]


@contextmanager
def forced_draws(
    ends: dict[int, int],
    stop_id: int,
    plain_id: int,
    device: torch.device | str = "cpu",
    others: Collection[int] = (),
) -> Iterator[None]:
    """Within this, the package's engines end the row of random key ``key`` after ``ends[key]`` tokens.

    A sampler that captured its graphs within this block replays the forced draws from then on: use it nowhere
    else, and always with the same ``stop_id`` and ``plain_id``.

    Args:
        stop_id: the token that ends a row.
        plain_id: what stands in for it where it is drawn too early.
        device: where the engines draw.
        others: further tokens that would end a row: never drawn.
    """
    from empg_lite.sampler import decoder, generate  # noqa: F401 (engines load late; both must be patched)
    from empg_lite.sampler import draw as home

    right = home.draw
    table = table_on(torch.device(device))
    table.write(ends)

    def forced(
        logits: Tensor, row_keys: Tensor, position: Any, *rest: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        tokens, logprobs = right(logits, row_keys, position, *rest, **more)
        early = without(tokens, (stop_id, *others), plain_id)
        return early.masked_fill(table.ended(row_keys, position), stop_id), logprobs

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


def without(tokens: Tensor, stops: Collection[int], plain_id: int) -> Tensor:
    """The tokens with ``plain_id`` in the place of each that would end a row."""
    for stop in sorted(set(stops)):
        tokens = tokens.masked_fill(tokens == stop, plain_id)
    return tokens


def end_rows(
    completions: Tensor,
    lengths: Sequence[int],
    stop_id: int,
    plain_id: int,
    others: Collection[int] = (),
) -> Tensor:
    """``(B, T)`` tokens ended by the table: the stop token once a row, at its end, and from there on.

    Args:
        others: further tokens that would end a row: taken out.

    Raises:
        AssertionError: a row has not been drawn to its end.
    """
    assert completions.shape == (len(lengths), max(lengths)), (tuple(completions.shape), max(lengths))
    at = torch.arange(completions.shape[1], device=completions.device)
    last = torch.tensor(lengths, device=completions.device)[:, None] - 1
    early = without(completions, (stop_id, *others), plain_id)
    return torch.where(at >= last, stop_id, early)


def forced_generate(
    generate: Callable[..., Tensor],
    lengths: Sequence[int],
    stop_id: int,
    plain_id: int,
    others: Collection[int] = (),
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
        done = end_rows(out[:, width:], lengths, stop_id, plain_id, others)
        return torch.cat([out[:, :width], done], dim=-1)

    return forced
