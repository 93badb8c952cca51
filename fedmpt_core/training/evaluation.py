"""Scoring the global model on a site's held-out pictures.

Thresholds are chosen on the `val` split and used on `test`; without a `val` split that shows a label the threshold is
0.5 and the result says so. What no picture shows has no figure; everything else is scored, each part by itself. Where
some classes were never trained, the threshold is chosen on the trained ones alone. Scores of pictures never leave this
module, only the figures over the whole split.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedmpt_core.model.base import TunedModel
from fedmpt_core.model.device import PieceSize, in_pieces
from fedmpt_core.model.features.cache import PatchFeatures
from fedmpt_core.model.fedmpt.gating import entropy
from fedmpt_core.training import metrics

DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class Scores:
    """Model outputs on R pictures: `probabilities` (R, C) and `gate` (R, N), float64."""

    probabilities: np.ndarray
    gate: np.ndarray


@dataclass(frozen=True)
class Split:
    """Held-out records: their patch features and (R, C) targets in {0, 1}."""

    features: PatchFeatures
    targets: np.ndarray


def score(model: TunedModel, features: PatchFeatures, *, batch_size: int = 64) -> Scores:
    """Probabilities and gate weights of every record, without gradients."""
    device = next(iter(model.trainable_parameters().values())).device
    probabilities, gates = [], []
    with torch.no_grad():
        text = model.text_features()

        def predict(start: int, stop: int) -> None:
            prediction = model(features.batch(range(start, stop)).to(device), text)
            probabilities.append(prediction.probabilities.double().cpu().numpy())
            gates.append(prediction.gate.double().cpu().numpy())

        in_pieces(len(features), PieceSize(batch_size), predict)
    return Scores(np.concatenate(probabilities), np.concatenate(gates))


def evaluate(model: TunedModel, test: Split, val: Split | None = None, *, unseen: int = 0) -> dict[str, Any]:
    """Figures of the model on the test split.

    Args:
        model: whose classes are the columns of the targets.
        test: what is judged; shows a label at least.
        val: what the threshold is chosen on.
        unseen: so many of the last classes were in no training target (generalised zero-shot): their labels in `val`
            are not looked at.

    Returns:
        mAP, CF1 (overall), CF1_macro, OF1 in percent, `threshold`, `threshold_from_val` (1 or 0), `ece`,
        `classes_without_positives`, `AP` (per class, NaN left out as -1), `share` (of the test
        pictures that show a class, [0, 1]), `gate` (mean weight per condition) and
        `gate_entropy` (mean over records, nats). With unseen classes these are over all classes, and `seen` and
        `unseen` hold the same figures over these classes' columns, of the same scores and threshold; one of them is
        missing where no picture shows its classes.
    """
    seen = test.targets.shape[1] - unseen
    from_val, threshold = val is not None and bool(val.targets[:, :seen].any()), DEFAULT_THRESHOLD
    if val is not None and from_val:
        known = score(model, val.features).probabilities[:, :seen]
        threshold = metrics.best_threshold(known, val.targets[:, :seen])
    scores = score(model, test.features)
    judged = figures(scores, test.targets, threshold, from_val=from_val)
    for name, part in (("seen", slice(None, seen)), ("unseen", slice(seen, None))):
        if unseen and test.targets[:, part].any():
            chosen = Scores(scores.probabilities[:, part], scores.gate)
            judged[name] = figures(chosen, test.targets[:, part], threshold, from_val=from_val)
    return judged


def figures(scores: Scores, targets: np.ndarray, threshold: float, *, from_val: bool) -> dict[str, Any]:
    """The figures of `evaluate` from scores already computed."""
    precision = metrics.average_precision(scores.probabilities, targets)
    f1 = metrics.f1_scores(scores.probabilities, targets, threshold)
    return {
        "mAP": 100 * float(np.nanmean(precision)),
        "CF1": 100 * f1.cf1_overall,
        "CF1_macro": 100 * f1.cf1_macro,
        "OF1": 100 * f1.of1,
        "threshold": float(threshold),
        "threshold_from_val": float(from_val),
        "ece": metrics.calibration_error(scores.probabilities, targets),
        "classes_without_positives": float(np.isnan(precision).sum()),
        "AP": [-1.0 if np.isnan(ap) else 100 * float(ap) for ap in precision],
        "share": [float(s) for s in targets.mean(0)],
        "gate": [float(g) for g in scores.gate.mean(0)],
        "gate_entropy": float(entropy(torch.from_numpy(np.log(np.maximum(scores.gate, 1e-300)))).mean()),
    }
