"""Poisson sampling: every unit in every step with its probability, on its own."""

import numpy as np
import pytest
from scipy import stats

from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.sampling import poisson_batches

KEY = bytes(32)


def inclusion(units: int, rate: float, steps: int) -> np.ndarray:
    """(steps, units) whether a unit takes part."""
    table = np.zeros((steps, units), bool)
    for row, batch in zip(table, poisson_batches(units, rate, steps, Keystream(KEY)), strict=True):
        row[batch] = True
    return table


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_units_take_part_independently_with_the_rate(rate: float) -> None:
    units, steps = 200, 500
    table = inclusion(units, rate, steps)
    spread = units * steps * rate * (1 - rate)
    assert abs(table.sum() - units * steps * rate) < 4 * np.sqrt(spread)
    # both the sizes of batches and the visits of a unit vary as binomials do; fixed-size batches would not
    for counts, trials in ((table.sum(1), units), (table.sum(0), steps)):
        ratio = np.square(counts - trials * rate).sum() / (trials * rate * (1 - rate))
        assert stats.chi2.cdf(ratio, len(counts)) == pytest.approx(0.5, abs=0.4999)
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.02


def test_rate_one_takes_everyone_and_no_unit_gives_empty_batches() -> None:
    assert inclusion(7, 1.0, 3).all()
    assert [len(b) for b in poisson_batches(0, 0.5, 4, Keystream())] == [0] * 4
    assert list(poisson_batches(5, 0.5, 0, Keystream())) == []
    assert any(len(b) == 0 for b in poisson_batches(1, 0.5, 40, Keystream(KEY)))


def test_batches_are_ascending_indices_and_differ_between_keys() -> None:
    one, other = (list(poisson_batches(64, 0.5, 3, Keystream())) for _ in range(2))
    assert all((np.diff(b) > 0).all() and b.dtype == np.int64 for b in one)
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0001, float("nan")])
def test_an_impossible_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="sample_rate"):
        list(poisson_batches(3, rate, 1, Keystream()))
    with pytest.raises(ValueError, match="neither may be negative"):
        list(poisson_batches(-1, 0.5, 1, Keystream()))
