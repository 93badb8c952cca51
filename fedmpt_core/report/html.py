"""The report as one HTML file: no script, no network, no font but the reader's own.

Everything that comes from a run passes `common.text.shown` and jinja2's escaping on its way out, whatever the
template says.
"""

from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedmpt_core.audit.disclosure import Disclosure
from fedmpt_core.common.text import shown
from fedmpt_core.report import charts, plain
from fedmpt_core.report.budgets import BudgetReport
from fedmpt_core.report.content import Report
from fedmpt_core.report.words import WORDS

GENERATOR = "fedmpt report"
MOST_LABELS, MOST_FINDINGS, MOST_SITES, MOST_FILES, MOST_ROWS = 200, 200, 200, 100, 24  # rows of a table; chosen


def render(report: Report) -> str:
    """The page of a run."""
    lines = charts.spending_lines(report.spending)
    groups: dict[tuple[Disclosure, ...], list[str]] = {}
    for site, left in report.releases.items():
        groups.setdefault(left, []).append(site)
    context = {
        "r": report,
        "lines": lines,
        "rows": _rows(lines),
        "scale": _scale(report),
        "charts": charts,
        "answers": WORDS["answers"],
        "layers": [(layer, list(items)) for layer, items in groupby(report.checklist, key=lambda item: item.layer)],
        "generator": GENERATOR,
        "groups": [(sites, left) for left, sites in groups.items()],
        "most": {
            "labels": MOST_LABELS,
            "findings": MOST_FINDINGS,
            "sites": MOST_SITES,
            "files": MOST_FILES,
            "lines": charts.MOST_LINES,
        },
    }
    return _environment().get_template("template.html.j2").render(context)


def render_budgets(report: BudgetReport) -> str:
    """The page of several runs and ledgers."""
    context = {"r": report, "generator": GENERATOR, "most": {"findings": MOST_FINDINGS}}
    return _environment().get_template("budgets.html.j2").render(context)


def is_report(text: str) -> bool:
    """Whether a file that begins so is a report of this program."""
    return f'<meta name="generator" content="{GENERATOR}">' in text


def _environment() -> Environment:
    here = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=here,
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("name", "names", "up", "number", "signed", "small", "count", "moment"):
        environment.filters[name] = getattr(plain, name)
    environment.filters["exact"] = _exact
    return environment


def _finalize(value: Any) -> Any:
    """Of every value on its way into the page: text is made harmless, marked-up text was made of harmless parts."""
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _exact(value: float | None, text: str) -> Markup:
    """A number as it is shown, with the exact one for machines."""
    if value is None:
        return Markup("–")
    return Markup('<data value="{}">{}</data>').format(repr(float(value)), text)


def _rows(lines: tuple[charts.Line, ...]) -> tuple[tuple[int, tuple[float | None, ...]], ...]:
    """Epsilon by round of the lines drawn, thinned for a table."""
    drawn = [dict(line.points) for line in lines[: charts.MOST_LINES]]
    numbers = sorted({r for points in drawn for r in points if r})
    kept = charts.thinned([(r, 0.0) for r in numbers], MOST_ROWS)
    return tuple((int(r), tuple(points.get(r) for points in drawn)) for r, _ in kept)


def _scale(report: Report) -> float:
    """The right end of the budget bars: the largest cap, or a round number beyond what is spent."""
    spent = max([(b.before or 0.0) + (b.added or 0.0) for b in report.budgets], default=0.0)
    cap = max((s.cap for s in report.spending.values() if s.cap is not None), default=0.0)
    return cap if cap >= spent > 0 else charts.round_above(spent)
