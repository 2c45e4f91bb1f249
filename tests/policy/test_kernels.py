"""Kernels borrowed from Unsloth: used if they agree with plain torch, else left out with a note."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backends import needs_unsloth
from fitting import SETTINGS, sgd
from fixture_model import load_fixture_policy
from processes import run_script
from rationales import rationale
from sampling import ids_of, prompts_of

from empg_lite.loop.mstep import m_step
from empg_lite.policy import backends, kernels
from empg_lite.policy.kernels import PLAIN, Kernels, verified
from empg_lite.policy.packing import pack
from empg_lite.policy.shared_prefix import check_pairs, stream
from empg_lite.sampler import Decoding, make_sampler
from empg_lite.sampler.native import NativeSampler

NAMES = ("add_norm", "rotate", "swiglu", "dequantize")


def borrowed(**fields: Any) -> Kernels:
    """Plain torch under borrowed names, except for the given fields."""

    def add_norm(
        x: torch.Tensor, update: torch.Tensor | None, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, normed = PLAIN.add_norm(x, update, *rest)
        return x.copy_(total), normed  # overwrites its input, as it may

    own = dict(
        add_norm=add_norm,
        angles=lambda cos, sin: (cos, sin, "rows"),
        rotate=lambda turning, turns: turning.copy_(PLAIN.rotate(turning, PLAIN.angles(*turns[:2]))),
        swiglu=lambda gate, up: PLAIN.swiglu(gate, up),
        dequantize=lambda packed, state: PLAIN.dequantize(packed, state),
    )
    return Kernels(**(own | fields), borrowed=NAMES)


@pytest.fixture(scope="module")
def nf4(model_dir: Path) -> Any:
    return load_fixture_policy(model_dir, load_in_4bit=True)


def off_by(share: float, name: str) -> Any:
    """A kernel whose last number is off."""

    def wrong(*inputs: Any) -> Any:
        result = getattr(PLAIN, name)(*inputs)
        last = result[-1] if isinstance(result, tuple) else result
        last.flatten()[-1] += share * last.abs().max()
        return result

    return wrong


def test_kernels_that_agree_are_used_and_sample_the_same(nf4: Any) -> None:
    found = verified(borrowed(), nf4.causal, torch.float32)
    assert found.borrowed == NAMES and found.notes == ()
    prompts, decoding = prompts_of(nf4, 4, 4), Decoding(12)
    expected = [ids_of(NativeSampler(nf4, merged=m).sample(prompts, decoding)) for m in (True, False)]
    nf4.kernels = found
    try:
        drawn = [ids_of(NativeSampler(nf4, merged=m).sample(prompts, decoding)) for m in (True, False)]
    finally:
        nf4.kernels = PLAIN
    assert drawn == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_off_in_one_number_is_left_out(nf4: Any, name: str) -> None:
    wrong = borrowed(**{name: off_by(1e-5, name)} | ({"angles": PLAIN.angles} if name == "rotate" else {}))
    found = verified(wrong, nf4.causal, torch.float32)
    assert found.borrowed == tuple(n for n in NAMES if n != name)
    assert getattr(found, name) is getattr(PLAIN, name) and found.angles is (
        PLAIN.angles if name == "rotate" else wrong.angles
    )
    (note,) = found.notes
    assert note.startswith(f"{name}: differs from plain torch by 1.0e-05")
    within = {name: off_by(1e-8, name)} | ({"angles": PLAIN.angles} if name == "rotate" else {})
    assert verified(borrowed(**within), nf4.causal, torch.float32).borrowed == NAMES


def test_kernels_that_raise_or_return_nan_or_another_type_are_left_out(nf4: Any) -> None:
    def raises(*_: Any) -> Any:
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    odd = borrowed(
        swiglu=raises,
        rotate=lambda turning, turns: turning * float("nan"),
        dequantize=lambda packed, state: PLAIN.dequantize(packed, state).double(),
    )
    found = verified(odd, nf4.causal, torch.float32)
    assert found.borrowed == ("add_norm",) and found.swiglu is PLAIN.swiglu
    notes = dict(note.split(": ", 1) for note in found.notes)
    assert notes["swiglu"] == "RuntimeError: no kernel image is available for execution on the device"
    assert "nan" in notes["rotate"] and "float64" in notes["dequantize"]


def test_without_nf4_there_is_nothing_to_dequantize(policy) -> None:  # type: ignore[no-untyped-def]
    found = verified(borrowed(), policy.causal, torch.float32)
    assert found.borrowed == NAMES[:3] and found.notes == ("dequantize: the weights are not in NF4",)


def test_16_bit_kernels_may_differ_by_rounding(nf4: Any) -> None:
    """Two roundings of bfloat16, not more."""
    right = borrowed(swiglu=off_by(0.01, "swiglu"))
    assert "swiglu" in verified(right, nf4.causal, torch.bfloat16).borrowed
    wrong = borrowed(swiglu=off_by(0.05, "swiglu"))
    assert "swiglu" not in verified(wrong, nf4.causal, torch.bfloat16).borrowed


# --- Unsloth's forward pass ---------------------------------------------------------------------------


def test_the_stream_has_each_prompt_before_its_completions() -> None:
    """By hand: two prompts, the second row of the first one last; no completion's last token is computed."""
    a, b = (1, 2, 3), (4, 5)
    laid = stream([(a, (10, 11)), (b, (20,)), (a, (30, 31, 32))])
    assert laid.ids == [1, 2, 3, 10, 30, 31, 4, 5]
    assert laid.positions == [0, 1, 2, 3, 3, 4, 0, 1]
    assert laid.groups == [(3, [1, 2]), (2, [0])]
    assert laid.scored == [2, 3, 7, 2, 4, 5]
    assert laid.targets == [10, 11, 20, 30, 31, 32] and laid.rows == [0, 0, 1, 2, 2, 2]


def test_stream_and_pack_score_the_same_tokens() -> None:
    pairs = check_pairs(259)
    laid, packed = stream(pairs), pack(pairs)
    assert laid.targets == packed.targets.tolist() and laid.rows == packed.rows.tolist()
    assert len(laid.ids) == len(packed.ids)
    # the token before each scored token is the same in both layouts
    before = [laid.ids[place] for place in laid.scored]
    assert before == packed.ids[packed.scored].tolist()
    assert [laid.positions[p] for p in laid.scored] == packed.positions[packed.scored].tolist()


@pytest.mark.parametrize("why", [None, "log-probabilities differ from the packed pass's by 2.0e+00 nats"])
def test_shared_prefix_is_used_if_it_agrees_else_noted(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, why: str | None
) -> None:
    """Verified once, before the first fit: sampling does not wait for it."""
    from empg_lite.policy import policy as home

    tried: list[Any] = []
    monkeypatch.setattr(home, "disagreement", lambda policy: tried.append(policy) or why)
    policy = load_fixture_policy(model_dir)
    given = [rationale(prompt_ids=(1, 2), completion_ids=(3, 256), weight=1.0)]
    m_step(policy, sgd(policy), given, SETTINGS)
    assert not tried and policy.shared_prefix is False  # nothing to verify without Unsloth on a GPU

    policy.shared_prefix = None
    make_sampler(policy, "native").sample(prompts_of(policy, 2, 2), Decoding(4))
    assert not tried
    monkeypatch.setattr(home, "shared_prefix_hidden", lambda policy, pairs: policy._scored(pairs, False))
    monkeypatch.setattr(home, "forget_masks", lambda: None)
    for _ in range(2):
        m_step(policy, sgd(policy), given, SETTINGS)
    assert tried == [policy] and policy.shared_prefix is (why is None)
    assert policy.facts()["fit"] == ("packed" if why else "unsloth, shared prefix")
    assert policy.notes == ((f"shared prefix: {why}",) if why else ())


def test_kernels_borrowed_on_a_gpu(nf4: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At load time each kernel is verified; the shared-prefix pass is left for later."""
    card = SimpleNamespace(device=SimpleNamespace(type="cuda"), notes=(), causal=nf4.causal, dtype=nf4.dtype)
    monkeypatch.setattr(backends, "future_leak", lambda policy: 0.0)
    monkeypatch.setattr(backends, "unsloth_kernels", lambda: borrowed(swiglu=off_by(1.0, "swiglu")))
    backends.borrow_from_unsloth(card)  # type: ignore[arg-type]
    assert card.shared_prefix is None and card.kernels.borrowed == ("add_norm", "rotate", "dequantize")
    assert [note.split(":")[0] for note in card.notes] == ["swiglu"]

    def moved() -> Kernels:
        raise ImportError("cannot import name 'swiglu_fg_kernel'")

    monkeypatch.setattr(backends, "unsloth_kernels", moved)
    card.notes, card.kernels = (), PLAIN
    backends.borrow_from_unsloth(card)  # type: ignore[arg-type]
    assert card.kernels is PLAIN and "swiglu_fg_kernel" in card.notes[0]


@needs_unsloth
@pytest.mark.unsloth
@pytest.mark.slow
def test_unsloths_kernels_under_tritons_interpreter(model_dir: Path, tmp_path: Path) -> None:
    """NF4's is a CUDA library and must be left out; the three Triton kernels sample as plain torch does."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    facts = run_script("unsloth_probe.py", "kernels", str(model_dir), cwd=tmp_path, env=environment)
    assert facts.pop("borrowed") == ["add_norm", "rotate", "swiglu"]
    (note,) = facts.pop("notes")
    assert note.startswith("dequantize: ")
    assert len(facts) == 4 and all(
        found["same tokens"] and found["apart"] <= 1e-5 for found in facts.values()
    )


# --- causality ----------------------------------------------------------------------------------------


def test_attention_that_sees_the_future_is_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from empg_lite.core.errors import ModelUnusable

    policy = load_fixture_policy(model_dir)
    assert backends.future_leak(policy) <= 1e-6
    backends.borrow_from_unsloth(policy)  # nothing to borrow on a CPU, nothing to refuse
    assert policy.kernels is PLAIN and not policy.shared_prefix
    real = policy.backbone

    def sees_all(ids: torch.Tensor, **options: Any) -> Any:
        everything = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
        return real(ids, attention_mask=everything, **options)

    monkeypatch.setattr(policy, "backbone", sees_all)
    assert backends.future_leak(policy) > backends.LEAK
    with pytest.raises(ModelUnusable, match="not causal.*model.backend: transformers"):
        backends.borrow_from_unsloth(policy)


def test_wide_is_float32_or_better() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert kernels.wide(torch.zeros(1, dtype=dtype)).dtype == torch.float32
    assert kernels.wide(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


# --- what `auto` is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["unsloth", "transformers"])
def test_auto_is_native_over_either_backend(policy, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:  # type: ignore[no-untyped-def]
    """On a GPU too."""
    monkeypatch.setattr(policy, "backend", backend)
    monkeypatch.setattr(policy, "device", torch.device("cuda"))
    sampler = make_sampler(policy)
    assert isinstance(sampler, NativeSampler) and sampler.merged and sampler._captures


def test_unmerged_weights_are_captured_too(policy, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Small cards have no room for a merged copy, and most users have small cards."""
    monkeypatch.setattr(policy, "device", torch.device("cuda"))
    assert NativeSampler(policy, merged=False)._captures
