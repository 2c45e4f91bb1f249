"""The comparison's harness: what every arm shares, and that a baseline's step is the step it claims."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import arms
import empg_vs_grpo
import empg_vs_grpo_methods as methods
import empg_vs_grpo_report as report
import pytest
import torch
from arms import Setting

from empg_lite.core.rationale import flatten

SHORT = {"steps": 3, "problems": 4, "samples": 4}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few problems to evaluate on; the adapters of a run are kept."""
    monkeypatch.setattr(arms, "VALIDATION", 8)
    monkeypatch.setattr(arms, "CURVE", 8)
    monkeypatch.setattr(arms, "EM_ARMS", arms.EM_ARMS | EXACT)


#: The package's own weightings over a constant denominator: two baselines are these, at theta = old.
EXACT = {
    name: (f"em.weighting={name}", "em.normalization=max_length") for name in ("centered", "raw", "posterior")
}


def adapter(setting: Setting) -> torch.Tensor:
    """The weights after the run."""
    kept: list[Any] = []
    learner = arms._learner
    arms._learner = lambda s: kept.append(learner(s)) or kept[-1]  # type: ignore[method-assign,func-returns-value]
    try:
        arms.train_arm(setting)
    finally:
        arms._learner = learner
    return torch.cat([p.detach().flatten() for p in kept[-1].policy.trainable().values()])


@pytest.mark.parametrize(("baseline", "own"), [("dr_grpo", "centered"), ("raft", "raw")])
def test_a_baseline_takes_the_step_that_the_package_would(baseline: str, own: str) -> None:
    """On fresh samples Dr.GRPO is centered, RAFT is raw: three steps, Adam and clipping included."""
    runs = {
        arm: adapter(Setting("tiny", arm, 2e-3, 0, test=False, **SHORT))
        for arm in (baseline, own, "posterior")
    }
    start = adapter(Setting("tiny", own, 2e-3, 0, test=False, **{**SHORT, "steps": 0}))
    moved = torch.linalg.norm(runs[own] - start)
    assert torch.linalg.norm(runs[baseline] - runs[own]) < 1e-3 * moved
    assert torch.linalg.norm(runs["posterior"] - runs[own]) > 0.1 * moved  # the control


def test_stale_samples_are_those_of_an_older_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[int, list[Any]] = {}
    sample = arms.sample_rationales

    def spy(*args: Any, **options: Any) -> Any:
        draw = sample(*args, **options)
        drawn.setdefault(age, []).append((options["policy_step"], flatten(draw.groups)))
        return draw

    monkeypatch.setattr(arms, "sample_rationales", spy)
    for age in (0, 1):
        arms.train_arm(Setting("tiny", "grpo", 2e-2, 0, stale=age, test=False, **SHORT))
    fresh, stale = ([step for step, _ in drawn[a][:3]] for a in (0, 1))
    assert (fresh, stale) == ([0, 1, 2], [0, 0, 1])
    texts = {a: [[r.completion for r in rows] for _, rows in drawn[a][:3]] for a in (0, 1)}
    assert texts[0][0] == texts[1][0]
    # Step 2: fresh samples come from the moved policy, stale ones from the base.
    assert texts[0][1] != texts[1][1]


def test_a_lenient_verifier_lets_its_share_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from rationales import rationale

    rows = [
        rationale(problem_id=f"p{i}", reward=float(i % 4 == 0), finish_reason="stop") for i in range(4000)
    ]
    seen = arms._deceived(rows, Setting("tiny", "empg", 1e-3, 0, noise=0.05))
    passed = sum(b.reward != a.reward for a, b in zip(rows, seen, strict=True))
    assert abs(passed - 150) < 4 * (3000 * 0.05 * 0.95) ** 0.5
    assert all(b.reward == 1.0 for a, b in zip(rows, seen, strict=True) if a.reward == 1.0)
    cut = [rationale(reward=0.0, finish_reason="length")] * 100
    assert arms._deceived(cut, Setting("tiny", "empg", 1e-3, 0, noise=1.0)) == cut
    assert arms._deceived(rows, Setting("tiny", "empg", 1e-3, 0)) == rows


def test_runs_are_handed_out_one_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    handed: list[int] = []
    monkeypatch.setattr(empg_vs_grpo, "train_arm", lambda s: {"seed": s.seed})
    settings = [Setting("tiny", "empg", 1e-3, seed) for seed in range(7)]
    waiting = (handed.append(s.seed) or s for s in settings)  # type: ignore[func-returns-value]
    with ThreadPoolExecutor(2) as pool:
        records = empg_vs_grpo._trained(pool, waiting, 2)
        first = next(records)
        assert len(handed) == 2
        assert sorted(r["seed"] for r in [first, *records]) == list(range(7))


# --- the report ---------------------------------------------------------------------------------------


def made(setting: Setting, accuracy: float) -> dict[str, Any]:
    curve = [
        {
            "step": i,
            "reward": accuracy / 2,
            "length": 9.0,
            "length_right": 8.0,
            "seconds": 1.0 * i,
            "updates": 1,
        }
        for i in range(1, 11)
    ]
    curve[-1]["greedy"] = accuracy
    return {
        "setting": setting.__dict__,
        "pass@1": accuracy,
        "t1_accuracy": accuracy / 2,
        "pass@8": accuracy,
        "mean_length": 9.0,
        "mean_length_right": 8.0,
        "t1_length": 9.0,
        "seconds": 10.0,
        "curve": curve,
    }


def test_rates_are_chosen_on_their_own_seeds_and_differences_are_paired() -> None:
    results: dict[Setting, dict[str, Any]] = {}
    for s in empg_vs_grpo.sweep("tiny"):
        results[s] = made(s, {1e-3: 0.4, 2e-3: 0.5, 4e-3: 0.3}[s.rate] + s.seed / 10_000)
    with pytest.raises(KeyError):
        empg_vs_grpo.best_rate(results, "tiny-hard", "empg")
    for s in empg_vs_grpo.STAGES["base"](results):
        results[s] = made(s, 0.1)
    for s in empg_vs_grpo.chosen(results, "tiny"):
        assert s.rate == 2e-3 and s.seed < 8
        results[s] = made(s, 0.6 + 0.02 * s.seed + (0.05 + 0.001 * s.seed if s.arm == "empg" else 0.0))
    ours, theirs = (report.row_of(results, "tiny", arm) for arm in ("empg", "grpo"))
    assert ours is not None and theirs is not None
    gains = report.difference(ours, theirs, report.greedy)
    assert gains == pytest.approx([0.05 + 0.001 * seed for seed in range(8)])
    # half-width: t(7) = 2.3646 times sd 0.0024495 / sqrt(8)
    table = report.paired_table(results, "tiny").splitlines()
    assert [
        line for line in table if "GRPO | +5.4 ± 0.2 | 8 of 8 | +2.7 ± 0.1 |" in line and "Dr" not in line
    ]
    assert report.row_of(results, "tiny-hard", "empg") is None


def test_the_rival_on_a_cpu_is_taken_after_as_many_samples_and_after_as_long() -> None:
    results: dict[Setting, dict[str, Any]] = {}
    for seed in empg_vs_grpo.CPU_SEEDS:
        ours, theirs = empg_vs_grpo.on_a_cpu(seed)
        counts = {"samples": 1920, "seen": 700}
        results[ours] = made(ours, 0.8 + 0.01 * seed) | counts
        half_way = made(theirs, 0.7 + 0.01 * seed) | counts | {"seconds": 5.0}
        del half_way["setting"], half_way["curve"]
        assert not methods.cpu_tables(results)  # a pair is missing
        results[theirs] = made(theirs, 0.815) | {"samples": 4224, "seen": 1056, "examined": half_way}
    found = methods.cpu_tables(results)
    rows = [line.strip("| ").split(" | ") for line in found["real-cpu"].splitlines()[2:]]
    assert [(row[0], row[1], row[3][:4], row[6], row[8]) for row in rows] == [
        ("EMPG, 3 tries", "64 × 1", "82.5", "1920", "10"),
        ("Dr.GRPO, equal samples", "16 × 4", "72.5", "1920", "5"),
        ("Dr.GRPO, equal time", "16 × 4", "81.5", "4224", "10"),
    ]
    # ten points in each seed; then -1.5, -0.5, ... 3.5, half-width t(5) = 2.5706 times sd 1.8708 / sqrt(6)
    assert "| +10.0 ± 0.0 | 6 of 6 | +5.0 ± 0.0 | 6 of 6 | +10.0 ± 0.0 |" in found["real-cpu-ahead"]
    assert "| +1.0 ± 2.0 | 4 of 6 | +0.5 ± 1.0 | 4 of 6 | +1.0 ± 2.0 |" in found["real-cpu-ahead"]


def test_intervals_against_scipy() -> None:
    from scipy import stats

    values = [0.1, 0.4, 0.35, 0.2, 0.9]
    center, half = report.interval(values)
    low, high = stats.t.interval(0.95, 4, loc=center, scale=stats.sem(values))
    assert (center - half, center + half) == pytest.approx((low, high), rel=1e-12)


def test_collapse_and_accuracy_at_a_time() -> None:
    run = made(Setting("tiny", "empg", 1e-3, 0), 0.8)
    assert not report.collapsed(run, base=0.4)
    assert report.collapsed(run, base=0.43)  # samples end at 0.4, more than 0.02 below
    run["curve"][4]["reward"] = 2.0  # a peak of 0.72 in the running mean
    assert report.collapsed(run, base=0.0)
    assert report.at_seconds(run, 0.2, 5.0) == pytest.approx(0.5)
    assert report.at_seconds(run, 0.2, 99.0) == 0.8


def test_the_page_is_filled_between_its_markers() -> None:
    page = "a\n<!-- main -->\nold\n<!-- /main -->\nb\n<!-- noise -->\nkept\n<!-- /noise -->\n"
    assert report.fill(page, {"main": "| 1 \\1 |"}) == page.replace("old", "| 1 \\1 |")


def test_tries_in_an_arm_follow_the_rule() -> None:
    """P x K rows a step; slots go on from step to step; weights are the rewards."""
    setting = Setting("tiny", "empg", 2e-3, 0, test=False, steps=3, problems=16, samples=2, tries=3)
    learner = arms._learner(setting)
    with arms.Grader() as grader:
        train, _, _ = arms._problems("tiny")
        e_step = arms.EStep(setting, learner, learner.sampler(), grader, arms.ProblemStream(train, 0))
        steps = [e_step.draw(step, 0) for step in (1, 2, 3)]
    rows = [sorted(flatten(groups or []), key=lambda r: r.sample_index) for groups in steps]
    assert [len(step) for step in rows] == [32, 32, 32] and e_step.samples == 96
    for slot in range(16):
        drawn = [r for step in rows for r in step[2 * slot : 2 * slot + 2]]
        for before, after in zip(drawn, drawn[1:], strict=False):
            goes_on = before.reward == 0 and before.tries < 3
            assert after.tries == (before.tries + 1 if goes_on else 1)
            assert (after.problem_id == before.problem_id) == goes_on
    assert len(e_step.seen) == len({r.problem_id for step in rows for r in step}) > 16


def test_an_examination_on_the_way_is_that_of_a_shorter_run_and_changes_nothing_after_it() -> None:
    longer = Setting("tiny", "dr_grpo", 2e-2, 0, test=False, **SHORT)
    on_the_way = arms.train_arm(replace(longer, examined=2))
    shorter, plain = arms.train_arm(replace(longer, steps=2)), arms.train_arm(longer)
    timed = {"seconds", "setting", "curve", "examined"}
    figures = [
        {name: value for name, value in run.items() if name not in timed}
        for run in (on_the_way["examined"], shorter, on_the_way, plain)
    ]
    assert figures[0] == figures[1] and figures[2] == figures[3] and figures[0] != figures[2]
    assert [on_the_way["examined"]["samples"], on_the_way["samples"]] == [32, 48]
    assert on_the_way["examined"]["seconds"] == pytest.approx(on_the_way["curve"][1]["seconds"], abs=1e-3)
    assert "examined" not in plain


def test_dynamic_sampling_keeps_groups_with_signal_and_counts_the_others() -> None:
    """Until P groups have a signal; a step that the budget cannot fill is not made."""
    setting = Setting("tiny-hard", "dr_grpo-dynamic", 2e-3, 0, test=False, **SHORT)
    learner = arms._learner(setting)
    with arms.Grader() as grader:
        train, _, _ = arms._problems("tiny-hard")
        e_step = arms.EStep(setting, learner, learner.sampler(), grader, arms.ProblemStream(train, 0))
        groups = e_step.draw(1, 0)
        assert groups is not None and len(groups) == 4
        assert all(len({r.reward for r in g.rationales}) == 2 for g in groups)
        assert len(e_step.drawn) == e_step.samples > 16  # the base model leaves many groups without
        while e_step.samples < 48:
            e_step.draw(2, 0)
        assert e_step.draw(3, 0) is None


def test_a_method_gets_its_best_shape_and_rate_and_as_much_time() -> None:
    """A rate 4 points behind on two seeds is not needed on the others; time is shared by steps."""
    import empg_vs_grpo_methods as methods

    score = {1e-3: 0.5, 2e-3: 0.6, 4e-3: 0.57}
    results: dict[Setting, dict[str, Any]] = {}
    study = empg_vs_grpo.ON_TINY
    for s in study.sweep_first():
        results[s] = made(s, score[s.rate] + (0.05 if s.samples == 4 else 0.0) + (0.2 if s.tries == 8 else 0))
    assert study.rates_left(results, "grpo 16x4") == [2e-3, 4e-3]
    with pytest.raises(KeyError):
        study.best(results, "GRPO")
    for s in empg_vs_grpo.STAGES["sweep-shapes"](results):
        assert s.rate != 1e-3
        results[s] = made(s, 0.9 if s.arm == "grpo" and s.rate == 4e-3 and s.samples == 2 else 0.6)
    assert study.best(results, "GRPO") == ("grpo 32x2", 4e-3)
    assert study.best(results, "EMPG, tries")[0] == "empg tries 8 16x4"
    assert methods.methods_table(study, results, methods.changed(study)) == ""  # not run yet
    for s in empg_vs_grpo.STAGES["methods"](results):
        tries = {"seconds": 20.0, "samples": 1920, "seen": 700}
        results[s] = made(s, 0.9 - 0.01 * (s.seed % 2) if s.tries else 0.7) | tries
        if s.arm == "grpo":
            results[s]["seconds"] = 10.0
    table = methods.ahead_table(study, results, methods.changed(study))
    assert table.count("8 of 8 | +") == 10 and "| +19.5 ± 0.4 | 8 of 8 |" in table
    assert {s.steps for s in study.equal_time(results, "GRPO")} == {60}
    shapes = methods.shapes_table(study, results)
    assert "(50" in shapes and "**" in shapes
