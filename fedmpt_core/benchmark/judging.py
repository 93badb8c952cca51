"""What methods are judged on, and their figures: a validation split, an independent test split, maybe a correlated one.

Both thresholds are chosen on validation records: the one with the best OF1, as everywhere, and the one that finds
`EQUAL_RECALL` of the present labels, so that methods whose probabilities are spread differently are compared at the
same recall. Scores of pictures never leave this module.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedmpt_core.benchmark.spurious import false_activation, threshold_at_recall
from fedmpt_core.model.base import TunedModel
from fedmpt_core.training import metrics
from fedmpt_core.training.evaluation import DEFAULT_THRESHOLD, Split, figures, score

EQUAL_RECALL = 0.5
"""Share of the present validation labels that is found where methods are compared at equal recall (chosen)."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out records that no method trains on.

    Attributes:
        val: to choose thresholds on; None takes 0.5 for both.
        independent: test records whose labels do not hang together as at the sites.
        correlated: test records with the sites' own pairs; None where nobody made any.
        pairs: (K, 2) spurious label pairs of all sites: those that scenes were made with, elsewhere those that the
            labels show (`spurious.spurious_pairs`); possibly none.
    """

    val: Split | None
    independent: Split
    correlated: Split | None = None
    pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))


def judge(model: TunedModel, held_out: HeldOut) -> dict[str, Any]:
    """Figures of a model, its parameters as they are.

    Args:
        model: on its device.
        held_out: the records.

    Returns:
        Those of `evaluation.figures` on the independent records, and `mAP_correlated`, `mAP_val`, `AP_spread` (standard
        deviation of the labels' AP, percent), `false_activation` and `false_activation_others` in percent at the OF1
        threshold, the same with `_at_recall` at equal recall, and `recall_reached` there. None where a split is
        missing.
    """
    scored, targets = score(model, held_out.independent.features), held_out.independent.targets
    val, correlated = (
        split and (score(model, split.features).probabilities, split.targets)
        for split in (held_out.val, held_out.correlated)
    )
    threshold = metrics.best_threshold(*val) if val else DEFAULT_THRESHOLD
    at_recall = threshold_at_recall(*val, EQUAL_RECALL) if val else DEFAULT_THRESHOLD
    judged = figures(scored, targets, threshold, from_val=val is not None)
    judged |= {
        "mAP_correlated": correlated and 100 * float(np.nanmean(metrics.average_precision(*correlated))),
        "mAP_val": val and 100 * float(np.nanmean(metrics.average_precision(*val))),
        "AP_spread": 100 * float(np.nanstd(metrics.average_precision(scored.probabilities, targets))),
        "recall_reached": 100 * metrics.f1_scores(scored.probabilities, targets, at_recall).recall,
    }
    for name, value in (("", threshold), ("_at_recall", at_recall)):
        partners, others = false_activation(scored.probabilities, targets, held_out.pairs, value)
        known = not np.isnan(partners)
        judged[f"false_activation{name}"] = 100 * partners if known else None
        judged[f"false_activation_others{name}"] = 100 * others if known else None
    return judged
