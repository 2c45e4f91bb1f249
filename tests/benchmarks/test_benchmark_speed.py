"""The speed and memory benchmarks: equal work for all rivals, right arithmetic, a gate that closes."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import forced
import gate
import hand_loop
import memory_peak
import pytest
import setting
import shapes
import timing
import torch
import trl_grpo
from fixture_model import load_fixture_policy

from empg_lite.core.rationale import Problem
from empg_lite.loop import mstep
from empg_lite.sampler import Decoding, Prompt, draw, make_sampler

K, CAP = 4, 9
LENGTHS = (3, 9, 2, 5, 7, 2, 4, 9, 6, 6, 2, 8)
STOP, PLAIN = 256, 65


def fixture_setting() -> setting.Setting:
    problems = tuple(Problem(f"p{n}", f"{n} + {n * 111} = ?", "1", {}) for n in range(3))
    return setting.Setting(problems, K, CAP, LENGTHS, PLAIN)


# --- lengths -----------------------------------------------------------------------------------------


def lognormal_cdf(x: float, mean: float, sigma: float) -> float:
    return 0.5 * (1 + math.erf((math.log(x / mean) + sigma**2 / 2) / (sigma * math.sqrt(2))))


@pytest.mark.parametrize(("mean", "sigma", "fits"), [(36, 0.5, True), (36, 0.45, False), (38, 0.5, False)])
def test_lengths_are_lognormal(mean: float, sigma: float, fits: bool) -> None:
    """Against the distribution function, by Kolmogorov's distance; two neighbors are told apart."""
    n = 20_000
    lengths = torch.tensor(forced.draw_lengths(n, cap=10**6))
    off = max(
        abs(float((lengths <= x).sum()) / n - lognormal_cdf(x + 0.5, mean, sigma)) for x in range(5, 150)
    )
    assert (off < 1.95 / math.sqrt(n)) == fits, off  # p = 0.001


def test_lengths_are_cut_at_the_cap_and_come_again() -> None:
    lengths = forced.draw_lengths(2000)
    assert max(lengths) == 72 and min(lengths) >= 2
    assert 0.02 < lengths.count(72) / 2000 < 0.1
    assert lengths == forced.draw_lengths(2000) != forced.draw_lengths(2000, seed=1)


def ended(rows: list[tuple[int, ...]]) -> bool:
    """Each has the table's length, and the stop token at its end only."""
    lengths = tuple(len(row) for row in rows)
    return lengths == LENGTHS and all(row.index(STOP) == len(row) - 1 for row in rows)


@pytest.mark.parametrize("engine", ["native", "generate"])
@pytest.mark.parametrize("batch_rows", [None, 8])
def test_an_engine_draws_the_tables_lengths(policy: Any, engine: str, batch_rows: int | None) -> None:
    given = fixture_setting()
    prompts = setting.prompts_of(policy, given)
    sampler, decoding = make_sampler(policy, engine, batch_rows), Decoding(CAP)

    def rows() -> list[tuple[int, ...]]:
        return [c.ids for group in sampler.sample(prompts, decoding) for c in group]

    free = rows()
    with forced.forced_draws(setting.ends_of(prompts, given), STOP, PLAIN):
        assert ended(rows())
    assert not ended(free) and rows() == free  # without, they end where they like, before and after


@pytest.mark.parametrize("with_config", [False, True])
def test_generate_draws_the_tables_lengths(policy: Any, with_config: bool) -> None:
    from transformers import GenerationConfig

    prompts = [p.ids for p in setting.prompts_of(policy, fixture_setting()) for _ in p.keys]
    inputs = hand_loop.left_padded(policy, prompts)
    # Of 259 tokens, 86 are made the end one by one: rows would end at once.
    how: dict[str, Any] = dict(do_sample=True, max_new_tokens=CAP, pad_token_id=policy.pad_id)
    if with_config:  # as TRL does it
        how = {"generation_config": GenerationConfig(**how, eos_token_id=list(range(86)))}
    generate = forced.forced_generate(policy.model.generate, LENGTHS, STOP, PLAIN)
    out = generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]
    assert ended([hand_loop.cut(row, frozenset({STOP})) for row in out.tolist()])


def test_rows_that_were_not_drawn_to_their_end_are_refused() -> None:
    rows = torch.tensor([[STOP, 1, 2], [1, STOP, 3]])
    assert forced.end_rows(rows, [2, 3], STOP, PLAIN).tolist() == [[PLAIN, STOP, STOP], [1, PLAIN, STOP]]
    with pytest.raises(AssertionError):
        forced.end_rows(rows, [2, 4], STOP, PLAIN)


def test_trl_steps_draw_the_tables_tokens_and_train(model_dir: Path) -> None:
    given, policy = fixture_setting(), load_fixture_policy(model_dir)
    prompts = [policy.encode_prompt(p.question)[0] for p in given.problems]
    trainer = trl_grpo.build(
        policy, prompts, samples=K, max_new_tokens=CAP, rows=6, rate=1e-3, rewards=given.rewards(True)
    )
    steps = trl_grpo.Steps(trainer, policy, LENGTHS, PLAIN)
    seen = [policy.adapter_sha256()]
    for _ in range(2):
        steps.step()
        assert steps.tokens == sum(LENGTHS)
        seen.append(policy.adapter_sha256())
    steps.close()
    assert len(set(seen)) == 3 and trainer.state.global_step == 2  # one optimizer step each
    assert not steps._thread.is_alive()


# --- times -------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round() -> None:
    """The ratio of medians would be 2; the rounds' own ratios are 4, 2, 1."""
    slow = [timing.Spent(w, 10.0) for w in (4.0, 8.0, 6.0)]
    fast = [timing.Spent(1.0, 2.0), timing.Spent(4.0, 5.0), timing.Spent(6.0, 1.0)]
    wall, cpu = timing.ratios(slow, fast)
    assert wall == timing.Spread(2.0, 1.0, 4.0) and cpu == timing.Spread(5.0, 2.0, 10.0)
    assert str(wall) == "2.00 (1.00-4.00)"


def test_rivals_take_turns_and_warm_up() -> None:
    calls: list[str] = []
    spent = timing.in_turn({n: lambda n=n: calls.append(n) for n in "AB"}, repeats=3, warmups=2)
    assert "".join(calls) == "AB" * 5 and {name: len(s) for name, s in spent.items()} == {"A": 3, "B": 3}


def test_processor_time_is_not_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"perf_counter": 100.0, "process_time": 7.0}
    for clock in now:
        monkeypatch.setattr(timing.time, clock, lambda clock=clock: now[clock])
    spent = timing.spend(lambda: now.update(perf_counter=103.5, process_time=8.25))
    assert spent == timing.Spent(wall=3.5, cpu=1.25)


# --- equal work --------------------------------------------------------------------------------------


def test_silent_groups_are_whole_and_half() -> None:
    given = setting.Setting((None,) * 16, 8, 72, tuple(forced.draw_lengths(128)), 0)  # type: ignore[arg-type]
    loud, silent = given.rewards(False), given.rewards(True)
    assert all(loud) and len(loud) == given.rows == 128
    zero = [p for p in range(16) if not any(silent[8 * p : 8 * p + 8])]
    assert zero == list(range(1, 16, 2)) and silent.count(0.0) == 64
    assert len(set(loud[:8])) == 2  # a group whose rewards are equal would teach TRL nothing


@pytest.fixture(scope="module")
def learner() -> Any:
    return setting.tiny_learner("sampler.max_new_tokens=24")


@pytest.fixture(scope="module")
def drawn(learner: Any) -> tuple[Any, Any]:
    given = setting.tiny_setting(learner, problems=4, samples=4, mean=12.0)
    return given, setting.sample(learner, make_sampler(learner.policy, "native"), given)


def test_rationales_come_in_the_tables_order(drawn: tuple[Any, Any]) -> None:
    given, rows = drawn
    assert [len(r.completion_ids) for r in rows] == list(given.lengths)
    assert all(r.finish_reason == "stop" for r in rows)
    assert [r.weight == 0 for r in setting.weighed(rows, given.rewards(True))] == [
        not r for r in given.rewards(True)
    ]


# --- the gate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", [False, True])
def test_the_gradient_is_the_loops_and_an_error_is_seen(
    learner: Any, drawn: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    given, rows = drawn
    rows = setting.weighed(rows, given.rewards(silent))
    before = learner.policy.adapter_sha256()
    assert gate.gradient_difference(learner, rows) < 1e-5
    assert learner.policy.adapter_sha256() == before  # comparing moves nothing
    right = mstep.denominator
    monkeypatch.setattr(mstep, "denominator", lambda *a, **k: 1.0001 * right(*a, **k))
    assert gate.gradient_difference(learner, rows) > 5e-5


def test_greedy_tokens_are_generates_and_an_error_is_seen(
    learner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = learner.policy
    prompts = [policy.encode_prompt(p.question)[1] for p in setting.load_splits(learner.recipe).train[:16]]
    assert gate.greedy_differences(policy, prompts, 24) == {"native": 0, "generate": 0}
    right = draw.draw

    def once_wrong(logits: Any, keys: Any, position: int, decoding: Any) -> Any:
        tokens, logprobs = right(logits, keys, position, decoding)
        return torch.where((keys == 5) & (torch.as_tensor(position) == 1), PLAIN, tokens), logprobs

    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("empg_lite.") and getattr(module, "draw", 0) is right:
            monkeypatch.setattr(module, "draw", once_wrong)
    assert gate.greedy_differences(policy, prompts, 24) == {"native": 1, "generate": 1}


def test_the_adapter_of_the_setting_matters(learner: Any) -> None:
    """Else a rival that leaves it out would pass."""
    policy = learner.policy
    prompts = [Prompt(policy.encode_prompt("What is 2 + 2?")[1], tuple(range(16)))]
    sampler = make_sampler(policy, "native")
    tuned = sampler.sample(prompts, Decoding(12))
    with policy.reference():
        base = sampler.sample(prompts, Decoding(12))
    assert tuned != base


# --- memory and shapes -------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_the_peak_is_what_the_work_needs() -> None:
    def hold(megabytes: int) -> None:
        torch.ones(megabytes * 250_000).sum()

    hold(200)  # an older, higher peak does not count
    assert 59 < memory_peak.peak_of(lambda: hold(60)) < 75
    assert memory_peak.peak_of(lambda: None) < 5


@pytest.mark.parametrize("name", ["0.5B", "1.5B", "3B", "7B"])
def test_shapes_count_their_parameters(name: str) -> None:
    """Against transformers' own model of the same numbers, on no device."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    s = shapes.SHAPES[name]
    with torch.device("meta"):
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=s.vocab,
                hidden_size=s.hidden,
                intermediate_size=s.intermediate,
                num_hidden_layers=s.layers,
                num_attention_heads=s.heads,
                num_key_value_heads=s.kv_heads,
                tie_word_embeddings=s.tied,
            )
        )
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert s.linear_parameters == sum(m.weight.numel() for m in linears)
    assert s.head_parameters == model.lm_head.weight.numel()
    # What is published: 0.49, 1.54, 3.09, 7.62 billion in all.
    total = sum(p.numel() for p in model.parameters()) / 1e9
    assert round(total, 2) == {"0.5B": 0.49, "1.5B": 1.54, "3B": 3.09, "7B": 7.62}[name]


def test_a_written_model_loads_and_samples(tmp_path: Path) -> None:
    shape = shapes.wider(shapes.SHAPES["tiny"], 2)
    assert shape.hidden == 256 and shape.head_dim == 32
    folder = shapes.write_model(tmp_path / "m", shape)
    loaded = setting.tiny_learner(f"model.name={folder}")
    assert sum(p.numel() for n, p in loaded.policy.causal.named_parameters() if "embed" in n) == 530 * 256
    (row,) = make_sampler(loaded.policy, "native").sample([Prompt((1, 2, 3), (7,))], Decoding(5))[0]
    assert 1 <= len(row.ids) <= 5


def test_a_sweep_changes_one_thing() -> None:
    import scaling

    seen: dict[str, list[Any]] = {}
    for name, point in scaling.points():
        seen.setdefault(name, []).append(point)
    for name, found in seen.items():
        field, values = scaling.SWEEPS[name]
        assert [getattr(p, field) for p in found] == list(values)
        assert {scaling.replace(p, **{field: 0}) for p in found} == {
            scaling.replace(scaling.Point(), **{field: 0})
        }
        assert scaling.Point() in found  # the middle of all


def test_a_sweeps_rates_are_tokens_over_the_median() -> None:
    import scaling

    cost = scaling.Cost(scaling.Point(), 1000, timing.Spread(2.0, 1.0, 9.0), timing.Spread(4.0, 3.0, 5.0))
    row = scaling.show("width of the model", [cost]).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["1", "1000", "2.00 (1.00-9.00)", "500", "4.00 (3.00-5.00)", "250"]
