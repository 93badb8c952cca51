"""Pictures of a benchmark's tables, as PNG."""

from collections.abc import Sequence
from typing import IO

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedmpt_core.benchmark.tables import COLUMNS, SWEEP_COLUMNS, Column, Row
from fedmpt_core.common.text import drawn

_COLOURS = ("#0b6e99", "#c2571a", "#4a7a2c", "#8a3f8f", "#9a7b00", "#4d4d4d", "#b0304b", "#2f5fd0")
_BARS = (
    (("figures.mAP", "mAP on independent labels"), ("figures.mAP_correlated", "mAP on correlated labels")),
    (
        ("figures.false_activation", "absent partner of a spurious pair"),
        ("figures.false_activation_others", "other absent labels"),
    ),
)


def draw(table: str, rows: Sequence[Row], note: str, file: IO[bytes]) -> None:
    """The picture of a table.

    Args:
        table: a key of `cases.TABLES`.
        rows: at least one.
        note: small print below, such as the name of the towers.
        file: the PNG goes here.
    """
    match table:
        case "methods" | "ablation":
            figure = _bars(rows)
        case "sensitivity":
            figure = _panels(rows, COLUMNS[0])
        case _:
            figure = _sweep(rows, SWEEP_COLUMNS)
    figure.suptitle(table, fontsize=10)
    figure.supxlabel(drawn(note), fontsize=8, color="#555555")
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def _bars(rows: Sequence[Row]) -> Figure:
    """Precision and false activations of every row, side by side, with standard deviations."""
    figure = Figure(figsize=(10, 0.45 * len(rows) + 2.2), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    for axis, bars, unit in zip(axes, _BARS, ("mAP, percent", "found although absent, percent"), strict=True):
        for k, (key, label) in enumerate(bars):
            places = [i + 0.38 * k - 0.19 for i in range(len(rows))]
            means = [row.cells[key].mean or 0.0 for row in rows]
            spread = [row.cells[key].deviation for row in rows]
            axis.barh(places, means, 0.36, xerr=spread, label=label, color=_COLOURS[k], error_kw={"linewidth": 0.8})
        axis.set(xlabel=unit)
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    axes[0].set_yticks(range(len(rows)), [drawn(row.name) for row in rows], fontsize=9)
    axes[0].invert_yaxis()
    return figure


def _sweep(rows: Sequence[Row], columns: Sequence[Column]) -> Figure:
    """One panel per column over the values of a sweep, one line per row name."""
    figure = Figure(figsize=(4 * len(columns), 3.6), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axis, column in zip(panels, columns, strict=True):
        for k, name in enumerate(dict.fromkeys(row.name for row in rows)):
            _line(axis, [row for row in rows if row.name == name], column, name, _COLOURS[k % len(_COLOURS)])
        axis.set(xlabel="share", title=column.heading)
    panels[0].legend(fontsize=7)
    return figure


def _panels(rows: Sequence[Row], column: Column) -> Figure:
    """One panel per row name: one column over that setting's values."""
    names = list(dict.fromkeys(row.name for row in rows))
    lines = -(-len(names) // 4)
    figure = Figure(figsize=(12, 2.6 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, min(4, len(names)), squeeze=False, sharey=True).flat
    for axis, name in zip(panels, names, strict=False):
        _line(axis, [row for row in rows if row.name == name], column, name, _COLOURS[0])
        axis.set(xlabel=drawn(name), ylabel=column.heading)
    for axis in list(panels):
        axis.set_axis_off()
    return figure


def _line(axis: Axes, rows: Sequence[Row], column: Column, label: str, colour: str) -> None:
    known = sorted((row for row in rows if row.cells[column.key].values), key=lambda row: row.value)
    cells = [row.cells[column.key] for row in known]
    axis.errorbar(
        [row.value for row in known],
        [cell.mean or 0.0 for cell in cells],
        [cell.deviation for cell in cells],
        label=drawn(label),
        color=colour,
        marker="o",
        markersize=3,
        linewidth=1.2,
    )
    axis.grid(alpha=0.3)
