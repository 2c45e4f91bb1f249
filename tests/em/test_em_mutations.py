"""Deliberate errors put into ``empg_lite/em.py`` and ``reference.py``: each must make its oracle fail.

A mutation replaces one text of the source. The mutated functions' code is then put into the functions that
the oracles call, so whoever imported them meets the error; monkeypatch puts the right code back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import reference
import test_em as properties
import test_em_oracles as oracles
from enumerable import BINARY, GRADED

from empg_lite import em

Row = tuple[int, str, str, str, list[Callable[[], None]]]


def mutate(module: ModuleType, old: str, new: str, patch: pytest.MonkeyPatch) -> None:
    """Give the functions of ``module`` the code they have where ``old`` reads ``new``."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{source.count(old)} places hold: {old}"
    mutant: dict[str, Any] = {}
    exec(compile(source.replace(old, new), "mutant", "exec", dont_inherit=True), mutant)
    for name, function in vars(module).items():
        if inspect.isfunction(function) and function.__module__ == module.__name__:
            patch.setattr(inspect.unwrap(function), "__code__", inspect.unwrap(mutant[name]).__code__)


def each(oracle: Callable[..., None], *arguments: Any) -> list[Callable[[], None]]:
    return [partial(oracle, *(a if isinstance(a, tuple) else (a,))) for a in arguments]


def exact(*weightings: str) -> list[Callable[[], None]]:
    return each(properties.test_weights_match_exact_arithmetic_and_each_group_alone, *weightings)


def no_signal(*weightings: str) -> list[Callable[[], None]]:
    return each(oracles.test_equal_rewards, *((w, 3) for w in weightings))


POLICY = [oracles.test_torch_policy_is_the_reference_policy]
SCORES = [oracles.test_scores_sum_to_zero]
FISHER = each(oracles.test_fisher_identity, BINARY, GRADED)
ASCENT = each(oracles.test_raw_loo_and_centered_ascend_j, (BINARY, 2), (GRADED, 3))
MIXTURE = each(oracles.test_posterior_ascends_a_mixture_of_pass_at_k, 2, 3)
SPREAD = each(oracles.test_standardized_and_scaled_negatives, 2, 3)
LENGTHS = each(oracles.test_normalizations, BINARY, GRADED)
EM = each(oracles.test_em_never_lowers_log_success, BINARY, GRADED)
TABULAR = [oracles.test_tabular_m_step]
ALL_RIGHT = each(oracles.test_all_right_under_posterior_weighs_k_times_one_minus_beta, (3, 0.5), (3, 1.0))
MICRO = [properties.test_micro_batches_and_row_order_change_nothing]
SKIP = [properties.test_zero_weight_rows_are_skipped_at_no_cost_to_the_math]
PADDING = [properties.test_garbage_outside_the_mask_stays_outside]
SCALE = each(oracles.test_weights_scale_and_shift, 2, 5)
FLOW = [oracles.test_fixed_data_limit_is_water_filling]
UNBOUNDED = [oracles.test_zero_sum_weights_are_unbounded_on_fixed_data]
KIMI = [oracles.test_kimi_regulariser_bounds_the_same_bandit]
BOUNDS = [oracles.test_surrogate_bounds_the_improvement]
HINT = [oracles.test_hint_example]
LOOPS = [properties.test_loss_and_gradient_match_triple_loops]
STOP = [properties.test_the_stop_token_is_trained]
FAILED = [properties.test_a_failed_row_counts_neither_in_the_mean_nor_in_k]
K3 = [properties.test_k3_is_the_kl_of_old_from_new]
ESS = [properties.test_effective_sample_size]


def first_step(method: str) -> list[Callable[[], None]]:
    return each(oracles.test_first_step_equals_the_methods_with_ratios, (method, BINARY), (method, GRADED))


DR_GRPO, CISPO, TAPER, TO_KIMI, KL = map(first_step, ("dr_grpo", "cispo", "taper", "kimi", "kl"))

# Places of em.py
LAST = " & (mask.cumsum(1) < mask.sum(1)[:, None])"
TRAINED = "mask & (weights != 0)[:, None]"
SUM = "torch.where(trained, logprobs, 0.0).sum(1)"
PER_ROW = SUM + " / mask.sum(1).clamp(min=1)"
WEIGHT = "weights.to(logprobs.dtype)"
OVER_Z = "row_logprobs).sum() / denominator"
MEAN = ".sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)"
SHARE = "share / _mean(share, valid) - baseline"
NONE = " - baseline, 0.0)"
LOO = "weights * n / (n - 1).clamp(min=1)"
STD = "_mean(weights.square(), valid).sqrt()"
SAMPLE_STD = "(weights.square().sum(1, True) / (valid.sum(1, True) - 1).clamp(min=1)).sqrt()"
CLAMP = "weights.clamp(min=0.0) if drop_negative else weights"
GAP = "gap = rewards - rewards.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)"
CENTER = "return gap - _mean(gap, valid)"

#: Item (0: none of the fifteen), the error in words, right text, wrong text, oracles that must all fail.
IN_THE_PACKAGE: list[Row] = [
    (1, "the last token masked away", TRAINED, TRAINED + LAST, SCORES + STOP),
    (1, "a mean per response", SUM, PER_ROW, SCORES + FISHER + LOOPS),
    (2, "the sign of the loss", "return -(weights", "return (weights", FISHER + EM + BOUNDS),
    (2, "weights taken for choices", WEIGHT, "(weights > 0)", FISHER + EM),
    (3, "K for K - 1 in loo", LOO, "weights", ASCENT + SCALE),
    (3, "loo upside down", LOO, "weights * (n - 1) / n", ASCENT + SCALE),
    (3, "a mean over the batch", MEAN, ".sum() / valid.sum().clamp(min=1)", ASCENT + MIXTURE),
    (3, "the best for the mean", CENTER, "return gap", ASCENT + exact("centered")),
    (3, "raw counts successes", "    weights = rewards\n", "    weights = (rewards > 0) * 1.0\n", ASCENT[1:]),
    (3, "weights clamped unasked", CLAMP, "weights.clamp(min=0.0)", ASCENT + SPREAD),
    (4, "a baseline in all-wrong groups", NONE, " - baseline, -baseline)", MIXTURE + ALL_RIGHT),
    (4, "no baseline", NONE, ", 0.0)", MIXTURE + ALL_RIGHT + FLOW),
    (4, "weights that sum to 1", SHARE, "share / share.sum(1, True) - baseline", MIXTURE + TABULAR + HINT),
    (4, "the best for the mean", SHARE, "share - baseline", MIXTURE + HINT),
    (5, "sample std", STD, SAMPLE_STD, SPREAD),
    (5, "a floor under the std", "weights / std, 0.0", "weights / (std + 1e-4), 0.0", SPREAD + SCALE),
    (5, "negatives kept", CLAMP, "weights", SPREAD),
    (6, "normalizations swapped", 'if normalization == "tokens"', 'if normalization != "tokens"', LENGTHS),
    (6, "a mean per response", SUM, PER_ROW, LENGTHS),
    (6, "rows without a length", "len(lengths) * max_new_tokens", "len(lengths)", LENGTHS),
    (7, "the likelihood lowered", "return -(weights", "return (weights", EM),
    (7, "likelihood, not its log", "* row_logprobs)", "* row_logprobs.exp())", EM + TABULAR),
    (7, "rewards squared", "share = rewards / top", "share = (rewards / top).square()", TABULAR + HINT),
    (8, "rounding of the mean", GAP, "gap = rewards", no_signal("centered", "loo", "standardized")),
    (8, "a baseline in all-wrong groups", NONE, " - baseline, -baseline)", ALL_RIGHT),
    (8, "all-right skipped", "(top > 0,", "((share != 1).any(1, True),", no_signal("posterior") + ALL_RIGHT),
    (8, "no signal is NaN", "where(std > 0,", "where(std >= 0,", no_signal("standardized")),
    (9, "a mean per micro-batch", OVER_Z, "row_logprobs).sum() / mask.sum()", MICRO + SKIP + LOOPS),
    (9, "skipped rows leave Z", OVER_Z, "row_logprobs).sum() / trained.sum()", MICRO + SKIP + LOOPS),
    (9, "a mean over rows", OVER_Z, "row_logprobs).mean() / denominator", MICRO + SKIP + LOOPS),
    (9, "0 times infinity", SUM, "(logprobs * trained).sum(1)", PADDING),
    (9, "rows of weight 0 multiplied", TRAINED, "mask", PADDING),
    (9, "padding trained", TRAINED, "(weights != 0)[:, None].expand_as(mask)", PADDING + LOOPS),
    (10, "a failed row in K", "n = valid.sum(1, keepdim=True)", "n = 0 * valid + valid.shape[1]", FAILED),
    (10, "tiny rewards underflow", "share = rewards / top", "share = rewards", SCALE),
    (10, "raw for posterior", SHARE, "rewards - baseline", SCALE),
    (11, "the baseline added", NONE, " + baseline, 0.0)", FLOW + MIXTURE),
    (11, "positive for zero-sum weights", CLAMP, "weights.clamp(min=0.0)", UNBOUNDED),
    (12, "loo's scale", CENTER, CENTER.replace("gap -", "20 / 19 * gap -"), KIMI),
    (13, "negatives halved", WEIGHT, "torch.where(weights < 0, weights / 2, weights)", DR_GRPO + CISPO),
    (13, "negatives dropped", WEIGHT, "weights.clamp(min=0)", DR_GRPO + CISPO + TAPER + TO_KIMI + KL),
    (14, "the sign of a weight lost", WEIGHT, "weights.abs()", BOUNDS),
    (14, "negatives clamped in the loss", WEIGHT, "weights.clamp(min=0)", BOUNDS + LOOPS),
    (15, "ESS of the number of rows", ".sum()) * w.numel()", ".sum())", HINT + ESS),
    (15, "ESS without the square", "float(w.sum()) ** 2", "float(w.sum())", HINT + ESS),
    (0, "KL the other way round", "logprobs - logprobs_old, 0", "logprobs_old - logprobs, 0", K3),
    (0, "k3 without its 1", "torch.expm1(d) - d", "torch.exp(d) - d", K3),
    (0, "k1 for k3", "torch.expm1(d) - d", "-d", K3),
    (0, "k3 per row", "max(int(mask.sum()), 1)", "len(mask)", K3),
]

# Places of reference.py
MIXED = "if mean > 0 and variance > 0 else"
NEGATIVES = "w = r - mean if r > mean else Fraction(eta) * (r - mean)"
POSITIVES = "w = Fraction(eta) * (r - mean) if r > mean else r - mean"
PULL = "weights - tau * (logp - np.log(mu))"
TAPERED = "w if w >= 0 else w * min(1.0, math.exp(sequence))"

#: What only the reference offers: neighboring estimators, limits, closed forms.
IN_THE_REFERENCE: list[Row] = [
    (1, "scores without their mean", "phi[token] - mean_phi", "phi[token]", POLICY),
    (4, "all-right groups kept", MIXED, "if mean > 0 else", MIXTURE),
    (5, "positives scaled", NEGATIVES, POSITIVES, SPREAD),
    (5, "variance for std", "math.sqrt(s / k * (1 - s / k))", "(s / k * (1 - s / k))", SPREAD),
    (6, "no mean per response", "/ (len(STRINGS[i]) if sequence_mean else 1)", "", LENGTHS),
    (11, "no normalizer", "pull - np.exp(logp) * pull.sum(-1, keepdims=True)", "pull", FLOW),
    (11, "no water level", "np.maximum(pull - low, 0)", "np.maximum(pull, 0)", FLOW),
    (12, "half the penalty", PULL, "weights - tau / 2 * (logp - np.log(mu))", KIMI),
    (12, "a pull to the uniform", PULL, "weights - tau * logp", KIMI),
    (13, "clipped at ratio 1", "ratio > 1.2 if w > 0", "ratio >= 1.0 if w > 0", DR_GRPO),
    (13, "a ratio that vanishes", "else w * ratio", "else w * (ratio - 1)", DR_GRPO),
    (13, "cap 0.2 for 1.2", "w * min(ratio, 1.2)", "w * min(ratio, 0.2)", CISPO),
    (13, "negatives dropped", TAPERED, "max(w, 0.0)", TAPER),
    (13, "a taper on first passes too", TAPERED, "w if w >= 0 else w / 2", TAPER),
    (13, "a penalty that stays", "w - 0.5 * sequence", "w - 0.5 * (sequence + 1)", TO_KIMI),
    (13, "k3's gradient without its 1", "w - (ratio - 1)", "w - ratio", KL),
]

TABLE = [(em, *row) for row in IN_THE_PACKAGE] + [(reference, *row) for row in IN_THE_REFERENCE]


@pytest.mark.parametrize(
    ("module", "old", "new", "must_fail"),
    [pytest.param(row[0], *row[3:], id=f"{row[1]}: {row[2]}") for row in TABLE],
)
def test_a_mutation_dies(
    module: ModuleType,
    old: str,
    new: str,
    must_fail: list[Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutate(module, old, new, monkeypatch)
    for oracle in must_fail:
        with pytest.raises(AssertionError) as failure:
            oracle()
        # at an oracle, not at an assertion of the package
        tests = Path(__file__).parents[1]
        assert Path(failure.traceback[-1].path).is_relative_to(tests)


def test_every_item_has_a_mutation() -> None:
    assert {row[1] for row in TABLE} == {0, *range(1, 16)}


def test_a_neutral_mutation_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the machinery itself breaks nothing, and what it broke is put back."""
    with monkeypatch.context() as patch:
        mutate(em, OVER_Z, f"1.0 * {OVER_Z}", patch)
        for oracle in SCORES + FISHER + MICRO:
            oracle()
        mutate(em, OVER_Z, f"1.1 * {OVER_Z}", patch)
        with pytest.raises(AssertionError):
            FISHER[0]()
    FISHER[0]()
