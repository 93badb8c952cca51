"""What a model makes of a site's accidental label pairs ("a cat, so a chair") on pictures with independent labels.

A pair (a, b) is spurious when the two occur together at some training site more often than they would by themselves.
Among pictures that show a and not b, or b and not a, the **false activation rate** is the share in which the absent
partner is found all the same. The rate of absent labels that are no partner of anything in the picture stands beside
it: a model that finds everything everywhere has both high.
"""

import numpy as np


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
