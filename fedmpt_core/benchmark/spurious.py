"""What a model makes of a site's accidental label pairs ("a cat, so a chair") on pictures with independent labels.

A pair (a, b) is spurious when the two occur together at some training site more often than they would by themselves.
Among pictures that show a and not b, or b and not a, the **false activation rate** is the share in which the absent
partner is found all the same. The rate of absent labels that are no partner of anything in the picture stands beside
it: a model that finds everything everywhere has both high.
"""

from collections.abc import Sequence

import numpy as np

LEAST_TOGETHER = 5  # pictures at a site that show both labels of a pair (chosen)
LEAST_PHI, LEAST_EXCESS = 0.3, 0.2  # of a pair's correlation at a site, and over that in the test pictures (chosen)


def spurious_pairs(train: Sequence[np.ndarray], test: np.ndarray) -> np.ndarray:
    """Pairs of labels that hang together at some site and not, or much less, where models are judged.

    Measured by the phi coefficient, the correlation of two labels over pictures.

    Args:
        train: by site, (R, C) targets in {0, 1}; other values count as 0.
        test: (R, C) targets in {0, 1} of the pictures that models are judged on.

    Returns:
        (K, 2) int64 label indices, the smaller first; none where labels hang together alike.
    """
    independent = _phi(test)
    pairs = np.zeros(independent.shape, bool)
    for targets in train:
        shown = (targets == 1).astype(np.int64)
        phi = _phi(shown)
        pairs |= (shown.T @ shown >= LEAST_TOGETHER) & (phi >= LEAST_PHI) & (phi - independent >= LEAST_EXCESS)
    return np.argwhere(np.triu(pairs, 1)).astype(np.int64)


def _phi(targets: np.ndarray) -> np.ndarray:
    """(C, C) correlations; 0 where one of the labels is everywhere or nowhere."""
    shown = (targets == 1).astype(np.float64)
    if not len(shown):
        return np.zeros((shown.shape[1],) * 2)
    centred = shown - shown.mean(0)
    spread = np.sqrt((centred**2).sum(0))
    scale = np.outer(spread, spread)
    return np.divide(centred.T @ centred, scale, out=np.zeros_like(scale), where=scale > 0)


def false_activation(
    probabilities: np.ndarray, targets: np.ndarray, pairs: np.ndarray, threshold: float
) -> tuple[float, float]:
    """Absent partners, and other absent labels, whose probability reaches the threshold.

    Args:
        probabilities: (R, C).
        targets: (R, C) in {0, 1}.
        pairs: (K, 2) int label indices, either order.
        threshold: chosen on other records.

    Returns:
        The shares of them, [0, 1], over all records and labels together: of labels whose spurious partner is in the
        picture, and of labels of which none is. NaN where there was none to find.

    Raises:
        ValueError: shapes that do not belong together, or a label paired with itself.
    """
    if probabilities.shape != targets.shape or pairs.ndim != 2 or pairs.shape[1:] != (2,):
        raise ValueError(
            f"probabilities {probabilities.shape}, targets {targets.shape} and pairs {pairs.shape} do not belong "
            "together: give two (R, C) and one (K, 2)"
        )
    partner = np.zeros((targets.shape[1],) * 2, np.int64)
    partner[pairs[:, 0], pairs[:, 1]] = partner[pairs[:, 1], pairs[:, 0]] = 1
    if partner.diagonal().any():
        raise ValueError("pairs holds a label paired with itself: give two different labels")
    shown = targets.astype(bool)
    awaited = ~shown & (targets.astype(np.int64) @ partner > 0)  # absent, and a partner of it is there
    active = probabilities >= threshold

    def share(where: np.ndarray) -> float:
        return float(active[where].mean()) if where.any() else float("nan")

    return share(awaited), share(~shown & ~awaited)


def threshold_at_recall(probabilities: np.ndarray, targets: np.ndarray, recall: float) -> float:
    """The largest threshold at which at least this share of all present labels is found; for validation records.

    Args:
        probabilities: (R, C).
        targets: (R, C) in {0, 1}, at least one 1.
        recall: (0, 1].

    Raises:
        ValueError: a recall out of range, or no present label.
    """
    if not 0 < recall <= 1:
        raise ValueError(f"recall={recall} is out of range: allowed is (0, 1]")
    positives = np.sort(probabilities[targets.astype(bool)])[::-1]
    if not len(positives):
        raise ValueError("targets hold no present label: there is nothing to recall")
    return float(positives[int(np.ceil(recall * len(positives))) - 1])
