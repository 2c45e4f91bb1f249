"""Log-probabilities of chosen tokens without ever holding a (tokens x V) fp32 tensor.

At V = 151,936 one fp32 row of logits is 608 KB, so 8 x 512 tokens would be 2.5 GB, twice that with the
softmax and thrice with its gradient. The head is frozen here (LoRA sits on the linears below it), so only
the gradient of the hidden states is wanted, and chunks of logits come and go.

A loss of the M-step weighs every log-probability by a number that is known beforehand. ``head_loss`` uses it:
it forms the gradient of a chunk while its softmax is there, two products with the head in all. A loss
of any other kind takes ``chosen_logprobs``, which forms the softmax a second time going backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from empg_lite.core.sizes import LOGIT_CHUNK
from empg_lite.policy.kernels import wide

#: (which of the tokens, their log-probs ``(n,)`` in nats, float32) -> their share of a sum over tokens.
TokenLoss = Callable[[slice, Tensor], Tensor]


def rows_per_chunk(weight: Tensor) -> int:
    """Tokens whose logits make up one chunk, for a head ``(V, D)``."""
    return max(1, LOGIT_CHUNK[weight.device.type] // weight.shape[0])


class _ChosenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        rows = rows_per_chunk(weight)
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
        rows = rows_per_chunk(weight)
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
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, loss: TokenLoss
    ) -> Tensor:
        rows, total = rows_per_chunk(weight), wide(hidden.new_zeros(()))
        grad_hidden = torch.empty_like(hidden)
        # One buffer for all chunks: those that malloc gives out one after another are not the same memory.
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
            value, grad = _value_and_grad(loss, at, (chosen - top - z.log()).squeeze(-1))
            total += value
            d_logits = _to_logits(grad, logits.div_(z), targets[at])
            grad_hidden[at] = (d_logits.to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.save_for_backward(grad_hidden)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), None, None, None


def _value_and_grad(loss: TokenLoss, at: slice, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        value = loss(at, leaf)
        (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def _to_logits(grad: Tensor, softmax: Tensor, targets: Tensor) -> Tensor:
    """Gradient of log-probs ``(n,)`` carried to logits ``(n, V)``; overwrites ``softmax``."""
    # d logp(target) / d logits = onehot(target) - softmax
    d_logits = softmax.neg_()
    d_logits.scatter_add_(-1, targets[:, None], torch.ones_like(d_logits[:, :1]))
    return d_logits.mul_(grad[:, None])


def chosen_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target under softmax(hidden @ weight.T).

    Args:
        hidden: ``(N, D)`` hidden states, one per token.
        weight: ``(V, D)`` output embedding; frozen.
        targets: ``(N,)`` token ids.

    Returns:
        ``(N,)`` float32, in nats; differentiable in ``hidden`` only.
    """
    assert hidden.ndim == 2 and targets.shape == hidden.shape[:1] and weight.shape[1] == hidden.shape[1]
    assert not weight.requires_grad, "the head is frozen: its gradient is not formed here"
    return _ChosenLogprobs.apply(hidden.to(weight.dtype), weight, targets)


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, loss: TokenLoss) -> Tensor:
    """A sum over tokens of something of their log-probabilities, its gradient formed on the way.

    Args:
        hidden, weight, targets: as in ``chosen_logprobs``.
        loss: adds up over tokens; called once for each chunk, with gradients enabled. Whatever scaling
            16-bit gradients need belongs into it: they are rounded here.

    Returns:
        Scalar float32, differentiable in ``hidden`` only.
    """
    assert hidden.ndim == 2 and targets.shape == hidden.shape[:1] and weight.shape[1] == hidden.shape[1]
    assert not weight.requires_grad, "the head is frozen: its gradient is not formed here"
    return _HeadLoss.apply(hidden.to(weight.dtype), weight, targets, loss)
