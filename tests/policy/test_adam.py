"""AdamW with 8-bit moments against AdamW in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixture_model import build_model

from empg_lite.policy import load_policy
from empg_lite.policy.adapter import make_adamw, read_tensors
from empg_lite.policy.policy import Policy
from empg_lite.recipe.schema import ModelSection
from empg_lite.run.checkpoint import _load_optimizer, _optimizer_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


def loaded(folder: Path) -> Policy:
    """Rank 40: matrices above and below 4,096 elements, where 8-bit moments start."""
    section = ModelSection(
        name=str(folder), backend="transformers", load_in_4bit=False, lora_r=40, lora_alpha=40
    )
    return load_policy(section, "plain", seed=0)


def walk(policy: Policy, optimizer: torch.optim.Optimizer, steps: range) -> torch.Tensor:
    """The parameters after steps whose gradients depend only on the step."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in policy.trainable().values():
            p.grad = 0.3 + torch.randn(p.shape, generator=generator)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in policy.trainable().values()])


def adam(policy: Policy, eight_bit: bool) -> torch.optim.Optimizer:
    return make_adamw(list(policy.trainable().values()), 1e-2, eight_bit=eight_bit)


def test_8bit_adam_follows_32bit_adam(folder: Path) -> None:
    """Within 3% of the distance after ten steps."""
    ends = {}
    for eight_bit in (False, True):
        policy = loaded(folder)
        start = torch.cat([p.detach().flatten().clone() for p in policy.trainable().values()])
        ends[eight_bit] = walk(policy, adam(policy, eight_bit), range(10)) - start
    off = torch.linalg.norm(ends[True] - ends[False]) / ends[False].norm()
    assert 1e-4 < off < 0.03  # other arithmetic, same direction


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_checkpoint_resumes_bit_for_bit(folder: Path, eight_bit: bool) -> None:
    policy = loaded(folder)
    optimizer = adam(policy, eight_bit)
    walk(policy, optimizer, range(3))
    kept = {n: p.detach().clone() for n, p in policy.trainable().items()}
    stored = _optimizer_bytes(policy, optimizer)
    straight = walk(policy, optimizer, range(3, 6))

    def resumed(data: bytes) -> torch.Tensor:
        other = loaded(folder)
        again = adam(other, eight_bit)
        with torch.no_grad():
            for name, p in other.trainable().items():
                p.copy_(kept[name])
        _load_optimizer(other, again, read_tensors(data, "optimizer"))
        return walk(other, again, range(3, 6))

    assert torch.equal(resumed(stored), straight)
    fresh = loaded(folder)
    walk(fresh, adam(fresh, eight_bit), range(2))  # negative control: moments of another step
    other = adam(fresh, eight_bit)
    walk(fresh, other, range(2))
    assert not torch.equal(resumed(_optimizer_bytes(fresh, other)), straight)
