"""What the scores of an attack prove: lower bounds on epsilon from one run, and the noise that was really there.

Each of m canaries was trained on or left out by a fair coin of its own, and the attack gave each a score, higher for
"trained on". From scores and coins:

    one-run bound       Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846): v of r guesses right is more than
                        (epsilon, delta) allows; holds for every mechanism and whatever canaries do to each other
    Gaussian one-run    Mahloujifar, Melis and Chaudhuri 2024 (arXiv 2410.22235): the same for a mechanism whose
                        trade-off curve is Gaussian, as sums of many steps nearly are
    Gaussian threshold  Nasr et al. 2023 (arXiv 2302.07956): Clopper-Pearson bounds on both error rates of a threshold;
                        also needs canaries that do not disturb each other
    mu-test, noise      the mechanism's own parameters from the moments of the scores: far sharper, both ends

Bounds hold at the confidence they are asked for: the number of guesses is fixed beforehand (`GUESSED`); of the
thresholds the best is taken, so the significance is divided by how many there are, and again among the three bounds.

A small bound proves nothing: another attack may show more. numpy and scipy; nothing of ours, no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log, sqrt
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit, log_ndtr, ndtr, ndtri

GUESSED = 0.2  # share of the canaries that is guessed at; best or nearly so in simulations at epsilon 1 to 30
FALSE_POSITIVE_RATES = (0.01, 0.001)
LARGEST = 1e3  # no search goes beyond this epsilon or mu
_CLOSE = 1e-6  # how far below the value that was searched for a bound may stay
_BOUNDS = 3  # bounds of `attack`, which share its significance


@dataclass(frozen=True)
class Interval:
    """Both ends of a confidence interval; an end may be infinite."""

    low: float
    high: float


@dataclass(frozen=True)
class Sensitivity:
    """How many canaries an attack finds while it accuses few that were left out.

    Attributes:
        false_positive_rate: the most that was allowed.
        rate: share of the canaries trained on that score above every threshold with at most that rate.
        confidence: Clopper-Pearson interval of `rate`, for the threshold as it was found.
        false_positives: canaries left out that score above the threshold too.
    """

    false_positive_rate: float
    rate: float
    confidence: Interval
    false_positives: int


@dataclass(frozen=True)
class Attack:
    """What an attack shows. The three epsilons hold together at the confidence asked for.

    Attributes:
        canaries: how many there were; `trained_on` of them were trained on.
        one_run: lower bound on epsilon without assumptions.
        gaussian_one_run: the same, if the mechanism's trade-off curve is Gaussian.
        gaussian_threshold: the same, if canaries do not disturb each other either.
        auroc: area under the curve of true over false positives.
        auroc_confidence: interval of it, by DeLong et al. 1988.
        sensitivity: at low false positive rates.
    """

    canaries: int
    trained_on: int
    one_run: float
    gaussian_one_run: float
    gaussian_threshold: float
    auroc: float
    auroc_confidence: Interval
    sensitivity: tuple[Sensitivity, ...]

    @property
    def bound(self) -> float:
        """The largest of the three."""
        return max(self.one_run, self.gaussian_one_run, self.gaussian_threshold)


def attack(scores: np.ndarray, trained_on: np.ndarray, delta: float, significance: float = 0.05) -> Attack:
    """Judge one attack.

    Args:
        scores: (m,) finite, higher for canaries that seem to have been trained on.
        trained_on: (m,) bool, the coins.
        delta: at which epsilon is bounded, (0, 1).
        significance: probability that a bound is too high at all, (0, 0.5).

    Raises:
        ValueError: fewer than two canaries on one side, a score that is not finite, or numbers out of range.
    """
    inside, outside = _split(scores, trained_on)
    _check_significance(significance)
    _check_delta(delta)
    guesses, right = right_guesses(scores, trained_on)
    each = significance / _BOUNDS
    return Attack(
        len(scores),
        len(inside),
        one_run_epsilon(len(scores), guesses, right, delta, each),
        gaussian_epsilon(one_run_mu(len(scores), guesses, right, each), delta),
        gaussian_epsilon(threshold_mu(inside, outside, each), delta),
        *auroc(inside, outside, significance),
        tuple(sensitivity(inside, outside, rate, significance) for rate in FALSE_POSITIVE_RATES),
    )


def right_guesses(scores: np.ndarray, trained_on: np.ndarray) -> tuple[int, int]:
    """Guess "trained on" for the highest and "left out" for the lowest scores; (guesses, right ones).

    The number of guesses is the even number next to `GUESSED` of the canaries, at least 2, whatever the scores.
    """
    half = max(1, round(GUESSED * len(scores) / 2))
    order = np.argsort(scores, kind="stable")
    right = np.count_nonzero(trained_on[order[-half:]]) + np.count_nonzero(~trained_on[order[:half]])
    return 2 * half, int(right)


def one_run_epsilon(canaries: int, guesses: int, right: int, delta: float, significance: float) -> float:
    """The largest epsilon that so many right guesses refute, 0 if none.

    Under (epsilon, delta) each guess is right with probability e^epsilon / (1 + e^epsilon) at most, whatever the
    others are, but for 2 m delta max_i P(v - i <= B < v) / i of the probability (B binomial).
    """
    _check_guesses(canaries, guesses, right)

    def excess(epsilon: float) -> float:
        chance = stats.binom(guesses, expit(epsilon))
        tail = chance.sf(right - 1)
        below = np.arange(1, right + 1)
        slack = ((chance.sf(right - 1 - below) - tail) / below).max(initial=0.0)
        return float(significance - tail - 2 * canaries * delta * slack)

    return _largest(excess)


def one_run_mu(canaries: int, guesses: int, right: int, significance: float) -> float:
    """The largest mu such that so many right guesses refute mu-Gaussian differential privacy, 0 if none.

    With c guesses and p_j the probability that j are right, let R_i = sum_{j >= i} p_j j / m and
    W_i = sum_{j >= i} p_j (c - j) / m: the probability that a random canary is guessed right (wrong) and at least i are
    right. Privacy of that canary asks for W_(i-1) >= Phi(Phi^-1(R_i) - mu). From p_right = `significance` down to i = 0
    this forces R_0 + W_0, which is c / m in truth; if it must be more, mu is refuted.
    """
    _check_guesses(canaries, guesses, right)

    def excess(mu: float) -> float:
        correct, wrong = significance * right / canaries, significance * (guesses - right) / canaries
        for i in range(right - 1, -1, -1):
            least = float(ndtr(ndtri(correct) - mu)) if correct < 1 else 1.0
            if least <= wrong:  # from here on nothing changes
                break
            correct, wrong = min(1.0, correct + i / (guesses - i) * (least - wrong)), least
        return correct + wrong - guesses / canaries

    return _largest(excess)


def threshold_mu(inside: np.ndarray, outside: np.ndarray, significance: float) -> float:
    """Lower bound on mu from the best of all thresholds, 0 if none shows any.

    At a threshold with false positive rate a and false negative rate b, Gaussian differential privacy asks for
    mu >= Phi^-1(1 - a) - Phi^-1(b). Both get Clopper-Pearson upper bounds, which hold for all thresholds at once when
    the significance is divided by the number of canaries: a bound is exact where the threshold is a score of its own
    side, and looser in between.
    """
    _check_significance(significance)
    thresholds = np.union1d(inside, outside)
    missed = np.searchsorted(np.sort(inside), thresholds, side="left")
    accused = len(outside) - np.searchsorted(np.sort(outside), thresholds, side="left")
    each = significance / (len(inside) + len(outside))
    a, b = _upper(accused, len(outside), each), _upper(missed, len(inside), each)
    return max(0.0, float(np.max(-ndtri(a) - ndtri(b))))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of mu-Gaussian differential privacy (Balle and Wang 2018; Dong, Roth and Su 2022, corollary 2.13).

    delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu); mu = 0 gives 0, infinity infinity.
    """
    _check_delta(delta)
    if not mu >= 0:
        raise ValueError(f"mu={mu} must be at least 0")
    if mu == 0 or mu == inf:
        return mu

    def excess(epsilon: float) -> float:
        one, other = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        return float(one + np.log(-np.expm1(min(other - one, -1e-300)))) - log(delta)

    most = mu * mu / 2 - mu * float(ndtri(delta))  # where the first term alone is delta
    if most <= 0 or excess(0.0) <= 0:
        return 0.0
    root: Any = brentq(excess, 0.0, most)
    return float(root)


def auroc(inside: np.ndarray, outside: np.ndarray, significance: float = 0.05) -> tuple[float, Interval]:
    """Probability that a canary trained on scores above one left out, ties half; and its interval by DeLong.

    Where DeLong's variance is 0 (all told apart, all wrongly, or all scores equal) the interval is Clopper-Pearson's
    for as many pairs as can be formed without using a canary twice.
    """
    ranks = stats.rankdata(np.concatenate([inside, outside]))
    won = (ranks[: len(inside)] - stats.rankdata(inside)) / len(outside)
    lost = 1 - (ranks[len(inside) :] - stats.rankdata(outside)) / len(inside)
    area = float(won.mean())
    variance = float(won.var(ddof=1) / len(won) + lost.var(ddof=1) / len(lost))
    if variance == 0:
        pairs = min(len(inside), len(outside))
        return area, clopper_pearson(round(area * pairs), pairs, significance)
    spread = sqrt(variance) * float(ndtri(1 - significance / 2))
    return area, Interval(max(0.0, area - spread), min(1.0, area + spread))


def sensitivity(inside: np.ndarray, outside: np.ndarray, rate: float, significance: float = 0.05) -> Sensitivity:
    """True positives at a false positive rate of at most `rate`; with few canaries that may mean none at all."""
    allowed = int(rate * len(outside) + 1e-9)
    threshold = np.sort(outside)[-1 - allowed]
    rightly, accused = int((inside > threshold).sum()), int((outside > threshold).sum())
    confidence = clopper_pearson(rightly, len(inside), significance)
    return Sensitivity(rate, rightly / len(inside), confidence, accused)


def clopper_pearson(hits: int, trials: int, significance: float) -> Interval:
    """The exact interval of a probability."""
    low = 1 - float(_upper(np.array(trials - hits), trials, significance / 2))
    return Interval(low, float(_upper(np.array(hits), trials, significance / 2)))


def mu_interval(inside: np.ndarray, outside: np.ndarray, significance: float) -> Interval:
    """Interval of mu where each score is normal with one spread and being trained on shifts it.

    mu is the difference of the means over the pooled spread; its error is sqrt(1/a + 1/b + mu^2 / (2 (a + b))) for a
    and b canaries on the two sides.
    """
    a, b = len(inside), len(outside)
    pooled = sqrt(((a - 1) * inside.var(ddof=1) + (b - 1) * outside.var(ddof=1)) / (a + b - 2))
    if pooled == 0:
        return Interval(0.0, inf) if inside.mean() == outside.mean() else Interval(inf, inf)
    mu = float(inside.mean() - outside.mean()) / pooled
    error = float(ndtri(1 - significance / 2)) * sqrt(1 / a + 1 / b + mu * mu / (2 * (a + b)))
    return Interval(max(0.0, mu - error), max(0.0, mu + error))


def noise_interval(
    inside: np.ndarray, outside: np.ndarray, noise: float, *, steps: int, rate: float, std: float, significance: float
) -> Interval:
    """Interval of the noise multiplier that was at work, as a multiple of the one that was claimed.

    In each step a score gets noise of standard deviation `std` and, with probability `rate`, one for being trained on.
    So the difference of the means over steps times rate is how much of a unit gets through, and the noise over that is
    what an accountant must be asked about. The significance is divided between the two.

    Args:
        inside: (a,) sums over all steps of the canaries trained on.
        outside: (b,) those of the others.
        noise: mean square of one step's score of the others, over all steps.
        steps: number of steps.
        rate: claimed sampling probability.
        std: claimed standard deviation of a step's score.
        significance: of the interval.
    """
    freedom, tail = steps * len(outside), significance / 4
    spread = [sqrt(noise * freedom / float(stats.chi2.ppf(p, freedom))) / std for p in (1 - tail, tail)]
    gap = float(inside.mean() - outside.mean())
    error = sqrt(inside.var(ddof=1) / len(inside) + outside.var(ddof=1) / len(outside)) * float(ndtri(1 - tail))
    through = [(gap + side) / (steps * rate) for side in (error, -error)]
    low, high = (inf if part <= 0 else wide / part for wide, part in zip(spread, through, strict=True))
    return Interval(low, high)


def steps_ratio(outside: np.ndarray, noise: float, steps: int, significance: float) -> tuple[float, Interval]:
    """Variance of the sums over steps times that of a step, and what independent noise allows: about 1.

    Noise that repeats raises it up to `steps`-fold, although each step by itself looks right.
    """
    ratio = float(np.mean(outside**2)) / (steps * noise) if noise else inf
    freedom = len(outside)
    low, high = (float(stats.chi2.ppf(p, freedom)) / freedom for p in (significance / 2, 1 - significance / 2))
    return ratio, Interval(low, high)


def _largest(excess: Callable[[float], float]) -> float:
    """The largest value from 0 on where a falling function is above 0, to 1e-6 below; 0 if there is none."""
    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        if high >= LARGEST:
            return high
        high *= 2
    root: Any = brentq(excess, 0.0 if high == 1 else high / 2, high, xtol=_CLOSE / 2)
    return max(0.0, float(root) - _CLOSE)


def _upper(hits: np.ndarray, trials: int, significance: float) -> np.ndarray:
    """One-sided Clopper-Pearson upper bounds."""
    with np.errstate(invalid="ignore"):
        return np.where(hits < trials, stats.beta.isf(significance, hits + 1.0, np.maximum(trials - hits, 1)), 1.0)


def _split(scores: np.ndarray, trained_on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if scores.shape != trained_on.shape or scores.ndim != 1 or trained_on.dtype != bool:
        raise ValueError(f"scores {scores.shape}, coins {trained_on.shape} {trained_on.dtype}: give (m,) and (m,) bool")
    if not np.isfinite(scores).all():
        raise ValueError("a score is NaN or infinite: nothing can be said of the attack")
    inside, outside = scores[trained_on], scores[~trained_on]
    if min(len(inside), len(outside)) < 2:
        raise ValueError(
            f"{len(inside)} canaries were trained on and {len(outside)} were not: plant more, at least two of each"
        )
    return inside, outside


def _check_guesses(canaries: int, guesses: int, right: int) -> None:
    if not 0 <= right <= guesses <= canaries or guesses < 1:
        raise ValueError(f"right={right} of guesses={guesses} of canaries={canaries} is impossible")


def _check_significance(significance: float) -> None:
    if not 0 < significance < 0.5:
        raise ValueError(f"significance={significance} is out of range: allowed is (0, 0.5)")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} is out of range: allowed is (0, 1)")
