"""What a policy really allocates and keeps, beside what the memory plan says."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from plan_settings import CPU
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from empg_lite.loop.plan import predict
from empg_lite.policy import load_policy
from empg_lite.policy.memory import terms as t
from empg_lite.policy.memory.shape import read_shape
from empg_lite.policy.memory.terms import Settings
from empg_lite.policy.packing import pack, packed_hidden
from empg_lite.policy.policy import Policy
from empg_lite.recipe.schema import ModelSection
from empg_lite.sampler import Decoding, Prompt, make_sampler

Pairs = list[tuple[tuple[int, ...], tuple[int, ...]]]


def kept_by(policy: Policy, layers: int, pairs: Pairs) -> int:
    """Bytes that autograd saves in a forward pass: storages, each once, no weights."""
    del policy.causal.model.layers[layers:]
    norms = [layer.qk_norm for layer in policy.network.layers if layer.qk_norm is not None]
    weights = (*policy.model.parameters(), *policy.model.buffers(), *norms)
    parameters = {p.untyped_storage().data_ptr() for p in weights}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = (storage.nbytes(), x)  # kept alive, or its address would be reused
        return x

    with (
        policy.training(),
        policy.autocast(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        packed_hidden(policy.network, pack(pairs))
    return sum(n for n, _ in seen.values())


def kept_by_a_block(model: Path, s: Settings, pairs: Pairs) -> int:
    """Two layers minus one, without the cast copies of the LoRA weights."""
    shape = read_shape(str(model))
    two, one = (kept_by(loaded(model, s), n, pairs) for n in (2, 1))
    return two - one - (0 if s.itemsize == 4 else 2 * t.adapter_params(shape, s) // shape.layers)


def pairs_of(s: Settings) -> Pairs:
    """A whole step at its longest: P prompts that share no prefix, K completions of each."""
    prompts = [(2 + i,) + (1,) * (s.prompt_tokens - 1) for i in range(s.problems)]
    return [(prompt, (2,) * s.new_tokens) for prompt in prompts for _ in range(s.samples)]


class _Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, of those made within this mode: each storage counts once.

    What the libraries take for themselves while they compute is left out: for 16-bit products it is another
    amount on each processor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if torch.is_tensor(x) and (name := x.untyped_storage()._cdata) not in self._known | given:
                self._known.add(name)
                self.now += x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self._gone, name, x.untyped_storage().nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


def most_alive(work: Callable[[], object]) -> int:
    """The most bytes of tensors that are alive at once among those that ``work`` makes."""
    with _Live() as counted:
        work()
    return counted.most


def loaded(model: Path, s: Settings) -> Policy:
    """A policy as these settings have it."""
    section = ModelSection(
        name=str(model),
        backend="transformers",
        dtype="float32" if s.itemsize == 4 else "bfloat16",
        load_in_4bit=s.four_bit,
        lora_r=s.lora_r,
        lora_alpha=8,
    )
    return load_policy(section, "plain", seed=0, gradient_checkpointing=s.checkpointing)


def m_step_beside_plan(model: Path, s: Settings, pairs: Pairs | None = None) -> tuple[int, int]:
    """Bytes of one M-step: predicted, alive. By default on a whole step's longest rows."""
    from empg_lite.core.rationale import Rationale
    from empg_lite.loop.mstep import FitSettings, m_step

    policy = loaded(model, s)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-3)
    row = dict(question="", gold="", prompt="", completion="", finish_reason="stop", reward=1.0, weight=1.0)
    row |= dict(problem_id="", policy_step=0, reason="equal", sample_index=0, step=1)
    made = pairs or pairs_of(s)
    rows = [Rationale(prompt_ids=p, completion_ids=c, **row) for p, c in made]  # type: ignore[arg-type]
    fit = FitSettings(1e-3, 1.0, 1, 0.005, "tokens", s.new_tokens, s.micro_batch_tokens)
    m_step(policy, optimizer, rows[:1], fit)  # Adam's moments are there from now on
    found = most_alive(lambda: m_step(policy, optimizer, rows, fit))
    return sum(predict(read_shape(str(model)), s, CPU).phases["M-step"].values()), found


def sample_beside_plan(model: Path, s: Settings) -> tuple[dict[str, int], int]:
    """An E-step on a step's longest rows: the plan's terms, bytes alive. One prompt is shorter, so that
    ``generate`` pads; one row in eight ends at its second token, so that places close up."""
    sampler = make_sampler(loaded(model, s), s.engine, s.batch_rows, s.merged)
    lengths = [s.prompt_tokens - (i == 0) for i in range(s.problems)]
    prompts = [Prompt((2 + i,) + (1,) * (n - 1), tuple(range(s.samples))) for i, n in enumerate(lengths)]

    def sample() -> None:
        seen = itertools.count()
        early = range(s.batch_rows, s.batch_rows * 9 // 8)  # the first rows, at their second token
        stop = SimpleNamespace(stopped=lambda ids: next(seen) in early, text=lambda ids: "")
        sampler._stop = stop  # type: ignore[attr-defined]
        sampler.sample(prompts, Decoding(s.new_tokens))

    return predict(read_shape(str(model)), s, CPU).phases["E-step"], most_alive(sample)
