"""Llama, Qwen2 and Qwen3: every path of the package against transformers' own forward pass."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from family_model import LLAMA3_ROPE, PUBLISHED, build_family
from fixture_model import load_fixture_policy
from sampling import ids_of, prompts_of
from torch import Tensor

from empg_lite.core.errors import ModelUnusable
from empg_lite.policy.families import FAMILIES
from empg_lite.policy.integrity import check_config, check_weights
from empg_lite.policy.merged import MergedCopy
from empg_lite.policy.network import Network, live_network
from empg_lite.policy.packing import pack, packed_hidden
from empg_lite.policy.policy import Policy
from empg_lite.sampler import Decoding, make_sampler
from empg_lite.sampler.decoder import Decoder

LONG = tuple(int(i) for i in torch.randint(256, (70,), generator=torch.Generator().manual_seed(3)))
PAIRS = [
    (LONG[:60], (40, 41, 42, 256)),
    ((5, 6), (50, 256)),
    (LONG[:60], (256,)),
    ((5, 6), (*LONG[:30], 256)),
    (LONG[3:30], (40, 41, 99)),
]


@pytest.fixture(scope="module")
def policy_of(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """``(name, four_bit) -> Policy`` with an adapter that is not zero; each loaded once."""

    @cache
    def folder(name: str) -> Path:
        return build_family(tmp_path_factory.mktemp("family"), name)

    @cache
    def load(name: str, load_in_4bit: bool = False) -> Policy:
        return load_fixture_policy(folder(name), load_in_4bit=load_in_4bit)

    return load


def by_transformers(policy: Policy, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """Log-probs ``(T,)`` of the completion: the model's own forward pass over one unpadded row."""
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([[*prompt, *completion]])).logits
    logprobs = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)


def by_network(policy: Policy, network: Network) -> Tensor:
    """Log-probs of all pairs, packed, through a network."""
    packed = pack(PAIRS)
    with torch.no_grad():
        logits = packed_hidden(network, packed) @ policy.head_weight.T
    return logits.log_softmax(-1).gather(-1, packed.targets[:, None]).squeeze(-1)


def left_padded(policy: Policy) -> Tensor:
    """Log-probs of all pairs by transformers over one batch padded on the left."""
    width = max(len(p) + len(c) for p, c in PAIRS)
    ids, seen = torch.full((len(PAIRS), width), 7), torch.zeros(len(PAIRS), width, dtype=torch.long)
    for row, (prompt, completion) in enumerate(PAIRS):
        size = len(prompt) + len(completion)
        ids[row, -size:], seen[row, -size:] = torch.tensor([*prompt, *completion]), 1
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = policy.model(input_ids=ids, attention_mask=seen, position_ids=positions).logits
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.cat([row[-len(c) :] for row, (_, c) in zip(logprobs, PAIRS, strict=True)])


def worst(one: Tensor, other: Tensor) -> float:
    """The largest difference: in nats, of the log-prob itself where that is larger than one."""
    return float(((one - other).abs() / other.abs().clamp(min=1)).max())


# --- log-probabilities --------------------------------------------------------------------------------


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_logprobs_are_transformers_own(policy_of, name: str, load_in_4bit: bool) -> None:  # type: ignore[no-untyped-def]
    """Packed, over the modules and over the merged copy; and rows padded on the left."""
    policy: Policy = policy_of(name, load_in_4bit)
    expected = torch.cat([by_transformers(policy, *pair) for pair in PAIRS])
    assert expected.std() > 0.5, "the model is sure of something"
    assert worst(torch.cat(policy.completion_logprobs(PAIRS)).detach(), expected) < 1e-5
    assert worst(by_network(policy, MergedCopy(policy.causal, torch.float32).network), expected) < 1e-5
    assert worst(left_padded(policy), expected) < 1e-5
    with policy.reference():
        base = torch.cat([by_transformers(policy, *pair) for pair in PAIRS])
        assert worst(torch.cat(policy.completion_logprobs(PAIRS)).detach(), base) < 1e-5
    assert worst(base, expected) > 0.01


@pytest.mark.parametrize("name", PUBLISHED)
def test_gradients_are_transformers_own(policy_of, name: str) -> None:  # type: ignore[no-untyped-def]
    policy: Policy = policy_of(name)

    def gradient(total: Tensor) -> Tensor:
        policy.model.zero_grad()
        total.backward()
        return torch.cat([p.grad.flatten() for p in policy.trainable().values() if p.grad is not None])

    prompt, completion = PAIRS[3]
    ids = torch.tensor([[*prompt, *completion]])
    logprobs = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = gradient(logprobs.gather(-1, torch.tensor(completion)[:, None]).sum())
    found = gradient(policy.completion_logprobs([PAIRS[3]])[0].sum())
    assert torch.linalg.norm(found - expected) < 1e-4 * expected.norm()


def test_what_a_family_needs_can_be_missed(policy_of, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Negative controls: without Qwen3's norms, Llama 3's scaling, Qwen2's biases."""

    def off(policy: Policy, network: Network) -> float:
        return worst(by_network(policy, network), torch.cat([by_transformers(policy, *p) for p in PAIRS]))

    qwen3 = policy_of("Qwen3-0.6B")
    bare = tuple(replace(layer, qk_norm=None) for layer in qwen3.network.layers)
    assert off(qwen3, qwen3.network) < 1e-5 < 0.1 < off(qwen3, replace(qwen3.network, layers=bare))
    swapped = tuple(
        replace(layer, qk_norm=layer.qk_norm.flip(0))  # type: ignore[union-attr]
        for layer in qwen3.network.layers
    )
    assert off(qwen3, replace(qwen3.network, layers=swapped)) > 0.1, "keys' weights for queries"
    llama = policy_of("Llama-3.2-1B")
    monkeypatch.setitem(llama.causal.config.rope_parameters, "rope_type", "default")
    assert off(llama, llama.network) < 1e-5 < 0.1 < off(llama, live_network(llama.causal))
    qwen2 = policy_of("Qwen2.5-0.5B")
    copy = MergedCopy(qwen2.causal, torch.float32)
    copy._fused[1].bias.zero_()  # type: ignore[union-attr]
    assert off(qwen2, copy.network) > 0.1


# --- rotary angles ------------------------------------------------------------------------------------


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32_768}


@pytest.mark.parametrize(
    "rope", [None, LLAMA3_ROPE, YARN, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}]
)
def test_scaled_angles_are_transformers_own(policy_of, rope: dict[str, Any] | None) -> None:  # type: ignore[no-untyped-def]
    """Llama 3.2's 131,072 positions, those beyond the 8,192 that it was first made for included."""
    from types import SimpleNamespace

    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from empg_lite.policy.network import _rotary

    sizes = dict(hidden_size=2048, num_attention_heads=32, head_dim=64, max_position_embeddings=131_072)
    config = LlamaConfig(**sizes, rope_parameters=rope)
    weight, at = torch.ones(2048), torch.tensor([0, 1, 63, 8191, 8192, 50_000, 131_071])
    cos, sin = LlamaRotaryEmbedding(config)(weight, at[None])
    norm = SimpleNamespace(norm=SimpleNamespace(weight=weight))
    ours = _rotary(SimpleNamespace(config=config, model=norm))(at)
    assert torch.equal(ours[0], cos[0]) and torch.equal(ours[1], sin[0])


# --- sampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_64_greedy_answers_are_those_of_generate(policy_of, name: str) -> None:  # type: ignore[no-untyped-def]
    """Merged and unmerged decoder against transformers' ``generate`` over rows padded on the left."""
    policy: Policy = policy_of(name)
    prompts, decoding = prompts_of(policy, 64, 1), Decoding(16, 0.0)
    expected = ids_of(make_sampler(policy, "generate").sample(prompts, decoding))
    assert ids_of(make_sampler(policy, "native", 20).sample(prompts, decoding)) == expected
    assert len({ids for row in expected for ids in row}) > 20, "they answer differently"


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_drawn_tokens_have_the_models_own_probability(policy_of, name: str, load_in_4bit: bool) -> None:  # type: ignore[no-untyped-def]
    policy: Policy = policy_of(name, load_in_4bit)
    network = MergedCopy(policy.causal, torch.float32).network
    rows = [list(LONG[:9]), list(LONG[5:7])]
    with torch.no_grad():
        decoder = Decoder(network, policy.head_weight, torch.float32, Decoding(12), 2, 24)
        decoder.prefill([tuple(row) for row in rows], [0, 1], [1, 2], range(2))
        for _ in range(6):
            for place, row in enumerate(rows):
                token = int(decoder.tokens[place])
                expected = by_transformers(policy, tuple(row), (token,))
                assert decoder.logprobs[place] == pytest.approx(expected.item(), abs=1e-5)
                row.append(token)
            decoder.step(2, 24)


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_pass(tmp_path: Path, name: str) -> None:
    folder = build_family(tmp_path, name)
    assert FAMILIES[check_config(folder)["model_type"]]
    check_weights(folder)


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("SmolLM2-135M", {"mlp_bias": True}, "llama with mlp_bias: true"),
        ("SmolLM2-135M", {"attention_bias": True}, "llama with attention_bias: true"),
        ("SmolLM2-135M", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("Qwen3-0.6B", {"attention_bias": True}, "qwen3 with attention_bias: true"),
        ("Qwen3-0.6B", {"use_sliding_window": True}, "use_sliding_window: true"),
        ("Qwen2.5-0.5B", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ("Qwen2.5-0.5B", {"rope_parameters": "yes"}, "rope_parameters 'yes'"),
        ("Qwen2.5-0.5B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ("Qwen2.5-0.5B", {"model_type": "gemma2"}, "model type 'gemma2' is not supported"),
    ],
)
def test_anything_else_is_refused_in_one_line(
    tmp_path: Path, name: str, changes: dict[str, Any], what: str
) -> None:
    import json

    kind, sizes = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | sizes | changes))
    with pytest.raises(ModelUnusable, match=what) as raised:
        check_config(tmp_path)
    assert "SmolLM2" in str(raised.value) and "\n" not in str(raised.value)


# --- full width ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_full_width_agrees_too(tmp_path: Path, name: str, load_in_4bit: bool) -> None:
    """Two layers as wide as the published model's: log-probs, merged copy, decoder against ``generate``."""
    policy = load_fixture_policy(build_family(tmp_path, name, small=False), load_in_4bit=load_in_4bit)
    expected = torch.cat([by_transformers(policy, *pair) for pair in PAIRS])
    assert worst(torch.cat(policy.completion_logprobs(PAIRS)).detach(), expected) < 1e-4
    assert worst(by_network(policy, MergedCopy(policy.causal, torch.float32).network), expected) < 1e-4
    prompts, decoding = prompts_of(policy, 8, 1), Decoding(8, 0.0)
    native, plain = (
        ids_of(make_sampler(policy, e).sample(prompts, decoding)) for e in ("native", "generate")
    )
    assert native == plain
