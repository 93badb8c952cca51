"""Multi-label figures from scores and labels: average precision, F1 in both common definitions, calibration.

Average precision is the step-wise area of scikit-learn, ties included. The two readings of "CF1" are kept apart by
name:

    cf1_overall = 2 CP CR / (CP + CR), CP and CR the class means of precision and recall     (the usual CF1)
    cf1_macro   = class mean of F1                                             (the paper's released code)

Class means run over classes with at least one positive. A threshold must never be chosen on the records it is then used
on: `best_threshold` is for the validation split.
"""

from dataclasses import dataclass

import numpy as np

BINS = 15  # of the calibration error, equally wide


@dataclass(frozen=True)
class F1Scores:
    """F1 at a threshold, all in [0, 1]; 0 / 0 counts as 0.

    Attributes:
        cf1_overall: harmonic mean of CP and CR.
        cf1_macro: mean of the classes' own F1.
        of1: harmonic mean of precision and recall over all decisions.
        recall: share of the present labels that is chosen, over all decisions.
    """

    cf1_overall: float
    cf1_macro: float
    of1: float
    recall: float


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Average precision of every class; `np.nanmean` of it is mAP.

    Args:
        scores: (R, C) finite, larger means more likely; only their order within a class matters.
        targets: (R, C) in {0, 1}.

    Returns:
        (C,) float64 in [0, 1], NaN for a class without positives.

    Raises:
        ValueError: shapes, values outside the ranges above, or no positive at all.

    Edge cases:
        Equal scores -> one step of the curve, whatever their order. All scores equal -> the share of positives.
    """
    scores, targets = _checked(scores, targets)
    return np.array([_one_class(scores[:, c], targets[:, c]) for c in range(scores.shape[1])])


def f1_scores(scores: np.ndarray, targets: np.ndarray, threshold: float) -> F1Scores:
    """F1 of the decisions `score >= threshold`.

    Args:
        scores: (R, C) finite.
        targets: (R, C) in {0, 1}.
        threshold: one threshold for all classes.

    Raises:
        ValueError: shapes, values outside the ranges above, or no positive at all.
    """
    scores, targets = _checked(scores, targets)
    chosen = scores >= threshold
    hits = (chosen & targets).sum(0)  # (C,)
    predicted, positives = chosen.sum(0), targets.sum(0)
    used = positives > 0
    precision, recall = (hits / np.maximum(predicted, 1))[used].mean(), (hits[used] / positives[used]).mean()
    return F1Scores(
        cf1_overall=float(2 * precision * recall / (precision + recall)) if hits.any() else 0.0,
        cf1_macro=float((2 * hits[used] / (predicted + positives)[used]).mean()),
        of1=float(2 * hits.sum() / (predicted + positives).sum()),
        recall=float(hits.sum() / positives.sum()),
    )


def best_threshold(scores: np.ndarray, targets: np.ndarray) -> float:
    """The threshold with the largest OF1 on these records; meant for a validation split.

    Args:
        scores: (R, C) finite.
        targets: (R, C) in {0, 1}.

    Returns:
        One of the scores: every score is tried, and of equally good ones the largest is taken. Decisions are
        `score >= threshold`.

    Raises:
        ValueError: shapes, values or no positive at all.
    """
    scores, targets = _checked(scores, targets)
    thresholds, chosen, hits = _curve(scores.ravel(), targets.ravel())
    return float(thresholds[np.argmax(2 * hits / (chosen + hits[-1]))])


def calibration_error(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Expected calibration error over all record-class decisions.

    Args:
        probabilities: (R, C) in [0, 1].
        targets: (R, C) in {0, 1}.

    Returns:
        Mean over decisions of |mean probability - share of positives| of the decision's bin, [0, 1].

    Raises:
        ValueError: shapes or values outside the ranges above.
    """
    probabilities, targets = _checked(probabilities, targets, need_positive=False)
    if probabilities.min() < 0 or probabilities.max() > 1:
        raise ValueError("probabilities lie outside [0, 1]: give probabilities, not logits")
    gaps, _ = np.histogram(probabilities, BINS, (0, 1), weights=probabilities - targets)
    return float(np.abs(gaps).sum() / probabilities.size)


def _checked(scores: np.ndarray, targets: np.ndarray, *, need_positive: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float64 and targets as bool, or a ValueError."""
    scores, targets = np.asarray(scores, dtype=np.float64), np.asarray(targets)
    if scores.ndim != 2 or scores.shape != targets.shape or scores.size == 0:
        raise ValueError(
            f"scores {scores.shape} and targets {targets.shape}: give two (R, C) arrays that are not empty"
        )
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity: no figure can be computed from them")
    if not np.isin(targets, (0, 1)).all():
        raise ValueError("targets hold values other than 0 and 1: give one 0 or 1 per record and class")
    if need_positive and not targets.any():
        raise ValueError("targets hold no positive label: precision and recall are not defined")
    return scores, targets.astype(bool)


def _one_class(scores: np.ndarray, targets: np.ndarray) -> float:
    if not targets.any():
        return float("nan")
    _, chosen, hits = _curve(scores, targets)
    return float((np.diff(hits, prepend=0) / hits[-1] * (hits / chosen)).sum())


def _curve(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every score once, from the largest down; how many scores reach it, and how many of these are of positives."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    return ranked[ends], ends + 1, np.cumsum(targets[order])[ends]
