"""Updates as integers modulo 2^32 and back: fixed point in two's complement, so that sums of masked words are exact.

`Encoding` makes integers of an update; `Integers` is for sites that share the noise of a sum and send integers already,
in which nothing may be rounded or cut off any more.

A vector is the update, then figures of training if the job sums any; both are scaled by the site's share, its weight
over the largest one, which is public. Under differential privacy the update has its noise already; rounding and cutting
off what is too large are then post-processing and cost nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.headroom import HALF, headroom, largest_word
from fedmpt_core.secagg.masking import uniform_words

METRIC_RANGE = 1000.0
_PIECE = 1 << 14  # chosen: numbers rounded at a time


@dataclass(frozen=True)
class Encoded:
    """A site's vector.

    Attributes:
        words: (words,) uint32.
        clamped: numbers that were cut off; a function of private data, so it stays at the site.
    """

    words: np.ndarray
    clamped: int


@dataclass(frozen=True)
class Decoded:
    """What a sum says.

    Attributes:
        mean: (size,) float64 weighted mean of the updates; each number is one that updates within range can give.
        metrics: weighted means by name.
        beyond: numbers that updates within range cannot give: a site has sent a false vector. They were cut off.
    """

    mean: np.ndarray
    metrics: dict[str, float]
    beyond: int


@dataclass(frozen=True)
class Encoding:
    """How a job's updates travel.

    Attributes:
        size: numbers of an update, from 1.
        max_sites: most sites in a sum.
        value_range: largest absolute value of a number of an update.
        fraction_bits: bits after the point.
        rounding: `stochastic` (mean of many roundings is right) or `deterministic` (to the nearest).
        metrics: names of the figures after the weight.
    """

    size: int
    max_sites: int = 100
    value_range: float = 16.0
    fraction_bits: int = 20
    rounding: Literal["stochastic", "deterministic"] = "stochastic"
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises SecAggError(OVERFLOW) when a sum could run over."""
        headroom(self.max_sites, self.value_range, self.fraction_bits)
        if self.metrics and self._metric_bits < 1:
            raise SecAggError(Abort.OVERFLOW, f"max_sites={self.max_sites}: the sum of figures could run over 2^31")

    @property
    def words(self) -> int:
        """Length of a vector."""
        return self.size + len(self.metrics)

    def encode(self, update: np.ndarray, share: float = 1.0, metrics: Mapping[str, float] | None = None) -> Encoded:
        """A site's update as a vector.

        Args:
            update: (size,) finite floats; what is beyond `value_range` is cut off.
            share: the site's weight over the largest one, (0, 1].
            metrics: exactly the figures that the job names, finite, within +-1000.

        Raises:
            SecAggError: OVERFLOW for a number that is not finite or out of its range, MALFORMED for another length or
                other names.
        """
        given = dict(metrics or {})
        if update.shape != (self.size,) or set(given) != set(self.metrics):
            raise SecAggError(
                Abort.MALFORMED,
                f"an update of shape {update.shape} with figures {sorted(given)}: the job has ({self.size},) and "
                f"{sorted(self.metrics)}",
            )
        if not 0 < share <= 1:  # also refuses NaN
            raise SecAggError(Abort.OVERFLOW, f"share={share} is out of range: allowed is (0, 1]")
        figures = np.array([given[name] for name in self.metrics], dtype=np.float64)
        if not np.isfinite(update).all() or not np.isfinite(figures).all():
            raise SecAggError(Abort.OVERFLOW, "the update or a figure holds NaN or infinity: nothing is sent")
        if (np.abs(figures) > METRIC_RANGE).any():
            raise SecAggError(Abort.OVERFLOW, f"a figure is beyond +-{METRIC_RANGE:g}: nothing is sent")
        words = np.empty(self.words, dtype="<i4")
        clamped = self._fill(words, update, share * 2**self.fraction_bits)
        words[self.size :] = np.rint(figures * (share * 2**self._metric_bits))
        return Encoded(words.view("<u4"), clamped)  # two's complement is the number modulo 2^32

    def decode(self, total: np.ndarray, shares: Sequence[float]) -> Decoded:
        """The sum of the vectors of sites with these shares, (words,) uint32, as weighted means.

        Raises:
            SecAggError: MALFORMED for another length, OVERFLOW for impossible shares.
        """
        numbers, weight = _signed(total, self.words, shares, self.max_sites), sum(shares)
        mean = numbers[: self.size] / (2**self.fraction_bits * weight)
        most = self.value_range + self.error_bound(shares)
        beyond = int(np.count_nonzero(np.abs(mean) > most))
        figures = np.clip(numbers[self.size :] / (2**self._metric_bits * weight), -METRIC_RANGE, METRIC_RANGE)
        metrics = {name: float(figure) for name, figure in zip(self.metrics, figures, strict=True)}
        return Decoded(np.clip(mean, -self.value_range, self.value_range), metrics, beyond)

    def error_bound(self, shares: Sequence[float]) -> float:
        """Most that rounding moves any number of the mean of updates within range, for sites of these shares."""
        unit = 0.5 if self.rounding == "deterministic" else 1.0
        return unit * len(shares) / (2**self.fraction_bits * sum(shares))

    @property
    def _metric_bits(self) -> int:
        return int(np.floor(np.log2((HALF - 1) / (self.max_sites * METRIC_RANGE))))

    def _fill(self, words: np.ndarray, update: np.ndarray, scale: float) -> int:
        """Round the update into `words`, piece by piece so that nothing leaves the cache; how many were cut off."""
        limit, clamped = largest_word(self.value_range, self.fraction_bits), 0
        noise = uniform_words(self.size) if self.rounding == "stochastic" else None
        for start in range(0, self.size, _PIECE):
            part = update[start : start + _PIECE]
            values = part.astype(np.float64)
            np.clip(values, -self.value_range, self.value_range, out=values)
            clamped += int(np.count_nonzero(values != part))
            values *= scale
            if noise is None:
                np.rint(values, out=values)
            else:
                values += noise[start : start + _PIECE] * 2.0**-32
                np.floor(values, out=values)
                # a range between two steps may be rounded up from, but not past the headroom
                np.clip(values, -limit, limit, out=values)
            words[start : start + len(part)] = values
        return clamped


@dataclass(frozen=True)
class Integers:
    """How noisy sums travel whose noise the sites share: as they are.

    Attributes:
        grid: (d,) float64 step of each number.
        room: largest absolute value of a site's number, in steps.
        max_sites: most sites in a sum; so many times `room` is below 2^31.
        batch: public batch size of a site whose share is 1.
    """

    grid: np.ndarray
    room: int
    max_sites: int
    batch: float

    def __post_init__(self) -> None:
        """Raises SecAggError(OVERFLOW) when a sum could run over."""
        if self.max_sites * self.room >= HALF:
            raise SecAggError(Abort.OVERFLOW, f"max_sites={self.max_sites} times room={self.room} is not below 2^31")

    @property
    def words(self) -> int:
        """Length of a vector."""
        return len(self.grid)

    def decode(self, total: np.ndarray, shares: Sequence[float]) -> Decoded:
        """The sum of the words of sites with these shares, (words,) uint32, over their public batch size.

        Raises:
            SecAggError: MALFORMED for another length, OVERFLOW for impossible shares.
        """
        numbers = _signed(total, self.words, shares, self.max_sites)
        most = len(shares) * self.room
        beyond = int(np.count_nonzero(np.abs(numbers) > most))
        return Decoded(np.clip(numbers, -most, most) * self.grid / (self.batch * sum(shares)), {}, beyond)


def _signed(total: np.ndarray, words: int, shares: Sequence[float], max_sites: int) -> np.ndarray:
    """A sum as float64 numbers. Raises SecAggError, see `decode`."""
    if total.shape != (words,) or total.dtype != np.dtype("<u4"):
        raise SecAggError(Abort.MALFORMED, f"the sum has shape {total.shape}, the job has {words} words")
    if not 1 <= len(shares) <= max_sites or not all(0 < share <= 1 for share in shares):
        raise SecAggError(Abort.OVERFLOW, f"shares={list(shares)}: 1 to {max_sites} in (0, 1] are possible")
    return total.view("<i4").astype(np.float64)
