"""What the model can do, from the figures that sites gave of their test pictures; a record may hold anything.

No figure here is of a training picture. Figures of a run are compared with the untouched towers and the plain prompt
(zero-shot); what differential privacy itself costs can only be told from a run without it, which is another job.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.report.content import GateWeight, Label, Utility
from fedmpt_core.report.plain import names

FIGURES = {"mAP": 1, "CF1": 1, "CF1_macro": 1, "OF1": 1, "ece": 100}  # what makes percent of the record's figure
MOST = 1e6  # no figure or round of ours is larger; a record may hold whole numbers without end


def utility_of(run: Run) -> Utility:
    """Figures overall, over the rounds and per label; where there are none, why."""
    scored = [row for row in run.record["rounds"] if _number(row.get("mAP")) is not None and 0 <= row["round"] <= MOST]
    if not scored:
        return Utility(none_since=_none_since(run))
    first, last = scored[0], scored[-1]
    start = first.get("zero_shot") if first["round"] == 0 else None
    zero: Mapping[str, Any] = start if isinstance(start, dict) else {}
    labels = _labels(run.job.classes, zero, last)
    gains = [label.gain for label in labels if label.gain is not None]
    known = [label for label in labels if label.share is not None and label.gain is not None]
    half = len(known) // 2
    sites = run.record["sites"] or {}
    return Utility(
        sites=tuple(sorted(site for site, joined in sites.items() if joined.get("evaluates") is True)),
        round=last["round"],
        figures=tuple((name, _percent(zero, name), _percent(last, name)) for name in FIGURES),
        curve=tuple((row["round"], float(row["mAP"])) for row in scored),
        labels=labels,
        worse=sum(gain < 0 for gain in gains),
        rare=_mean([label.gain for label in known[:half]]),
        common=_mean([label.gain for label in known[half:]]) if half else None,
    )


def _none_since(run: Run) -> str:
    """Why a run has no figures; what the job asked for is in its digest, which the sites' ledgers hold."""
    if not run.job.federation.evaluate_every:
        return "the job asked for none"
    giving = sorted(site for site, joined in (run.record["sites"] or {}).items() if joined.get("evaluates") is True)
    if not giving:
        return "the job asked for them, and no site of this run gives any"
    return f"the job asked for them, {names(giving)} would give them, and none are in the record"


def gate_of(run: Run) -> tuple[GateWeight, ...]:
    """Mean weight of every condition, at the first and the last evaluation."""
    scored = [row for row in run.record["rounds"] if isinstance(row.get("gate"), list)]
    conditions = run.job.model.conditions
    if not scored:
        return ()
    start, final = (_numbers(row["gate"], len(conditions)) for row in (scored[0], scored[-1]))
    return tuple(GateWeight(c, a, b) for c, a, b in zip(conditions, start, final, strict=True))


def _labels(classes: Sequence[str], zero: Mapping[str, Any], last: Mapping[str, Any]) -> tuple[Label, ...]:
    count = len(classes)
    shares = _numbers(last.get("share"), count)
    before, after = _numbers(zero.get("AP"), count), _numbers(last.get("AP"), count)
    labels = [Label(*row) for row in zip(classes, shares, before, after, strict=True)]
    if all(share is None for share in shares):
        return tuple(sorted(labels, key=lambda label: (label.gain is None, label.gain or 0.0)))
    return tuple(sorted(labels, key=lambda label: (label.share is None, label.share or 0.0)))


def _percent(figures: Mapping[str, Any], name: str) -> float | None:
    figure = _number(figures.get(name))
    return None if figure is None else figure * FIGURES[name]


def _number(value: Any) -> float | None:
    """A figure; None for what is none, and for the -1 of a label that was not scored."""
    return float(value) if type(value) in (int, float) and 0 <= value <= MOST else None


def _numbers(values: Any, count: int) -> list[float | None]:
    if not isinstance(values, list) or len(values) != count:
        return [None] * count
    return [_number(value) for value in values]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
