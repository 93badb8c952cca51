"""Privacy losses on a grid, for histories of many kinds of steps or very many points: what takes dp-accounting minutes.

The same bound as its own, by the same rule. Each cell's probability goes to the cell's two ends so that it stays what
it was both with and without the record ("connect the dots", Doroshenko et al. 2022, arXiv 2207.04380): the pair on the
grid dominates the real one, so epsilon is never lower on a coarser grid. Steps are composed by one Fourier transform;
what may lie outside its window (Chernoff's bound) counts as an unbounded loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from scipy.fft import next_fast_len
from scipy.special import ndtr

Pair: TypeAlias = Literal["remove", "add", "replace"]
REACH = 10.0  # standard deviations of the noise on the grid; what lies beyond, 1e-23, is an unbounded loss
OUTSIDE = 1e-16  # probability that the composed loss may lie outside the window, either way
RATES = 10  # exponents that Chernoff's bound tries
FLAT = 600.0  # losses from which exp would overflow: a cell's whole probability goes up


@dataclass(frozen=True)
class Loss:
    """A distribution of privacy losses; its two readings have dp-accounting's names.

    Attributes:
        interval: of the grid.
        first: number of the first grid point, a loss of `first * interval`.
        probabilities: (N,) of the grid points.
        unbounded: probability of an unbounded loss.
    """

    interval: float
    first: int
    probabilities: np.ndarray
    unbounded: float

    @property
    def losses(self) -> np.ndarray:
        """(N,) the grid points."""
        return (np.arange(len(self.probabilities)) + self.first) * self.interval

    def get_delta_for_epsilon(self, epsilon: float) -> float:
        """The delta at an epsilon of at least 0."""
        above = max(0, math.floor(epsilon / self.interval) + 1 - self.first)
        losses = (np.arange(above, len(self.probabilities)) + self.first) * self.interval
        return self.unbounded + float(self.probabilities[above:] @ -np.expm1(np.minimum(epsilon - losses, 0.0)))

    def get_epsilon_for_delta(self, delta: float) -> float:
        """The epsilon at a delta, at least 0; infinite where the unbounded loss alone is likelier."""
        if self.unbounded > delta:
            return math.inf
        if self.get_delta_for_epsilon(0.0) <= delta:
            return 0.0
        low, high = max(0, self.first), max(0, self.first) + len(self.probabilities)  # exceeds delta, and does not
        if self.get_delta_for_epsilon(low * self.interval) <= delta:
            low = 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.get_delta_for_epsilon(middle * self.interval) > delta else (low, middle)
        above = max(0, high - self.first)
        losses = (np.arange(above, len(self.probabilities)) + self.first) * self.interval
        part = self.probabilities[above:]
        held = float(part @ np.exp(low * self.interval - losses))
        # between two grid points delta is `unbounded + sum - e^(epsilon - low) held`
        inside = math.log((self.unbounded + float(part.sum()) - delta) / held) if held > 0 else math.inf
        return low * self.interval + min(max(inside, 0.0), (high - low) * self.interval)


def one_step(rate: float, noise: float, pair: Pair, interval: float) -> Loss:
    """The loss of one Poisson-subsampled Gaussian step.

    Args:
        rate: sampling probability, in (0, 1].
        noise: noise multiplier, above 0.
        pair: which neighbours: a record is removed, added, or replaced.
        interval: of the grid, above 0.
    """
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        low, high = _range(rate, noise, pair)
        first, last = math.floor(low / interval), math.ceil(high / interval)
        losses = np.arange(first, last + 1) * interval
        reached = _reached(losses if pair != "add" else -losses, rate, noise, pair)
        if pair == "add":  # the loss falls along the axis
            upper, lower = ((1.0, 0.0),), ((1 - rate, 0.0), (rate, 1.0))
            sign = -1.0
        else:
            upper = ((1 - rate, 0.0), (rate, 1.0))
            lower = ((1.0, 0.0),) if pair == "remove" else ((1 - rate, 0.0), (rate, -1.0))
            sign = 1.0
        with_it, without = (_cells(reached, mixture, noise, sign) for mixture in (upper, lower))
        beyond = sum(w * float(ndtr(-sign * (reached[-1] - c) / noise)) for w, c in upper)
        up = (with_it - np.exp(np.minimum(losses[:-1], FLAT)) * without) / -math.expm1(-interval)
        up = np.clip(np.where(losses[:-1] > FLAT, with_it, up), 0.0, with_it)
    probabilities = np.append(with_it - up, 0.0)
    probabilities[1:] += up
    probabilities[0] += max(0.0, 1.0 - float(with_it.sum()) - beyond)  # what lies below goes up to the first point
    return Loss(interval, first, probabilities, beyond)


def composed(steps: Sequence[tuple[Loss, int]], spread: float) -> Loss:
    """The loss of all steps together.

    Args:
        steps: the loss of one step and how often it is taken, all on one grid; at least one.
        spread: rough standard deviation of the composed loss, above 0.
    """
    interval = steps[0][0].interval
    low, high = _window(steps, spread)
    size: int = cast(Any, next_fast_len)(high - low + 1, real=True)
    powers: dict[int, np.ndarray] = {}  # the product of the kinds whose count has this bit
    shift = low
    for loss, count in steps:
        folded = np.pad(loss.probabilities, (0, -len(loss.probabilities) % size)).reshape(-1, size).sum(0)
        transform = np.fft.rfft(folded)
        shift -= loss.first * count
        for bit in range(count.bit_length()):
            if count >> bit & 1:
                powers[bit] = powers[bit] * transform if bit in powers else transform
    product: Any = 1.0
    for bit in range(max(powers), -1, -1):
        product = product * product * powers.get(bit, 1.0)
    probabilities = np.maximum(np.roll(np.fft.irfft(product, size), -(shift % size)), 0.0)
    unbounded = sum(count * loss.unbounded for loss, count in steps) + OUTSIDE
    return Loss(interval, low, probabilities, unbounded)


def points(rate: float, noise: float, pair: Pair, interval: float) -> int:
    """Grid points of one step's loss."""
    low, high = _range(rate, noise, pair)
    return math.ceil((high - low) / interval) + 1


def _range(rate: float, noise: float, pair: Pair) -> tuple[float, float]:
    """The losses at the ends of the axis."""
    rest = math.log1p(-rate) if rate < 1 else -math.inf

    def against_none(x: float, centre: float) -> float:
        return float(np.logaddexp(rest, math.log(rate) + centre * (x - centre / 2) / noise**2))

    reach = REACH * noise
    if pair == "add":
        return -against_none(reach + 1, 1.0), -against_none(-reach, 1.0)
    if pair == "remove":
        return against_none(-reach, 1.0), against_none(1 + reach, 1.0)
    high = against_none(1 + reach, 1.0) - against_none(1 + reach, -1.0)
    return -high, high


def _reached(losses: np.ndarray, rate: float, noise: float, pair: Pair) -> np.ndarray:
    """Where on the axis the loss is reached, which rises along it; minus infinity where it is above all along."""
    if pair != "replace":
        small = np.log1p(np.expm1(np.minimum(losses, 30.0)) / rate)
        ratio = np.where(losses > 30.0, losses - math.log(rate) + np.log1p(-(1 - rate) * np.exp(-losses)), small)
        return np.where(np.isnan(ratio), -np.inf, noise**2 * ratio + 0.5)
    half = np.abs(losses) / 2
    inner = np.log1p(-rate) + half + np.log1p(-np.exp(-2 * half)) - math.log(2) - math.log(rate) + 0.5 / noise**2
    arsinh = np.logaddexp(inner, 0.5 * np.logaddexp(2 * inner, 0.0))
    return noise**2 * np.sign(losses) * (half + arsinh)


def _cells(x: np.ndarray, mixture: Sequence[tuple[float, float]], noise: float, sign: float) -> np.ndarray:
    """Probability between neighbouring points of the axis, from whichever tail is smaller; `sign` -1 where x falls."""
    total = np.zeros(len(x) - 1)
    for weight, centre in mixture:
        at = sign * (x - centre) / noise
        below, above = ndtr(at), ndtr(-at)
        total += weight * np.where(at[:-1] > 0, above[:-1] - above[1:], below[1:] - below[:-1])
    return np.maximum(total, 0.0)


def _window(steps: Sequence[tuple[Loss, int]], spread: float) -> tuple[int, int]:
    """Grid points between which the composed loss lies, but for `OUTSIDE` on each side."""
    interval = steps[0][0].interval
    least = sum(loss.first * count for loss, count in steps)
    most = sum((loss.first + len(loss.probabilities) - 1) * count for loss, count in steps)
    widest = max(float(np.abs(loss.losses[[0, -1]]).max()) for loss, _ in steps)
    slowest = min(1 / max(widest, interval), 1 / spread)
    for rate in np.geomspace(slowest, 100 / spread, RATES):
        most = min(most, math.ceil(_chernoff(steps, float(rate)) / interval))
        least = max(least, math.floor(_chernoff(steps, -float(rate)) / interval))
    return min(least, most), most


def _chernoff(steps: Sequence[tuple[Loss, int]], rate: float) -> float:
    """Above (below, for a negative rate) it the composed loss lies with a probability of `OUTSIDE` at most."""
    total = -math.log(OUTSIDE)
    for loss, count in steps:
        exponents = rate * loss.losses
        top = float(exponents.max())
        total += count * (top + math.log(float(loss.probabilities @ np.exp(np.maximum(exponents - top, -700.0)))))
    return total / rate
