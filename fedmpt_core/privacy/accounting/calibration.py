"""The least noise that keeps a plan within a budget."""

import math
from collections.abc import Callable

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


def calibrate(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The least noise that keeps a run within a budget.

    Args:
        epsilon: the most that may be spent, in (0, 200].
        delta: in (0, 1).
        sample_rate: in (0, 1].
        steps: at least 1.

    Returns:
        The smallest noise multiplier of 4 decimals (5 digits from 10 on) whose `epsilon(...)` is at most `epsilon`.

    Raises:
        ValueError: an argument outside its range.
        AccountingError: no noise multiplier up to 100,000 suffices, or `epsilon` cannot answer.
    """
    if not (is_real(epsilon) and 0 < epsilon <= LARGEST):
        raise ValueError(f"epsilon={epsilon!r} must be a number in (0, {LARGEST:g}]")
    require_delta(delta)
    check_rate(sample_rate)
    check_count("steps", steps, 1)

    def spends(units: int) -> float:
        return spent_by([Steps(sample_rate, units / 10_000, steps)], delta)

    def excess(units: int) -> float:
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


def _least_units(excess: Callable[[int], float]) -> int | None:
    """The smallest whole number where the falling `excess` is not above 0; to five digits, None when there is none.

    Regula falsi with halved weights (Illinois) on the logarithm, over which that of epsilon is nearly straight.
    """
    low, above, high = 0, math.inf, 10_000
    while (below := excess(high)) > 0:
        low, above, high = high, below, high * 4
        if high > MOST_UNITS:
            return None
    last = 0
    while high - low > max(1, high // 100_000):
        share = above / (above - below) if math.isfinite(above - below) else 0.5
        start = math.log(low or 1)
        middle = min(max(round(math.exp(start + share * (math.log(high) - start))), low + 1), high - 1)
        found = excess(middle)
        if found > 0:
            low, above, below, last = middle, found, below / 2 if last > 0 else below, 1
        else:
            high, below, above, last = middle, found, above / 2 if last < 0 else above, -1
    return high
