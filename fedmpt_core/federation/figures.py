"""What a site may say of a model's quality: the names that `training.evaluation.evaluate` gives, and finite numbers.

A site holds its own answer against it before it leaves, the server each answer before it goes into a mean: a figure
under another name would stand in the record in place of what the server says of a round.
"""

import math
from typing import Any

from fedmpt_core.config.job import JobConfig

NUMBERS = ("mAP", "CF1", "CF1_macro", "OF1", "threshold", "threshold_from_val", "ece", "classes_without_positives")
NUMBERS += ("gate_entropy",)


def are_figures(figures: Any, job: JobConfig) -> bool:
    """Whether these are figures of a job's model, of any kind that somebody may send."""
    return _are_figures(figures, job, ("zero_shot", "seen", "unseen") if job.unseen_classes else ("zero_shot",))


def _are_figures(figures: Any, job: JobConfig, parts: tuple[str, ...]) -> bool:
    if type(figures) is not dict:
        return False
    labels, conditions = len(job.all_classes), max(1, len(job.model.conditions))
    longest = {"AP": labels, "share": labels, "gate": conditions}
    for name, value in figures.items():
        if name in parts:
            fine = _are_figures(
                value, job, tuple(part for part in parts if part != "zero_shot" and name == "zero_shot")
            )
        elif name in longest:
            fine = type(value) is list and len(value) <= longest[name] and all(map(is_number, value))
        else:
            fine = name in NUMBERS and is_number(value)
        if not fine:
            return False
    return True


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
