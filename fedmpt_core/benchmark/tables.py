"""Tables of a benchmark's results: mean and sample standard deviation over seeds as Markdown, every run as CSV, all of
it as JSON.
"""

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmpt_core.benchmark.cases import Case
from fedmpt_core.benchmark.published import NOTE

SCHEMA = 1


@dataclass(frozen=True)
class Column:
    """One figure: its key in a result (a dot leads into `figures`), its heading, digits after the point, and whether
    more is better (None: neither).
    """

    key: str
    heading: str
    digits: int = 1
    more_is_better: bool | None = True


COLUMNS = (
    Column("figures.mAP", "mAP independent"),
    Column("figures.mAP_correlated", "mAP correlated"),
    Column("figures.CF1", "CF1"),
    Column("figures.CF1_macro", "CF1 macro"),
    Column("figures.OF1", "OF1"),
    Column("figures.ece", "calibration error", 3, False),
    Column("figures.AP_spread", "spread of AP", 1, None),
    Column("figures.false_activation", "false activation %", 1, False),
    Column("figures.false_activation_others", "other absent labels %", 1, False),
    Column("figures.false_activation_at_recall", "false activation % at equal recall", 1, False),
    Column("trained", "trained numbers", 0, None),
    Column("bytes_per_round", "bytes per round and site", 0, None),
    Column("cpu_ms_per_step", "CPU-ms per step", 0, None),
    Column("cost_ratio", "step over zero-shot inference", 0, None),
    Column("epsilon", "epsilon", 2, None),
)
SWEEP_COLUMNS = (COLUMNS[0], COLUMNS[1], COLUMNS[4], COLUMNS[7])


@dataclass(frozen=True)
class Cell:
    """A figure over seeds; `values` in the order of the seeds, without those that had none."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """None where no run has the figure."""
        return statistics.mean(self.values) if self.values else None

    @property
    def deviation(self) -> float:
        """Sample standard deviation; 0 for one run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def text(self, digits: int) -> str:
        """As a table shows it."""
        if self.mean is None:
            return "–"
        mean = f"{self.mean:,.{digits}f}"
        return f"{mean} ± {self.deviation:.{digits}f}" if self.deviation > 0 else mean


@dataclass(frozen=True)
class Row:
    """One row: method and place in the table, the seeds that are finished, a cell per column key."""

    name: str
    method: str
    value: float
    seeds: tuple[int, ...]
    cells: dict[str, Cell]


def figure(result: Mapping[str, Any], key: str) -> float | None:
    """A result's figure by a column's key; None where it has none."""
    if key == "cost_ratio":
        step, plain = result["cpu_ms_per_step"], result["cpu_ms_zero_shot"]
        return step / plain if step and plain else None
    value: Any = result
    for part in key.split("."):
        value = value.get(part)
    return None if value is None else float(value)


def rows_of(cases: Sequence[Case], results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The rows of a table, in the order of the cases; rows without a finished run are left out."""
    places: dict[tuple[str, float], list[tuple[Case, Mapping[str, Any]]]] = {}
    for case, result in _finished(cases, results):
        places.setdefault((case.row, case.value), []).append((case, result))
    rows = []
    for (name, value), runs in places.items():
        cells = {}
        for column in COLUMNS:
            values = (figure(result, column.key) for _, result in runs)
            cells[column.key] = Cell(tuple(v for v in values if v is not None))
        seeds = tuple(case.job.seed for case, _ in runs)
        rows.append(Row(name, runs[0][0].method, value, seeds, cells))
    return rows


def markdown(table: str, rows: Sequence[Row], reported: Mapping[str, float] | None = None) -> str:
    """One table, the best mean of each column in bold.

    Args:
        table: a key of `cases.TABLES`.
        rows: at least none.
        reported: mAP by method that the authors reported on the same data and weights; None on others.
    """
    if not rows:
        return f"### {table}\n\nNo finished run.\n"
    axis = table not in ("methods", "ablation")
    columns = COLUMNS if not axis else SWEEP_COLUMNS
    columns = tuple(c for c in columns if any(r.cells[c.key].values for r in rows))
    best = {c.key: _best(c, rows) for c in columns} if not axis else {}
    headings = ["method" if table == "methods" else "row", *(["value"] if axis else []), *(c.heading for c in columns)]
    if reported:
        headings.append("mAP reported by the authors")
    lines = [f"### {table}", "", f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for row in rows:
        cells = []
        for column in columns:
            cell = row.cells[column.key]
            text = cell.text(column.digits)
            cells.append(f"**{text}**" if cell.mean is not None and cell.mean == best.get(column.key) else text)
        if reported:
            theirs = reported.get(row.method)
            cells.append("–" if theirs is None else f"{theirs:.2f}")
        lines.append("| " + " | ".join([row.name, *([f"{row.value:g}"] if axis else []), *cells]) + " |")
    seeds = sorted({s for r in rows for s in r.seeds})
    unequal = {len(r.seeds) for r in rows} != {len(seeds)}
    lines += ["", f"Means and sample standard deviations over seeds {', '.join(map(str, seeds))}."]
    if unequal:
        lines.append("Not all runs are finished: rows differ in their number of seeds.")
    if reported:
        lines.append(NOTE)
    return "\n".join(lines) + "\n"


def comma_separated(cases: Sequence[Case], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Every finished run as a line of CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "row", "value", "method", "seed", *(c.key for c in COLUMNS), "run"])
    for case, result in _finished(cases, results):
        values = (figure(result, c.key) for c in COLUMNS)
        cells = ["" if v is None else f"{v:.6g}" for v in values]
        writer.writerow([case.table, case.row, f"{case.value:g}", case.method, case.job.seed, *cells, case.identity()])
    return text.getvalue()


def plain(tables: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """All tables as plain values for JSON."""
    return {
        "schema": SCHEMA,
        "columns": {c.key: c.heading for c in COLUMNS},
        "tables": {
            name: [
                {
                    "row": row.name,
                    "method": row.method,
                    "value": row.value,
                    "seeds": list(row.seeds),
                    "figures": {
                        k: {"mean": c.mean, "deviation": c.deviation} for k, c in row.cells.items() if c.values
                    },
                }
                for row in rows
            ]
            for name, rows in tables.items()
        },
    }


def _finished(
    cases: Sequence[Case], results: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[Case, Mapping[str, Any]]]:
    for case in cases:
        result = results.get(case.identity())
        if result is not None:
            yield case, result


def _best(column: Column, rows: Sequence[Row]) -> float | None:
    means = [mean for row in rows if (mean := row.cells[column.key].mean) is not None]
    if column.more_is_better is None or not means:
        return None
    return max(means) if column.more_is_better else min(means)
