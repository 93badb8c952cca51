"""`fedmpt audit`: is what a run claims true? Works offline on what was downloaded; exit code 1 when something fails."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedmpt_core.audit.auditor import Anchors, Audit, audit_run, compare
from fedmpt_core.audit.finding import Finding
from fedmpt_core.audit.run import load_run
from fedmpt_core.kit import load_roster
from fedmpt_core.policy_card import PolicyCard
from fedmpt_flare.console import say

SHOWN = {"fail": "[red]FAIL[/]", "warning": "[yellow]warning[/]", "note": "note"}


def audit(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Downloaded runs of one federation, or simulated ones.")
    ],
    roster: Annotated[
        Path | None, typer.Option("--roster", metavar="FILE", help="The roster of keys that the sites agreed on.")
    ] = None,
    policies: Annotated[
        list[Path] | None, typer.Option("--policy", metavar="CARD.json", help="A site's policy card, for its cap.")
    ] = None,
    independent: Annotated[
        bool, typer.Option("--independent", help="Also recompute epsilon with an accountant of our own.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Audit downloaded runs: ledgers, epsilon, sums, and everything that left each site."""
    anchors = Anchors(load_roster(roster) if roster else None)
    cards = [PolicyCard.load(path) for path in policies or []]
    runs = [load_run(folder, anchors) for folder in folders]
    audits = [audit_run(run, independent=independent, cards=cards) for run in runs]
    between = compare(runs)
    passed = all(a.passed for a in audits) and not between
    if as_json:
        found = {"passed": passed, "runs": [a.to_dict() for a in audits], "between": [f.to_dict() for f in between]}
        typer.echo(json.dumps(found))
    else:
        for one in audits:
            _show(one)
        _findings("Between the runs", between)
        say("Passed: nothing that was checked fails." if passed else "FAILED: see what is marked FAIL.")
    if not passed:
        raise typer.Exit(1)


def _show(one: Audit) -> None:
    say(f"Run {one.run_id} of job {one.job}")
    if one.spending:
        others = sorted({name for s in one.spending.values() for name in s.accountants})
        table = Table("site", "data set", "this run", *others, "all jobs", "cap", "delta", "unit", title="Epsilon")
        for site, spent in one.spending.items():
            cap = "–" if spent.cap is None else f"{spent.cap:g}"
            numbers = [f"{spent.job:.3f}", *(f"{spent.accountants[n]:.3f}" for n in others), f"{spent.total:.3f}"]
            jobs = f"{numbers.pop()} ({spent.jobs} jobs)"
            row = (site, spent.dataset, *numbers, jobs, cap, f"{spent.delta:g}", spent.unit)
            table.add_row(*(_plain(cell) for cell in row))
        Console(highlight=False).print(table)
    table = Table("site", "what left it", "protected by", title="What left the sites")
    for site, left in one.releases.items():
        for release in left:
            table.add_row(_plain(site), _plain(release.what), _plain(release.protection))
    Console(highlight=False).print(table)
    _findings("Findings", one.findings)


def _findings(title: str, findings: list[Finding]) -> None:
    if not findings:
        return
    table = Table("", "code", "where", "what", "do", title=title)
    for column in table.columns:
        column.overflow = "fold"
    for f in findings:
        table.add_row(SHOWN[f.severity], f.code, _plain(f.where), _plain(f.text), _plain(f.remedy))
    Console(highlight=False).print(table)


def _plain(text: str) -> str:
    """Names come from the run, so they may hold anything: no control character and no markup reaches the terminal."""
    return escape("".join(c if c.isprintable() else "?" for c in text))
