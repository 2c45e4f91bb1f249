"""Which attention kernels torch may choose, and repeated keys where a card has none that shares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_model import load_fixture_policy
from sampling import ids_of, prompts_of
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from empg_lite.core.sizes import PREFILL_TOKENS
from empg_lite.policy import attention
from empg_lite.policy.attention import attention_kernels
from empg_lite.sampler import Decoding, make_sampler
from empg_lite.sampler.decoder import Decoder, prefill_batches

PAIRS = [((1, 2, 3), (4, 5, 6, 256)), ((1, 2, 3), (7, 256)), ((9, 8, 7, 6, 5), (4, 3, 256))]


def test_loading_a_model_disables_cudnn_attention(model_dir: Path) -> None:
    """Where torch prefers it, it builds a plan for each shape."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_fixture_policy(model_dir)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(("capability", "shares"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_heads_share_keys_from_sm80_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], shares: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention.shares_keys(torch.device("cuda")) is shares
    assert attention.shares_keys(torch.device("cpu"))


def test_repeated_keys_change_no_number(policy, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """As below sm80: attention never shares keys among heads; samples and log-probs stay the same."""
    prompts, decoding = prompts_of(policy, 5, 3), Decoding(8)
    asked: list[bool] = []
    real = F.scaled_dot_product_attention

    def watched(q: torch.Tensor, k: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        asked.append(bool(options.get("enable_gqa")) or q.shape[1] != k.shape[1])
        return real(q, k, *rest, **options)

    def found() -> tuple[Any, list[torch.Tensor]]:
        asked.clear()
        drawn = ids_of(make_sampler(policy, "native").sample(prompts, decoding))
        with torch.no_grad():
            return drawn, policy.completion_logprobs(PAIRS)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    ids, logprobs = found()
    assert any(asked)
    monkeypatch.setattr(attention, "shares_keys", lambda device: False)
    written_ids, written = found()
    assert asked and not any(asked)
    assert written_ids == ids
    for one, other in zip(written, logprobs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_torch_reports_its_attention_kernels(policy) -> None:  # type: ignore[no-untyped-def]
    places = {"prompts", "decoding", "fitting"}
    found = attention_kernels(policy.network, torch.float32, torch.device("cpu"))
    assert found.keys() == places and found["decoding"] == "two products"
    assert {found["prompts"], found["fitting"]} <= {"flash_attention", "math"}
    with sdpa_kernel(SDPBackend.MATH):
        found = attention_kernels(policy.network, torch.float32, torch.device("cpu"))
    assert (found["prompts"], found["fitting"]) == ("math", "math")


# --- prefill batches ----------------------------------------------------------------------------------


def test_prefill_batches_hold_all_prompts_within_the_limit() -> None:
    lengths = [1, 2, 2, 3, 5, 5, 9]
    for most in range(1, 40):
        found = list(prefill_batches(lengths, most))
        assert [i for piece in found for i in piece] == list(range(7))
        padded = [len(piece) * max(lengths[i] for i in piece) for piece in found]
        assert all(size <= most or len(piece) == 1 for size, piece in zip(padded, found, strict=True))
        # and none could have taken the next prompt too
        for piece, after in zip(found, found[1:], strict=False):
            assert (len(piece) + 1) * max(lengths[i] for i in (*piece, after[0])) > most


def test_prefill_in_batches_draws_the_same_and_bounds_its_size(
    policy,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts, decoding = prompts_of(policy, 40, 2), Decoding(6)
    passes: list[list[int]] = []  # lengths of the prompts prefilled together
    real = Decoder._prefill_batch

    def prefill(self: Decoder, together: Any, *rest: Any) -> torch.Tensor:
        passes.append([len(prompt) for prompt in together])
        return real(self, together, *rest)

    monkeypatch.setattr(Decoder, "_prefill_batch", prefill)
    whole = make_sampler(policy, "native").sample(prompts, decoding)
    assert [len(lengths) for lengths in passes] == [40]
    passes.clear()
    monkeypatch.setitem(PREFILL_TOKENS, "cpu", 64)
    cut = make_sampler(policy, "native").sample(prompts, decoding)
    assert len(passes) > 5 and all(len(n) * max(n) <= 64 for n in passes)
    assert sorted(n for lengths in passes for n in lengths) == sorted(len(p.ids) for p in prompts)
    assert ids_of(cut) == ids_of(whole)
    for one, other in zip(cut, whole, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
