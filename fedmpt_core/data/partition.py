"""One data set split over K simulated sites: by clusters of label sets, or uniformly.

`by_labels` clusters softmax-normalised label vectors with k-means, the heterogeneous split of the paper as
far as it is known (method, section 8): record i with labels y_i in {0,1}^C, k_i of them ones, becomes x_i =
softmax(y_i) = (1 + (e - 1) y_i) / (C + (e - 1) k_i), and every cluster is one site.

For simulation only: it needs all labels in one place. It must never be run on data that different sites own,
and it must never be given a test set to align with a training set: a partition belongs to exactly the data
set it was made of. Groups are not kept together.
"""

import warnings

import numpy as np
from threadpoolctl import threadpool_limits

from fedmpt_core.data.pictures import Dataset

STARTS = 10
"""Runs of k-means, of which the best is kept (chosen)."""


def by_labels(dataset: Dataset, sites: int, seed: int) -> tuple[np.ndarray, ...]:
    """Clusters of records with similar label sets, one per site.

    Args:
        dataset: R records.
        sites: number of parts K, in [1, R].
        seed: fixes the partition, in [0, 2^32 - 1].

    Returns:
        K arrays of ascending int64 indices, none empty, every record in exactly one; ordered by their first
        index.

    Raises:
        ValueError: K or the seed is out of range.

    Edge cases:
        - fewer different label sets than sites -> the largest parts are halved until every site has records.
        - records with the same labels -> same site, unless that part had to be halved.
    """
    from sklearn.cluster import KMeans  # takes seconds to import, and most sites split nothing
    from sklearn.exceptions import ConvergenceWarning

    _check(dataset, sites, seed)
    vectors = _softmax(dataset.targets)
    clusters = min(sites, len(np.unique(dataset.targets, axis=0)))
    means = KMeans(
        n_clusters=clusters,
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
    parts = [np.flatnonzero(labels == cluster) for cluster in np.unique(labels)]
    while len(parts) < sites:
        largest = max(range(len(parts)), key=lambda k: len(parts[k]))
        whole = parts.pop(largest)
        parts += [whole[::2], whole[1::2]]
    return tuple(sorted((p.astype(np.int64) for p in parts), key=lambda part: part[0]))


def uniform(dataset: Dataset, sites: int, seed: int) -> tuple[np.ndarray, ...]:
    """Records dealt out at random, for comparison.

    Args:
        dataset: R records.
        sites: number of parts K, in [1, R].
        seed: fixes the partition, in [0, 2^32 - 1].

    Returns:
        K arrays of ascending int64 indices, every record in exactly one; their lengths differ by one at most.

    Raises:
        ValueError: K or the seed is out of range.
    """
    _check(dataset, sites, seed)
    order = np.random.default_rng(seed).permutation(len(dataset))
    return tuple(np.sort(part).astype(np.int64) for part in np.array_split(order, sites))


def _softmax(targets: np.ndarray) -> np.ndarray:
    """(R, C) in {0, 1} to (R, C) float64 whose rows sum to one."""
    raised = 1 + (np.e - 1) * targets.astype(np.float64)
    return raised / raised.sum(axis=1, keepdims=True)


def _check(dataset: Dataset, sites: int, seed: int) -> None:
    if not 1 <= sites <= len(dataset):
        raise ValueError(
            f"sites={sites} is out of range: a data set of {len(dataset)} records makes 1 to as many sites"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} is out of range: allowed is [0, {2**32 - 1}]")
