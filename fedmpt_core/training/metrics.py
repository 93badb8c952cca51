"""Multi-label figures from scores and labels: mean average precision, F1 in both common definitions,
calibration.

Average precision is the step-wise area of scikit-learn, ties included. The two readings of "CF1" are kept
apart by name:

    cf1_overall = 2 CP CR / (CP + CR), CP and CR the class means of precision and recall     (the usual CF1)
    cf1_macro   = class mean of F1                                                           (the paper's
    released code)

Class means run over classes with at least one positive; how many were left out is returned. A threshold must
never be chosen on the records it is then used on: `best_threshold` is for the validation split.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class AveragePrecision:
    """Average precision of every class.

    Attributes:
        mean: mean over classes with positives (mAP), [0, 1].
        per_class: (C,) float64, NaN for a class without positives.
        without_positives: how many classes have none and are left out of the mean.
    """

    mean: float
    per_class: np.ndarray
    without_positives: int


@dataclass(frozen=True)
class F1Scores:
    """Precision, recall and F1 at a threshold, all in [0, 1]; 0 / 0 counts as 0.

    Attributes:
        class_precision: CP, mean over classes with positives.
        class_recall: CR, mean over classes with positives.
        cf1_overall: harmonic mean of CP and CR.
        cf1_macro: mean of the classes' own F1.
        overall_precision: OP, over all decisions.
        overall_recall: OR, over all decisions.
        of1: harmonic mean of OP and OR.
        without_positives: how many classes have no positive and are left out of the class means.
    """

    class_precision: float
    class_recall: float
    cf1_overall: float
    cf1_macro: float
    overall_precision: float
    overall_recall: float
    of1: float
    without_positives: int


def average_precision(scores: np.ndarray, targets: np.ndarray) -> AveragePrecision:
    """Average precision per class and its mean.

    Args:
        scores: (R, C) finite, larger means more likely; only their order within a class matters.
        targets: (R, C) in {0, 1}.

    Returns:
        AveragePrecision.

    Raises:
        ValueError: shapes, values outside the ranges above, or no positive at all.

    Edge cases:
        Equal scores -> one step of the curve, whatever their order. All scores equal -> the share of
        positives.
    """
    scores, targets = _checked(scores, targets)
    per_class = np.array([_one_class(scores[:, c], targets[:, c]) for c in range(scores.shape[1])])
    missing = int(np.isnan(per_class).sum())
    return AveragePrecision(float(np.nanmean(per_class)), per_class, missing)


def f1_scores(scores: np.ndarray, targets: np.ndarray, threshold: float) -> F1Scores:
    """Precision, recall and F1 of the decisions `score >= threshold`.

    Args:
        scores: (R, C) finite.
        targets: (R, C) in {0, 1}.
        threshold: one threshold for all classes.

    Returns:
        F1Scores.

    Raises:
        ValueError: shapes, values outside the ranges above, or no positive at all.
    """
    scores, targets = _checked(scores, targets)
    chosen = scores >= threshold
    hits = (chosen & targets).sum(0).astype(np.float64)  # (C,)
    predicted, positives = chosen.sum(0), targets.sum(0)
    used = positives > 0
    precision, recall = _ratio(hits, predicted)[used], _ratio(hits, positives)[used]
    overall_precision = float(_ratio(hits.sum(), predicted.sum()))
    overall_recall = float(_ratio(hits.sum(), positives.sum()))
    return F1Scores(
        class_precision=float(precision.mean()),
        class_recall=float(recall.mean()),
        cf1_overall=_harmonic(float(precision.mean()), float(recall.mean())),
        cf1_macro=float(_ratio(2 * hits, predicted + positives)[used].mean()),
        overall_precision=overall_precision,
        overall_recall=overall_recall,
        of1=_harmonic(overall_precision, overall_recall),
        without_positives=int((~used).sum()),
    )


def best_threshold(
    scores: np.ndarray, targets: np.ndarray, metric: Literal["of1", "cf1_overall", "cf1_macro"] = "of1"
) -> float:
    """The threshold with the largest `metric` on these records; meant for a validation split.

    Args:
        scores: (R, C) finite.
        targets: (R, C) in {0, 1}.
        metric: which field of F1Scores to maximise.

    Returns:
        One of the scores: every score is tried, and of equally good ones the largest is taken. Decisions are
        `score >= threshold`.

    Raises:
        ValueError: shapes, values, no positive at all, or an unknown metric.
    """
    scores, targets = _checked(scores, targets)
    order = np.argsort(-scores, axis=0, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=0)  # (R,C), each class from its largest score down
    hits = np.cumsum(np.take_along_axis(targets, order, axis=0), axis=0, dtype=np.float64)
    predicted = np.arange(1.0, len(scores) + 1)[:, None]
    positives = targets.sum(0)
    used = positives > 0

    flat = np.argsort(-ranked.ravel(), kind="stable")
    candidates = ranked.ravel()[flat]
    # Equal scores are taken together.
    ends = np.append(np.flatnonzero(np.diff(candidates)), len(candidates) - 1)

    def class_mean(per_class: np.ndarray) -> np.ndarray:
        """(R,C) figure of a class after each of its own scores -> mean after each score of all classes."""
        steps = np.diff(per_class, axis=0, prepend=0.0) * used
        return np.cumsum(steps.ravel()[flat])[ends] / used.sum()

    match metric:
        case "of1":
            found = np.cumsum(np.diff(hits, axis=0, prepend=0.0).ravel()[flat])[ends]
            value = 2 * found / (ends + 1 + positives.sum())
        case "cf1_overall":
            precision, recall = class_mean(hits / predicted), class_mean(_ratio(hits, positives))
            value = _ratio(2 * precision * recall, precision + recall)
        case "cf1_macro":
            value = class_mean(2 * hits / (predicted + positives))
        case _:
            raise ValueError(f"metric={metric!r} is not known: use 'of1', 'cf1_overall' or 'cf1_macro'")
    # Running sums differ by rounding where the true figures are equal.
    return float(candidates[ends[np.argmax(value >= value.max() - 1e-12)]])


def calibration_error(probabilities: np.ndarray, targets: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error over all record-class decisions.

    Args:
        probabilities: (R, C) in [0, 1].
        targets: (R, C) in {0, 1}.
        bins: number of equally wide bins, >= 1.

    Returns:
        Mean over decisions of |mean probability - share of positives| of the decision's bin, [0, 1].

    Raises:
        ValueError: shapes, values outside the ranges above, or bins < 1.
    """
    probabilities, targets = _checked(probabilities, targets, need_positive=False)
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1: use 15")
    if probabilities.min() < 0 or probabilities.max() > 1:
        raise ValueError("probabilities lie outside [0, 1]: give probabilities, not logits")
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, probabilities.ravel(), side="right") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    mean = _ratio(np.bincount(place, weights=probabilities.ravel(), minlength=bins), count)
    share = _ratio(np.bincount(place, weights=targets.ravel(), minlength=bins), count)
    return float((count * np.abs(mean - share)).sum() / count.sum())


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
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    hits = np.cumsum(targets[order])[ends]
    precision, recall = hits / (ends + 1), hits / hits[-1]
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def _ratio(over: np.ndarray | float, under: np.ndarray | float) -> np.ndarray:
    over, under = np.broadcast_arrays(np.asarray(over, np.float64), np.asarray(under, np.float64))
    return np.divide(over, under, out=np.zeros(over.shape), where=under != 0)


def _harmonic(one: float, other: float) -> float:
    return 2 * one * other / (one + other) if one + other > 0 else 0.0
