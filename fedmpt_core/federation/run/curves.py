"""The picture of a run: figures over rounds, and the gate's weights where a gate is trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedmpt_core.common.files import whole_file
from fedmpt_core.common.text import drawn
from fedmpt_core.config.toml import job_from_dict


def draw_curves(record: Mapping[str, Any], path: Path) -> None:
    """Draw mAP, CF1 and OF1 over rounds, and the mean gate weight of every condition if it can move, into a PNG.

    Args:
        record: a run's record in plain values (`result.json`).
        path: the PNG to write.

    Raises:
        ValueError: the record holds no evaluated round.
    """
    rows = [r for r in record["rounds"] if "mAP" in r]
    if not rows:
        raise ValueError("the run has no evaluated round: there is nothing to draw")
    rounds = [r["round"] for r in rows]
    gated = job_from_dict(record["config"]).model.trains_gate
    figure = Figure(figsize=(10 if gated else 6, 4), layout="constrained")
    scores, *gates = figure.subplots(1, 1 + gated, squeeze=False, width_ratios=(3, 2)[: 1 + gated])[0]
    for key, colour in (("mAP", "#0b6e99"), ("CF1", "#c2571a"), ("OF1", "#4a7a2c")):
        scores.plot(rounds, [r[key] for r in rows], marker="o", markersize=4, label=key, color=colour)
    zero_shot = rows[0].get("zero_shot", {}).get("mAP")
    if zero_shot is not None:
        scores.axhline(zero_shot, linestyle="--", linewidth=1, color="#555555", label=f"zero-shot mAP {zero_shot:.1f}")
    towers = record["backbone"] + (", not CLIP" if record["is_stand_in"] else "")
    scores.set(
        xlabel="round", ylabel="percent", title=f"{drawn(record['config']['name'])}: global model on test pictures"
    )
    scores.grid(alpha=0.3)
    scores.legend(fontsize=8)
    for panel in gates:
        _draw_gate(panel, record, rows)
    figure.supxlabel(drawn(towers), fontsize=8, color="#555555")
    with whole_file(path, mode=None) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})


def _draw_gate(panel: Axes, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    names = record["config"]["model"]["conditions"]
    if len(rows[0]["gate"]) != len(names):
        names = [f"{i + 1}" for i in range(len(rows[0]["gate"]))]
    for n, name in enumerate(names):
        panel.plot(
            [r["round"] for r in rows], [r["gate"][n] for r in rows], marker="o", markersize=3, label=drawn(name)
        )
    panel.set(xlabel="round", ylabel="mean weight", title="gate over conditions")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
