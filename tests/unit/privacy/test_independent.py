"""The third accountant against the reported one, against a closed form, and at its edges."""

from math import exp

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import ndtr

from fedmpt_core.privacy.accounting.epsilon import Steps, privacy_profile
from fedmpt_core.privacy.accounting.epsilon import epsilon as reported
from fedmpt_core.privacy.accounting.independent import epsilon, profile


def histories(count: int) -> list[list[tuple[float, float, int]]]:
    rng = np.random.default_rng(7)
    return [
        [
            (float(rng.uniform(0.005, 1)), float(rng.uniform(0.9, 6)), int(rng.integers(1, 150)))
            for _ in range(rng.integers(1, 5))
        ]
        for _ in range(count)
    ]


MANY = [(0.01 + i / 1000, 0.9 + i / 20, 5 + i) for i in range(40)]


# in the last case the direction in which a unit is added shows 0.02 less
@pytest.mark.parametrize("history", [*histories(25), MANY, [(0.1, 0.8, 50)]])
def test_it_finds_what_the_reported_accountant_finds(history: list[tuple[float, float, int]]) -> None:
    expected = reported([Steps(*step) for step in history], 1e-5)
    if expected < 150:
        assert epsilon(history, 1e-5) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(("noise", "steps"), [(0.7, 1), (1.0, 1), (2.0, 9), (20.0, 100)])
def test_full_batches_are_a_gaussian_mechanism(noise: float, steps: int) -> None:
    """Closed form: Balle and Wang 2018, theorem 8, with sensitivity over noise = sqrt(steps) / noise."""
    mu = steps**0.5 / noise

    def excess(value: float) -> float:
        return ndtr(mu / 2 - value / mu) - exp(value) * ndtr(-mu / 2 - value / mu) - 1e-5

    assert epsilon([(1.0, noise, steps)], 1e-5) == pytest.approx(brentq(excess, 0, 60), abs=1e-3)


def test_more_steps_less_noise_and_higher_rates_cost_more() -> None:
    base = epsilon([(0.1, 1.0, 100)], 1e-5)
    assert epsilon([(0.1, 1.0, 101)], 1e-5) > base
    assert epsilon([(0.1, 0.99, 100)], 1e-5) > base
    assert epsilon([(0.11, 1.0, 100)], 1e-5) > base
    assert epsilon([(0.1, 1.0, 60), (0.1, 1.0, 40)], 1e-5) == pytest.approx(base, abs=1e-3)
    assert epsilon([(0.1, 1.0, 100)], 1e-6) > base


def test_nothing_spent_is_nothing() -> None:
    assert epsilon([], 1e-5) == epsilon([(0.5, 1.0, 0)], 1e-5) == 0.0
    assert profile([], [1.0, 2.0]) == [0.0, 0.0]


def test_the_profile_is_the_reported_one() -> None:
    history = [(0.25, 1.2, 56), (0.1, 2.0, 30)]
    points = [0.5, 1.0, 3.0, 5.0, 8.0]
    assert profile(history, points) == pytest.approx(privacy_profile([Steps(*s) for s in history], points), rel=0.02)
