"""Epsilon of a history of DP-SGD steps: Poisson-subsampled Gaussian mechanisms, every iterate released.

Reported is the privacy loss distribution of dp-accounting (PLD; Doroshenko et al. 2022, arXiv 2207.04380): an upper
bound that composes mechanisms, never epsilons. The neighbours differ by adding or removing one record, or one unit
where the unit is larger. Opacus' PRV accountant (Gopi et al. 2021, arXiv 2106.02848) is the cross-check. It must never
report less than was spent: what cannot be computed is an `AccountingError`, not a number. Sites price a job while a
server waits, so a history that would take dp-accounting longer than a second is composed by `grid`: the same bound.

dp-accounting and numpy are imported where they are used and torch only by `cross_checked`: a FLARE parent process holds
this module, and who looks at an unused ledger needs none of them.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from numbers import Integral, Real
from typing import TYPE_CHECKING

from fedmpt_core.common.release import named

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    from fedmpt_core.privacy.accounting.grid import Loss, Pair

AGREEMENT = 0.02  # PRV adds its own error bound of 0.01 and rounds delta; honest runs are 0.010 to 0.015 apart
LARGEST = 200.0  # chosen: beyond it nothing is protected, and both accountants need gigabytes
SMALLEST_NOISE = 1e-3
MOST_NOISE = 1e6  # what has more is priced as this
ROUNDING = 1e-15  # of delta, kept back for each step and 100 more: ten times the worst against the closed form
TOLERANCE = 5e-4  # how much of epsilon the grid may cost
MOST_POINTS = 1_000_000  # grid points of one step's distribution; a coarser grid is looser, never lower
LIBRARY_WORK = 60_000  # grid points of all kinds, and 2,000 for each, that dp-accounting composes in under a second
OWN_POINTS = 400_000  # of all kinds, that `grid` composes in a second; a coarser grid keeps to them
OWN_WORK = 30_000_000  # kinds times points of its window
PRV_MOST_POINTS = 10_000_000
RDP_WORK = 1500  # kinds times orders; fewer orders are looser, never lower
MOST_STEPS = 1_000_000  # sampled ones; PLD asked for 9 GB for 100 million
ORDERS = (*range(2, 64), 80, 96, 128, 192, 256, 512, 1024)  # whole orders only: the fractional ones may not converge

Kind = tuple[float, float, int]


class AccountingError(ValueError):
    """The accountants disagree or cannot answer; nothing may be trained."""


@dataclass(frozen=True)
class Steps:
    """Equal DP-SGD steps.

    It may grow as the events of dp_accounting do: no field is ever removed or changes its meaning, and a new one has a
    default that means what was true before, so that a history written down today costs the same in every later release.
    What needs more than that is a class of its own.

    Attributes:
        sample_rate: probability of each record to be in a step's batch, in (0, 1].
        noise_multiplier: standard deviation of the noise over the clip norm, above 0.
        count: how many steps, at least 0.
        honest: sites that share this noise, at least 1; `alone` is what one of them adds. 1: a site adds it all.
    """

    sample_rate: float
    noise_multiplier: float
    count: int
    honest: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for impossible values."""
        check_rate(self.sample_rate)
        if not (is_real(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ValueError(f"noise_multiplier={self.noise_multiplier!r} must be a finite number above 0")
        check_count("count", self.count, 0)
        check_count("honest", self.honest, 1)

    @property
    def alone(self) -> "Steps":
        """The same where nothing but one site's share of the noise protects its records: if the masks fail."""
        return Steps(self.sample_rate, self.noise_multiplier / math.sqrt(self.honest), self.count)


def added_up(history: Iterable[Steps]) -> list[Steps]:
    """The same history with one entry for each kind of steps, in the order of their first."""
    counts: dict[tuple[float, float, int], int] = {}
    for steps in history:
        kind = steps.sample_rate, steps.noise_multiplier, steps.honest
        counts[kind] = counts.get(kind, 0) + steps.count
    return [Steps(rate, noise, count, honest) for (rate, noise, honest), count in counts.items()]


@dataclass(frozen=True)
class Epsilons:
    """Epsilon of one history at one delta.

    Attributes:
        pld: the reported one; add or remove one record.
        prv: the cross-check, same neighbours.
        rdp: by Renyi divergences, same neighbours; looser.
        replace_one: upper bound where a record is replaced by another.
    """

    pld: float
    prv: float
    rdp: float
    replace_one: float


def epsilon(history: Iterable[Steps], delta: float) -> float:
    """Epsilon spent by a history, for adding or removing one record.

    Args:
        history: in any order; equal (sample_rate, noise_multiplier) are added up first.
        delta: in (0, 1).

    Returns:
        An upper bound, at least 0, and about 0.0005 above the exact value; for hundreds of kinds of steps, or a rate
            so small that the grid is very fine, up to 0.005 or 0.2 percent above it, whichever is more.

    Raises:
        ValueError: delta outside its range.
        AccountingError: the expected privacy loss is above 200, a noise multiplier is below 0.001 (that of all steps
            together where sample_rate is 1), more than 1,000,000 steps are sampled, delta is below 1e-13 times the
            steps and 100 more, or dp-accounting fails.

    Guarantees: the grid rounds towards more loss, and a part of delta is kept back for floating point. More steps never
        lower it by more than what the grid may add.

    Edge cases: no step at all -> 0.0; sample_rate 1 -> one Gaussian mechanism with 1/noise^2 added up, which is exact.

    Example:
        >>> from fedmpt_core.privacy.accounting.epsilon import Steps, epsilon
        >>> demo = Steps(sample_rate=0.25, noise_multiplier=1.2346, count=40)
        >>> round(epsilon([demo], delta=1e-5), 1)
        8.0
        >>> round(epsilon([demo, demo], delta=1e-5), 1)  # two such jobs on one data set: not 16
        11.5
    """
    require_delta(delta)
    return _epsilon(_merged(history), float(delta), False)


def cross_checked(history: Iterable[Steps], delta: float) -> Epsilons:
    """Epsilon by three accountants, and for replacing a record.

    `replace_one` composes the pair (1-q) N(0) + q N(1) and (1-q) N(0) + q N(-1), dp-accounting's REPLACE_ONE, where
    N(x) is the noise around x. No two clipped gradients x, x' (norm <= 1) are told apart better in a step: given the
    rest of the batch (the divergence is jointly convex) they show as (1-q) N(0) + q N(x) and (1-q) N(0) + q N(x'). An
    event of probability a under N(0) has at most Phi(Phi^-1(a) + 1/noise) under N(x) and at least
    Phi(Phi^-1(a) - 1/noise) under N(x') (Neyman and Pearson), and for N(1), N(-1) one half-line reaches all three.
    Dominating pairs compose (Zhu et al. 2022, arXiv 2106.08567). At sample_rate 1 it is twice the sensitivity.

    Args:
        history: as in `epsilon`.
        delta: in (0, 1).

    Returns:
        All four; 0.0 without steps.

    Raises:
        ValueError: delta outside its range.
        AccountingError: an accountant cannot answer, or PLD and PRV are more than 0.02 apart.
    """
    require_delta(delta)
    kinds, delta = _merged(history), float(delta)
    if not kinds:
        return Epsilons(0.0, 0.0, 0.0, 0.0)
    pld = _epsilon(kinds, delta, False)
    prv = _prv(kinds, delta, pld)
    if not abs(pld - prv) <= AGREEMENT:
        raise AccountingError(
            f"the accountants disagree on {_in_words(kinds)} at delta={delta:g}: {named('dp-accounting')} (PLD) says "
            f"epsilon {pld:.4f}, {named('opacus')} (PRV) {prv:.4f}, at most {AGREEMENT} apart is allowed: "
            "do not train, and report these numbers"
        )
    return Epsilons(pld, prv, _rdp(kinds, delta), _epsilon(kinds, delta, True))


def epsilon_alone(history: Iterable[Steps], delta: float) -> float:
    """Epsilon if the masks fail and each site's own noise is all that protects it; otherwise as `epsilon`."""
    return epsilon([steps.alone for steps in history], delta)


def replace_one(history: Iterable[Steps], delta: float) -> float:
    """Epsilon where a record is replaced by another, see `cross_checked`; arguments and errors as in `epsilon`."""
    require_delta(delta)
    return _epsilon(_merged(history), float(delta), True)


def prv(history: Iterable[Steps], delta: float) -> float:
    """Epsilon by Opacus' PRV accountant alone, the cross-check; arguments and errors as in `epsilon`."""
    require_delta(delta)
    kinds = _merged(history)
    return _cached_prv(kinds, float(delta)) if kinds else 0.0


@lru_cache(maxsize=1024)
def _cached_prv(kinds: tuple[Kind, ...], delta: float) -> float:
    return _prv(kinds, delta, _epsilon(kinds, delta, False))


def privacy_profile(history: Iterable[Steps], epsilons: Sequence[float]) -> list[float]:
    """Delta at each of the given epsilons, for adding or removing one record.

    Args:
        history: as in `epsilon`.
        epsilons: finite, at least 0.

    Returns:
        Upper bounds in [0, 1], one for each epsilon; 0.0 without steps.

    Raises:
        ValueError: an epsilon outside its range.
        AccountingError: as in `epsilon`.
    """
    for value in epsilons:
        if not (is_real(value) and value >= 0):
            raise ValueError(f"epsilon={value!r} must be a finite number, at least 0")
    kinds = _merged(history)
    if not kinds:
        return [0.0] * len(epsilons)
    losses = _losses(kinds, 100 * _rounding(kinds), False)
    return [
        min(1.0, max(float(loss.get_delta_for_epsilon(float(e))) for loss in losses) + _rounding(kinds))
        for e in epsilons
    ]


def is_real(value: float) -> bool:
    """Whether it is a finite number and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_rate(rate: float) -> None:
    """Raises ValueError unless it is in (0, 1]."""
    if not (is_real(rate) and 0 < rate <= 1):
        raise ValueError(f"sample_rate={rate!r} must be a probability in (0, 1]")


def check_count(name: str, count: int, least: int) -> None:
    """Raises ValueError unless it is a whole number of at least `least`."""
    if not isinstance(count, Integral) or isinstance(count, bool) or count < least:
        raise ValueError(f"{name}={count!r} must be a whole number, at least {least}")


def require_delta(delta: float) -> None:
    """Raises ValueError unless delta is in (0, 1)."""
    if not (is_real(delta) and 0 < delta < 1):
        raise ValueError(f"delta={delta!r} must be in (0, 1)")


def _merged(history: Iterable[Steps]) -> tuple[Kind, ...]:
    """(sample rate, noise, count) without repeats, sorted; all unsampled steps as one."""
    counts: dict[tuple[float, float], int] = {}
    precision = 0.0
    for steps in history:
        if steps.sample_rate == 1:
            precision += steps.count * (1 / steps.noise_multiplier) * (1 / steps.noise_multiplier)
        elif steps.count:
            # less noise costs no less, and squares of more are no numbers
            kind = float(steps.sample_rate), min(float(steps.noise_multiplier), MOST_NOISE)
            counts[kind] = counts.get(kind, 0) + int(steps.count)
    whole = [(1.0, 1 / math.sqrt(precision), 1)] if precision else []
    return tuple(sorted([(q, noise, count) for (q, noise), count in counts.items()] + whole))


@lru_cache(maxsize=1024)
def _epsilon(kinds: tuple[Kind, ...], delta: float, replace: bool) -> float:
    if not kinds:
        return 0.0
    kept = _rounding(kinds)
    if 100 * kept > delta:
        raise AccountingError(
            f"delta={delta:g} is below {100 * kept:.2g}, the least that floating point allows after {_in_words(kinds)}"
        )
    value = max(float(loss.get_epsilon_for_delta(delta - kept)) for loss in _losses(kinds, delta, replace))
    if not math.isfinite(value):
        raise AccountingError(f"{named('dp-accounting')} finds no epsilon for {_in_words(kinds)} at delta={delta:g}")
    return value


def _rounding(kinds: tuple[Kind, ...]) -> float:
    """What floating point may hide of delta: a Fourier transform is raised to the power of the steps."""
    return ROUNDING * (100 + sum(count for _, _, count in kinds))


def _losses(kinds: tuple[Kind, ...], delta: float, replace: bool) -> "Sequence[PrivacyLossDistribution | Loss]":
    """The composed privacy loss, one for each direction or one for both, on a grid as fine as time allows."""
    grid = grid_of(kinds, delta, replace)
    try:
        return [_by_library(kinds, grid, replace)] if grid.by_library else _by_grid(kinds, grid, replace)
    except (ValueError, ArithmeticError, MemoryError) as error:
        raise AccountingError(f"{named('dp-accounting')} fails on {_in_words(kinds)}: {error}") from error


def _by_library(kinds: tuple[Kind, ...], grid: "Grid", replace: bool) -> "PrivacyLossDistribution":
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
    from dp_accounting.privacy_accountant import NeighboringRelation

    neighbours = NeighboringRelation.REPLACE_ONE if replace else NeighboringRelation.ADD_OR_REMOVE_ONE

    def composed(q: float, noise: float, count: int) -> "PrivacyLossDistribution":
        one = from_gaussian_mechanism(
            noise, value_discretization_interval=grid.interval, sampling_prob=q, neighboring_relation=neighbours
        )
        return one.self_compose(count)

    return reduce(lambda total, some: total.compose(some), (composed(*kind) for kind in kinds))


def _by_grid(kinds: tuple[Kind, ...], grid: "Grid", replace: bool) -> "list[Loss]":
    from fedmpt_core.privacy.accounting.grid import composed, one_step

    return [
        composed([(one_step(q, noise, pair, grid.interval), count) for q, noise, count in kinds], grid.spread)
        for pair in _pairs(replace)
    ]


def _pairs(replace: bool) -> "tuple[Pair, ...]":
    return ("replace",) if replace else ("remove", "add")


@dataclass(frozen=True)
class Grid:
    """How a history's privacy loss is worked out, and so how long it takes.

    Attributes:
        interval: between grid points.
        points: of all kinds of steps, one direction.
        spread: standard deviation of the composed loss, roughly.
        by_library: whether dp-accounting composes it; else `grid` does.
    """

    interval: float
    points: int
    spread: float
    by_library: bool


def grid_of(kinds: tuple[Kind, ...], delta: float, replace: bool = False) -> Grid:
    """The grid of (sample rate, noise multiplier, count) without repeats: fine enough for `TOLERANCE` where that takes
    a second or less, else as fine as that. Raises AccountingError where no grid serves.

    A grid of width h adds h^2/6 to the variance of a step's loss. A sum of T steps that spreads by s has epsilon near
    mean + z s, so epsilon grows by z T h^2 / (12 s) (within 10 % of what was measured).
    """
    counts = [count for _, _, count in kinds]
    if sum(counts) > MOST_STEPS:
        raise AccountingError(f"{sum(counts)} steps are more than the {MOST_STEPS} that can be accounted for")
    if (least := min(noise for _, noise, _ in kinds)) < SMALLEST_NOISE:
        raise AccountingError(f"noise_multiplier={least:.3g} of {_in_words(kinds)} is below {SMALLEST_NOISE}: use more")
    import numpy as np

    means, variances, reaches = zip(*(_moments(q, noise) for q, noise, _ in kinds), strict=True)
    mean, spread = float(np.dot(means, counts)), math.sqrt(np.dot(variances, counts))
    z = math.sqrt(-2 * math.log(delta)) + 1
    if not mean <= LARGEST:
        raise AccountingError(
            f"{_in_words(kinds)} have an expected loss of {mean:.3g}, {LARGEST:g} is the most: add noise"
        )
    spread = max(spread, 1e-6)
    fine = math.sqrt(12 * spread * TOLERANCE / (z * sum(counts)))
    interval = max(min(fine, max(1e-3, max(reaches) / 1e5)), max(reaches) / MOST_POINTS)
    from fedmpt_core.privacy.accounting.grid import points

    total = sum(points(q, noise, pair, interval) for q, noise, _ in kinds for pair in _pairs(replace)[:1])
    if total + 2000 * len(kinds) <= LIBRARY_WORK:
        return Grid(interval, total, spread, True)
    window = (2 * (z + 8) * spread + max(reaches)) / interval
    coarser = max(1.0, total / OWN_POINTS, len(kinds) * window / OWN_WORK)
    return Grid(interval * coarser, math.ceil(total / coarser), spread, False)


@lru_cache(maxsize=256)
def _moments(q: float, noise: float) -> tuple[float, float, float]:
    """Mean and variance of a step's privacy loss when the record is there, and the largest loss that matters.

    By the trapezoid rule, which is exact for normal densities, over ten standard deviations of the noise.
    """
    import numpy as np

    x = np.linspace(-10 * noise, 1 + 10 * noise, 2001)
    with np.errstate(under="ignore", over="ignore"):
        density = (1 - q) * np.exp(-((x / noise) ** 2) / 2) + q * np.exp(-(((x - 1) / noise) ** 2) / 2)
    density /= density.sum()
    rest = math.log1p(-q) if q < 1 else -math.inf
    loss = np.logaddexp(rest, math.log(q) + (x - 0.5) / noise**2)
    mean = float(density @ loss)
    return mean, float(density @ (loss - mean) ** 2), float(loss[-1])


def _prv(kinds: tuple[Kind, ...], delta: float, pld: float) -> float:
    """Opacus' PRV. Its mesh is 0.01 over a root of the steps, so its size is known before memory is asked for."""
    steps = sum(count for _, _, count in kinds)
    points = 200 * (1.3 * pld + 3) * math.sqrt(steps * math.log(12_000 / delta) / 2)
    if points > PRV_MOST_POINTS:
        raise AccountingError(
            f"PRV would need {points:.1g} points for {_in_words(kinds)} (epsilon {pld:.1f}), which cannot be "
            "cross-checked: use more noise or fewer steps"
        )
    import numpy as np
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(noise, q, count) for q, noise, count in kinds]
    try:
        # PRV takes log(1 - q), which is -inf as it should be at q = 1, and warns of its own RDP orders
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(delta))
    except (ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise AccountingError(
            f"{named('opacus')} (PRV) fails on {_in_words(kinds)}, where {named('dp-accounting')} (PLD) says epsilon "
            f"{pld:.4f}: {error}"
        ) from error


def _rdp(kinds: tuple[Kind, ...], delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(ORDERS[:: math.ceil(len(ORDERS) * len(kinds) / RDP_WORK)])
    for q, noise, count in kinds:
        accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(noise)), count)
    return float(accountant.get_epsilon(delta))


def _in_words(kinds: tuple[Kind, ...]) -> str:
    shown = [f"{count} steps at sample_rate={q:g}, noise_multiplier={noise:g}" for q, noise, count in kinds[:4]]
    return ", ".join(shown) + (f" and {len(kinds) - 4} kinds more" if len(kinds) > 4 else "")
