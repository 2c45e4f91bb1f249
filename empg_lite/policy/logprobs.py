"""Log-probabilities of chosen tokens without ever holding a (tokens x V) fp32 tensor.

At V = 151,936 one fp32 row of logits is 608 KB, so 8 x 512 tokens would be 2.5 GB, twice that with the
softmax and thrice with its gradient. The head is frozen here (LoRA sits on the linears below it), so only
the gradient of the hidden states is wanted: forward keeps each row's logsumexp, backward forms the
softmax again chunk by chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Elements of one fp32 chunk of logits: 64 MiB.
CHUNK_ELEMENTS = 1 << 24


def _rows_per_chunk(vocab: int) -> int:
    return max(1, CHUNK_ELEMENTS // vocab)


class _ChosenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        rows = _rows_per_chunk(weight.shape[0])
        logprobs = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        log_z = torch.empty_like(logprobs)
        for i in range(0, hidden.shape[0], rows):
            logits = (hidden[i : i + rows] @ weight.T).float()  # (rows, V)
            log_z[i : i + rows] = logits.logsumexp(-1)
            chosen = logits.gather(-1, targets[i : i + rows, None]).squeeze(-1)
            logprobs[i : i + rows] = chosen - log_z[i : i + rows]
        ctx.save_for_backward(hidden, weight, targets, log_z)
        return logprobs

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        hidden, weight, targets, log_z = ctx.saved_tensors
        rows = _rows_per_chunk(weight.shape[0])
        grad_hidden = torch.empty_like(hidden)
        for i in range(0, hidden.shape[0], rows):
            logits = (hidden[i : i + rows] @ weight.T).float()
            # d logp(target) / d logits = onehot(target) - softmax
            d_logits = torch.exp(logits - log_z[i : i + rows, None]).neg_()
            d_logits.scatter_add_(-1, targets[i : i + rows, None], torch.ones_like(d_logits[:, :1]))
            d_logits.mul_(grad[i : i + rows, None])
            grad_hidden[i : i + rows] = (d_logits.to(weight.dtype) @ weight).to(hidden.dtype)
        return grad_hidden, None, None


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
