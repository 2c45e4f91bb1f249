"""Completions behind one prompt: the same numbers and gradients as row by row, with less work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from fixture_model import load_fixture_policy
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from empg_lite.core.sizes import LOGIT_CHUNK, SHARED_FROM, shared_prefix
from empg_lite.em import m_step_loss
from empg_lite.loop.batching import PREFIX_AGAIN, packed_batches
from empg_lite.policy import load_policy
from empg_lite.policy.logprobs import chosen_logprobs, head_loss
from empg_lite.policy.packing import Rows, pack, packed_hidden, packed_prompts
from empg_lite.policy.policy import Policy, collate
from empg_lite.recipe.schema import ModelSection

Pair = tuple[tuple[int, ...], tuple[int, ...]]

#: Two problems out of order, prompts of other lengths, one of them the start of the other; single tokens.
FIRST, SECOND = (5, 6, 7, 8, 9), (5, 6)
PAIRS: list[Pair] = [
    (FIRST, (40, 41, 42, 256)),
    (SECOND, (50, 256)),
    (FIRST, (256,)),
    (SECOND, (60, 61, 62, 63, 64, 65, 256)),
    (FIRST, (40, 41, 99)),
]
#: The same behind a prefix of twenty tokens; what all prompts share is one longer.
PREFIX = tuple(range(100, 120))
PREFIXED: list[Pair] = [((*PREFIX, *prompt), completion) for prompt, completion in PAIRS]
both = pytest.mark.parametrize("pairs", [PAIRS, PREFIXED], ids=["apart", "prefixed"])


def alone(policy: Policy, pair: Pair) -> Tensor:
    """Log-probs of one row through the model's own forward pass and full logits: the reference."""
    prompt, completion = pair
    ids = torch.tensor([[*prompt, *completion]])
    logprobs = policy.model(input_ids=ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    return logprobs.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)


def gradient(policy: Policy, backward: Callable[[], object]) -> Tensor:
    policy.model.zero_grad()
    with policy.training():
        backward()
    return torch.cat([p.grad.flatten() for p in policy.trainable().values() if p.grad is not None])


def weighted(policy: Policy, pairs: Sequence[Pair], weights: Sequence[float]) -> Tensor:
    """The loss of the M-step, packed; Z is 10."""
    return policy.completion_loss(pairs, torch.tensor(weights), partial(m_step_loss, denominator=10.0))


def by_row(policy: Policy, pairs: Sequence[Pair], weights: Sequence[float]) -> Tensor:
    rows = (-w * alone(policy, pair).sum() / 10.0 for pair, w in zip(pairs, weights, strict=True))
    return torch.stack(list(rows)).sum()


def in_double(policy: Policy) -> Policy:
    policy.model.double()
    policy.dtype = torch.float32  # no autocast
    return policy


def test_a_pack_holds_every_prompt_once() -> None:
    packed = pack(PAIRS)
    # no last token of a completion, for nothing is predicted from it
    assert packed.ids.tolist() == [*FIRST, *SECOND, 40, 41, 42, 50, 60, 61, 62, 63, 64, 65, 40, 41]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 2, 2, 3, 4, 5, 6, 7, 5, 6]
    assert packed.owner.tolist() == [0, 1, 0, 1, 0]
    assert packed.targets.tolist() == [token for _, completion in PAIRS for token in completion]
    assert packed.rows.tolist() == [0] * 4 + [1] * 2 + [2] + [3] * 7 + [4] * 3
    before = [packed.ids[i].item() for i in packed.scored]
    assert before == [9, 40, 41, 42, 6, 50, 9, 6, 60, 61, 62, 63, 64, 65, 9, 40, 41]
    assert packed.completions.lengths.tolist() == [3, 1, 0, 6, 2]


def test_a_head_that_all_prompts_share_is_packed_once() -> None:
    packed, apart = pack(PREFIXED), pack(PAIRS)
    assert packed.ids.tolist() == [
        *PREFIX,
        5,
        6,
        7,
        8,
        9,
        6,
        *apart.ids.tolist()[7:],
    ]  # the prefix, then the rest
    assert packed.positions.tolist()[:26] == [*range(25), 21]
    assert packed.positions.tolist()[26:] == [at + 20 for at in apart.positions.tolist()[7:]]
    before = [packed.ids[i].item() for i in packed.scored]
    assert before == [apart.ids[i].item() for i in apart.scored]
    rows = packed.prompts.pad(packed.ids)
    assert rows[0].tolist() == [*PREFIX, *FIRST] and rows[1, :22].tolist() == [*PREFIX, *SECOND]
    own = packed.prompts.unpad(rows[:, packed.prompts.prefix :])
    assert own.tolist() == [6, 7, 8, 9, 6]  # behind PREFIX and 5
    short = [((*PREFIX[:10], *prompt), completion) for prompt, completion in PAIRS]
    assert len(pack(short).ids) == len(apart.ids) + 20  # too short a prefix to be worth it


@given(
    prefix=st.integers(0, 40),
    tails=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_a_shared_prefix_leaves_every_prompt_as_it_is(prefix: int, tails: list[list[int]]) -> None:
    prompts = [[*range(10, 10 + prefix), *tail] for tail in tails]
    shared = shared_prefix(prompts)
    assert all(p[:shared] == prompts[0][:shared] and shared < len(p) for p in prompts)
    assert shared >= prefix or len(prompts) == 1 or prefix < SHARED_FROM
    ids, positions = (torch.tensor(t) for t in packed_prompts(prompts, shared))
    rows = Rows.of([len(p) for p in prompts], 0, torch.device("cpu"), shared)
    for row, at, end, prompt in zip(rows.pad(ids), rows.pad(positions), rows.ends, prompts, strict=True):
        assert row[: len(prompt)].tolist() == prompt
        assert at[: len(prompt)].tolist() == [*range(len(prompt))]
        assert ids[end] == prompt[-1] and positions[end] == len(prompt) - 1
    assert rows.unpad(rows.pad(ids)[:, shared:]).tolist() == ids[shared:].tolist()


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_packed_logprobs_equal_the_models_own(model_dir: Path, load_in_4bit: bool) -> None:
    policy = load_fixture_policy(model_dir, load_in_4bit=load_in_4bit)
    packed = policy.completion_logprobs(PAIRS)
    for pair, found in zip(PAIRS, packed, strict=True):
        torch.testing.assert_close(found, alone(policy, pair).detach(), rtol=1e-5, atol=1e-5)
    with policy.reference():
        base = policy.completion_logprobs(PAIRS)
        torch.testing.assert_close(base[0], alone(policy, PAIRS[0]).detach(), rtol=1e-5, atol=1e-5)
    assert (base[0] - packed[0]).abs().max() > 1e-2  # the adapter was in it


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@both
def test_packed_gradient_equals_row_by_row(
    model_dir: Path, checkpointing: bool, load_in_4bit: bool, pairs: list[Pair]
) -> None:
    policy = load_fixture_policy(model_dir, load_in_4bit=load_in_4bit)
    policy.checkpointing = checkpointing
    weights = [2.0, 0.5, -1.0, 1.0, 0.25]
    expected = gradient(policy, lambda: by_row(policy, pairs, weights).backward())
    found = gradient(policy, lambda: weighted(policy, pairs, weights).backward())
    assert torch.linalg.norm(found - expected) <= 1e-5 * expected.norm()
    with torch.no_grad():
        assert weighted(policy, pairs, weights).item() == pytest.approx(
            by_row(policy, pairs, weights).item(), rel=1e-5
        )
    wrong = gradient(policy, lambda: weighted(policy, pairs, weights[::-1]).backward())  # negative control
    assert torch.linalg.norm(wrong - expected) > 0.1 * expected.norm()


def in_type(model_dir: Path, dtype: str, load_in_4bit: bool) -> Policy:
    section = ModelSection(
        name=str(model_dir),
        backend="transformers",
        dtype=dtype,  # type: ignore[arg-type]
        load_in_4bit=load_in_4bit,
        lora_r=4,
        lora_alpha=8,
    )
    policy = load_policy(section, "plain", seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_in_bfloat16_packing_is_no_worse_than_padding(model_dir: Path, load_in_4bit: bool) -> None:
    """Against the float32 gradient both are off by bfloat16's rounding, alike; the masters stay float32."""
    weights = [2.0, 0.5, 1.0, 1.0, 0.25]
    exact, policy = (in_type(model_dir, dtype, load_in_4bit) for dtype in ("float32", "bfloat16"))
    expected = gradient(exact, lambda: weighted(exact, PAIRS, weights).backward())

    def padded() -> None:
        logprobs, mask = policy.token_logprobs(collate(PAIRS, policy.pad_id))
        m_step_loss(logprobs, mask, torch.tensor(weights), 10.0).backward()

    def off(found: Tensor) -> float:
        return float(torch.linalg.norm(found - expected) / expected.norm())

    packed = off(gradient(policy, lambda: weighted(policy, PAIRS, weights).backward()))
    assert 1e-3 < packed < 1.5 * off(gradient(policy, padded)) < 0.15
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}


@both
def test_in_double_precision_only_rounding_is_left(model_dir: Path, pairs: list[Pair]) -> None:
    policy = in_double(load_fixture_policy(model_dir))
    hidden = [packed_hidden(policy.network, pack([pair])) for pair in pairs]
    together = packed_hidden(policy.network, pack(pairs))
    torch.testing.assert_close(together, torch.cat(hidden), rtol=1e-12, atol=1e-12)

    weights = [2.0, 0.5, -1.0, 1.0, 0.25]
    parts = [[pair] for pair in pairs]  # not transformers' own pass: its norms are float32 whatever comes
    one_by_one = gradient(
        policy,
        lambda: [weighted(policy, part, [w]).backward() for part, w in zip(parts, weights, strict=True)],
    )
    whole = gradient(policy, lambda: weighted(policy, pairs, weights).backward())
    assert whole.dtype == torch.float64
    assert torch.linalg.norm(whole - one_by_one) <= 1e-12 * whole.norm()


def test_completions_do_not_see_each_other(model_dir: Path) -> None:
    policy = load_fixture_policy(model_dir)
    changed = [*PAIRS[:3], (SECOND, (70, 71, 72, 73, 74, 75, 256)), PAIRS[4]]
    for row, (a, b) in enumerate(
        zip(policy.completion_logprobs(PAIRS), policy.completion_logprobs(changed), strict=True)
    ):
        if row == 3:
            assert (a - b).abs().max() > 1e-2
        else:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_checkpointing_keeps_fewer_activations(model_dir: Path) -> None:
    policy = load_fixture_policy(model_dir)

    def kept(checkpointing: bool) -> int:
        tensors: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                tensors[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            packed_hidden(policy.network, pack(PAIRS), checkpointing=checkpointing)
        return sum(tensors.values())

    assert kept(True) < kept(False) / 4


@pytest.mark.parametrize("chunk", [1 << 22, 700, 1])
def test_head_loss_value_and_gradient(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Any sum over tokens: here one that is not linear in the log-probs."""
    monkeypatch.setitem(LOGIT_CHUNK, "cpu", chunk)
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 16, requires_grad=True), torch.randn(301, 16)
    targets, lengths, row_weights = torch.randint(0, 301, (37,)), [9, 1, 20, 7], torch.randn(4)
    w = row_weights.repeat_interleave(torch.tensor(lengths))

    def squares(logprobs: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        assert logprobs.shape == mask.shape and weights.shape == logprobs.shape[:1]
        assert not logprobs[~mask].any()
        return (weights[:, None] * logprobs.square()).sum()

    loss = head_loss(hidden, weight, targets, lengths, row_weights, squares)
    (3.0 * loss).backward()
    reference = hidden.detach().double().requires_grad_()
    full = (reference @ weight.double().T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    expected = (w * full.square()).sum()
    (3.0 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]


def test_head_loss_reports_a_broken_policy() -> None:
    hidden = torch.randn(4, 8)
    hidden[2, 0] = torch.inf
    targets, weights = torch.tensor([1, 2, 3, 4]), torch.ones(2)
    loss = head_loss(hidden, torch.randn(9, 8), targets, [1, 3], weights, lambda logprobs, *_: logprobs.sum())
    assert not torch.isfinite(loss)


def test_head_loss_never_holds_full_logits() -> None:
    """The largest tensor made at V = 151,936 is a chunk, and one chunk at a time is alive."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape != weight.shape:
                largest = max(largest, out.numel())
            return out

    hidden = torch.randn(512, 8, requires_grad=True)
    weight, targets = torch.randn(151_936, 8), torch.randint(0, 151_936, (512,))
    with Watch():
        head_loss(
            hidden, weight, targets, [512], torch.ones(1), lambda logprobs, *_: logprobs.sum()
        ).backward()
        packed = largest
        chosen_logprobs(hidden.detach(), weight, targets)
    assert 151_936 <= packed <= LOGIT_CHUNK["cpu"] < 512 * 151_936


@given(
    sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), min_size=1, max_size=40),
    budget=st.integers(1, 200),
    prefix=st.sampled_from([0, 30]),
)
def test_packed_batches_hold_every_row_once_within_the_budget(
    sizes: list[tuple[int, int]], budget: int, prefix: int
) -> None:
    tails = [tuple(range(1, n + 2)) + (which,) for which, n in enumerate((3, 9, 1, 20, 7, 12))]
    prompts = [(*range(50, 50 + prefix), *tail) for tail in tails]
    rows = {i: (prompts[which], n) for i, (which, n) in enumerate(sizes)}
    batches = packed_batches(rows, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        prompts_of = {rows[i][0] for i in batch}
        ids, _ = packed_prompts(sorted(prompts_of), shared_prefix(sorted(prompts_of)))
        again = (len(prompts_of) - 1) * (shared_prefix(prompts) // PREFIX_AGAIN)
        assert len(ids) + again + sum(rows[i][1] for i in batch) <= budget or len(batch) == 1
    # a problem that fits is never cut
    for prompt in {p for p, _ in rows.values()}:
        members = [i for i, (p, _) in rows.items() if p == prompt]
        if len(prompt) + sum(rows[i][1] for i in members) <= budget:
            assert sum(any(i in batch for i in members) for batch in batches) == 1
