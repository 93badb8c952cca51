"""Epsilon against closed forms, a second accountant, and the numbers that the documents quote."""

import math
import subprocess
import sys
from functools import reduce

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy.optimize import root_scalar
from scipy.stats import norm

from fedmpt_core.privacy.accounting.calibration import calibrate
from fedmpt_core.privacy.accounting.epsilon import (
    AGREEMENT,
    ROUNDING,
    AccountingError,
    Epsilons,
    Steps,
    cross_checked,
    epsilon,
    grid_of,
    privacy_profile,
    replace_one,
)
from fedmpt_core.privacy.accounting.grid import Pair, composed, one_step


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Balle & Wang 2018, theorem 8, for a sensitivity of `mu` standard deviations."""
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    return root_scalar(lambda e: gaussian_delta(e, mu) - delta, bracket=(0, mu * mu / 2 + 20 * mu), xtol=1e-10).root


ALMOST_ALL = 1 - 2.0**-53  # the largest rate of steps that are composed one by one: at 1 they are one mechanism


def test_no_step_costs_nothing() -> None:
    for history in ([], [Steps(0.1, 1.0, 0), Steps(1.0, 2.0, 0)]):
        assert epsilon(history, 1e-5) == 0.0
        assert cross_checked(history, 1e-5) == Epsilons(0.0, 0.0, 0.0, 0.0)
        assert privacy_profile(history, [0.0, 1.0]) == [0.0, 0.0]


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize(("noise", "count"), [(0.1, 1), (1.0, 1), (3.0, 50), (40.0, 1000), (500.0, 10**5)])
def test_unsampled_steps_agree_with_the_closed_form(noise: float, count: int, delta: float) -> None:
    exact = gaussian_epsilon(math.sqrt(count) / noise, delta)
    assert exact <= epsilon([Steps(1.0, noise, count)], delta) <= exact + 5e-4


@pytest.mark.parametrize(("delta", "count"), [(1e-5, 200), (1e-9, 5000), (1e-7, 10**5)])
@pytest.mark.parametrize("mu", [0.1, 0.7, 3.0])
def test_steps_composed_on_the_grid_stay_above_the_closed_form(mu: float, count: int, delta: float) -> None:
    exact = gaussian_epsilon(mu, delta)
    assert exact <= epsilon([Steps(ALMOST_ALL, math.sqrt(count) / mu, count)], delta) <= exact + 5e-3


@pytest.mark.slow
def test_what_is_kept_of_delta_covers_rounding_where_it_was_worst() -> None:
    mu, count = 3.0, 10**6
    at = mu * mu / 2 + 6.5 * mu
    profile = privacy_profile([Steps(ALMOST_ALL, math.sqrt(count) / mu, count)], [at])[0]
    assert gaussian_delta(at, mu) <= profile - ROUNDING * count / 2  # half of what is kept would do


def mixture_epsilon(left: tuple[float, float], right: tuple[float, float], noise: float, delta: float) -> float:
    """By sums: epsilon of a step whose output is around 0 or, with a probability, around a value; either way."""
    x = np.linspace(-1 - 12 * noise, 1 + 12 * noise, 60_001)

    def density(rate: float, value: float) -> np.ndarray:
        return (1 - rate) * norm.pdf(x, scale=noise) + rate * norm.pdf(x, loc=value, scale=noise)

    p, q = density(*left) * (x[1] - x[0]), density(*right) * (x[1] - x[0])

    def one(a: np.ndarray, b: np.ndarray) -> float:
        def over(e: float) -> float:
            return float(np.maximum(a - math.exp(e) * b, 0).sum()) - delta

        return root_scalar(over, bracket=(0, 100)).root if over(0) > 0 else 0.0

    return max(one(p, q), one(q, p))


@pytest.mark.parametrize(("rate", "noise", "delta"), [(0.1, 1.0, 1e-5), (0.5, 0.7, 1e-3), (0.01, 0.5, 1e-6)])
def test_one_sampled_step_agrees_with_a_sum(rate: float, noise: float, delta: float) -> None:
    found = cross_checked([Steps(rate, noise, 1)], delta)
    assert found.pld == pytest.approx(mixture_epsilon((rate, 1.0), (0.0, 0.0), noise, delta), abs=2e-3)
    assert found.replace_one == pytest.approx(mixture_epsilon((rate, 1.0), (rate, -1.0), noise, delta), abs=2e-3)


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0.05, 0.95), st.floats(0.5, 2), st.floats(-1, 1), st.floats(-1, 1), st.sampled_from([1e-1, 1e-2, 1e-4])
)
def test_no_replacement_in_a_step_costs_more_than_replace_one(
    rate: float, noise: float, old: float, new: float, delta: float
) -> None:
    worst = mixture_epsilon((rate, 1.0), (rate, -1.0), noise, delta)
    assert mixture_epsilon((rate, old), (rate, new), noise, delta) <= worst + 1e-6


# noise, rate, steps, delta, PLD, PRV, replace one; 256/60000 is the batch of the common MNIST run
TABLE = [
    (1.0, 0.032, 320, 1e-5, 3.711, 3.721, 5.583),
    (1.0, 0.064, 800, 1e-4, 11.336, 11.347, 20.000),
    (2.0, 0.064, 800, 1e-4, 3.739, 3.749, 7.800),
    (1.1, 256 / 60000, 14040, 1e-5, 2.380, 2.390, 4.217),
    (5.0, 0.5, 200, 1e-4, 5.874, 5.885, 13.793),
    (0.5, 0.1, 1000, 1e-4, 116.445, 116.459, 160.979),
    (4.0, 0.01, 10, 1e-5, 0.024, 0.034, 0.046),
    (1.0, 1.0, 1, 1e-5, 4.377, 4.387, 9.997),
]


@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "pld", "prv", "replace"), TABLE)
def test_the_quoted_numbers(
    noise: float, rate: float, steps: int, delta: float, pld: float, prv: float, replace: float
) -> None:
    found = cross_checked([Steps(rate, noise, steps)], delta)
    assert (found.pld, found.prv, found.replace_one) == pytest.approx((pld, prv, replace), abs=2e-3)
    assert found.rdp >= found.pld


def random_history(rng: np.random.Generator) -> list[Steps]:
    """One to three kinds; every fourth holds unsampled steps."""
    history = [
        Steps(float(10 ** rng.uniform(-3, 0)), float(10 ** rng.uniform(-0.1, 1)), int(10 ** rng.uniform(0, 3)))
        for _ in range(rng.integers(1, 4))
    ]
    return history + [Steps(1.0, float(rng.uniform(3, 30)), int(rng.integers(1, 10)))] * int(rng.integers(4) == 0)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "seed"), [(12, 6), pytest.param(50, 5, marks=pytest.mark.thorough)])
def test_two_accountants_agree_on_random_histories(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)  # one that covers small and large epsilon
    found: list[Epsilons] = []
    while len(found) < count:
        history, delta = random_history(rng), float(10 ** rng.uniform(-7, -3))
        try:
            if epsilon(history, delta) > 15:
                continue  # PRV's memory grows with epsilon; the table above has 116
        except AccountingError:
            continue
        found.append(cross_checked(history, delta))
    assert all(abs(e.pld - e.prv) <= AGREEMENT for e in found)
    assert all(e.rdp >= e.pld - 1e-3 and e.replace_one >= e.pld - 1e-3 for e in found)
    assert min(e.pld for e in found) < 0.1 and max(e.pld for e in found) > 10


def by_grid(history: list[Steps], delta: float, interval: float, pairs: tuple[Pair, ...]) -> float:
    spread = max(1e-3, math.sqrt(sum(s.count * (s.sample_rate / s.noise_multiplier) ** 2 for s in history)))
    losses = [
        composed([(one_step(s.sample_rate, s.noise_multiplier, pair, interval), s.count) for s in history], spread)
        for pair in pairs
    ]
    assert all(abs(loss.get_delta_for_epsilon(loss.get_epsilon_for_delta(delta)) / delta - 1) < 1e-9 for loss in losses)
    return max(loss.get_epsilon_for_delta(delta) for loss in losses)


@pytest.mark.parametrize("delta", [1e-3, 1e-6])
@pytest.mark.parametrize(
    "history",
    [
        [Steps(0.032, 1.0, 320)],
        [Steps(0.1, 0.5, 1000)],
        [Steps(0.5, 5.0, 200)],
        [Steps(256 / 60000, 1.1, 14040)],
        [Steps(0.1, 0.15, 1)],
        [Steps(1.0, 0.4, 3)],
        [Steps(1.0, 20.0, 4), Steps(0.05, 1.3, 60), Steps(0.01, 0.9, 100)],
    ],
)
def test_the_fast_accountant_is_the_library_to_the_last_digits(history: list[Steps], delta: float) -> None:
    parts = [
        from_gaussian_mechanism(s.noise_multiplier, sampling_prob=s.sample_rate, value_discretization_interval=2e-3)
        for s in history
    ]
    whole = reduce(lambda a, b: a.compose(b), (p.self_compose(s.count) for p, s in zip(parts, history, strict=True)))
    slow = whole.get_epsilon_for_delta(delta)
    assert by_grid(history, delta, 2e-3, ("remove", "add")) == pytest.approx(slow, abs=1e-5)


@pytest.mark.parametrize(("rate", "noise", "count"), [(0.032, 1.0, 320), (0.1, 0.5, 1000), (0.5, 5.0, 200)])
def test_the_fast_accountant_replaces_a_record_as_the_library_does(rate: float, noise: float, count: int) -> None:
    history = [Steps(rate, noise, count)]
    assert by_grid(history, 1e-5, 1e-3, ("replace",)) == pytest.approx(replace_one(history, 1e-5), abs=1e-3)


@pytest.mark.parametrize("interval", [1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("mu", [0.3, 2.0])
def test_the_fast_accountant_is_never_below_the_closed_form(mu: float, interval: float) -> None:
    history = [Steps(ALMOST_ALL, math.sqrt(50) / mu, 20), Steps(1.0, math.sqrt(50) / mu, 30)]
    assert gaussian_epsilon(mu, 1e-6) <= by_grid(history, 1e-6, interval, ("remove", "add"))


def kinds(count: int) -> list[Steps]:
    rng = np.random.default_rng(count)
    return [
        Steps(float(rng.uniform(0.005, 0.1)), float(rng.uniform(0.8, 3)), int(rng.integers(5, 100)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("history", [kinds(200), kinds(1000), [Steps(1e-6, 0.5, 100_000)], [Steps(1e-5, 0.4, 10**6)]])
def test_no_history_takes_more_work_than_a_second_or_two(history: list[Steps]) -> None:
    grid = grid_of(tuple((s.sample_rate, s.noise_multiplier, s.count) for s in history), 1e-5)
    assert grid.points <= (60_000 if grid.by_library else 400_001)


@pytest.mark.parametrize("noise", [1e7, 1e160, 1.7e308])
def test_more_noise_than_has_a_square_is_priced_as_less(noise: float) -> None:
    """A ledger that somebody hands to an auditor may say anything."""
    assert epsilon([Steps(0.5, noise, 10)], 1e-5) == epsilon([Steps(0.5, 1e6, 10)], 1e-5)


def test_a_long_ledger_costs_what_a_fine_grid_says_and_never_less() -> None:
    for history, finer in ((kinds(200), 1e-3), ([Steps(1e-6, 0.5, 100_000)], 1.5e-5)):
        fast = epsilon(history, 1e-5)
        fine = by_grid(history, 1e-5, finer, ("remove", "add"))
        assert fine - 1e-6 <= fast <= fine + max(0.005, 0.002 * fine)


def test_order_and_splitting_do_not_matter() -> None:
    whole = [Steps(0.05, 1.3, 60), Steps(1.0, 20.0, 4), Steps(0.01, 0.9, 100)]
    split = [Steps(0.01, 0.9, 10)] * 10 + [Steps(1, 20, 1)] * 4 + [Steps(0.05, 1.3, 30), Steps(0.3, 1, 0)] * 2
    assert epsilon(split, 1e-5) == epsilon(whole, 1e-5)
    assert epsilon(iter(whole), np.float64(1e-5)) == epsilon(whole, 1e-5)


def test_three_jobs_cost_less_together_than_their_sum() -> None:
    jobs = [Steps(0.032, 1.0, 320), Steps(0.064, 1.2, 300), Steps(0.02, 0.8, 200)]
    assert max(epsilon([job], 1e-5) for job in jobs) < epsilon(jobs, 1e-5) < sum(epsilon([job], 1e-5) for job in jobs)


@settings(max_examples=25, deadline=None)
@given(st.floats(-4, 0), st.floats(-0.2, 1.5), st.integers(1, 20_000), st.integers(1, 3), st.floats(-7, -2))
def test_more_steps_never_cost_less(rate: float, noise: float, count: int, more: int, delta: float) -> None:
    def spent(steps: int) -> float:
        try:
            return epsilon([Steps(10**rate, 10**noise, steps)], 10**delta)
        except AccountingError:
            return math.inf

    assert spent(count + more) >= spent(count) - 1e-4  # the grid follows the number of steps


@pytest.mark.parametrize(
    ("rate", "noise", "count", "grid"), [(0.02, 1.0, 500, 1e-4), (0.001, 1.0, 20_000, 2e-5), (0.01, 4.0, 10, 1e-4)]
)
def test_a_much_finer_grid_says_the_same(rate: float, noise: float, count: int, grid: float) -> None:
    one = from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=grid)
    fine = one.self_compose(count).get_epsilon_for_delta(1e-5)
    assert -1e-6 < epsilon([Steps(rate, noise, count)], 1e-5) - fine < 1e-3


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([Steps(1e-6, 1e6, 10)], 0.0),
        ([Steps(1.0, 1e8, 10)], 0.0),
        ([Steps(1e-12, 1.0, 1000)], 0.0),
        ([Steps(1.0, 1e200, 1)], 0.0),
        ([Steps(0.1, 0.05, 1)], 271.161),
        ([Steps(1.0, 0.1, 1)], 91.817),
    ],
)
def test_extreme_noise_and_rates(history: list[Steps], expected: float) -> None:
    assert epsilon(history, 1e-5) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("history", "delta", "says"),
    [
        ([Steps(0.1, 1.0, 10**8)], 1e-3, "100000000 steps are more than"),
        (
            [Steps(0.5, 0.5, 100_000)],
            1e-5,
            "noise_multiplier=0.5 have an expected loss of .*, 200 is",
        ),
        ([Steps(0.5, 1e-4, 1)], 1e-5, "noise_multiplier=0.0001 .* is below 0.001"),
        ([Steps(1.0, 1e-200, 1)], 1e-5, "is below 0.001"),
        ([Steps(1.0, 0.001, 5)], 1e-5, "noise_multiplier=0.000447 .* is below 0.001"),
        ([Steps(0.001, 5.0, 100_000)], 1e-9, "delta=1e-09 is below 1e-08"),
        ([Steps(1.0, 5.0, 1)], 9e-12, "delta=9e-12 is below 1e-11, the least"),
    ],
)
def test_what_cannot_be_computed_is_refused(history: list[Steps], delta: float, says: str) -> None:
    with pytest.raises(AccountingError, match=says):
        epsilon(history, delta)


def test_a_library_that_fails_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("deltas are not in non-increasing order")

    monkeypatch.setattr("dp_accounting.pld.privacy_loss_distribution.from_gaussian_mechanism", broken)
    with pytest.raises(AccountingError, match=r"dp-accounting \d.* fails on 7 steps .*non-increasing"):
        epsilon([Steps(0.011, 1.0, 7)], 1e-5)
    monkeypatch.undo()
    monkeypatch.setattr(PRVAccountant, "get_epsilon", broken)
    with pytest.raises(AccountingError, match=r"opacus \d.* \(PRV\) fails on 7 steps"):
        cross_checked([Steps(0.011, 1.0, 7)], 1e-5)


def test_accountants_that_disagree_are_named_with_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PRVAccountant, "get_epsilon", lambda *_: 3.5)
    with pytest.raises(AccountingError, match=r"dp-accounting \d.* says epsilon 3\.711\d, opacus \d.* 3\.5000"):
        cross_checked([Steps(0.032, 1.0, 320)], 1e-5)
    for wrong in (3.74, math.inf, math.nan):
        monkeypatch.setattr(PRVAccountant, "get_epsilon", lambda *_, wrong=wrong: wrong)
        with pytest.raises(AccountingError, match="disagree"):
            cross_checked([Steps(0.032, 1.0, 320)], 1e-5)


def test_an_epsilon_too_large_for_the_second_accountant_is_refused() -> None:
    with pytest.raises(AccountingError, match="PRV would need"):
        cross_checked([Steps(0.05, 2.0, 200_000)], 1e-5)


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"),
    [(8.0, 1e-5, 0.032, 320), (1.0, 1e-5, 256 / 60000, 14040), (0.1, 1e-6, 0.01, 1000), (8.0, 1e-5, 1.0, 100)],
)
def test_calibrated_noise_is_enough_and_not_more(target: float, delta: float, rate: float, steps: int) -> None:
    noise = calibrate(target, delta, rate, steps)
    assert noise == round(noise, 4)
    assert epsilon([Steps(rate, noise, steps)], delta) <= target
    assert epsilon([Steps(rate, round(noise - 1e-4, 4), steps)], delta) > target


def test_calibrated_noise_follows_the_closed_form() -> None:
    noise = calibrate(2.0, 1e-6, 1.0, 400)
    mu = root_scalar(lambda mu: gaussian_delta(2.0, mu) - 1e-6, bracket=(0.01, 5)).root
    assert noise == pytest.approx(20 / mu, rel=2e-4)


def test_a_budget_that_no_noise_meets_is_refused() -> None:
    with pytest.raises(AccountingError, match=r"no noise_multiplier up to 100,000 keeps 10 steps"):
        calibrate(1e-9, 1e-10, 1.0, 10)
    with pytest.raises(AccountingError, match="2000000 steps are more than"):
        calibrate(1.0, 1e-5, 0.5, 2_000_000)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0.0, 1e-5, 0.1, 10), "epsilon=0.0 must be"),
        ((-1.0, 1e-5, 0.1, 10), "epsilon=-1.0 must be"),
        ((math.inf, 1e-5, 0.1, 10), "epsilon=inf must be"),
        ((1.0, 0.0, 0.1, 10), "delta=0.0 must be"),
        ((1.0, 1.0, 0.1, 10), "delta=1.0 must be"),
        ((1.0, 1e-5, 0.0, 10), "sample_rate=0.0 must be"),
        ((1.0, 1e-5, 1.1, 10), "sample_rate=1.1 must be"),
        ((1.0, 1e-5, 0.1, 0), "steps=0 must be"),
    ],
)
def test_calibrate_names_a_bad_argument(arguments: tuple[float, float, float, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        calibrate(*arguments)


@pytest.mark.parametrize(
    ("rate", "noise", "count", "says"),
    [
        (0.0, 1.0, 1, "sample_rate=0.0"),
        (1.0001, 1.0, 1, "sample_rate=1.0001"),
        (math.nan, 1.0, 1, "sample_rate=nan"),
        (True, 1.0, 1, "sample_rate=True"),
        ("0.1", 1.0, 1, "sample_rate='0.1'"),
        (0.1, 0.0, 1, "noise_multiplier=0.0"),
        (0.1, -1.0, 1, "noise_multiplier=-1.0"),
        (0.1, math.inf, 1, "noise_multiplier=inf"),
        (0.1, math.nan, 1, "noise_multiplier=nan"),
        (0.1, 1.0, -1, "count=-1"),
        (0.1, 1.0, 1.0, "count=1.0"),
        (0.1, 1.0, True, "count=True"),
    ],
)
def test_impossible_steps_are_refused(rate: float, noise: float, count: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Steps(rate, noise, count)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_outside_its_range_is_refused(delta: float) -> None:
    for account in (epsilon, cross_checked):
        with pytest.raises(ValueError, match="delta="):
            account([], delta)


def test_the_privacy_profile_is_the_inverse_of_epsilon() -> None:
    history = [Steps(0.032, 1.0, 320), Steps(1.0, 30.0, 5)]
    at = [epsilon(history, delta) for delta in (1e-2, 1e-4, 1e-6)]
    assert privacy_profile(history, at) == pytest.approx([1e-2, 1e-4, 1e-6], rel=5e-3)
    exact = [gaussian_delta(e, 0.5) for e in (0.0, 1.0, 3.0)]
    assert privacy_profile([Steps(1.0, 4.0, 4)], [0, 1.0, 3.0]) == pytest.approx(exact, rel=1e-3)
    assert privacy_profile(history, [1e6])[0] < 1e-9
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"epsilon=.* must be a finite number"):
            privacy_profile(history, [bad])


def test_a_parent_process_accounts_without_torch() -> None:
    code = (
        "import sys; from fedmpt_core.privacy.accounting.epsilon import *;"
        "from fedmpt_core.privacy.accounting.calibration import calibrate;"
        "assert 'dp_accounting' not in sys.modules;"
        "history = [Steps(0.1, 2.0, 5)]; epsilon(history, 1e-5); privacy_profile(history, [1.0]);"
        "calibrate(3.0, 1e-5, 0.1, 5);"
        "assert not {'torch', 'opacus'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
