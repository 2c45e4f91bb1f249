"""Batched decoding over a static KV cache.

Each row owns a slot, where its tokens are cached from index 0 on, so cache index and position are the same:
there is no left padding, rows start and finish at any step, and keys move only when slots are compacted. A
step reads and writes the same tensors every time, as captured graphs require: one graph for the network
(``forward``), one for the draw (``draw_next``).

Shapes: B slots, n of them in use, S cache length, P prompts, G key heads, H query heads, d head size, D
hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from empg_lite.core.sizes import PREFILL_TOKENS, logit_rows
from empg_lite.policy.packing import Rows, attend_prompts, behind_head, packed_prompts, shared_head
from empg_lite.sampler.draw import Decoding, draw

if TYPE_CHECKING:
    from empg_lite.policy.network import Layer, Network


class Decoder:
    """The state of up to B rows.

    Args:
        network: decoded without gradients; the caller switches them off.
        head: ``(V, D)``.
        slots, cache_len: B and S.

    Attributes:
        tokens, lengths, drawn, keys: ``(B,)`` for each slot: the next input token, the number of cached
            tokens, the number of completion tokens drawn so far, the key of its random numbers.
        logprobs: ``(B,)`` of ``tokens``.
    """

    def __init__(
        self,
        network: Network,
        head: Tensor,
        dtype: torch.dtype,
        decoding: Decoding,
        slots: int,
        cache_len: int,
    ) -> None:
        self.network, self.head, self.decoding, self.cache_len = network, head, decoding, cache_len
        device = head.device
        shape = (slots, network.kv_heads, cache_len, network.head_dim)
        self._cache = [  # keys and values of each layer, (B, G, S, d)
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in network.layers
        ]
        self.tokens, self.lengths, self.drawn, self.keys = (
            torch.zeros(slots, dtype=torch.long, device=device) for _ in range(4)
        )
        self.logprobs = torch.zeros(slots, device=device)
        # (B, D), written by ``forward`` and read by ``draw_next``
        self._hidden = torch.zeros(slots, head.shape[1], dtype=dtype, device=device)
        heads = torch.arange(slots * network.kv_heads, device=device).view(slots, -1)
        self._starts = heads * cache_len  # (B, G) index of a row's first token among all B G S

    def prefill(
        self, prompts: Sequence[Sequence[int]], owner: Sequence[int], keys: Sequence[int], rows: Sequence[int]
    ) -> None:
        """Start these rows and draw their first tokens; each prompt runs once.

        Args:
            prompts: P prompts.
            owner, keys: for each row, the prompt that it continues and the key of its random numbers.
            rows: the rows' slots.
        """
        device, lengths = self.head.device, torch.tensor([len(p) for p in prompts])
        ends = []
        for batch in prefill_batches([len(p) for p in prompts], PREFILL_TOKENS[device.type]):
            here = [(slot, which) for slot, which in zip(rows, owner, strict=True) if which in batch]
            ends.append(self._prefill_batch(prompts[batch.start : batch.stop], batch.start, here))
        owners, slots = torch.tensor(owner), torch.tensor(rows, device=device)
        self.keys[slots] = torch.tensor(keys, device=device)
        self.lengths[slots], self.drawn[slots] = lengths[owners].to(device), 0
        self._draw(torch.cat(ends)[owners.to(device)], slots)

    def restart(self, rows: Sequence[int], prompts: Sequence[Sequence[int]], keys: Sequence[int]) -> None:
        """Draw anew in rows that still hold their prompts, with other random numbers.

        The next ``step`` runs a prompt's last token again and draws the first token after it.
        """
        device = self.head.device
        slots = torch.tensor(rows, device=device)
        self.tokens[slots] = torch.tensor([prompt[-1] for prompt in prompts], device=device)
        self.lengths[slots] = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        self.keys[slots], self.drawn[slots] = torch.tensor(keys, device=device), 0

    def _prefill_batch(
        self, prompts: Sequence[Sequence[int]], number: int, rows_of: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Compute the prompts' keys and values, of a head that they share once, and cache them in each row.

        Args:
            number: index of the first of these prompts.
            rows_of: (slot, index of its prompt) for each row.

        Returns:
            ``(P, D)`` hidden states of the prompts' last tokens.
        """
        device, network, head = self.head.device, self.network, shared_head(prompts)
        rows = Rows.of([len(p) for p in prompts], 0, device, head)
        packed, positions = packed_prompts(prompts, head)
        angles = network.angles(torch.tensor(positions, device=device))
        source, target = self._copies(rows, number, rows_of)

        x: Tensor = network.embed(torch.tensor(packed, device=device))
        behind = behind_head(rows, network.heads // network.kv_heads, x.dtype)
        update = None
        for layer, (cached_keys, cached_values) in zip(network.layers, self._cache, strict=True):
            x, normed = network.add_norm(x, update, layer.norm)
            q, k, v = network.qkv_heads(layer, normed, angles)
            self._write(cached_keys, target, k[source])
            self._write(cached_values, target, v[source])
            q, k, v = (rows.pad(t).transpose(1, 2) for t in (q, k, v))
            attended = attend_prompts(rows, behind, q, k, v).flatten(1)
            x, update = network.after_attention(layer, x, attended)
        assert update is not None
        return network.add_norm(x[rows.ends], update[rows.ends], network.norm)[1]

    def _copies(self, rows: Rows, number: int, rows_of: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """From each packed prompt token ``(m,)`` to its cache indices in each of its rows ``(m, G)``."""
        device = self.head.device
        owners = torch.tensor([which - number for _, which in rows_of], device=device)
        slots = torch.tensor([slot for slot, _ in rows_of], device=device)
        source = rows.gather[owners]  # (n, T)
        at = torch.arange(source.shape[1], device=device)
        inside = at < rows.lengths[owners][:, None]
        target = self._starts[slots][inside.nonzero()[:, 0]] + at.expand_as(source)[inside][:, None]
        return source[inside], target

    def step(self, n: int, context: int) -> None:
        """Cache the tokens of the first n slots and draw their next ones; see ``forward``."""
        self.forward(n, context)
        self.draw_next(n)

    def forward(self, n: int, context: int) -> None:
        """Run the tokens of the first n slots through the network and into the cache.

        Args:
            context: cached positions that attention reads: more than any of their ``lengths``.
        """
        network = self.network
        tokens, lengths = self.tokens[:n], self.lengths[:n]
        angles, target = network.angles(lengths), self._starts[:n] + lengths[:, None]
        future = torch.arange(context, device=lengths.device) > lengths[:, None]  # (n, S')
        mask = torch.zeros(future.shape, dtype=self._cache[0][0].dtype, device=lengths.device)
        mask = mask.masked_fill_(future, -torch.inf)[:, None, None]
        x: Tensor = network.embed(tokens)
        update = None
        for number, layer in enumerate(network.layers):
            x, normed = network.add_norm(x, update, layer.norm)
            attended = self._attend(number, layer, normed, angles, target, mask)
            x, update = network.after_attention(layer, x, attended)
        lengths.add_(1).clamp_(max=self.cache_len - 1)  # a finished row keeps overwriting its own last entry
        self._hidden[:n] = network.add_norm(x, update, network.norm)[1]

    def draw_next(self, n: int) -> None:
        """Draw the next tokens of the first n slots, after ``forward``."""
        self._draw(self._hidden[:n], slice(0, n))

    def _attend(
        self, number: int, layer: Layer, normed: Tensor, angles: Any, target: Tensor, mask: Tensor
    ) -> Tensor:
        """(n, D) -> (n, H d). A key head's query heads lie along the tokens: keys are not repeated."""
        network, (n, context) = self.network, (len(normed), mask.shape[-1])
        q, k, v = network.qkv_heads(layer, normed, angles)
        for cached, new in zip(self._cache[number], (k, v), strict=True):
            self._write(cached, target, new)
        keys, values = (cached[:n, :, :context] for cached in self._cache[number])
        grouped = q.view(n, network.kv_heads, -1, network.head_dim)
        return _attention(grouped, keys, values, mask).flatten(1)

    def _write(self, cached: Tensor, target: Tensor, new: Tensor) -> None:
        """Write ``(m, G, d)`` to the indices ``target``, ``(m, G)``, among all B G S."""
        cached.view(-1, self.network.head_dim).index_copy_(0, target.flatten(), new.flatten(0, 1))

    def _draw(self, hidden: Tensor, slots: slice | Tensor) -> None:
        """Head and draw in chunks of rows: no float32 (n, V) tensor is made."""
        size, n = logit_rows(self.head.device.type, len(self.head)), len(hidden)
        for start in range(0, n, size):
            stop = min(start + size, n)
            chunk = slots[start:stop] if isinstance(slots, Tensor) else slice(start, stop)
            logits = hidden[start:stop].to(self.head.dtype) @ self.head.T
            self.tokens[chunk], self.logprobs[chunk] = draw(
                logits, self.keys[chunk], self.drawn[chunk], self.decoding
            )
        self.drawn[slots] += 1

    def compact(self, keep: Sequence[int]) -> list[int]:
        """Keep the rows in these slots, in the first slots; as few as possible move.

        Returns:
            For each of the first ``len(keep)`` slots, the slot that its row was in.
        """
        n, kept = len(keep), set(keep)
        holes = [slot for slot in range(n) if slot not in kept]
        moved = [slot for slot in keep if slot >= n]  # as many: n rows are kept
        came_from = list(range(n))
        for hole, slot in zip(holes, moved, strict=True):
            came_from[hole] = slot
        if holes:
            to, source = (torch.tensor(slots, device=self.head.device) for slots in (holes, moved))
            caches = (cached for layer in self._cache for cached in layer)
            for state in (self.tokens, self.lengths, self.drawn, self.keys, *caches):
                state[to] = state[source]
        return came_from


def prefill_batches(lengths: Sequence[int], limit: int) -> Iterator[range]:
    """Consecutive prompts to prefill together: at most ``limit`` tokens with padding, or a single prompt."""
    start, longest = 0, 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i > start and longest * (i + 1 - start) > limit:
            yield range(start, i)
            start, longest = i, length
    yield range(start, len(lengths))


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(n, G, H/G, d) over keys and values (n, G, S', d), ``mask`` (n, 1, 1, S') of 0 and -inf."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, -1, q.shape[2], -1))
    # Two plain products: a CPU's flash kernel is built for many queries and takes twice as long over few.
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).add_(mask)
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(v.dtype), v)
