"""How strong a claim is, in numbers that mean something: from the charges of a data set to odds of guessing right.

For a mechanism with privacy profile delta(epsilon), and neighbours that differ in one unit:

    right guesses, undecided before     <= (1 + delta(0)) / 2         (delta(0) is the total variation distance)
    true positives at false positives a <= min over epsilon of e^epsilon a + delta(epsilon)
    mu: the least one with delta(epsilon) <= Phi(-epsilon/mu + mu/2) - e^epsilon Phi(-epsilon/mu - mu/2)

The first two hold by definition (Wasserman and Zhou 2010; Kairouz et al. 2015), for every attacker, also one that
knows all other records and sees every release. The third is the profile of a Gaussian mechanism (Dong, Roth and Su
2022, corollary 2.13). It must never shorten what was charged: a history that no accountant answers has no profile.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import ceil, exp, isfinite

import numpy as np
from scipy.special import log_ndtr, ndtr

from fedmpt_core.audit.spending import Spending
from fedmpt_core.privacy.accounting.epsilon import AccountingError, Steps, epsilon, privacy_profile, replace_one
from fedmpt_core.report.content import Profile, SiteAccount

TABLE = (0.0, 1.0, 3.0, 5.0, 8.0)  # always among the epsilons
MOST_PROFILES = 4  # that a report draws; chosen
POINTS = 48
FALSE_POSITIVES = 0.01
LEAST_DELTA = 1e-10  # chosen: below it the accountants' own rounding shows
MOST_MU = 100.0

Kind = tuple[float, float, int]  # sample rate, noise multiplier, steps


def accounts_of(spending: Mapping[str, Spending]) -> tuple[SiteAccount, ...]:
    """Every site's account: what was spent before this run, what this run added, what is left."""
    accounts = []
    for site, spent in spending.items():
        try:
            before: float | None = epsilon(_steps(spent.charged_before), spent.delta)
        except (AccountingError, ValueError):
            before = None
        added = None if before is None or not isfinite(spent.total) else max(0.0, spent.total - before)
        left = None if spent.cap is None or not isfinite(spent.total) else max(0.0, spent.cap - spent.total)
        accounts.append(SiteAccount(site, before, added, left))
    return tuple(accounts)


def profiles_of(spending: Mapping[str, Spending]) -> tuple[Profile, ...]:
    """Privacy profiles of the data sets, those that spent most first; at most four.

    Sites that were charged the same share one. A replaced unit is worked out for the first alone, since it needs the
    slowest accountant.
    """
    alike: dict[tuple[Kind, ...], list[str]] = {}
    for site, spent in sorted(spending.items(), key=lambda item: -item[1].total):
        sums: dict[tuple[float, float], int] = {}
        for rate, noise, steps in (*spent.charged, *spent.charged_before):
            sums[rate, noise] = sums.get((rate, noise), 0) + steps
        alike.setdefault(tuple(sorted((*kind, steps) for kind, steps in sums.items())), []).append(site)
    profiles: list[Profile] = []
    for charged, sites in list(alike.items())[:MOST_PROFILES]:
        spent = spending[sites[0]]
        if not isfinite(spent.total):
            continue
        try:
            profile = _profile(charged, spent.total, spent.delta, with_replaced=not profiles)
        except (AccountingError, ValueError):
            continue
        profiles.append(replace(profile, sites=tuple(sites)))
    return tuple(profiles)


def gaussian_mu(epsilons: Sequence[float], deltas: Sequence[float]) -> float | None:
    """The least mu whose Gaussian mechanism has at least the given deltas; None where there is none up to 100.

    Args:
        epsilons: at least 0.
        deltas: at them, in [0, 1]; those below 1e-10 are left out.

    Edge cases: no delta left -> 0.0; a delta of 1 -> None.
    """
    if max(deltas, default=0.0) >= 1:
        return None
    mu = 0.0
    for value, delta in zip(epsilons, deltas, strict=True):
        if delta < LEAST_DELTA or gaussian_delta(value, max(mu, 1e-9)) >= delta:
            continue
        low, high = mu, MOST_MU
        if gaussian_delta(value, high) < delta:
            return None
        while high - low > 1e-9 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if gaussian_delta(value, middle) >= delta else (middle, high)
        mu = high
    return mu


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Delta at an epsilon of the Gaussian mechanism whose noise is 1 / mu of its sensitivity, mu > 0."""
    return float(ndtr(mu / 2 - epsilon / mu) - np.exp(epsilon + log_ndtr(-epsilon / mu - mu / 2)))


@lru_cache(maxsize=64)
def _profile(charged: tuple[Kind, ...], total: float, delta: float, *, with_replaced: bool) -> Profile:
    """The profile of nobody in particular."""
    history, top = _steps(charged), max(TABLE[-1], 1.3 * total)
    step = max(0.25, ceil(4 * top / POINTS) / 4)
    grid = tuple(sorted({*TABLE, *(step * i for i in range(ceil(top / step) + 1))}))
    deltas = tuple(privacy_profile(history, grid))
    named = min(exp(value) * FALSE_POSITIVES + delta for value, delta in zip(grid, deltas, strict=True))
    replaced = None
    if with_replaced and history:
        try:
            replaced = replace_one(history, delta)
        except AccountingError:
            replaced = None
    guess = 50 * (1 + deltas[0])
    return Profile((), grid, deltas, gaussian_mu(grid, deltas), guess, min(100.0, 100 * named), replaced)


def _steps(charged: Sequence[Kind]) -> list[Steps]:
    return [Steps(rate, noise, count) for rate, noise, count in charged]
