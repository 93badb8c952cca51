"""The least noise that keeps a plan within a budget."""

import math
from collections.abc import Callable
from typing import Any

from fedmpt_core.privacy.accounting.epsilon import (
    LARGEST,
    AccountingError,
    Steps,
    check_count,
    check_rate,
    is_real,
    require_delta,
)
from fedmpt_core.privacy.accounting.epsilon import epsilon as spent_by

MOST_UNITS = 10**9  # ten-thousandths of a noise multiplier that `calibrate` tries
CLOSE = 1e-6  # of the logarithm of these, where the search ends
BEYOND = 20.0  # stands for an epsilon that is infinite, or 0, in a search by logarithms


def calibrate(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The least noise that keeps a run within a budget.

    Args:
        epsilon: the most that may be spent, in (0, 200].
        delta: in (0, 1).
        sample_rate: in (0, 1].
        steps: at least 1.

    Returns:
        The smallest noise multiplier of 4 decimals (6 digits from 100 on) whose `epsilon(...)` is at most `epsilon`.

    Raises:
        ValueError: an argument outside its range.
        AccountingError: no noise multiplier up to 100,000 suffices, or `epsilon` cannot answer.
    """
    if not (is_real(epsilon) and 0 < epsilon <= LARGEST):
        raise ValueError(f"epsilon={epsilon!r} must be a number in (0, {LARGEST:g}]")
    require_delta(delta)
    check_rate(sample_rate)
    check_count("steps", steps, 1)

    def spends(units: float) -> float:
        return spent_by([Steps(sample_rate, units / 10_000, steps)], delta)

    def excess(units: float) -> float:
        try:
            spent = spends(units)
        except AccountingError:
            return math.inf
        return math.log(spent / epsilon) if spent else -math.inf

    units = _least_units(excess)
    if units is None:
        spends(MOST_UNITS)  # has its own sentence where steps or delta are what cannot be accounted for
        raise AccountingError(
            f"no noise_multiplier up to {MOST_UNITS // 10_000:,} keeps {steps} steps at sample_rate={sample_rate} "
            f"within epsilon={epsilon} at delta={delta}: allow more epsilon, or take fewer steps or smaller batches"
        )
    return units / 10_000


def _least_units(excess: Callable[[float], float]) -> int | None:
    """The smallest whole number, to six digits, where the falling `excess` is not above 0; None when there is none.

    By Brent's method on the logarithm, over which that of epsilon is nearly straight.
    """
    high = 10_000
    while excess(high) > 0:
        high *= 4
        if high > MOST_UNITS:
            return None
    low = 1 if high == 10_000 else high // 4
    from scipy.optimize import brentq  # here: commands that calibrate nothing start without it, a server has none

    close: Any = brentq(
        lambda x: max(-BEYOND, min(BEYOND, excess(math.exp(x)))), math.log(low), math.log(high), xtol=CLOSE
    )
    digit = 10 ** max(0, math.floor(close / math.log(10)) - 5)
    units = math.ceil(math.exp(close) / digit) * digit
    while excess(units) > 0:
        units += digit
    while units > digit and excess(units - digit) <= 0:
        units -= digit
    return units
