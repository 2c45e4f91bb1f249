"""E-step and M-step, each without the other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from fitting import SETTINGS, sgd
from fixture_model import load_fixture_policy
from rationales import rationale

from empg_lite.core.errors import OutOfMemory
from empg_lite.core.rationale import Group, Problem, Rationale, flatten, group_rationales
from empg_lite.loop import mstep
from empg_lite.loop.estep import reward_matrix, sample_rationales, weigh
from empg_lite.loop.metrics import estep_metrics, mixture_metrics
from empg_lite.loop.mstep import m_step
from empg_lite.policy.policy import collate
from empg_lite.rewards import Grader
from empg_lite.rewards.scorer import Scorer
from empg_lite.sampler import Decoding, make_sampler

WEIGHTS = [2.0, 0.0, 1.0, 0.5, 0.0, -1.0]


def rows(weights=WEIGHTS):  # type: ignore[no-untyped-def]
    """Rows of different lengths, each ending in the stop token."""
    return [
        rationale(
            problem_id=f"p{i % 2}",
            prompt_ids=tuple(range(1, 3 + i)),
            completion_ids=(*range(40 + i, 42 + 2 * i), 256),
            sample_index=i,
            weight=w,
        )
        for i, w in enumerate(weights)
    ]


def parameters(policy) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return torch.cat([p.detach().flatten().double() for p in policy.trainable().values()])


def step_of(model_dir: Path, given, settings=SETTINGS, **options):  # type: ignore[no-untyped-def]
    """(movement of the parameters per unit of rate under SGD = -gradient, stats)."""
    policy = load_fixture_policy(model_dir)
    before = parameters(policy)
    stats = m_step(policy, sgd(policy), given, dataclasses.replace(settings, learning_rate=1.0), **options)
    return parameters(policy) - before, stats


def naive_gradient(model_dir: Path, given, z: float) -> tuple[torch.Tensor, float]:  # type: ignore[no-untyped-def]
    """Row by row, through the full logits, in the order given."""
    policy = load_fixture_policy(model_dir)
    loss = torch.zeros((), dtype=torch.float64)
    for r in given:
        ids = torch.tensor([[*r.prompt_ids, *r.completion_ids]])
        logprobs = policy.model(input_ids=ids).logits.double().log_softmax(-1)[0, :-1]
        for t in range(len(r.prompt_ids), ids.shape[1]):
            loss = loss - r.weight * logprobs[t - 1, ids[0, t]] / z
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in policy.trainable().values()]), float(loss.detach())


# --- M-step -------------------------------------------------------------------------------------------


def test_m_step_is_the_weighted_likelihood(model_dir: Path) -> None:
    given = rows()
    z = sum(len(r.completion_ids) for r in given)  # rows of weight 0 count
    gradient, loss = naive_gradient(model_dir, given, z)
    movement, stats = step_of(model_dir, given)
    assert stats.loss == pytest.approx(loss, rel=1e-5)
    assert stats.grad_norm == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert torch.linalg.norm(movement + gradient) <= 1e-5 * gradient.norm()
    assert (stats.updates, stats.rows_fitted) == (1, 4)
    wrong_z, _ = naive_gradient(model_dir, given, sum(len(r.completion_ids) for r in given if r.weight))
    assert torch.linalg.norm(movement + wrong_z) > 0.1 * gradient.norm()  # negative control


def test_max_length_normalizes_by_a_constant(model_dir: Path) -> None:
    gradient, _ = naive_gradient(model_dir, rows(), 6 * 9)
    movement, _ = step_of(model_dir, rows(), dataclasses.replace(SETTINGS, normalization="max_length"))
    assert torch.linalg.norm(movement + gradient) <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("tokens", [1, 20, 30, 60])
def test_micro_batches_do_not_change_the_gradient(model_dir: Path, tokens: int) -> None:
    whole, _ = step_of(model_dir, rows())
    cut, stats = step_of(model_dir, rows(), dataclasses.replace(SETTINGS, micro_batch_tokens=tokens))
    assert torch.linalg.norm(whole - cut) <= 1e-6 * whole.norm()
    assert stats.micro_batch_tokens == tokens


def test_row_order_does_not_change_the_gradient(model_dir: Path) -> None:
    whole, _ = step_of(model_dir, rows())
    turned, _ = step_of(model_dir, rows()[::-1])
    assert torch.linalg.norm(whole - turned) <= 1e-6 * whole.norm()


def test_zero_weight_rows_are_not_computed(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    policy = load_fixture_policy(model_dir)
    real = policy.completion_loss
    monkeypatch.setattr(
        policy, "completion_loss", lambda pairs, *rest: seen.append(len(pairs)) or real(pairs, *rest)
    )
    m_step(policy, sgd(policy), rows(), SETTINGS)
    assert sum(seen) == sum(w != 0 for w in WEIGHTS)


def test_no_signal_moves_nothing_even_with_momentum(model_dir: Path) -> None:
    policy = load_fixture_policy(model_dir)
    adam = torch.optim.AdamW(list(policy.trainable().values()), lr=1e-2, weight_decay=0.0)
    m_step(policy, adam, rows(), SETTINGS)  # momentum
    before, state = parameters(policy), {k: v["step"].item() for k, v in adam.state.items()}
    stats = m_step(policy, adam, rows([0.0] * 6), SETTINGS)
    assert torch.equal(parameters(policy), before)
    assert {k: v["step"].item() for k, v in adam.state.items()} == state
    assert (stats.updates, stats.rows_fitted, stats.loss, stats.grad_norm) == (0, 0, None, None)


def test_the_stop_token_is_trained(model_dir: Path) -> None:
    policy = load_fixture_policy(model_dir)
    row = rationale(prompt_ids=(1, 2), completion_ids=(50, 256), weight=1.0)
    batch = collate([(row.prompt_ids, row.completion_ids)], policy.pad_id)

    def stop_logprob() -> float:
        with torch.no_grad():
            logprobs, mask = policy.token_logprobs(batch)
        return float(logprobs[mask][-1])

    before = stop_logprob()
    for _ in range(3):
        m_step(policy, sgd(policy, 0.1), [row], dataclasses.replace(SETTINGS, learning_rate=0.1))
    assert stop_logprob() > before + 0.01


def test_gradient_clipping_scales_the_whole_step(model_dir: Path) -> None:
    free, stats = step_of(model_dir, rows())
    assert stats.grad_norm is not None
    clipped, same = step_of(
        model_dir, rows(), dataclasses.replace(SETTINGS, max_grad_norm=stats.grad_norm / 4)
    )
    torch.testing.assert_close(clipped, free / 4, rtol=1e-4, atol=1e-7)
    assert same.grad_norm == pytest.approx(stats.grad_norm)  # reported before clipping


def test_non_finite_gradients_are_thrown_away(model_dir: Path) -> None:
    policy = load_fixture_policy(model_dir)
    before = parameters(policy)
    adam = torch.optim.AdamW(list(policy.trainable().values()), lr=1e-2, weight_decay=0.0)
    stats = m_step(policy, adam, rows([float("inf")] + WEIGHTS[1:]), SETTINGS)
    assert (stats.updates, stats.skipped_nonfinite) == (0, 1)
    assert torch.equal(parameters(policy), before) and not adam.state


def test_passes_reuse_the_samples_without_negatives(model_dir: Path) -> None:
    """Two passes = two steps by hand, the second with weights clamped at 0 and the same denominator."""
    two, stats = step_of(model_dir, rows(), dataclasses.replace(SETTINGS, passes=2))
    policy = load_fixture_policy(model_dir)
    before = parameters(policy)
    optimizer = sgd(policy)
    one = dataclasses.replace(SETTINGS, learning_rate=1.0)
    m_step(policy, optimizer, rows(), one)
    m_step(policy, optimizer, rows([max(w, 0.0) for w in WEIGHTS]), one)
    assert torch.linalg.norm(two - (parameters(policy) - before)) <= 1e-5 * two.norm()
    assert stats.updates == 2 and stats.drift.k3 is not None and stats.drift.k3 > 0


def test_kl_stop_ends_the_passes(model_dir: Path) -> None:
    _, free = step_of(model_dir, rows(), dataclasses.replace(SETTINGS, passes=4))
    _, stopped = step_of(model_dir, rows(), dataclasses.replace(SETTINGS, passes=4, kl_stop=1e-9))
    assert free.updates == 4
    assert stopped.updates == 1  # the check comes before the second pass
    assert 0 < stopped.drift.k3 < free.drift.k3  # type: ignore[operator]


def test_measured_kl_is_k3_over_all_rows(model_dir: Path) -> None:
    policy = load_fixture_policy(model_dir)
    given = [dataclasses.replace(r, reward=float(i % 2)) for i, r in enumerate(rows())]

    def logprobs() -> torch.Tensor:
        with torch.no_grad():
            values, mask = policy.token_logprobs(
                collate([(r.prompt_ids, r.completion_ids) for r in given], policy.pad_id)
            )
        return values[mask].double()

    old = logprobs()
    stats = m_step(policy, sgd(policy), given, SETTINGS, measure_kl=True)
    d = logprobs() - old
    assert stats.drift.k3 == pytest.approx(float((d.exp() - 1 - d).mean()), rel=1e-3)
    assert stats.drift is not None
    sums = [float(part.sum()) for part in d.split([len(r.completion_ids) for r in given])]
    for mean, wanted in ((stats.drift.right, True), (stats.drift.wrong, False)):
        own = [s for s, r in zip(sums, given, strict=True) if r.right == wanted]
        assert mean == pytest.approx(sum(own) / len(own), rel=1e-4)
    assert stats.drift.largest == pytest.approx(float(d.abs().max()), rel=1e-4)


@pytest.mark.parametrize("fail_on_call", [1, 2])
def test_out_of_memory_halves_the_micro_batch_and_nothing_else(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, fail_on_call: int
) -> None:
    whole, _ = step_of(model_dir, rows(), dataclasses.replace(SETTINGS, micro_batch_tokens=31))
    policy = load_fixture_policy(model_dir)
    before, real, calls = parameters(policy), policy.completion_loss, 0

    def failing(pairs, *rest):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == fail_on_call:  # 2: with half of the gradient summed already
            raise torch.OutOfMemoryError("pretended")
        return real(pairs, *rest)

    monkeypatch.setattr(policy, "completion_loss", failing)
    settings = dataclasses.replace(SETTINGS, micro_batch_tokens=31, learning_rate=1.0)
    stats = m_step(policy, sgd(policy), rows(), settings)
    assert torch.linalg.norm(whole - (parameters(policy) - before)) <= 1e-6 * whole.norm()
    assert stats.micro_batch_tokens == 15 and stats.updates == 1


def test_out_of_memory_ends_when_one_row_does_not_fit(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_fixture_policy(model_dir)

    def failing(pairs, *rest):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(policy, "completion_loss", failing)
    with pytest.raises(OutOfMemory, match="max_new_tokens") as raised:
        m_step(policy, sgd(policy), rows(), SETTINGS)
    assert raised.value.exit_code == 71


def test_float16_scaling_changes_no_gradient(model_dir: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain, _ = step_of(model_dir, rows())
    scaled, stats = step_of(model_dir, rows(), scaler=scaler)
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-7)
    assert stats.updates == 1
    _, skipped = step_of(model_dir, rows([float("inf")] + WEIGHTS[1:]), scaler=scaler)
    assert skipped.updates == 0 and skipped.skipped_nonfinite == 1 and scaler.get_scale() == 1024.0


def test_a_loss_that_is_no_number_moves_nothing_in_float16_either(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler looks at gradients alone; here they are finite and the loss is not."""
    real = mstep._Fitter._backward

    def backward(self, weights):  # type: ignore[no-untyped-def]
        _, *sizes = real(self, weights)
        return (float("nan"), *sizes)

    monkeypatch.setattr(mstep._Fitter, "_backward", backward)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    moved, stats = step_of(model_dir, rows(), scaler=scaler)
    assert stats.updates == 0 and stats.skipped_nonfinite == 1 and not moved.any()
    assert scaler.get_scale() == 1024.0 and stats.scale_halvings == 0


# --- E-step -------------------------------------------------------------------------------------------


def test_sampling_leaves_rewards_open_and_records_who_sampled(policy) -> None:  # type: ignore[no-untyped-def]
    problems = [Problem("a", "1 + 1?", "2"), Problem("b", "2 + 2?", "4")]
    draw = sample_rationales(
        policy, make_sampler(policy), problems, Decoding(8), samples=3, seed=0, step=5, policy_step=4
    )
    assert [g.problem_id for g in draw.groups] == ["a", "b"]
    for group, problem in zip(draw.groups, problems, strict=True):
        for k, r in enumerate(group.rationales):
            assert (r.step, r.policy_step, r.sample_index, r.gold) == (5, 4, k, problem.gold)
            assert (r.reward, r.reason, r.weight) == (None, None, None)
            assert r.prompt == f"Question: {problem.question}\nAnswer:"
            assert r.prompt_ids == tuple(policy.tokenizer.encode(r.prompt))
    assert draw.nats > 0


class CountingGrader(Grader):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def submit(self, spec, case):  # type: ignore[no-untyped-def]
        self.asked.append(case.prediction)
        return super().submit(spec, case)


def test_scoring_skips_the_truncated_and_the_known() -> None:
    given = [
        rationale(completion=" #### 2", reward=None, reason=None, sample_index=0),
        rationale(completion=" #### 2", finish_reason="length", reward=None, reason=None, sample_index=1),
        rationale(completion=" #### 3", reward=None, reason=None, sample_index=2),
        rationale(completion=" #### 4", reward=None, reason=None, sample_index=3),
    ]
    known = {
        ("p1", " #### 3"): rationale(completion=" #### 3", reward=0.25, reason="different"),
        ("p1", " #### 4"): rationale(
            completion=" #### 4", reward=0.0, reason="timeout"
        ),  # no verdict: ask again
    }
    done: list[int] = []
    with CountingGrader() as grader:
        scored = Scorer(grader, "gsm8k", known, done.append).scored(given)
    assert grader.asked == [" #### 2", " #### 4"] and done == [1] * 4
    assert [(r.reward, r.reason) for r in scored] == [
        (1.0, "equal"),
        (0.0, "truncated"),
        (0.25, "different"),
        (0.0, "different"),
    ]


def test_grading_begins_while_sampling(policy) -> None:  # type: ignore[no-untyped-def]
    """Each rationale is handed over as it ends, once, and before the last one has: with both engines."""
    problems = [Problem(f"p{i}", f"{i} + 1?", "2") for i in range(3)]
    for engine in ("native", "generate"):
        ended: list[Rationale] = []
        sampler = make_sampler(policy, engine, 8)
        decoding = Decoding(12)
        draw = sample_rationales(
            policy,
            sampler,
            problems,
            decoding,
            samples=4,
            seed=0,
            step=1,
            policy_step=0,
            on_rationale=ended.append,
        )
        rows = flatten(draw.groups)
        assert sorted(map(id, ended)) == sorted(map(id, rows)) and len(rows) == 12
        if engine == "native":
            lengths = [len(r.completion_ids) for r in ended if r.problem_id == ended[0].problem_id]
            assert lengths == sorted(lengths), "the shortest first"
        with CountingGrader() as grader:
            scorer = Scorer(grader, "gsm8k")
            for r in ended[:7]:
                scorer.submit(r)
            early = len(grader.asked)
            scored = scorer.scored(rows)
        stopped = [r for r in rows if r.finish_reason == "stop"]
        assert early == sum(r.finish_reason == "stop" for r in ended[:7])
        assert len(grader.asked) == len(stopped), "none is graded twice"
        assert [(r.problem_id, r.sample_index) for r in scored] == [
            (r.problem_id, r.sample_index) for r in rows
        ]


def groups_of(table: dict[str, list[tuple[float, str]]], **changes: object) -> tuple[Group, ...]:
    return tuple(
        group_rationales(
            rationale(problem_id=pid, sample_index=k, reward=reward, reason=reason, **changes)
            for pid, row in table.items()
            for k, (reward, reason) in enumerate(row)
        )
    )


def test_grader_failures_leave_mean_and_k() -> None:
    groups = groups_of(
        {
            "a": [(1.0, "equal"), (0.0, "different"), (0.0, "timeout"), (0.0, "different")],
            "b": [(0.0, "crash"), (0.0, "memory")],
        }
    )
    rewards, valid = reward_matrix(groups)
    assert rewards.shape == valid.shape == (2, 4)
    assert valid.tolist() == [[True, True, False, True], [False] * 4]
    weighed = weigh(groups, weighting="posterior")
    assert [r.weight for r in weighed[0].rationales] == pytest.approx([3.0, 0.0, 0.0, 0.0])  # mean of three
    assert [r.weight for r in weighed[1].rationales] == [0.0, 0.0]


def test_stale_groups_lose_their_negative_weights() -> None:
    table = {"a": [(1.0, "equal"), (0.0, "different")]}
    fresh = weigh(groups_of(table, policy_step=7), weighting="centered", current_step=7)
    stale = weigh(groups_of(table, policy_step=6), weighting="centered", current_step=7)
    assert [r.weight for r in fresh[0].rationales] == [0.5, -0.5]
    assert [r.weight for r in stale[0].rationales] == [0.5, 0.0]


def test_metrics_of_a_step_by_hand() -> None:
    groups = groups_of(
        {
            "a": [(1.0, "equal"), (0.0, "different")],
            "b": [(1.0, "equal"), (1.0, "equal")],
            "c": [(0.0, "truncated"), (0.0, "timeout")],
        }
    )
    groups = weigh(groups, weighting="posterior")
    metrics = estep_metrics(groups)
    assert metrics["reward"] == pytest.approx(3 / 5)  # the time-out is no verdict
    assert metrics["reward_std"] == pytest.approx(torch.tensor([1.0, 0, 1, 1, 0]).std().item())
    assert metrics["em/frac_mixed"] == pytest.approx(1 / 3)
    assert metrics["em/frac_all_right"] == pytest.approx(1 / 3)
    assert metrics["em/frac_all_wrong"] == pytest.approx(1 / 3)
    assert metrics["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert metrics["completions/mean_length"] == 3.0
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 / 6)
    assert metrics["reasons/failed"] == pytest.approx(1 / 6)
    assert metrics["completions/distinct_right"] == pytest.approx(2 / 3)  # "b" said the same thing twice
    assert mixture_metrics(flatten(groups), 0)["em/weight_max"] == 2.0
    weights = [r.weight for r in flatten(groups) if not r.failed]
    assert weights == [2.0, 0.0, 1.0, 1.0, 0.0]
    assert mixture_metrics(flatten(groups), 0)["em/ess"] == pytest.approx(4**2 / (5 * (4 + 1 + 1)))


def test_mixture_metrics_say_where_rows_come_from_and_how_old_they_are() -> None:
    made = [("sampled", 7), ("sampled", 7), ("sampled", 4), ("text", -1), ("sampled", 1)]
    rows = [rationale(origin=origin, policy_step=step, weight=1.0) for origin, step in made]
    assert mixture_metrics(rows, 7) == {
        "em/ess": 1.0,
        "em/weight_max": 1.0,
        "em/frac_text": 0.2,
        "em/frac_stale": 0.4,  # those drawn at 4 and at 1; the age of text is unknown
        "em/staleness": (0 + 0 + 3 + 6) / 4,
        "em/staleness_max": 6.0,
    }
    later = mixture_metrics([rationale(policy_step=s, weight=1.0) for s in (9, 5)], 7)
    assert (later["em/staleness"], later["em/frac_stale"]) == (2.0, 1.0)  # a later policy is another one too
    unknown = mixture_metrics([rationale(policy_step=-1, weight=0.0)], 7)
    assert set(unknown.values()) == {0.0}
