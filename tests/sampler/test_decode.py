"""Decoder and merged copy against the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from fixture_model import load_fixture_policy, perturb_adapter
from sampling import ids_of, prompts_of, same_but_for_rounding
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from empg_lite.core.errors import OutOfMemory
from empg_lite.core.sizes import GRAPH_ROWS, GRAPH_TOKENS, LOGIT_CHUNK, round_up
from empg_lite.policy import load_policy
from empg_lite.policy.kernels import dequantize
from empg_lite.policy.merged import MergedCopy, merged_weight
from empg_lite.policy.network import live_network
from empg_lite.policy.policy import Policy
from empg_lite.recipe.schema import ModelSection
from empg_lite.sampler import Decoding, Prompt
from empg_lite.sampler.decoder import Decoder
from empg_lite.sampler.decoder import _attention as decoder_attention
from empg_lite.sampler.graphs import Graphs
from empg_lite.sampler.native import NativeSampler

PROMPTS = [(1, 2, 3, 4, 5, 6, 7), (9, 8), (5,)]
OWNER, KEYS = [0, 0, 1, 2, 2], [11, 12, 13, 14, 15]
#: What prompts may begin with.
PREFIX = tuple(range(20, 40))


def own_logprobs(policy: Policy, ids: list[int]) -> Tensor:
    """Of the token after ``ids``, by transformers, in the policy's modules."""
    with torch.no_grad():
        return policy.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("prefix", "in_slots"), [((), True), (PREFIX, True), (PREFIX, False)])
def test_every_drawn_token_has_the_models_own_probability(
    model_dir: Path, merged: bool, prefix: tuple[int, ...], in_slots: bool, load_in_4bit: bool
) -> None:
    """Rows of ragged prompts; slots are compacted on the way, and new prompts start while others continue."""
    policy = load_fixture_policy(model_dir, load_in_4bit=load_in_4bit)
    network = MergedCopy(policy.causal, torch.float32).network if merged else policy.network
    prompts, new = [prefix + prompt for prompt in PROMPTS], (*prefix, 3, 3, 3)
    rows = [list(prompts[o]) for o in OWNER]
    with torch.no_grad():
        room = 20 + in_slots * len(prefix)
        decoder = Decoder(network, policy.head_weight, torch.float32, Decoding(20), 6, room)
        decoder.begin(prefix, in_slots)
        decoder.prefill(prompts, OWNER, KEYS, range(len(OWNER)))
        for step in range(8):
            seen = max(map(len, rows)) + 1
            for place, row in enumerate(rows):
                expected = own_logprobs(policy, row)[decoder.tokens[place]]
                assert decoder.logprobs[place] == pytest.approx(expected.item(), abs=1e-5)
                row.append(int(decoder.tokens[place]))
            if step == 3:
                came_from = decoder.compact([0, 2, 4])
                assert came_from == [0, 4, 2]  # one row moves, into the hole
                rows = [rows[slot] for slot in came_from]
            if step == 5:
                decoder.prefill([new], [0, 0], [16, 17], range(3, 5))
                rows += [[*new], [*new]]
                for row, place in zip(rows[3:], (3, 4), strict=True):
                    row.append(int(decoder.tokens[place]))
            decoder.step(len(rows), seen)
    assert decoder.lengths[:5].tolist() == [len(row) for row in rows]


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_merged_weight_is_what_the_layer_computes(model_dir: Path, load_in_4bit: bool) -> None:
    policy = load_fixture_policy(model_dir, load_in_4bit=load_in_4bit)
    linear = policy.causal.model.layers[1].mlp.up_proj
    x = torch.eye(linear.in_features)
    with torch.no_grad():
        torch.testing.assert_close(merged_weight(linear), linear(x).T, rtol=1e-5, atol=1e-5)
        with policy.reference():
            base = merged_weight(linear)
            torch.testing.assert_close(base, linear(x).T, rtol=1e-5, atol=1e-5)
        assert (merged_weight(linear) - base).abs().max() > 1e-2


def test_sampling_follows_the_adapter_and_leaves_the_base_alone(model_dir: Path) -> None:
    policy = load_fixture_policy(model_dir, load_in_4bit=True)
    frozen = {n: p.detach().clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    sampler, prompts = NativeSampler(policy), prompts_of(policy, 6, 4)
    decoding = Decoding(20)
    first = sampler.sample(prompts, decoding)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.mul_(1.5)
    moved = sampler.sample(prompts, decoding)
    live = NativeSampler(policy, merged=False).sample(prompts, decoding)
    same_but_for_rounding(policy, prompts, moved, live, decoding)
    assert ids_of(moved) != ids_of(first)
    stale = MergedCopy(policy.causal, torch.float32)  # negative control: a copy that is not refreshed
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.div_(1.5)
        old = Decoder(stale.network, policy.head_weight, torch.float32, decoding, 8, 40)
        old.prefill(PROMPTS, OWNER, KEYS, range(len(OWNER)))
        expected = own_logprobs(policy, list(PROMPTS[0]))[old.tokens[0]]
        assert abs(old.logprobs[0] - expected) > 1e-3
    with policy.reference():
        base = sampler.sample(prompts, decoding)
        same_but_for_rounding(
            policy, prompts, base, NativeSampler(policy).sample(prompts, decoding), decoding
        )
    assert ids_of(base) != ids_of(first)
    assert ids_of(sampler.sample(prompts, decoding)) == ids_of(first)
    after = dict(policy.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())
    assert sampler.work.refresh_seconds > 0


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("batch_rows", [None, 1, 20, 64])
@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_greedy_equals_generate_on_64_prompts(  # type: ignore[no-untyped-def]
    policy, merged: bool, batch_rows: int | None, prefix: tuple[int, ...]
) -> None:
    """Prefill once, compact slots, reuse slots, compute what all share apart: no token changes."""
    from empg_lite.sampler.generate import GenerateSampler

    prompts, decoding = [Prompt(prefix + p.ids, p.keys) for p in prompts_of(policy, 64, 1)], Decoding(24, 0.0)
    ours = NativeSampler(policy, batch_rows, merged).sample(prompts, decoding)
    assert ids_of(ours) == ids_of(GenerateSampler(policy).sample(prompts, decoding))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_prefix_attended_apart_is_one_attended_in_every_row(dtype: torch.dtype, tolerance: float) -> None:
    """Against torch's own attention in float64, over the prefix's keys repeated before those of each row."""
    generator = torch.Generator().manual_seed(0)
    n, kv_heads, group, d, shared, own = 9, 3, 2, 16, 21, 7

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    q, k, v = some(n, kv_heads, group, d), some(n, kv_heads, own, d), some(n, kv_heads, own, d)
    prefix = some(shared, kv_heads, d), some(shared, kv_heads, d)
    mask = torch.zeros(n, 1, 1, own, dtype=dtype)
    for row in range(n):
        mask[row, ..., 1 + row % own :] = -torch.inf
    found = decoder_attention(q, k, v, mask, prefix)
    first = (t.transpose(0, 1).expand(n, -1, -1, -1) for t in prefix)
    keys, values = (torch.cat(pair, 2).double() for pair in zip(first, (k, v), strict=True))
    seen = torch.cat((torch.zeros(n, 1, 1, shared), mask), -1).double()
    expected = scaled_dot_product_attention(q.double(), keys, values, attn_mask=seen)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_what_prompts_share_takes_no_room_in_the_slots(policy, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    begun: list[tuple[int, int, int]] = []
    real = Decoder.begin

    def begin(self: Decoder, prefix: tuple[int, ...], in_slots: bool = True) -> None:
        real(self, prefix, in_slots)
        begun.append((len(prefix), self.offset, self.cache_len))

    monkeypatch.setattr(Decoder, "begin", begin)
    prompts = [Prompt(PREFIX + ids, (i,)) for i, ids in enumerate(PROMPTS)]
    NativeSampler(policy).sample(prompts, Decoding(5))
    NativeSampler(policy).sample(prompts[:1], Decoding(5))
    longest = len(PREFIX) + len(PROMPTS[0]) + 5
    assert begun[1::2] == [
        (20, 20, longest - 20),
        (0, 0, longest),
    ]  # the first of each pair is the constructor's


def test_finished_rows_stay_in_their_slot(model_dir: Path) -> None:
    """A finished row that decodes past its cache must not write into its neighbor's."""
    policy = load_fixture_policy(model_dir)
    with torch.no_grad():
        decoder = Decoder(policy.network, policy.head_weight, torch.float32, Decoding(20), 2, 10)
        decoder.prefill([PROMPTS[0], PROMPTS[1]], [0, 1], [1, 2], range(2))
        row = list(PROMPTS[1])
        for _ in range(7):  # the first row has 3 tokens of room left
            expected = own_logprobs(policy, row)[decoder.tokens[1]]
            assert decoder.logprobs[1] == pytest.approx(expected.item(), abs=1e-5)
            row.append(int(decoder.tokens[1]))
            decoder.step(2, 10)
    assert decoder.lengths.tolist() == [9, 9]


def test_drawing_never_holds_rows_times_vocabulary(monkeypatch: pytest.MonkeyPatch, policy) -> None:  # type: ignore[no-untyped-def]
    """In chunks of three rows the largest tensor of a draw is three rows, and the tokens are the same."""
    from torch.utils._python_dispatch import TorchDispatchMode

    vocab, prompts, decoding = len(policy.head_weight), prompts_of(policy, 4, 8), Decoding(6)
    expected = NativeSampler(policy).sample(prompts, decoding)
    monkeypatch.setitem(LOGIT_CHUNK, "cpu", 3 * vocab)
    widest, head = 0, policy.head_weight.data_ptr()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal widest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[-1:] == (vocab,) and out.data_ptr() != head:
                widest = max(widest, out.numel() // vocab)
            return out

    with Watch():
        chunked = NativeSampler(policy).sample(prompts, decoding)
    assert widest == 3
    assert ids_of(chunked) == ids_of(expected)


def test_rounded_graph_sizes_compute_the_same_rows(policy) -> None:  # type: ignore[no-untyped-def]
    """The part of the graphs that needs no GPU: rounded sizes compute the same rows."""
    with torch.no_grad():
        plain, rounded = (
            Decoder(policy.network, policy.head_weight, torch.float32, Decoding(20), 16, 140)
            for _ in range(2)
        )
        for decoder in (plain, rounded):
            decoder.prefill(PROMPTS, OWNER, KEYS, range(len(OWNER)))
        for step in range(5):
            plain.step(5, len(PROMPTS[0]) + step + 1)
            rounded.step(round_up(5, GRAPH_ROWS), round_up(len(PROMPTS[0]) + step + 1, GRAPH_TOKENS))
            assert torch.equal(plain.tokens[:5], rounded.tokens[:5])
            torch.testing.assert_close(plain.logprobs[:5], rounded.logprobs[:5], rtol=1e-5, atol=1e-5)
    graphs = Graphs(plain)
    assert graphs.fits(16, 140) and graphs.fits(3, 20)
    assert not graphs.fits(17, 140) and not graphs.fits(16, 141)


class Replayed:
    """Stands in for a captured graph: runs its work eagerly, with the settings of the capture."""

    def __init__(self, graphs: Graphs, work: Callable[[], None]) -> None:
        self.decoder, self.work = graphs.decoder, work
        self.decoding = graphs.decoder.decoding
        self.linear = graphs.linear_for_tests
        self.off = self.linear.disable_adapters

    def replay(self) -> None:
        asked, self.decoder.decoding = self.decoder.decoding, self.decoding
        off, self.linear._disable_adapters = self.linear.disable_adapters, self.off
        self.work()
        self.decoder.decoding, self.linear._disable_adapters = asked, off


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Policy], None]:
    """Lets graphs be "captured" without a GPU (see ``Replayed``)."""

    def pretend(policy: Policy) -> None:
        linear = policy.causal.model.layers[0].mlp.down_proj
        monkeypatch.setattr(Graphs, "linear_for_tests", linear, raising=False)
        monkeypatch.setattr(Graphs, "_capture", lambda self, work: Replayed(self, work))
        monkeypatch.setattr(NativeSampler, "_captures", property(lambda self: self.pretends))
        monkeypatch.setattr(NativeSampler, "pretends", True, raising=False)

    return pretend


@pytest.mark.parametrize("merged", [True, False])
def test_graphs_are_kept_from_call_to_call(
    captured: Callable[[Policy], None], model_dir: Path, merged: bool
) -> None:
    """Training, evaluation and the base model in turn: one cache, no size captured twice, every update seen.

    The network's graphs serve T=1 and greedy alike.
    """
    policy = load_fixture_policy(model_dir)
    captured(policy)
    sampler, plain = NativeSampler(policy, merged=merged), NativeSampler(policy, merged=False)
    plain.pretends = False  # type: ignore[attr-defined]
    few, many = prompts_of(policy, 8, 8), prompts_of(policy, 70, 1)
    calls = [(few, Decoding(20)), (many, Decoding(12, 0.0)), (few, Decoding(20, 0.0))]
    for turn in range(3):
        for number, (prompts, decoding) in enumerate(calls):
            with policy.reference() if number == 1 else nullcontext():
                found = sampler.sample(prompts, decoding)
                expected = plain.sample(prompts, decoding)
                same_but_for_rounding(policy, prompts, found, expected, decoding)
        graphs = sampler._graphs
        assert graphs is not None
        if turn == 0:
            decoder, before = graphs.decoder, set(graphs._graphs)
            assert len(decoder.tokens) == 70 and decoder.cache_len >= 20 + max(len(p.ids) for p in few)
            assert decoder.cache_len % 8 == 0
        if turn == 1:
            kept = set(graphs._graphs)  # the first kind of call once more, in the larger cache
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.mul_(1.1)
    assert graphs.decoder is decoder and before < kept == set(graphs._graphs)
    kinds = {key[0] for key in kept}
    assert kinds == {"network", "draw"}
    networks = [key for key in kept if key[0] == "network"]
    assert len({key[-1] for key in networks}) == (1 if merged else 2)  # adapter on, off
    assert len(networks) == len({(*key[1:3], key[-1]) for key in networks}), "T=1 and greedy share them"
    work = sampler.work
    assert work.eager_steps == 0 and work.graphs_replayed > work.graphs_captured >= len(kept)
    sampler.release()
    assert sampler._graphs is None and sampler._copy is None


def test_a_failed_capture_warns_once_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
    policy,  # type: ignore[no-untyped-def]
) -> None:
    asked = []

    def capture(self: Graphs, work: Callable[[], None]) -> None:
        asked.append(work)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graphs, "_capture", capture)
    prompts, decoding = prompts_of(policy, 6, 4), Decoding(20)
    expected = NativeSampler(policy).sample(prompts, decoding)
    monkeypatch.setattr(NativeSampler, "_captures", True)
    sampler = NativeSampler(policy)
    with pytest.warns(match="not permitted when stream is capturing") as said:
        found = [sampler.sample(prompts, decoding) for _ in range(2)]
    assert len(said) == len(asked) == 1
    assert ids_of(found[0]) == ids_of(found[1]) == ids_of(expected)
    assert sampler.graph_failure == "operation not permitted when stream is capturing"
    assert sampler.work.graphs_captured == sampler.work.graphs_replayed == 0 < sampler.work.eager_steps


def test_out_of_memory_in_a_capture_is_handled_as_such(monkeypatch: pytest.MonkeyPatch, policy) -> None:  # type: ignore[no-untyped-def]
    """It surfaces as an error about the capture: fewer rows are tried, down to the fewest; graphs stay on."""

    def full(self: Graphs, work: Callable[[], None]) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(NativeSampler, "_captures", True)
    monkeypatch.setattr(Graphs, "_capture", full)
    sampler = NativeSampler(policy)
    with pytest.raises(OutOfMemory, match="8 rows of"):
        sampler.sample(prompts_of(policy, 6, 4), Decoding(20))
    assert sampler.graph_failure is None


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_merged_copy_is_rounded_once(model_dir: Path, four_bit: bool) -> None:
    """W + scale B A in float32, then 16 bits; sampling runs under autocast, which would round B A before."""
    section = ModelSection(
        name=str(model_dir), backend="transformers", dtype="bfloat16", load_in_4bit=four_bit, lora_r=4
    )
    policy = load_policy(section, "plain", seed=0)
    perturb_adapter(policy)
    with policy.sampling():
        copy = MergedCopy(policy.causal, policy.dtype)
        layer = policy.causal.model.layers[1]
        linear, found = layer.mlp.down_proj, copy._fused[1].down
        product = linear.lora_B["default"].weight @ linear.lora_A["default"].weight
        assert product.dtype == torch.bfloat16  # autocast is on
    base = linear.base_layer.weight
    if four_bit:
        base = dequantize(base.data, base.quant_state)
    b, a = linear.lora_B["default"].weight.double(), linear.lora_A["default"].weight.double()
    exact = base.double() + linear.scaling["default"] * (b @ a)
    # at most half a step of bfloat16 from the exact value; float32's own error is far below
    step = 2.0 ** (torch.floor(torch.log2(exact.abs())) - 7)
    assert ((found.double() - exact).abs() <= 0.5001 * step).all()


def test_without_graphs_no_copy_outlives_its_call(policy) -> None:  # type: ignore[no-untyped-def]
    sampler = NativeSampler(policy)
    sampler.sample(prompts_of(policy, 2, 2), Decoding(4))
    assert sampler._copy is None

    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.sample(prompts_of(policy, 2, 2), Decoding(4), refuse)
    assert sampler._copy is None


def test_a_prompt_with_more_samples_than_batch_rows_takes_as_many(policy) -> None:  # type: ignore[no-untyped-def]
    prompts = [*prompts_of(policy, 2, 12), Prompt((1, 2, 3), (5,))]
    found = NativeSampler(policy, batch_rows=4).sample(prompts, Decoding(8))
    assert [len(row) for row in found] == [12, 12, 1]


def test_many_one_token_prompts_do_not_recurse(policy) -> None:  # type: ignore[no-untyped-def]
    """More refills without a step between them than Python calls may be nested."""
    import sys

    prompts = [Prompt((1 + i % 50, 2), (i,)) for i in range(8 * sys.getrecursionlimit() + 8)]
    found = NativeSampler(policy, batch_rows=8).sample(prompts, Decoding(1))
    assert all(len(row) == 1 and len(row[0].ids) == 1 for row in found)
    assert ids_of(found[:50]) == ids_of(NativeSampler(policy).sample(prompts[:50], Decoding(1)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotary_angles_are_the_models_own(model_dir: Path, dtype: str) -> None:
    """To the bit, without asking its module: Unsloth's on a GPU takes no positions."""
    section = ModelSection(name=str(model_dir), backend="transformers", dtype=dtype, load_in_4bit=False)
    causal = load_policy(section, "plain", seed=0).causal
    positions = torch.tensor([0, 1, 2, 31, 500, 32_767])
    expected = causal.model.rotary_emb(causal.model.norm.weight, positions[None])
    network = live_network(causal)
    causal.model.rotary_emb = None
    for ours, theirs in zip(network.rotary(positions), expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs[0])
