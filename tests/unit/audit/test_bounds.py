"""What attacks prove: against another library's figures, and against mechanisms whose epsilon is known."""

import json
import subprocess
import sys
from collections.abc import Callable
from math import exp, inf, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld.common import DifferentialPrivacyParameters
from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from fedmpt_core.audit.canaries import bounds as estimators
from fedmpt_core.audit.canaries.bounds import Interval

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "canaries.json").read_text())
DELTA = 1e-5


def scores_of(case: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Two values only: those above the one threshold, and the rest."""
    inside = np.repeat([1.0, 0.0], [case["tp"], case["n_in"] - case["tp"]])
    return inside, np.repeat([1.0, 0.0], [case["fp"], case["n_out"] - case["fp"]])


def upper(hits: int, trials: int, significance: float) -> float:
    """scipy's own Clopper-Pearson."""
    interval = stats.binomtest(hits, trials).proportion_ci(1 - 2 * significance, method="exact")
    return float(interval.high)


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda c: f"{c['tp']}-{c['fp']}-{c['delta']:g}")
def test_bounds_equal_those_of_another_library(case: dict[str, float]) -> None:
    n_in, n_out, tp, fp = (int(case[k]) for k in ("n_in", "n_out", "tp", "fp"))
    m, guesses, delta, significance = n_in + n_out, tp + fp, case["delta"], case["significance"]
    one_run = estimators.one_run_epsilon(m, guesses, tp, delta, significance)
    assert one_run == pytest.approx(case["epsilon_one_run"], abs=2e-5)
    mu = estimators.one_run_mu(m, guesses, tp, significance)
    assert estimators.gaussian_epsilon(mu, delta) == pytest.approx(case["epsilon_one_run_fdp"], abs=2e-5)
    mu = estimators.threshold_mu(*scores_of(case), significance)  # type: ignore[arg-type]
    a, b = upper(fp, n_out, significance / m), upper(n_in - tp, n_in, significance / m)
    # where the bounds on the error rates add up to more than 1 nothing is shown; jax-privacy 2.0.0 takes mu's absolute
    # value there (its pull request 270), so it cannot be asked
    expected = case["epsilon_from_gdp"] if a + b < 1 else 0.0
    assert estimators.gaussian_epsilon(mu, delta) == pytest.approx(expected, abs=2e-5)


def test_the_other_library_was_asked_about_all_kinds_of_outcomes() -> None:
    cases = VECTORS["cases"]
    assert VECTORS["package"] == "jax-privacy"
    assert sum(c["epsilon_one_run"] > 0.1 for c in cases) >= 10
    assert sum(c["epsilon_one_run_fdp"] > 0.1 for c in cases) >= 10
    assert sum(c["epsilon_from_gdp"] > 5 for c in cases) >= 3
    assert any(c["epsilon_one_run"] == 0 for c in cases)


@given(st.floats(0.05, 30), st.floats(1e-9, 0.2))
@settings(max_examples=40, deadline=None)
def test_epsilon_of_a_gaussian_mechanism_is_the_accountant_s(mu: float, delta: float) -> None:
    bound = estimators.gaussian_epsilon(mu, delta)
    loss = GaussianPrivacyLoss(1 / mu)

    def spends(epsilon: float) -> float:
        delta: Any = loss.get_delta_for_epsilon(epsilon)
        return float(delta)

    assert spends(bound) <= delta * (1 + 1e-6)
    if bound:
        assert spends(bound - 1e-6 * max(1, bound)) > delta * (1 - 1e-9)


def test_epsilon_of_mu_at_its_ends() -> None:
    assert estimators.gaussian_epsilon(0.0, DELTA) == 0
    assert estimators.gaussian_epsilon(inf, DELTA) == inf
    assert estimators.gaussian_epsilon(1e-6, DELTA) == 0
    assert estimators.gaussian_epsilon(10.0, 0.6) > 0
    noise = GaussianPrivacyLoss.from_privacy_guarantee(DifferentialPrivacyParameters(4.377, DELTA)).standard_deviation
    assert estimators.gaussian_epsilon(1 / noise, DELTA) == pytest.approx(4.377, abs=1e-3)


def randomised_response(rng: np.random.Generator, m: int, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    coins = rng.random(m) < 0.5
    told = coins ^ (rng.random(m) < 1 / (1 + exp(epsilon)))
    return told + 0.1 * rng.random(m), coins  # ties would be broken by the order of the canaries


def gaussian(rng: np.random.Generator, m: int, mu: float) -> tuple[np.ndarray, np.ndarray]:
    coins = rng.random(m) < 0.5
    return rng.standard_normal(m) + mu * coins, coins


def share_above(draw: Callable[[], float], truth: float, runs: int) -> float:
    return float(np.mean([draw() > truth for _ in range(runs)]))


def test_a_bound_is_above_the_truth_as_seldom_as_it_says() -> None:
    rng = np.random.default_rng(0)

    def one_run() -> float:
        scores, coins = randomised_response(rng, 400, 1.0)
        return estimators.one_run_epsilon(400, *estimators.right_guesses(scores, coins), DELTA, 0.2)

    def curve() -> float:
        scores, coins = gaussian(rng, 400, 1.0)
        return estimators.one_run_mu(400, *estimators.right_guesses(scores, coins), 0.2)

    def threshold() -> float:
        scores, coins = gaussian(rng, 400, 1.0)
        return estimators.threshold_mu(scores[coins], scores[~coins], 0.2)

    # randomised response reaches the bound, so here it is not only safe but sharp: 20 % +- 3 standard errors of 150
    assert 0.05 < share_above(one_run, 1.0, 150) < 0.3
    assert share_above(curve, 1.0, 60) < 0.2
    assert share_above(threshold, 1.0, 150) < 0.2


def unpaid_threshold_mu(scores: np.ndarray, coins: np.ndarray, significance: float) -> float:
    """The broken twin: the best of all thresholds, at the significance of a single one."""
    inside, outside = np.sort(scores[coins]), np.sort(scores[~coins])
    missed, accused = np.searchsorted(inside, scores), len(outside) - np.searchsorted(outside, scores)
    a = stats.beta.isf(significance, accused + 1, len(outside) - accused)
    b = stats.beta.isf(significance, missed + 1, len(inside) - missed)
    return float(np.nanmax(-stats.norm.ppf(a) - stats.norm.ppf(b)))


def test_choosing_the_threshold_without_paying_for_it_would_be_caught() -> None:
    rng = np.random.default_rng(1)
    draws = [gaussian(rng, 400, 0.0) for _ in range(100)]  # scores that say nothing
    paid = [estimators.threshold_mu(scores[coins], scores[~coins], 0.1) for scores, coins in draws]
    assert paid == pytest.approx([max(0.0, unpaid_threshold_mu(*draw, 0.1 / 400)) for draw in draws])
    assert np.mean(np.array(paid) > 0) < 0.1
    assert np.mean([unpaid_threshold_mu(*draw, 0.1) > 0 for draw in draws]) > 0.2


def test_an_attack_that_tells_all_apart_shows_much_and_one_that_guesses_shows_nothing() -> None:
    rng = np.random.default_rng(2)
    scores, coins = gaussian(rng, 1000, 12.0)
    attack = estimators.attack(scores, coins, DELTA)
    assert (attack.canaries, attack.trained_on) == (1000, coins.sum())
    assert attack.one_run > 3.3
    assert attack.gaussian_one_run > 5
    assert attack.bound == attack.gaussian_threshold > 15
    assert attack.auroc == 1
    assert 0.99 < attack.auroc_confidence.low < 1 == attack.auroc_confidence.high
    assert [s.rate for s in attack.sensitivity] == [1, 1]
    blind = estimators.attack(rng.standard_normal(1000), coins, DELTA)
    assert blind.bound == 0
    assert blind.auroc_confidence.low < 0.5 < blind.auroc_confidence.high


def test_bounds_grow_with_what_is_right_and_shrink_with_what_must_hold() -> None:
    bounds = [estimators.one_run_epsilon(1000, 200, right, DELTA, 0.05) for right in (100, 140, 170, 190, 200)]
    assert bounds[0] == 0
    assert bounds == sorted(bounds)
    curve = [estimators.one_run_mu(1000, 200, right, 0.05) for right in (100, 140, 170, 190, 200)]
    assert curve == sorted(curve)
    for bound in (
        lambda s: estimators.one_run_epsilon(1000, 200, 180, DELTA, s),
        lambda s: estimators.one_run_mu(1000, 200, 180, s),
    ):
        assert bound(0.001) < bound(0.01) < bound(0.2)
    assert estimators.one_run_epsilon(1000, 200, 180, 1e-2, 0.05) < estimators.one_run_epsilon(
        1000, 200, 180, 1e-6, 0.05
    )
    # without delta it is one binomial test
    limit = estimators.one_run_epsilon(1000, 200, 180, 1e-300, 0.05)
    assert stats.binom.sf(179, 200, 1 / (1 + exp(-limit))) == pytest.approx(0.05, rel=1e-4)


def test_guesses_are_as_many_whatever_the_scores() -> None:
    coins = np.arange(1000) % 2 == 0
    assert estimators.right_guesses(coins.astype(float), coins) == (200, 200)
    assert estimators.right_guesses(-coins.astype(float), coins) == (200, 0)
    assert estimators.right_guesses(np.zeros(1000), coins) == (200, 100)
    assert estimators.right_guesses(np.array([0.0, 1.0, 2.0, 3.0]), np.array([False, False, True, True])) == (2, 2)


@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(2, 60), st.booleans())
@settings(max_examples=50, deadline=None)
def test_the_area_is_that_of_another_library(seed: int, a: int, b: int, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    inside, outside = rng.standard_normal(a) + 0.5, rng.standard_normal(b)
    if tied:
        inside, outside = inside.round(), outside.round()
    area, interval = estimators.auroc(inside, outside)
    labels = np.repeat([1, 0], [a, b])
    assert area == pytest.approx(roc_auc_score(labels, np.concatenate([inside, outside])), abs=1e-12)
    assert 0 <= interval.low <= area <= interval.high <= 1
    assert interval.low < interval.high


def test_the_area_s_interval_covers_the_truth() -> None:
    rng, truth = np.random.default_rng(3), float(stats.norm.cdf(1 / 2**0.5))
    intervals = [estimators.auroc(rng.standard_normal(60) + 1, rng.standard_normal(50))[1] for _ in range(400)]
    covered = np.mean([i.low <= truth <= i.high for i in intervals])
    assert 0.91 < covered < 0.98


def test_true_positives_at_a_rate_are_counted_above_the_threshold() -> None:
    outside, inside = np.arange(500.0), np.array([499.5] * 30 + [496.5] * 20 + [490.0] * 50)
    few = estimators.sensitivity(inside, outside, 0.01)
    assert (few.rate, few.false_positives) == (0.5, 5)  # 495..499 are accused, so the threshold is 494
    none = estimators.sensitivity(inside, outside, 0.001)
    assert (none.rate, none.false_positives) == (0.3, 0)
    exact = stats.binomtest(50, 100).proportion_ci(0.95, method="exact")
    assert (few.confidence.low, few.confidence.high) == pytest.approx((exact.low, exact.high))
    assert estimators.clopper_pearson(0, 10, 0.05).low == 0
    assert estimators.clopper_pearson(10, 10, 0.05).high == 1


def test_the_mu_test_covers_the_truth_and_sees_half_the_noise() -> None:
    rng, hits = np.random.default_rng(4), 0
    for _ in range(200):
        scores, coins = gaussian(rng, 1000, 1.3)
        interval = estimators.mu_interval(7 + 5 * scores[coins], 7 + 5 * scores[~coins], 0.05)
        hits += interval.low <= 1.3 <= interval.high
    assert hits >= 180
    scores, coins = gaussian(rng, 1000, 2.6)
    assert estimators.mu_interval(scores[coins], scores[~coins], 0.001).low > 2.3
    one = np.ones(5)
    assert estimators.mu_interval(one, one, 0.05) == Interval(0, inf)
    assert estimators.mu_interval(2 * one, one, 0.05) == Interval(inf, inf)


def subsampled(
    rng: np.random.Generator,
    *,
    rate: float,
    std: float,
    length: float = 1.0,
    fixed: bool = False,
    repeats: bool = False,
) -> tuple[np.ndarray, np.ndarray, float]:
    """40 steps of 1000 canaries: sums of those trained on and of the others, mean square of the others."""
    coins = rng.random(1000) < 0.5
    noise = np.repeat(rng.normal(0, std, (1000, 1)), 40, 1) if repeats else rng.normal(0, std, (1000, 40))
    taken = (rng.random((1000, 1)) < rate) if fixed else (rng.random((1000, 40)) < rate)
    seen = noise + length * taken * coins[:, None]
    return seen[coins].sum(1), seen[~coins].sum(1), float(np.mean(seen[~coins] ** 2))


def noise_of(scores: tuple[np.ndarray, np.ndarray, float], significance: float = 0.05) -> Interval:
    return estimators.noise_interval(*scores, steps=40, rate=0.25, std=1.2, significance=significance)


def test_the_noise_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(5)
    intervals = [noise_of(subsampled(rng, rate=0.25, std=1.2)) for _ in range(200)]
    assert np.mean([i.low <= 1 <= i.high for i in intervals]) >= 0.93
    assert max(i.high - i.low for i in intervals) < 0.4


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"rate": 0.25, "std": 0.6}, 0.5),
        ({"rate": 0.25, "std": 1.2, "length": 3.0}, 1 / 3),
        ({"rate": 0.75, "std": 1.2}, 1 / 3),
        ({"rate": 0.25, "std": 2.4}, 2.0),
    ],
)
def test_the_noise_interval_finds_what_is_wrong(settings: dict[str, float], factor: float) -> None:
    interval = noise_of(subsampled(np.random.default_rng(6), **settings), 1e-4)  # type: ignore[arg-type]
    assert interval.low <= factor <= interval.high
    assert not interval.low <= 1 <= interval.high


def test_the_noise_interval_at_its_ends() -> None:
    zero = np.zeros(10)
    assert noise_of((zero + 10, zero, 0.0)) == Interval(0, 0)
    assert noise_of((zero - 1, zero, 1.0)) == Interval(inf, inf)
    assert noise_of((zero, zero, 1.0)) == Interval(inf, inf)


def test_noise_that_repeats_is_not_independent() -> None:
    rng = np.random.default_rng(7)
    _, outside, square = subsampled(rng, rate=0.25, std=1.2)
    ratio, allowed = estimators.steps_ratio(outside, square, 40, 1e-4)
    assert allowed.low < ratio < allowed.high
    _, outside, square = subsampled(rng, rate=0.25, std=1.2, repeats=True)
    assert estimators.steps_ratio(outside, square, 40, 1e-4)[0] > 30
    assert estimators.steps_ratio(np.zeros(3), 0.0, 40, 1e-4)[0] == inf


def test_impossible_arguments_are_sentences() -> None:
    coins = np.array([True, True, False, False])
    with pytest.raises(ValueError, match="3 canaries were trained on and 1 were not: plant more"):
        estimators.attack(np.zeros(4), np.array([True, True, True, False]), DELTA)
    with pytest.raises(ValueError, match="a score is NaN or infinite"):
        estimators.attack(np.array([0, 1, 2, np.nan]), coins, DELTA)
    with pytest.raises(ValueError, match=r"give \(m,\) and \(m,\) bool"):
        estimators.attack(np.zeros(4), coins.astype(int), DELTA)
    with pytest.raises(ValueError, match=r"significance=0\.7 is out of range"):
        estimators.attack(np.zeros(4), coins, DELTA, 0.7)
    with pytest.raises(ValueError, match="delta=0 is out of range"):
        estimators.attack(np.zeros(4), coins, 0)
    with pytest.raises(ValueError, match="right=5 of guesses=4"):
        estimators.one_run_epsilon(10, 4, 5, DELTA, 0.05)
    with pytest.raises(ValueError, match="mu=-1"):
        estimators.gaussian_epsilon(-1, DELTA)


def test_an_auditor_needs_no_torch_for_it() -> None:
    code = "import sys, fedmpt_core.audit.canaries.bounds; sys.exit('torch' in sys.modules or 'opacus' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_randomised_response_is_measured_at_its_epsilon() -> None:
    """Ten thousand canaries that all are guessed: the bound closes in on log 3."""
    rng = np.random.default_rng(8)
    scores, coins = randomised_response(rng, 10_000, log(3))
    guesses, right = estimators.right_guesses(scores, coins)
    assert log(3) - 0.15 < estimators.one_run_epsilon(10_000, guesses, right, 1e-9, 0.05) < log(3) + 0.1
