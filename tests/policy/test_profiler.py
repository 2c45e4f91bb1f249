"""The profile: counters against what was really computed, figures against arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixture_model import load_fixture_policy
from plan_settings import BASE, FIXTURE

from empg_lite.core.rationale import Rationale
from empg_lite.loop.metrics import context_tokens
from empg_lite.loop.mstep import FitSettings, m_step
from empg_lite.policy.memory import profile as profiler
from empg_lite.policy.memory.profile import Rates, fitting_floor, probe, profile, sampling_floor
from empg_lite.policy.policy import Policy
from empg_lite.run.rollouts import read_rollouts
from empg_lite.sampler import Decoding, Prompt, SampleWork, make_sampler
from empg_lite.sampler.decoder import Decoder

RECORD = {
    "step_time": 10.0,
    "time/sample": 6.0,
    "time/refresh": 1.0,
    "time/score": 0.5,
    "time/fit": 3.5,
    "completions/mean_length": 12.5,
    "em/rows_fitted": 6,
    "em/rows_skipped": 10,
    "time/row_steps": 250,
    "time/prompt_tokens": 40,
    "em/context_tokens": 5000,
    "time/tokens_computed": 300,
    "time/tokens_padded": 400,
}


def test_profile_against_hand_computed_numbers() -> None:
    rates = Rates(bytes_per_second=1e9, flops_per_second=1e12)
    found = profile([RECORD, RECORD], FIXTURE, BASE, rates, seconds=25.0)
    assert found["steps"] == 2
    assert found["seconds"] == {
        "sampling": 10.0,
        "refresh": 2.0,
        "grading": 1.0,
        "fitting": 7.0,
        "everything_else": 5.0,
    }
    assert found["shares"]["fitting"] == pytest.approx(7 / 25) and sum(found["shares"].values()) == 1
    assert found["tokens_per_second"] == {
        "sampling": pytest.approx(400 / 12),
        "step": pytest.approx(400 / 20),
    }
    assert found["wasted_row_steps"] == pytest.approx(1 - 400 / 500)
    assert found["padding"] == 0.25 and found["rows_skipped"] == 10 / 16
    assert found["of_floor"]["fitting"] == pytest.approx(found["floor"]["fitting"] / 7)


def test_the_floors_are_bytes_over_bandwidth_and_products_over_rate() -> None:
    """Fixture: 2 layers of 36,864 weights, head 259 x 64, 256 bytes of cache a token and layer in fp32."""
    linear, head, cache = 2 * 36_864, 259 * 64, 2 * 256
    assert FIXTURE.linear_params == linear
    total: Any = RECORD.__getitem__
    slow_memory, slow_products = Rates(1e6, 1e15), Rates(1e15, 1e6)
    passes = 200 / 16
    read = passes * 4 * (linear + head) + 5000 * cache
    assert sampling_floor(FIXTURE, BASE, slow_memory, 200, total) == pytest.approx(read / 1e6)
    products = 2 * 200 * (linear + head) + 2 * 40 * linear
    assert sampling_floor(FIXTURE, BASE, slow_products, 200, total) == pytest.approx(products / 1e6)
    assert fitting_floor(FIXTURE, slow_products, total) == pytest.approx(4 * 300 * linear / 1e6)
    packed = replace(BASE, four_bit=True)
    assert sampling_floor(FIXTURE, packed, slow_memory, 200, total) < read / 1e6
    merged = replace(packed, merged=True)  # the copy is what is read, whatever the base is held in
    assert sampling_floor(FIXTURE, merged, slow_memory, 200, total) == pytest.approx(read / 1e6)


@pytest.mark.parametrize("engine", ["native", "generate"])
def test_an_engine_counts_what_it_computes(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Forward calls of the network, counted by hooks, against ``work``."""
    policy = load_fixture_policy(model_dir)
    sampler = make_sampler(policy, engine, 16)
    seen: list[tuple[int, int]] = []  # rows and width of every pass of the network
    prefill, step = Decoder.prefill, Decoder.step
    monkeypatch.setattr(
        Decoder,
        "prefill",
        lambda self, prompts, owner, *rest: (
            seen.append((len(owner), max(map(len, prompts)))) or prefill(self, prompts, owner, *rest)
        ),
    )
    monkeypatch.setattr(Decoder, "step", lambda self, n, m: seen.append((n, 1)) or step(self, n, m))
    policy.causal.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple((args or (kwargs["input_ids"],))[0].shape)),
        with_kwargs=True,
    )
    ends = iter(range(10**6))
    rule = SimpleNamespace(  # a row ends at random, at every fifth question on average
        stopped=lambda ids: next(ends) * 7919 % 5 == 0, text=lambda ids: ""
    )
    monkeypatch.setattr(sampler, "_stop", rule)
    prompts = [Prompt((1,) * (4 + i), tuple(range(8 * i, 8 * i + 8))) for i in range(4)]
    for n in (1, 2):
        drawn = sampler.sample(prompts, Decoding(9))
        work = sampler.work
        if n == 1:
            first = work
    assert work.since(first).tokens == sum(len(c.ids) for row in drawn for c in row)
    copies = 8 if engine == "generate" else 1  # generate sends each prompt through once a sample
    assert first.prompt_tokens == copies * sum(len(p.ids) for p in prompts)
    decoding = sum(rows for rows, width in seen if width == 1)
    entering = sum(rows for rows, width in seen if width > 1)
    # First tokens come from prefill, each further one from a decoding step.
    assert work.row_steps == decoding + entering and work.row_steps > work.tokens
    assert (work.refresh_seconds > 0) == (engine == "native")


def test_work_adds_up() -> None:
    a, b = SampleWork(1, 2, 3, 0.5), SampleWork(10, 20, 30, 1.0)
    assert a + b == SampleWork(11, 22, 33, 1.5) and (a + b).since(a) == b


def row(i: int, prompt: int, completion: int, weight: float) -> Rationale:
    return Rationale(
        problem_id=str(i),
        question="",
        gold="",
        prompt="",
        prompt_ids=(1,) * prompt,
        completion="",
        completion_ids=(2,) * completion,
        finish_reason="stop",
        step=1,
        policy_step=0,
        sample_index=0,
        reward=1.0,
        reason="equal",
        weight=weight,
    )


def looked_up(policy: Policy) -> list[int]:
    """Tokens that the embedding looks up, a number for each pass from now on."""
    places: list[int] = []
    policy.causal.model.embed_tokens.register_forward_hook(lambda m, ids, out: places.append(ids[0].numel()))
    return places


def test_the_m_step_counts_tokens_and_padding(model_dir: Path) -> None:
    """Rows of 9, 7, 6, 4 tokens, two of one prompt (and one row of weight 0): what the embedding looks up."""
    policy = load_fixture_policy(model_dir)
    places = looked_up(policy)
    rows = [row(i, *sizes) for i, sizes in enumerate(((5, 4, 1.0), (3, 4, 1.0), (3, 3, 1.0), (2, 2, 1.0)))]
    rows.append(row(4, 50, 50, 0.0))
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-6)
    settings = FitSettings(1e-6, 1.0, 1, 0.005, "tokens", 50, 18)
    stats = m_step(policy, optimizer, rows, settings)
    assert len(places) == 2  # the shared prompt once, and of no completion the last token
    assert stats.tokens_computed == sum(places) == (5 + 3) + (3 + 3 + 2) + (2 + 1)
    assert stats.tokens_padded == (5 + 3) + (2 * 3 + 3 * 3)  # attention pads prompts, and completions, each
    nothing = m_step(policy, optimizer, [row(0, 5, 4, 0.0)], settings)
    assert nothing.tokens_computed == nothing.tokens_padded == 0


def behind(i: int, own: int, completion: int) -> Rationale:
    """A row whose prompt is 20 tokens that all share, and ``own`` of its own."""
    return replace(row(i, 0, completion, 1.0), prompt_ids=(1,) * 20 + (3 + i,) * own)


def test_what_all_prompts_share_is_counted_once(model_dir: Path) -> None:
    """In the M-step as in the E-step: what the embedding looks up, with a prefix of 20 tokens."""
    policy = load_fixture_policy(model_dir)
    places = looked_up(policy)
    rows = [behind(0, 5, 4), behind(1, 3, 4), behind(2, 2, 2)]
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-6)
    stats = m_step(policy, optimizer, rows, FitSettings(1e-6, 1.0, 1, 0.005, "tokens", 50, 1000))
    assert stats.tokens_computed == sum(places) == 20 + (5 + 3 + 2) + (3 + 3 + 1)
    assert stats.tokens_padded == 20 + 3 * 5 + 3 * 3

    places.clear()
    sampler = make_sampler(policy, "native", 2, merged=False)
    sampler.sample([Prompt(r.prompt_ids, (i,)) for i, r in enumerate(rows)], Decoding(1))
    assert sampler.work.prompt_tokens == sum(places) == 20 + (5 + 3 + 2)


def test_context_counts_every_key_that_only_one_row_reads() -> None:
    assert context_tokens([row(0, 5, 4, 1.0)]) == 5 + 6 + 7 + 8
    assert context_tokens([row(0, 5, 4, 1.0), row(0, 5, 2, 1.0)]) == 5 + 6 + 7 + 8 + 5 + 6
    assert context_tokens([behind(0, 5, 3), behind(1, 3, 1)]) == 5 + 6 + 7 + 3


def test_train_profiles_only_on_request(
    recipe_file: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    code, out, _ = cli("train", "-r", recipe_file, "-o", run, "--profile")
    assert code == 0 and "fitting" in out and "after their stop" in out
    found = json.loads((run / "profile.json").read_text())
    assert found["steps"] == 3 and sum(found["shares"].values()) == pytest.approx(1)
    drawn = [
        r
        for n in (1, 2, 3)
        for s in read_rollouts(run / f"rollouts/step-{n:06d}.jsonl")
        for r in s.rationales
    ]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if "step_time" in r]
    assert sum(map(profiler.sampled_tokens, records)) == sum(len(r.completion_ids) for r in drawn)
    steps = [[r for r in drawn if r.step == n] for n in (1, 2, 3)]
    assert [r["em/context_tokens"] for r in records] == [context_tokens(rows) for rows in steps]
    skipped = sum(r.weight == 0 for r in drawn)
    assert found["rows_skipped"] == pytest.approx(skipped / len(drawn))
    assert 0 <= found["wasted_row_steps"] < 1 and found["of_floor"]["fitting"] > 0

    monkeypatch.setattr(
        "empg_lite.policy.memory.profile.probe", lambda *a: pytest.fail("probed without being asked")
    )
    code, _, _ = cli("train", "-r", recipe_file, "-o", tmp_path / "plain", "--max-steps", 1)
    assert code == 0 and not (tmp_path / "plain" / "profile.json").exists()


def test_the_probe_takes_the_fastest_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: the warm-up does not count, the best of the others does."""
    now, costs = [0.0], iter([9.0, 0.1, 0.04, 0.06, 0.2, 0.05])

    def work() -> None:
        now[0] += next(costs)

    monkeypatch.setattr(profiler.time, "perf_counter", lambda: now[0])
    assert profiler._fastest(work, torch.device("cpu")) == pytest.approx(0.04)
    monkeypatch.undo()
    rates = probe(torch.device("cpu"), torch.float32)
    assert rates.bytes_per_second > 0 and rates.flops_per_second > 0
