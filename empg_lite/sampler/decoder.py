"""Rows that grow by a token a step, in a key/value cache of fixed place.

Every row has a place of its own and its tokens lie there from index 0 on, so position and index are one:
nothing is padded on the left, a row may leave or begin at any step, and nothing moves but when the places are
closed up. A step reads and writes the same tensors each time, which is what captured graphs need: one of the
network (``advance``), one of the draw (``choose``).

Shapes: B places, n of them in use, S tokens of room, P prompts, G key heads, H query heads, d of one head, D
hidden, V.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from empg_lite.core.sizes import PREFILL_TOKENS
from empg_lite.policy.logprobs import rows_per_chunk
from empg_lite.policy.network import Layer, Network
from empg_lite.policy.packing import Rows, causal_attention
from empg_lite.sampler.draw import Decoding, draw


class Decoder:
    """The state of up to B rows.

    Args:
        network: what is decoded; gradients are the caller's to switch off.
        head: ``(V, D)``.
        rows, room: B and S.

    Attributes:
        tokens, lengths, drawn, keys: ``(B,)`` of each place: the token to go through the network next, how
            many lie in the cache, how many of its completion have been drawn, the key of its random numbers.
        logprobs: ``(B,)`` of ``tokens``.
    """

    def __init__(
        self, network: Network, head: Tensor, dtype: torch.dtype, decoding: Decoding, rows: int, room: int
    ) -> None:
        self.network, self.head, self.decoding, self.room = network, head, decoding, room
        device = head.device
        shape = (rows, network.kv_heads, room, network.head_dim)
        self._cache = [  # keys and values of each layer, (B, G, S, d)
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in network.layers
        ]
        self.tokens, self.lengths, self.drawn, self.keys = (
            torch.zeros(rows, dtype=torch.long, device=device) for _ in range(4)
        )
        self.logprobs = torch.zeros(rows, device=device)
        # (B, D), written by ``advance`` and read by ``choose``
        self._hidden = torch.zeros(rows, head.shape[1], dtype=dtype, device=device)
        heads = torch.arange(rows * network.kv_heads, device=device).view(rows, -1)
        self._starts = heads * room  # (B, G) index of a row's first token among all B G S

    def begin(
        self, prompts: Sequence[Sequence[int]], owner: Sequence[int], keys: Sequence[int], first: int
    ) -> None:
        """Put rows into the places from ``first`` on and draw their first tokens; prompts go through once.

        Args:
            prompts: P prompts.
            owner, keys: of each row, the prompt that it continues, and the key of its random numbers.
        """
        device, lengths = self.head.device, torch.tensor([len(p) for p in prompts])
        ends = []
        for piece in pieces([len(p) for p in prompts], PREFILL_TOKENS[device.type]):
            here = [(place, which) for place, which in enumerate(owner, first) if which in piece]
            ends.append(self._prefill(prompts[piece.start : piece.stop], piece.start, here))
        owners, places = torch.tensor(owner), slice(first, first + len(owner))
        self.keys[places] = torch.tensor(keys, device=device)
        self.lengths[places], self.drawn[places] = lengths[owners].to(device), 0
        self._draw(torch.cat(ends)[owners.to(device)], places)

    def _prefill(
        self, prompts: Sequence[Sequence[int]], number: int, rows_of: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Put prompts' keys and values into the cache.

        Args:
            number: of the first of these prompts.
            rows_of: (place, number of its prompt) of each row; places follow each other.

        Returns:
            ``(P, D)`` hidden states of their last tokens.
        """
        device, network, lengths = self.head.device, self.network, [len(p) for p in prompts]
        rows = Rows.of(lengths, 0, device)
        packed = [token for prompt in prompts for token in prompt]
        positions = [at for n in lengths for at in range(n)]
        angles = network.angles(torch.tensor(positions, device=device))
        owners = torch.tensor([which - number for _, which in rows_of], device=device)
        size = rows.lengths[owners]  # (n,)
        places = slice(rows_of[0][0], rows_of[-1][0] + 1)
        # every prompt token -> its place in each of its rows
        source = rows.gather[owners]  # (n, T)
        inside = torch.arange(source.shape[1], device=device) < size[:, None]
        at = torch.arange(source.shape[1], device=device).expand_as(source)[
            inside
        ]  # (m,) of all rows' tokens
        source, target = source[inside], self._starts[places][inside.nonzero()[:, 0]] + at[:, None]  # (m, G)

        x: Tensor = network.embed(torch.tensor(packed, device=device))
        update = None
        for layer, (cached_keys, cached_values) in zip(network.layers, self._cache, strict=True):
            x, normed = network.add_norm(x, update, layer.norm)
            q, k, v = network.heads_of(layer, normed, angles)
            self._write(cached_keys, target, k[source])
            self._write(cached_values, target, v[source])
            q, k, v = (rows.pad(t).transpose(1, 2) for t in (q, k, v))
            out = causal_attention(q, k, v)
            x, update = network.after(layer, x, rows.unpad(out.transpose(1, 2)).flatten(1))
        ends = rows.lengths.cumsum(0) - 1
        assert update is not None
        return network.add_norm(x[ends], update[ends], network.norm)[1]

    def step(self, n: int, seen: int) -> None:
        """Put the first n places' tokens into the cache and draw their next ones; see ``advance``."""
        self.advance(n, seen)
        self.choose(n)

    def advance(self, n: int, seen: int) -> None:
        """Put the first n places' tokens through the network and into the cache.

        Args:
            seen: of the room, how much attention looks at: more than any of their ``lengths``.
        """
        network = self.network
        tokens, lengths = self.tokens[:n], self.lengths[:n]
        angles, target = network.angles(lengths), self._starts[:n] + lengths[:, None]
        behind = torch.arange(seen, device=lengths.device) > lengths[:, None]  # (n, S')
        mask = torch.zeros(behind.shape, dtype=self._cache[0][0].dtype, device=lengths.device)
        mask = mask.masked_fill_(behind, -torch.inf)[:, None, None]
        x: Tensor = network.embed(tokens)
        update = None
        for number, layer in enumerate(network.layers):
            x, normed = network.add_norm(x, update, layer.norm)
            x, update = network.after(layer, x, self._attend(number, layer, normed, angles, target, mask))
        lengths.add_(1).clamp_(max=self.room - 1)  # one that has ended goes on in vain, at its own place
        self._hidden[:n] = network.add_norm(x, update, network.norm)[1]

    def choose(self, n: int) -> None:
        """Draw the next tokens of the first n places, after ``advance``."""
        self._draw(self._hidden[:n], slice(n))

    def _attend(
        self, number: int, layer: Layer, normed: Tensor, angles: Any, target: Tensor, mask: Tensor
    ) -> Tensor:
        """(n, D) -> (n, H d). Query heads of a key head stand where tokens would: no key is written twice."""
        network, (n, seen) = self.network, (len(normed), mask.shape[-1])
        q, k, v = network.heads_of(layer, normed, angles)
        for cached, new in zip(self._cache[number], (k, v), strict=True):
            self._write(cached, target, new)
        keys, values = (cached[:n, :, :seen] for cached in self._cache[number])
        grouped = q.view(n, network.kv_heads, -1, network.head_dim)
        return _attention(grouped, keys, values, mask).flatten(1)

    def _write(self, cached: Tensor, target: Tensor, new: Tensor) -> None:
        """Put ``(m, G, d)`` where ``target``, ``(m, G)``, says among all B G S."""
        cached.view(-1, self.network.head_dim).index_copy_(0, target.flatten(), new.flatten(0, 1))

    def _draw(self, hidden: Tensor, places: slice) -> None:
        """Head and draw, a chunk of rows at a time: no (n, V) tensor of float32 is made."""
        first, last, _ = places.indices(len(self.tokens))
        size = rows_per_chunk(self.head)
        for start in range(first, last, size):
            chunk = slice(start, min(start + size, last))
            logits = hidden[chunk.start - first : chunk.stop - first].to(self.head.dtype) @ self.head.T
            self.tokens[chunk], self.logprobs[chunk] = draw(
                logits, self.keys[chunk], self.drawn[chunk], self.decoding
            )
        self.drawn[places] += 1

    def compact(self, keep: Sequence[int]) -> None:
        """Move the rows at these places, in rising order, to the first places."""
        at, n = torch.tensor(keep, dtype=torch.long, device=self.head.device), len(keep)
        for state in (self.tokens, self.lengths, self.drawn, self.keys):
            state[:n] = state[at]
        for layer in self._cache:
            for cached in layer:
                cached[:n] = cached[at]


def pieces(lengths: Sequence[int], most: int) -> Iterator[range]:
    """Which prompts go through together: runs of at most ``most`` tokens with padding, or a single prompt."""
    start, longest = 0, 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i > start and longest * (i + 1 - start) > most:
            yield range(start, i)
            start, longest = i, length
    yield range(start, len(lengths))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(n, G, H/G, d) over keys and values (n, G, S', d), ``mask`` (n, 1, 1, S') of 0 and -inf."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, -1, q.shape[2], -1))
    # Two plain products: a CPU's flash kernel is made for many queries and takes twice as long over few.
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).add_(mask)
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(v.dtype), v)
