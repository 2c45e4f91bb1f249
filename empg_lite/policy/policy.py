"""The policy: one base, one adapter, one tokenizer, one template.

Sampling and fitting must agree on prompt, padding and adapter state. A silent mismatch is the most common
bug in this area of research, so one object does both. With the adapter on it is the policy, with the adapter
off the reference: there is never a second copy of the weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from empg_lite.policy.attention import attention_kernels
from empg_lite.policy.kernels import PLAIN
from empg_lite.policy.logprobs import RowLoss, chosen_logprobs, head_loss
from empg_lite.policy.network import Network, live_network
from empg_lite.policy.packing import Ids, pack, packed_hidden
from empg_lite.policy.shared_prefix import disagreement, forget_masks, shared_prefix_hidden
from empg_lite.policy.templates import Template
from empg_lite.policy.tokens import stop_ids


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded rows, prompt then completion.

    Attributes:
        input_ids: ``(B, T)``.
        completion_mask: ``(B, T)`` bool, True on completion tokens (the stop included), made from lengths.
    """

    input_ids: Tensor
    completion_mask: Tensor

    def __post_init__(self) -> None:
        assert self.input_ids.ndim == 2 and self.completion_mask.shape == self.input_ids.shape
        assert self.completion_mask.dtype == torch.bool
        assert not self.completion_mask[:, 0].any(), "a completion token is predicted from what precedes it"


def collate(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, device: torch.device | str = "cpu"
) -> Batch:
    """Pad (prompt_ids, completion_ids) pairs on the right into a ``Batch`` of B = len(rows)."""
    assert all(len(prompt) for prompt, _ in rows), "a prompt needs at least one token"
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[i, :end] = torch.tensor([*prompt, *completion], dtype=torch.long)
        mask[i, len(prompt) : end] = True
    return Batch(ids.to(device), mask.to(device))


class Policy:
    """A LoRA-adapted causal LM with its tokenizer and prompt template.

    Attributes:
        model: the ``PeftModel``.
        stop_ids: all end tokens of the model, the tokenizer and the template.
        backend: ``unsloth`` or ``transformers``.
        checkpointing: whether fitting recomputes activations instead of keeping them.
        revision: commit of the base model on the hub, or None.
        kernels: the pointwise operations of sampling.
        shared_prefix: whether fits use Unsloth's own forward pass instead of the packed one; None: available
            but not verified yet (``prepare_fit``).
        notes: which parts of the backend are not used, and what was mended, and why.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: Template,
        *,
        dtype: torch.dtype,
        backend: str,
        name: str,
        revision: str | None = None,
        checkpointing: bool = False,
        set_mode: Callable[[Any, bool], None] | None = None,
        free_buffers: Callable[[], None] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.dtype, self.backend, self.name, self.revision = dtype, backend, name, revision
        self.checkpointing = checkpointing
        self.device = next(model.parameters()).device
        self.stop_ids = stop_ids(model, tokenizer, template)
        self.pad_id = int(
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.stop_ids)
        )
        self.kernels, self.notes = PLAIN, notes
        self.shared_prefix: bool | None = False
        self._set_mode = set_mode or (lambda model, training: model.train(training))
        self._free_buffers = free_buffers

    # --- text <-> ids -----------------------------------------------------------------------------

    def encode_prompt(self, question: str) -> tuple[str, tuple[int, ...]]:
        """The prompt as text and as ids.

        Names of control tokens in a question are encoded as plain text, so a question cannot end the user's
        turn.
        """
        prompt, encode = self.template.render(question), self.tokenizer.encode
        if not any(name in question for name in self.tokenizer.get_added_vocab()):
            return prompt, tuple(encode(prompt, add_special_tokens=False))
        before, after = self.template.text.split("{question}")
        ids = [encode(part, add_special_tokens=False) for part in (before, after)]
        own = encode(question, add_special_tokens=False, split_special_tokens=True)
        return prompt, (*ids[0], *own, *ids[1])

    def encode_completion(self, text: str) -> tuple[int, ...]:
        """Ids of a completion given as text, with the template's end token appended."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return (*ids, self.tokenizer.convert_tokens_to_ids(self.template.end))

    @property
    def tokenizer_sha256(self) -> str:
        """Identity of the vocabulary and the stop ids."""
        vocab = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(
            repr((vocab, sorted(self.stop_ids))).encode("utf-8", "surrogatepass")
        ).hexdigest()

    # --- the network ------------------------------------------------------------------------------

    @property
    def causal(self) -> Any:
        """The causal LM inside the PEFT wrapper (LoRA layers injected)."""
        return self.model.base_model.model

    def backbone(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Everything below the head; ``last_hidden_state`` is (B, T, D)."""
        return self.causal.model(input_ids=input_ids, **kwargs)

    @property
    def head_weight(self) -> Tensor:
        """``(V, D)`` output embedding, frozen."""
        return self.causal.lm_head.weight

    @cached_property
    def network(self) -> Network:
        """The network layer by layer, over the model's modules; differentiable."""
        return live_network(self.causal)

    @property
    def decoding_network(self) -> Network:
        """The same with the borrowed kernels, without gradients."""
        return live_network(self.causal, self.kernels)

    def prepare_fit(self) -> None:
        """Before the first fit, verify Unsloth's own pass against the packed one.

        Not done at load time: the pass has to be compiled, and sampling does not need it.
        """
        if self.shared_prefix is None:
            why = disagreement(self)
            self.shared_prefix = why is None
            self.notes += () if why is None else (f"shared prefix: {why}",)

    def autocast(self, cache: bool = True) -> AbstractContextManager[Any]:
        """16-bit compute over fp32 adapters: PEFT keeps them in fp32 and would upcast every product.

        Args:
            cache: keep 16-bit copies of weights until the block ends. A captured graph must not use them: it
                would read copies from before the last update.
        """
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=cache)

    def token_logprobs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the completion tokens by the backend's own forward pass over padded rows.

        The reference for ``completion_logprobs``; prompts are repeated for every row.

        Returns:
            ``(B, T-1)`` float32 log-probs, 0 where the mask is False, and that mask ``(B, T-1)``: index t
            scores token t + 1.
        """
        with self.autocast():
            hidden, targets, mask = self._padded_hidden(batch)
            chosen = chosen_logprobs(hidden[mask], self.head_weight, targets[mask])
        logprobs = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return logprobs.masked_scatter(mask, chosen), mask

    def _padded_hidden(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states ``(B, T-1, D)``, the next tokens and their completion mask, ``(B, T-1)`` each."""
        targets, mask = batch.input_ids[:, 1:], batch.completion_mask[:, 1:]
        # Right padding under a causal mask: real tokens cannot see padding, so no attention mask is needed.
        hidden = self.backbone(batch.input_ids, use_cache=False).last_hidden_state[:, :-1]
        assert hidden.shape[:2] == mask.shape, f"backbone returned {tuple(hidden.shape)}"
        return hidden, targets, mask

    def completion_loss(self, pairs: Sequence[tuple[Ids, Ids]], weights: Tensor, loss: RowLoss) -> Tensor:
        """A sum over completion tokens of a function of their log-probabilities, ready for ``backward``.

        Args:
            pairs: (prompt_ids, completion_ids) of B rows, neither empty.
            weights: ``(B,)`` float32.
            loss: ``(log-probs (b, T), mask (b, T), weights (b,)) -> scalar`` of some of the rows; see
                ``head_loss``.
        """
        with self.autocast():
            hidden, targets, _ = self._scored(pairs)
            lengths = [len(completion) for _, completion in pairs]
            return head_loss(hidden, self.head_weight, targets, lengths, weights, loss)

    def completion_logprobs(
        self, pairs: Sequence[tuple[Ids, Ids]], *, shared: bool | None = None
    ) -> list[Tensor]:
        """Log-probabilities of every completion's tokens: ``(T,)`` float32 nats for each pair.

        Differentiable, for losses other than the M-step's; it computes the head's softmax twice.

        Args:
            shared: use Unsloth's own pass or the packed one; None: as ``shared_prefix`` says.
        """
        with self.autocast():
            hidden, targets, _ = self._scored(pairs, shared)
            flat = chosen_logprobs(hidden, self.head_weight, targets)
        return list(flat.split([len(completion) for _, completion in pairs]))

    def _scored(
        self, pairs: Sequence[tuple[Ids, Ids]], shared: bool | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states ``(M, D)`` before each completion token, the tokens and their rows ``(M,)``."""
        if self.shared_prefix if shared is None else shared:
            return shared_prefix_hidden(self, pairs)
        packed = pack(pairs, self.device)
        hidden = packed_hidden(self.network, packed, checkpointing=self.checkpointing)
        return hidden, packed.targets, packed.rows

    def facts(self) -> dict[str, Any]:
        """Which code this policy runs on, for ``environment.json``."""
        attention = attention_kernels(self.network, self.dtype, self.device)
        if self.shared_prefix:
            attention["fitting"] = "flex_attention"
        return {
            "backend": self.backend,
            "fit": "unsloth, shared prefix" if self.shared_prefix else "packed",
            "kernels": list(self.kernels.borrowed) or ["plain torch"],
            "attention": attention,
            "notes": list(self.notes),
        }

    # --- modes ------------------------------------------------------------------------------------

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Inference mode of the backend without gradients; restores the previous mode."""
        was = self.model.training
        self._set_mode(self.model, False)
        try:
            with torch.no_grad(), self.autocast(cache=False):
                yield
        finally:
            if self._free_buffers:
                self._free_buffers()
            if was:
                self._set_mode(self.model, True)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Training mode of the backend (with gradient checkpointing if requested)."""
        self._set_mode(self.model, True)
        try:
            yield
        finally:
            if self.shared_prefix:
                forget_masks()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Adapter off: the base model, same weights in memory."""
        with self.model.disable_adapter():
            yield

    # --- the adapter ------------------------------------------------------------------------------

    @property
    def adapter_on(self) -> bool:
        """Whether the adapter is enabled; not within ``reference``."""
        return not self.causal.model.layers[0].mlp.down_proj.disable_adapters

    def trainable(self) -> dict[str, nn.Parameter]:
        """The LoRA parameters by name, in a fixed order."""
        return {name: p for name, p in sorted(self.model.named_parameters()) if p.requires_grad}

    def adapter_sha256(self) -> str:
        """Identity of the adapter's values: names, shapes and bytes."""
        digest = hashlib.sha256()
        for name, parameter in self.trainable().items():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
