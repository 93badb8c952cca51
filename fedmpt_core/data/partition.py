"""One data set split over K simulated sites: by clusters of label sets or features, Dirichlet draws, or uniformly.

`labels` clusters softmax-normalised label vectors with k-means, the heterogeneous split of the paper as
far as it is known (method, section 8): record i with labels y_i in {0,1}^C, k_i of them ones, becomes x_i =
softmax(y_i) = (1 + (e - 1) y_i) / (C + (e - 1) k_i), and every cluster is one site. `features` clusters the
frozen image tower's mean patch features instead. `dirichlet` is the usual split of other work (Hsu et al. 2019),
carried over to several labels per record.

Records of one group stay together: with groups, what is split are groups, each with the mean of its records' vectors.

For simulation only: it needs all records in one place. It must never be run on data that different sites own,
and it must never be given a test set to align with a training set: a partition belongs to exactly the data
set it was made of.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from fedmpt_core.config.datasets import Division
from fedmpt_core.data.pictures import Dataset

STARTS = 10
"""Runs of k-means, of which the best is kept (chosen)."""

Parts = tuple[np.ndarray, ...]
"""K arrays of ascending int64 indices, none empty, every record in exactly one."""


def sites_for(heterogeneity: float, classes: int) -> int:
    """K = round(t C), at least 1: as many sites as a share of the classes, halves rounded up (method, section 8).

    Args:
        heterogeneity: t, (0, 1].
        classes: C, at least 1.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 < heterogeneity <= 1 or classes < 1:
        raise ValueError(f"heterogeneity={heterogeneity}, classes={classes}: the first is in (0, 1], the other above 0")
    return max(1, math.floor(heterogeneity * classes + 0.5))


def divide(
    dataset: Dataset,
    kind: Division,
    sites: int,
    seed: int,
    *,
    alpha: float = 0.5,
    vectors: np.ndarray | None = None,
) -> Parts:
    """One part of the records for each site.

    `labels` clusters records with similar label sets, `features` records that look alike, `uniform` deals them out at
    random. For `dirichlet` the sites' shares of every label, and of records without any, are one draw from a symmetric
    Dirichlet distribution; a record goes by one of its labels, drawn at random, a group by one of its records'.

    Args:
        dataset: R records, all labels known.
        kind: how they are divided.
        sites: number of parts K, in [1, number of groups or records].
        seed: fixes the partition, in [0, 2^32 - 1].
        alpha: for `dirichlet`: concentration, [0.01, 1000]; small means uneven.
        vectors: for `features`: (R, D) finite, what each record looks like; only their direction counts.

    Returns:
        The parts, ordered by their first index. Those of `uniform` are in no order; their numbers of groups, or of
        records where there are none, differ by one at most.

    Raises:
        ValueError: K or alpha is out of range, or the vectors do not fit.

    Edge cases:
        - a site that would have nothing, as with fewer different label sets than sites -> it takes half of the largest
          part.
        - `labels`: records with the same labels -> same site, unless that part had to be halved.
    """
    units = _units(dataset, sites)
    match kind:
        case "labels":
            raised = 1 + (np.e - 1) * dataset.targets.astype(np.float64)
            return _clusters(_means(raised / raised.sum(axis=1, keepdims=True), units), units, sites, seed)
        case "features":
            return _clusters(_means(_directions(vectors, len(dataset)), units), units, sites, seed)
        case "dirichlet":
            return _dealt(dataset, units, sites, seed, alpha)
        case "uniform":
            order = np.random.default_rng(seed).permutation(units.max() + 1)
            return tuple(np.flatnonzero(np.isin(units, part)).astype(np.int64) for part in np.array_split(order, sites))


def _directions(vectors: np.ndarray | None, count: int) -> np.ndarray:
    """(R, D) of unit length. Raises ValueError unless there is one finite vector for each of `count` records."""
    if vectors is None or vectors.ndim != 2 or len(vectors) != count or not np.isfinite(vectors).all():
        shape = () if vectors is None else vectors.shape
        raise ValueError(f"vectors has shape {shape}: give one finite vector for each of {count} records")
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _dealt(dataset: Dataset, units: np.ndarray, sites: int, seed: int, alpha: float) -> Parts:
    if not 0.01 <= alpha <= 1000:
        raise ValueError(f"alpha={alpha} is out of range: allowed is [0.01, 1000]")
    rng = np.random.default_rng([seed, 1])
    positives = np.zeros((units.max() + 1, len(dataset.classes) + 1))
    np.add.at(positives, units, np.pad(dataset.targets == 1, ((0, 0), (0, 1))))
    positives[~positives.any(1), -1] = 1
    shares = rng.dirichlet(np.full(sites, alpha), size=positives.shape[1])  # (C+1,K)
    labels = _pick(rng, positives)
    chosen = _pick(rng, shares[labels])
    return _parts([np.flatnonzero(chosen == k) for k in range(sites)], units, sites)


def _units(dataset: Dataset, sites: int) -> np.ndarray:
    """(R,) int64, the group of each record, from 0 without gaps; each record its own where there are no groups."""
    units = np.arange(len(dataset))
    if dataset.groups is not None:
        units = np.unique(np.array(dataset.groups), return_inverse=True)[1]
    count = int(units.max()) + 1 if len(units) else 0
    if not 1 <= sites <= count:
        noun = "records" if dataset.groups is None else "groups, which stay together,"
        raise ValueError(f"sites={sites} is out of range: a data set of {count} {noun} makes 1 to as many sites")
    return units


def _means(vectors: np.ndarray, units: np.ndarray) -> np.ndarray:
    """(R, D) to (U, D)."""
    count = np.bincount(units)
    if len(count) == len(vectors):
        return vectors[np.argsort(units)]
    sums = np.zeros((len(count), vectors.shape[1]), vectors.dtype)
    np.add.at(sums, units, vectors)
    return sums / count[:, None].astype(vectors.dtype)


def _clusters(vectors: np.ndarray, units: np.ndarray, sites: int, seed: int) -> Parts:
    from sklearn.cluster import KMeans  # takes seconds to import, and most sites split nothing
    from sklearn.exceptions import ConvergenceWarning

    means = KMeans(
        n_clusters=min(sites, len(np.unique(vectors, axis=0))),
        n_init=STARTS,  # pyright: ignore[reportArgumentType]  # typed after its default "auto"
        random_state=seed,
        algorithm="lloyd",
    )
    # Every simulated site computes the partition for itself: one thread, so that sums have one order
    # everywhere.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # k-means says so when it ends with fewer clusters than asked for; they are halved below.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = means.fit_predict(vectors)
    return _parts([np.flatnonzero(labels == cluster) for cluster in np.unique(labels)], units, sites)


def _parts(of_units: Sequence[np.ndarray], units: np.ndarray, sites: int) -> Parts:
    """Parts of units to parts of records, the largest halved until there are enough."""
    parts = [part for part in of_units if len(part)]
    while len(parts) < sites:
        largest = max(range(len(parts)), key=lambda k: len(parts[k]))
        whole = parts.pop(largest)
        parts += [whole[::2], whole[1::2]]
    records = [np.flatnonzero(np.isin(units, part)).astype(np.int64) for part in parts]
    return tuple(sorted(records, key=lambda part: part[0]))


def _pick(rng: np.random.Generator, weights: np.ndarray) -> np.ndarray:
    """(U,) a column for each row of (U, N) weights, with a probability in proportion to them."""
    upper = np.cumsum(weights, axis=1)
    return (rng.random((len(weights), 1)) * upper[:, -1:] < upper).argmax(1)
