"""Batched decoding over a static KV cache.

Each row owns a slot, where its tokens are cached from index 0 on, so cache index and position go together:
there is no left padding, rows start and finish at any step, and keys move only when slots are compacted. A
step reads and writes the same tensors every time, as captured graphs require: one graph for the network
(``forward``), one for the draw (``draw_next``).

What all prompts of a call begin with (instructions, examples) is computed once, by ``begin``. On a CPU it is
not copied into the slots, which then begin behind it: a step reads its keys once for all rows, in a product
over all of them, as Hydragen does (Juravsky et al., arXiv 2402.05099, section 3).

Shapes: B slots, n of them in use, S cache length, L prefix, P prompts, G key heads, H query heads, d head
size, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from empg_lite.core.sizes import PREFILL_TOKENS, logit_rows
from empg_lite.policy.attention import causal_attention
from empg_lite.policy.packing import Rows, attend_behind, behind_prefix
from empg_lite.sampler.draw import Decoding, draw

if TYPE_CHECKING:
    from empg_lite.policy.network import Network

#: (layer's number, queries (N, H, d), keys and values (N, G, d)) -> (N, H d).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Decoder:
    """The state of up to B rows.

    Args:
        network: decoded without gradients; the caller switches them off.
        head: ``(V, D)``.
        slots, cache_len: B and S.

    Attributes:
        tokens, lengths, drawn, keys: ``(B,)`` for each slot: the next input token, the number of tokens
            before it, the number of completion tokens drawn so far, the key of its random numbers.
        logprobs: ``(B,)`` of ``tokens``.
        prefix_len: L.
        offset: position of a slot's first token: 0, or L where the slots begin behind the prefix.
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
        self.begin(())

    def begin(self, prefix: Sequence[int], in_slots: bool = True) -> None:
        """Compute the keys and values of what all prompts that follow begin with.

        Args:
            prefix: leading L tokens of every prompt, never its last one.
            in_slots: each row's slot has the prefix, too; else the slots begin behind it.
        """
        device = self.head.device
        self._prefix: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer, (L, G, d)
        self.prefix_len, self.offset = len(prefix), 0 if in_slots else len(prefix)
        self.lengths.fill_(self.offset)

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._prefix.append((k.clone(), v.clone()))  # not the products that they are views of
            attended = causal_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)))  # (1, H, L, d)
            return attended[0].transpose(0, 1).flatten(1)

        if prefix:
            ids = torch.tensor(prefix, device=device)
            self._through(ids, torch.arange(len(prefix), device=device), attend)

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
        """Compute the prompts' keys and values behind the prefix and cache them in each row.

        Args:
            number: index of the first of these prompts.
            rows_of: (slot, index of its prompt) for each row.

        Returns:
            ``(P, D)`` hidden states of the prompts' last tokens.
        """
        device, network, prefix = self.head.device, self.network, self.prefix_len
        rows = Rows.of([len(p) for p in prompts], 0, device, prefix)
        own = [(token, at) for p in prompts for at, token in enumerate(p) if at >= prefix]
        ids, positions = (torch.tensor(column, device=device) for column in zip(*own, strict=True))
        source, target = self._copies(rows, number, rows_of)
        behind = behind_prefix(rows, network.heads // network.kv_heads, self._hidden.dtype)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self._prefix:
                k, v = (torch.cat(pair) for pair in zip(self._prefix[layer], (k, v), strict=True))
            for cached, new in zip(self._cache[layer], (k, v), strict=True):
                self._write(cached, target, new[source])
            k, v = (rows.pad(t).transpose(1, 2) for t in (k, v))  # (P, G, T, d)
            return attend_behind(rows, behind, q, k, v).flatten(1)

        x, update = self._through(ids, positions, attend)
        ends = rows.ends - prefix
        return network.add_norm(x[ends], update[ends], network.norm)[1]

    def _copies(self, rows: Rows, number: int, rows_of: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """From tokens of prefix and prompts ``(m,)`` to cache indices in each of their rows ``(m, G)``."""
        device = self.head.device
        owners = torch.tensor([which - number for _, which in rows_of], device=device)
        slots = torch.tensor([slot for slot, _ in rows_of], device=device)
        source = rows.gather[owners, self.offset :]  # (n, T - offset)
        at = torch.arange(source.shape[1], device=device)
        inside = at < rows.lengths[owners][:, None] - self.offset
        target = self._starts[slots][inside.nonzero()[:, 0]] + at.expand_as(source)[inside][:, None]
        return source[inside], target

    def _through(self, ids: Tensor, positions: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """Run tokens ``(N,)`` at these positions through all layers: x and the pending update, ``(N, D)``."""
        network, angles = self.network, self.network.angles(positions)
        x: Tensor = network.embed(ids)
        update = None
        for number, layer in enumerate(network.layers):
            x, normed = network.add_norm(x, update, layer.norm)
            # without names: what each call returns is freed when the next one is done with it
            x, update = network.after_attention(
                layer, x, attend(number, *network.qkv_heads(layer, normed, angles))
            )
        assert update is not None
        return x, update

    def step(self, n: int, context: int) -> None:
        """Cache the tokens of the first n slots and draw their next ones; see ``forward``."""
        self.forward(n, context)
        self.draw_next(n)

    def forward(self, n: int, context: int) -> None:
        """Run the tokens of the first n slots through the network and into the cache.

        Args:
            context: cached positions that attention reads: more than any of their ``lengths``.
        """
        network, lengths = self.network, self.lengths[:n]
        cached = lengths - self.offset  # tokens in the row's slot
        target = self._starts[:n] + cached[:, None]
        future = torch.arange(context - self.offset, device=lengths.device) > cached[:, None]  # (n, S')
        mask = torch.zeros(future.shape, dtype=self._hidden.dtype, device=lengths.device)
        mask = mask.masked_fill_(future, -torch.inf)[:, None, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._attend(layer, q, k, v, target, mask)

        x, update = self._through(self.tokens[:n], lengths, attend)
        # a finished row keeps overwriting its own last entry
        lengths.add_(1).clamp_(max=self.offset + self.cache_len - 1)
        self._hidden[:n] = network.add_norm(x, update, network.norm)[1]

    def draw_next(self, n: int) -> None:
        """Draw the next tokens of the first n slots, after ``forward``."""
        self._draw(self._hidden[:n], slice(0, n))

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """(n, H, d) -> (n, H d). A key head's query heads lie along the tokens: keys are not repeated."""
        n, context = len(q), mask.shape[-1]
        for cached, new in zip(self._cache[layer], (k, v), strict=True):
            self._write(cached, target, new)
        keys, values = (cached[:n, :, :context] for cached in self._cache[layer])
        grouped = q.view(n, self.network.kv_heads, -1, self.network.head_dim)
        prefix = self._prefix[layer] if self.offset else None
        return _attention(grouped, keys, values, mask, prefix).flatten(1)

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


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
    """(n, G, H/G, d) over keys and values (n, G, S', d), ``mask`` (n, 1, 1, S') of 0 and -inf.

    Args:
        prefix: keys and values ``(L, G, d)`` before those of all rows; on a CPU only.
    """
    if q.device.type != "cpu":
        assert prefix is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, -1, q.shape[2], -1))
    # Plain products: a CPU's flash kernel is built for many queries and takes twice as long over few.
    q = q * q.shape[-1] ** -0.5
    scores = torch.matmul(q, k.transpose(-1, -2)).add_(mask)
    if prefix is None:
        return torch.matmul(_softmax(scores, v.dtype), v)
    first_k, first_v = (t.transpose(0, 1) for t in prefix)  # (G, L, d)
    first = _by_rows(torch.matmul(_by_heads(q), first_k.transpose(-1, -2)), len(q))
    first, rest = _softmax(torch.cat((first, scores), -1), v.dtype).split((first.shape[-1], k.shape[2]), -1)
    return torch.matmul(rest, v) + _by_rows(torch.matmul(_by_heads(first), first_v), len(q))


def _softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """In float32."""
    return scores.softmax(-1, dtype=torch.float32).to(dtype)


def _by_heads(x: Tensor) -> Tensor:
    """(n, G, H/G, c) -> (G, n H/G, c): all rows in one product for each key head."""
    return x.transpose(0, 1).flatten(1, 2)


def _by_rows(x: Tensor, n: int) -> Tensor:
    """(G, n H/G, c) -> (n, G, H/G, c)."""
    return x.unflatten(1, (n, -1)).transpose(0, 1)
