"""Each family on a GPU: the numbers of a CPU, graphs, and in 16 bits the sampler against the fit."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from family_model import PUBLISHED, build_family
from fixture_model import perturb_adapter
from sampling import prompts_of

from empg_lite.policy import load_policy
from empg_lite.policy.policy import Policy
from empg_lite.recipe.schema import ModelSection
from empg_lite.sampler import Decoding, make_sampler

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_checks  # noqa: E402

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
#: Without a card the same code is compared with itself.
everywhere = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])],
)
families = pytest.mark.parametrize("name", PUBLISHED)
PAIRS = [((5, 6, 7), (8, 9, 256)), (tuple(range(40, 110)), (1, 2, 256)), ((5, 6, 7), (*range(60), 256))]


def load(folder: Path, device: str, dtype: str = "float32", four_bit: bool = False) -> Policy:
    section = ModelSection(
        name=str(folder), backend="transformers", dtype=dtype, load_in_4bit=four_bit, lora_r=4, lora_alpha=8
    )
    with ExitStack() as hidden:
        if device == "cpu":
            hidden.enter_context(patch("torch.cuda.is_available", lambda: False))
        policy = load_policy(section, "plain", seed=0)
    assert policy.device.type == device
    perturb_adapter(policy)
    return policy


@everywhere
@families
def test_logprobs_are_those_of_a_cpu(tmp_path: Path, name: str, device: str) -> None:
    plain = load(build_family(tmp_path, name), "cpu")
    expected = torch.cat(plain.completion_logprobs(PAIRS)).detach()
    found = torch.cat(load(tmp_path, device).completion_logprobs(PAIRS)).detach().cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@everywhere
@families
def test_greedy_tokens_by_graphs_step_by_step_and_by_generate(tmp_path: Path, name: str, device: str) -> None:
    policy = load(build_family(tmp_path, name), device)
    prompts = prompts_of(policy, 12, 1)
    found = gpu_checks.three_ways(policy, prompts, Decoding(16, temperature=0.0))
    assert not [error for error in found.values() if isinstance(error, str)]
    for way, tokens in found.items():
        assert not gpu_checks.partings(prompts, found["generate"], tokens), way


@everywhere
@families
def test_full_width_in_bf16_over_nf4(tmp_path: Path, name: str, device: str) -> None:
    """What the sampler says it drew with, and what the fit computes for the same tokens: rounding apart."""
    policy = load(build_family(tmp_path, name, small=False), device, "bfloat16", True)
    prompts = prompts_of(policy, 3, 2)
    drawn = make_sampler(policy, "native").sample(prompts, Decoding(24))
    rows = [(p.ids, c) for p, row in zip(prompts, drawn, strict=True) for c in row]
    with torch.no_grad():
        fitted = torch.cat(policy.completion_logprobs([(ids, c.ids) for ids, c in rows])).cpu()
    sampled = torch.cat([torch.tensor(c.logprobs) for _, c in rows])
    assert float((fitted - sampled).square().mean().sqrt()) < 0.15, "a wrong network is off by nats"
