"""Our engine against the backend's own ``generate``, and both against the distribution they claim."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixture_model import load_fixture_policy
from sampling import ids_of, prompts_of, same_but_for_rounding
from scipy.stats import chisquare, kstest

from empg_lite.core.errors import NumericalStop
from empg_lite.core.sizes import MIN_ROWS
from empg_lite.policy.policy import collate
from empg_lite.sampler import Decoding, Prompt, make_sampler, sample_key
from empg_lite.sampler.base import check_finite
from empg_lite.sampler.decoder import Decoder
from empg_lite.sampler.draw import draw, uniforms
from empg_lite.sampler.stops import StopRule

MASK_64 = (1 << 64) - 1


# --- random numbers -----------------------------------------------------------------------------------


def splitmix64(key: int, position: int) -> float:
    """SplitMix64 in Python integers, at a counter."""
    z = (key + (position + 1) * 0x9E3779B97F4A7C15) & MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK_64
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def test_uniforms_are_splitmix64() -> None:
    # Reference output of SplitMix64 seeded with 1234567 (first three values of the published C code).
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64(1234567, p) for p in range(3)] == [(v >> 11) * 2.0**-53 for v in first]
    keys = [sample_key(s, t, "p", k) for s in (0, 1) for t in (1, 2) for k in range(8)] + [
        -1,
        0,
        2**63 - 1,
        -(2**63),
    ]
    for position in (0, 1, 511, 10**6):
        ours = uniforms(torch.tensor(keys), position).tolist()
        assert ours == [splitmix64(key & MASK_64, position) for key in keys]


def test_uniforms_are_uniform_and_independent() -> None:
    keys = torch.tensor([sample_key(0, 1, "p", k) for k in range(4000)])
    a, b = uniforms(keys, 0), uniforms(keys, 1)
    assert kstest(a.numpy(), "uniform").pvalue > 1e-4
    assert kstest((a.numpy() ** 1.1), "uniform").pvalue < 1e-4  # the test can fail
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.06


def test_keys_differ_in_every_part() -> None:
    base = (0, 1, "abc", 2)
    others = [(1, 1, "abc", 2), (0, 2, "abc", 2), (0, 1, "abd", 2), (0, 1, "abc", 3), (0, 11, "abc", 2)]
    assert len({sample_key(*x) for x in [base, *others]}) == 6
    assert sample_key(*base) == sample_key(*base)


# --- drawing a token ----------------------------------------------------------------------------------


def test_draws_follow_softmax() -> None:
    torch.manual_seed(0)
    logits = 1.5 * torch.randn(40)
    keys = torch.tensor([sample_key(0, 1, "x", k) for k in range(20_000)])
    tokens, logprobs = draw(logits.expand(len(keys), -1), keys, 3, Decoding(1))
    counts = torch.bincount(tokens, minlength=40).numpy()
    expected = logits.softmax(-1).double().numpy() * len(keys)
    assert chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-4
    warm = (logits / 1.1).softmax(-1).double().numpy() * len(keys)
    assert chisquare(counts, warm * counts.sum() / warm.sum()).pvalue < 1e-4  # negative control
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[tokens])


@pytest.mark.parametrize(("top_p", "top_k"), [(0.6, 0), (1.0, 3), (0.9, 2), (0.05, 0)])
def test_nucleus_against_a_plain_loop(top_p: float, top_k: int) -> None:
    torch.manual_seed(1)
    logits = torch.randn(12)
    probs = logits.softmax(-1).tolist()
    kept, mass = [], 0.0
    for token in sorted(range(12), key=lambda t: -probs[t]):
        if mass >= top_p or (top_k and len(kept) == top_k):
            break
        kept.append(token)
        mass += probs[token]
    keys = torch.arange(3000) * 7919
    tokens, logprobs = draw(logits.expand(3000, -1), keys, 0, Decoding(1, 1.0, top_p, top_k))
    assert set(tokens.tolist()) == set(kept)
    torch.testing.assert_close(
        logprobs, logits.log_softmax(-1)[tokens]
    )  # of the policy itself, nothing cut off


def test_greedy_and_zero_probability() -> None:
    logits = torch.tensor([[0.0, 5.0, -torch.inf], [1.0, -torch.inf, -torch.inf]])
    keys = torch.tensor([1, 2])
    assert draw(logits, keys, 0, Decoding(1, 0.0))[0].tolist() == [1, 0]
    for position in range(200):
        assert (draw(logits, keys, position, Decoding(1))[0] <= torch.tensor([1, 0])).all()


# --- engines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "temperature"), [(64, 1, 0.0), (16, 4, 1.0), (1, 1, 1.0), (3, 5, 0.7)])
def test_native_equals_generate(policy, n: int, k: int, temperature: float) -> None:  # type: ignore[no-untyped-def]
    prompts = prompts_of(policy, n, k)
    assert len({len(p.ids) for p in prompts}) > 1 or n == 1
    decoding = Decoding(20, temperature)
    native = make_sampler(policy, "native").sample(prompts, decoding)
    reference = make_sampler(policy, "generate").sample(prompts, decoding)
    if temperature == 0:
        assert ids_of(native) == ids_of(reference)
    same_but_for_rounding(policy, prompts, native, reference, decoding)
    for row, other in zip(native, reference, strict=True):
        for a, b in zip(row, other, strict=True):
            if a.ids != b.ids:
                continue
            assert (a.text, a.finish_reason) == (b.text, b.finish_reason)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_native_equals_generate_on_the_bundled_model() -> None:
    """64 word problems of different lengths, greedy: real text and real stops."""
    from empg_lite.data.tiny import tiny_problems
    from empg_lite.policy import load_policy
    from empg_lite.recipe.schema import ModelSection

    section = ModelSection(name="tiny", backend="transformers", load_in_4bit=False, lora_r=4, lora_alpha=8)
    tiny = load_policy(section, "plain", seed=0)
    ids = [tiny.encode_prompt(p.question)[1] for p in tiny_problems("test")[:64]]
    assert len(set(map(len, ids))) > 10
    prompts = [Prompt(i, (0,)) for i in ids]
    native = make_sampler(tiny, "native").sample(prompts, Decoding(72, 0.0))
    assert ids_of(native) == ids_of(make_sampler(tiny, "generate").sample(prompts, Decoding(72, 0.0)))
    assert {c.finish_reason for row in native for c in row} == {"stop"}


def test_next_token_distribution_of_both_engines(policy) -> None:  # type: ignore[no-untyped-def]
    """4,000 first tokens of one prompt against the model's own softmax."""
    keys = tuple(sample_key(0, 1, "q", k) for k in range(4000))
    prompt = Prompt(policy.encode_prompt("7 + 5?")[1], keys)
    with torch.no_grad():
        probs = policy.model(torch.tensor([prompt.ids])).logits[0, -1].double().softmax(-1).numpy()
    order = probs.argsort()[::-1]
    bins = [[t] for t in order[:30]] + [list(order[30:])]
    for engine in ("native", "generate"):
        completions = make_sampler(policy, engine).sample([prompt], Decoding(1))[0]
        tokens = [c.ids[0] for c in completions]
        counts = [sum(tokens.count(t) for t in group) for group in bins]
        expected = [probs[group].sum() * len(keys) for group in bins]
        assert chisquare(counts, expected, sum_check=False).pvalue > 1e-4
        shifted = probs**1.5 / (probs**1.5).sum()
        wrong = [shifted[group].sum() * len(keys) for group in bins]
        assert chisquare(counts, wrong, sum_check=False).pvalue < 1e-4  # negative control


@pytest.mark.parametrize("engine", ["native", "generate"])
def test_sampled_logprobs_equal_recomputed_ones(policy, engine: str) -> None:  # type: ignore[no-untyped-def]
    prompts = prompts_of(policy, 8, 4)
    results = make_sampler(policy, engine).sample(prompts, Decoding(24))
    rows = [(p.ids, c.ids) for p, row in zip(prompts, results, strict=True) for c in row]
    sampled = [c.logprobs for row in results for c in row]
    with torch.no_grad():
        batched, mask = policy.token_logprobs(collate(rows, policy.pad_id))
        for i, (row, logprobs) in enumerate(zip(rows, sampled, strict=True)):
            alone, alone_mask = policy.token_logprobs(collate([row], policy.pad_id))
            for ours in (batched[i][mask[i]], alone[alone_mask]):
                assert (ours - torch.tensor(logprobs)).abs().max() <= 1e-5


@pytest.mark.parametrize("engine", ["native", "generate"])
@pytest.mark.parametrize("mode", [True, False])
def test_sampling_leaves_the_model_as_it_was(policy, engine: str, mode: bool) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = policy.model, policy.tokenizer
    was = [m.training for m in model.modules()]
    try:
        model.train(mode)
        before = ([m.training for m in model.modules()], tokenizer.padding_side, model.config.use_cache)
        make_sampler(policy, engine).sample(prompts_of(policy, 3, 2), Decoding(4))
        after = ([m.training for m in model.modules()], tokenizer.padding_side, model.config.use_cache)
        assert after == before and any(before[0]) is mode
    finally:
        for module, flag in zip(model.modules(), was, strict=True):
            module.training = flag


def test_a_sample_does_not_depend_on_its_batch(policy) -> None:  # type: ignore[no-untyped-def]
    prompts = prompts_of(policy, 12, 3)
    decoding = Decoding(20)
    native = make_sampler(policy, "native")
    together = native.sample(prompts, decoding)
    alone = [native.sample([p], decoding)[0] for p in prompts]
    small = make_sampler(policy, "native", batch_rows=9).sample(prompts, decoding)
    backwards = native.sample(prompts[::-1], decoding)[::-1]
    split = [[native.sample([Prompt(p.ids, (key,))], decoding)[0][0] for key in p.keys] for p in prompts]
    for other in (alone, small, backwards, split):
        same_but_for_rounding(policy, prompts, other, together, decoding)
    again = make_sampler(policy, "native").sample(prompts, decoding)
    assert ids_of(again) == ids_of(together)  # the same layout gives the same bits: a resume is exact
    assert [c.logprobs for row in again for c in row] == [c.logprobs for row in together for c in row]
    other = native.sample(prompts_of(policy, 12, 3, seed=1), decoding)
    with pytest.raises(AssertionError):  # the seed does matter
        same_but_for_rounding(policy, prompts, other, together, decoding)


def test_ragged_sample_counts(policy) -> None:  # type: ignore[no-untyped-def]
    prompts = [Prompt(p.ids, p.keys[: 1 + i]) for i, p in enumerate(prompts_of(policy, 4, 4))]
    results = make_sampler(policy, "native").sample(prompts, Decoding(8))
    assert [len(row) for row in results] == [1, 2, 3, 4]
    assert ids_of(results) == ids_of(make_sampler(policy, "generate").sample(prompts, Decoding(8)))


def test_completions_end_where_they_say(policy) -> None:  # type: ignore[no-untyped-def]
    """Stop tokens are kept as ids (they are trained) and left out of the text; length cuts are marked."""
    results = make_sampler(policy, "native").sample(prompts_of(policy, 16, 16), Decoding(40))
    completions = [c for row in results for c in row]
    reasons = {c.finish_reason for c in completions}
    assert reasons == {"stop", "length"}
    for c in completions:
        ended = c.ids[-1] in policy.stop_ids
        assert (c.finish_reason == "stop") == ended
        assert not any(i in policy.stop_ids for i in c.ids[:-1])
        assert len(c.ids) == 40 or ended
        assert c.text == policy.tokenizer.decode(list(c.ids[:-1] if ended else c.ids))
        assert len(c.logprobs) == len(c.ids)


@pytest.mark.parametrize("engine", ["native", "generate"])
def test_stop_strings_end_completions(model_dir: Path, tmp_path: Path, engine: str) -> None:
    template = tmp_path / "t.yaml"
    template.write_text('text: "{question}"\nstop: ["e", "zz"]\n')
    policy = load_fixture_policy(model_dir, prompt=str(template))
    results = make_sampler(policy, engine).sample(prompts_of(policy, 16, 16), Decoding(60))
    stopped = [c for row in results for c in row if c.ids[-1] == policy.tokenizer.encode("e")[0]]
    assert len(stopped) > 20
    for c in stopped:
        assert c.finish_reason == "stop" and "e" not in c.text
        assert policy.tokenizer.decode(list(c.ids)) == c.text + "e"


def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Rows of every step, and prompts of every first pass."""
    steps: list[int] = []
    prompts: list[int] = []
    step, prefill = Decoder.step, Decoder.prefill
    monkeypatch.setattr(Decoder, "step", lambda self, n, seen: steps.append(n) or step(self, n, seen))
    monkeypatch.setattr(
        Decoder, "prefill", lambda self, p, *rest: prompts.append(len(p)) or prefill(self, p, *rest)
    )
    return steps, prompts


def test_finished_rows_leave_the_batch(policy, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    steps, prompts = watched(monkeypatch)
    make_sampler(policy, "native").sample(prompts_of(policy, 8, 16), Decoding(200))
    assert prompts == [8]  # each prompt once, not once a sample
    assert steps[0] > 100 and steps == sorted(steps, reverse=True) and steps[-1] < 0.7 * steps[0]
    assert min(steps) >= MIN_ROWS


def test_waiting_prompts_take_freed_slots(policy, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    together = make_sampler(policy, "native").sample(prompts_of(policy, 24, 4), Decoding(200))
    steps, prompts = watched(monkeypatch)
    sampler = make_sampler(policy, "native", batch_rows=32)
    refilled = sampler.sample(prompts_of(policy, 24, 4), Decoding(200))
    same_but_for_rounding(policy, prompts_of(policy, 24, 4), refilled, together, Decoding(200))
    assert max(steps) <= 32 and sum(prompts) == 24 and prompts[0] == 8
    assert len(prompts) > 3  # not batch after batch: three of those would do
    tokens = sum(len(c.ids) for row in refilled for c in row)
    assert sampler.work.tokens == tokens
    assert sampler.work.row_steps == sum(steps) + 24 * 4
    refilled_steps = len(steps)
    for start in (0, 8, 16):  # the same, batch after batch
        make_sampler(policy, "native").sample(prompts_of(policy, 24, 4)[start : start + 8], Decoding(200))
    assert refilled_steps < 0.9 * (len(steps) - refilled_steps)


# --- stop strings that straddle tokens ----------------------------------------------------------------


class Pieces:
    """A tokenizer whose tokens are given pieces of text."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.pieces[i] for i in ids)


@pytest.mark.parametrize(
    ("ids", "stopped_at", "text"),
    [
        ([0, 1, 2, 3], 3, "x = 1"),  # "\n\n" + "Ques" + "tion:"
        ([0, 4], 1, "x = 1"),  # whole stop and more inside one token
        ([0, 1, 0], None, "x = 1\n\nx = 1"),
        ([0, 3], None, "x = 1tion:"),
        ([0, 5], 1, "x = 1"),  # a stop token
    ],
)
def test_stop_rule(ids: list[int], stopped_at: int | None, text: str) -> None:
    rule = StopRule(
        Pieces("x = 1", "\n\n", "Ques", "tion:", "\n\nQuestion: 2", "<end>"), [5], ["\n\nQuestion:"]
    )
    first = next((n for n in range(len(ids)) if rule.stopped(ids[: n + 1])), None)
    assert first == stopped_at
    assert rule.text(ids) == text


def test_nan_logits_stop_the_run() -> None:
    with pytest.raises(NumericalStop):
        check_finite([[0.0, float("nan")]])
    check_finite([[0.0, -1e30]])
