"""Log-probabilities of chosen tokens without a (tokens x V) fp32 tensor.

At V = 151,936 one fp32 row of logits is 608 KB: 8 x 512 tokens would take 2.5 GB, twice that with the softmax
and three times with its gradient. The head is frozen (LoRA is on the linears below it), so only the gradient
of the hidden states is needed, and logits are computed in chunks.

The M-step's loss weighs each log-probability by a number known beforehand, so ``head_loss`` forms the
gradient of a chunk while its softmax is there: two products with the head in all. Other losses use
``chosen_logprobs``, which recomputes the softmax in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from empg_lite.core.sizes import logit_rows
from empg_lite.policy.kernels import wide

#: (log-probs ``(b, T)`` in nats, float32; mask ``(b, T)``; weights ``(b,)``) -> scalar, a sum over tokens.
RowLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _chunk_rows(weight: Tensor) -> int:
    return logit_rows(weight.device.type, len(weight))


class _ChosenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        rows = _chunk_rows(weight)
        logprobs = wide(hidden.new_empty(hidden.shape[0]))
        log_z = torch.empty_like(logprobs)
        for i in range(0, hidden.shape[0], rows):
            logits = wide(hidden[i : i + rows] @ weight.T)  # (rows, V)
            log_z[i : i + rows] = logits.logsumexp(-1)
            chosen = logits.gather(-1, targets[i : i + rows, None]).squeeze(-1)
            logprobs[i : i + rows] = chosen - log_z[i : i + rows]
        ctx.save_for_backward(hidden, weight, targets, log_z)
        return logprobs

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        hidden, weight, targets, log_z = ctx.saved_tensors
        rows = _chunk_rows(weight)
        grad_hidden = torch.empty_like(hidden)
        for i in range(0, hidden.shape[0], rows):
            logits = wide(hidden[i : i + rows] @ weight.T)
            softmax = torch.exp(logits - log_z[i : i + rows, None])
            d_logits = _to_logits(grad[i : i + rows], softmax, targets[i : i + rows])
            grad_hidden[i : i + rows] = (d_logits.to(weight.dtype) @ weight).to(hidden.dtype)
        return grad_hidden, None, None


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        lengths: Sequence[int],
        row_weights: Tensor,
        loss: RowLoss,
    ) -> Tensor:
        assert hidden.ndim == 2 and targets.shape == hidden.shape[:1] and weight.shape[1] == hidden.shape[1]
        assert sum(lengths) == len(targets) and row_weights.shape == (len(lengths),)
        assert not weight.requires_grad, "the head is frozen: its gradient is not formed here"
        hidden = hidden.to(weight.dtype)
        rows, total = _chunk_rows(weight), wide(hidden.new_zeros(()))
        grad_hidden = torch.empty_like(hidden)
        # One buffer for all chunks: malloc would give each a different block.
        buffer = total.new_empty(min(rows, hidden.shape[0]), weight.shape[0])
        for i in range(0, hidden.shape[0], rows):
            at = slice(i, min(i + rows, hidden.shape[0]))
            logits = buffer[: at.stop - i]  # (rows, V); becomes its softmax, then its gradient in place
            if logits.dtype == hidden.dtype:
                torch.mm(hidden[at], weight.T, out=logits)
            else:
                logits.copy_(hidden[at] @ weight.T)
            chosen = logits.gather(-1, targets[at, None])
            top = logits.amax(-1, keepdim=True)
            z = logits.sub_(top).exp_().sum(-1, keepdim=True)
            with torch.enable_grad():
                logprobs = (chosen - top - z.log()).squeeze(-1).detach().requires_grad_()  # (n,)
                first, cut = _rows_between(lengths, at)
                padded, mask = pad_rows(logprobs, cut)  # (b, T)
                value = loss(padded, mask, row_weights[first : first + len(cut)])
                (grad,) = torch.autograd.grad(value, logprobs)
            total += value.detach()
            d_logits = _to_logits(grad, logits.div_(z), targets[at])
            grad_hidden[at] = (d_logits.to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.save_for_backward(grad_hidden)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), None, None, None, None, None


def _rows_between(lengths: Sequence[int], at: slice) -> tuple[int, list[int]]:
    """The first row with tokens in a slice of the packed tokens, and how many each row has from there on."""
    first, cut, start = 0, list[int](), 0
    for row, length in enumerate(lengths):
        inside = min(start + length, at.stop) - max(start, at.start)
        if inside > 0:
            first = first if cut else row
            cut.append(inside)
        start += length
    return first, cut


def pad_rows(packed: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Packed values ``(n,)`` as right-padded rows ``(b, T)``, 0 in the padding, and their mask ``(b, T)``."""
    rows = pad_sequence(packed.split(list(lengths)), batch_first=True)
    ends = torch.tensor(lengths, device=packed.device)
    return rows, torch.arange(rows.shape[1], device=packed.device) < ends[:, None]


def _to_logits(grad: Tensor, softmax: Tensor, targets: Tensor) -> Tensor:
    """Gradient of logits ``(n, V)`` from that of log-probs ``(n,)``; overwrites ``softmax``."""
    # d logp(target) / d logits = onehot(target) - softmax
    d_logits = softmax.neg_()
    d_logits.scatter_add_(-1, targets[:, None], torch.ones_like(d_logits[:, :1]))
    return d_logits.mul_(grad[:, None])


def chosen_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target under softmax(hidden @ weight.T).

    Args:
        hidden: ``(N, D)`` hidden states.
        weight: ``(V, D)`` output embedding; frozen.
        targets: ``(N,)`` token ids.

    Returns:
        ``(N,)`` float32, in nats; differentiable in ``hidden`` only.
    """
    assert hidden.ndim == 2 and targets.shape == hidden.shape[:1] and weight.shape[1] == hidden.shape[1]
    assert not weight.requires_grad, "the head is frozen: its gradient is not formed here"
    return _ChosenLogprobs.apply(hidden.to(weight.dtype), weight, targets)


#: ``head_loss(hidden, weight, targets, lengths, row_weights, loss)``: a sum over tokens of a function of
#: their log-probabilities, its gradient formed in the forward pass; scalar float32, differentiable in
#: ``hidden`` only. ``hidden`` ``(N, D)``, ``weight`` ``(V, D)`` and ``targets`` ``(N,)`` as in
#: ``chosen_logprobs``; the N tokens are packed rows of ``lengths``, with weights ``row_weights`` ``(B,)``.
#: ``loss`` is called once per chunk, with the rows of that chunk (one may be cut between two), and must be
#: additive over tokens. The weights must include any scaling that 16-bit gradients need: gradients are
#: rounded here.
head_loss = _HeadLoss.apply
