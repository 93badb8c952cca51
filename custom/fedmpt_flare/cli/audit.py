"""`fedmpt audit`: is what a run or a ledger claims true? Works offline on what was downloaded or handed over."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmpt_core.common.text import shown
from fedmpt_flare.cli.evidence import EXIT_CODES, load_evidence, verdict
from fedmpt_flare.cli.options import AsJson, Independent, Policies, RosterFile, SelfTest

if TYPE_CHECKING:
    from fedmpt_core.audit.auditor import Audit
    from fedmpt_core.audit.disclosure import Disclosure, Sums
    from fedmpt_core.audit.site_ledger import LedgerAudit


def audit(
    places: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Runs, downloaded or simulated, and sites' ledgers or exports of them."),
    ],
    roster: RosterFile = None,
    policies: Policies = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", metavar="client.crt", help="Of the site whose bare ledger is given.")
    ] = None,
    independent: Independent = False,
    self_test: SelfTest = False,
    as_json: AsJson = False,
) -> None:
    """Audit runs and ledgers: chains, signatures, epsilon, sums, and everything that left each site.

    Exit code 0: nothing fails. 1: something contradicts the claim. 2: there is nothing that could be audited. 3: a
    ledger that the claim rests on is missing, and nothing contradicts it.
    """
    from fedmpt_core.audit.auditor import examine
    from fedmpt_core.federation.site.policy_card import PolicyCard

    runs, own = load_evidence(places, roster, certificate)
    policy_cards = [PolicyCard.load(path) for path in policies or []]
    examined = examine(runs, own, independent=independent, policy_cards=policy_cards, self_test=self_test)
    if as_json:
        typer.echo(json.dumps(examined.to_dict(), allow_nan=False))
    else:
        from fedmpt_flare.cli.screen import show_findings

        for one in examined.audits:
            _show_run(one)
        for one in examined.ledgers:
            _show_ledger(one)
        show_findings("Between them", examined.between)
        typer.echo(verdict(examined))
    raise typer.Exit(EXIT_CODES.get(examined.worst, 0))


def _show_run(one: "Audit") -> None:
    from rich.table import Table

    from fedmpt_flare.cli.screen import harmless, print_table, show_findings, show_table

    typer.echo(f"Run {shown(one.run_id)} of job {shown(one.job)}")
    if one.spending:
        names = list(next(iter(one.spending.values())).accountants)
        short = [name.split(" (")[0] for name in names]
        rows = []
        for site, spent in one.spending.items():
            cap = "–" if spent.cap is None else f"{spent.cap:g}"
            numbers = [f"{spent.accountants[n]:.3f}" if n in spent.accountants else "–" for n in names]
            jobs = f"{spent.total:.3f} ({spent.jobs} job{'s' * (spent.jobs != 1)})"
            rows.append((shown(site), shown(spent.dataset), *numbers, jobs, cap, f"{spent.delta:g}", spent.unit))
        columns = ("site", "data set", *short, "all jobs", "cap", "delta", "unit")
        show_table("Epsilon of this run", columns, rows, "; ".join(names))
        if any(spent.total_alone != spent.total for spent in one.spending.values()):
            rows = [
                (shown(n), f"{s.job_alone:.3f}", f"{s.total_alone:.3f}", f"{s.cap_alone:g}" if s.cap_alone else "–")
                for n, s in one.spending.items()
            ]
            show_table("If the masks fail", ("site", "this run", "all jobs", "cap"), rows)
    typer.echo(_sums(one.sums))
    alike: dict[tuple[Disclosure, ...], list[str]] = {}
    for site, left in one.releases.items():
        alike.setdefault(tuple(left), []).append(site)
    table = Table("sites", "what left each", "protected by", title="What left the sites")
    for left, sites in alike.items():
        for number, release in enumerate(left):
            table.add_row(
                "" if number else harmless(", ".join(sites)), harmless(release.what), harmless(release.protection)
            )
        table.add_section()
    print_table(table)
    show_findings("Findings", one.findings)
    typer.echo(f"The server's word alone: {'; '.join(one.servers_word)}.")


def _sums(sums: "Sums") -> str:
    if not sums.masked:
        return f"The server saw every update of {sums.rounds} rounds: no secure aggregation."
    size = f"{sums.least}" if sums.least == sums.most else f"{sums.least} to {sums.most}"
    return (
        f"The server saw {sums.rounds} sums of {size} sites (at least {sums.threshold} by the rules) and nothing else "
        f"of any update; with {sums.colluders} site{'s' * (sums.colluders != 1)} on its side an update hides among "
        f"{sums.hidden_among}. If the masks had failed, each site's epsilon would be the same."
    )


def _show_ledger(one: "LedgerAudit") -> None:
    from fedmpt_flare.cli.screen import show_findings, show_table

    account = one.statement
    if account is None:
        typer.echo(f"Ledger {shown(one.place)}")
    else:
        typer.echo(f"Ledger {shown(one.place)}: {shown(account.site)}, data set '{shown(account.dataset)}'")
        rows = [(name, f"{value:.3f}") for name, value in one.accountants.items()]
        show_table(f"At delta {account.delta:g}, per {account.unit}", ("accountant", "epsilon of all jobs"), rows)
    show_findings("Findings", one.findings)
