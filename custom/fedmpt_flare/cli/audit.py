"""`fedmpt audit`: is what a run or a ledger claims true? Works offline on what was downloaded or handed over."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from fedmpt_core.common.text import shown
from fedmpt_core.config.toml import ConfigError
from fedmpt_flare.cli.screen import harmless, say

SHOWN = {"fail": "[red]FAIL[/]", "warning": "[yellow]warning[/]", "note": "note"}


def audit(
    places: Annotated[
        list[Path] | None,
        typer.Argument(metavar="DIR...", help="Runs, downloaded or simulated, and sites' ledgers or exports of them."),
    ] = None,
    roster: Annotated[
        Path | None, typer.Option("--roster", metavar="FILE", help="The roster of keys that the sites agreed on.")
    ] = None,
    policies: Annotated[
        list[Path] | None, typer.Option("--policy", metavar="CARD.json", help="A site's policy card, for its cap.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", metavar="client.crt", help="Of the site whose bare ledger is given.")
    ] = None,
    independent: Annotated[
        bool, typer.Option("--independent", help="Also recompute epsilon with an accountant of our own.")
    ] = False,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Also test this installation's mechanism with the job's settings.")
    ] = False,
    canaries: Annotated[
        Path | None,
        typer.Option(
            "--canaries",
            metavar="JOB.TOML",
            help="Instead, at a site: train this job with planted canaries and attack it. Charged like the job.",
        ),
    ] = None,
    sites: Annotated[
        Path | None,
        typer.Option("--sites", metavar="FILE", help="With --canaries: the site file; default: site.toml beside it."),
    ] = None,
    site: Annotated[
        str | None, typer.Option("--site", metavar="NAME", help="With --canaries: the site; default: the first.")
    ] = None,
    kit: Annotated[
        Path | None,
        typer.Option("--kit", metavar="DIR", help="With --canaries: the startup folder that signs the ledger."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="With --canaries: for the result; default: runs/NAME-canaries."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Audit runs and ledgers: chains, signatures, epsilon, sums, and everything that left each site.

    Exit code 0: nothing fails. 1: something does. 2: there is nothing that could be audited.
    """
    if canaries:
        if places:
            raise ConfigError(f"--canaries {canaries}: is a run of its own: leave {places[0]} away")
        from fedmpt_flare.cli import canaries as canary_cli

        if not canary_cli.canaries(canaries, sites=sites, site=site, kit=kit, out=out, as_json=as_json):
            raise typer.Exit(1)
        return
    if not places:
        raise ConfigError("DIR is missing: name a run's folder, a ledger or an export, or --canaries JOB.TOML")
    given = {"--sites": sites, "--site": site, "--kit": kit, "--out": out}
    if odd := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"{odd[0]}: goes with --canaries JOB.TOML")
    from fedmpt_core.audit.auditor import audit_run, compare
    from fedmpt_core.audit.ledger_copy import LedgerReader
    from fedmpt_core.audit.run_evidence import KnownKeys, load_run
    from fedmpt_core.audit.site_ledger import audit_ledger, is_ledger, load_ledger
    from fedmpt_core.audit.spending import further_accountants
    from fedmpt_core.federation.site.policy_card import PolicyCard
    from fedmpt_core.secagg.start_up_kit import load_roster

    keys, reader = KnownKeys(load_roster(roster) if roster else None), LedgerReader()
    policy_cards = [PolicyCard.load(path) for path in policies or []]
    caps = {(card.site, card.privacy.dataset): card.privacy.epsilon for card in policy_cards}
    own = [load_ledger(place, keys, reader, certificate) for place in places if is_ledger(place)]
    runs = [load_run(place, keys, reader) for place in places if not is_ledger(place)]
    audits = [audit_run(run, independent=independent, policy_cards=policy_cards, self_test=self_test) for run in runs]
    asked = further_accountants(independent=independent)
    ledgers = [
        audit_ledger(one, asked, caps.get((one.entries[0].site, one.entries[0].dataset)) if one.entries else None)
        for one in own
    ]
    between = compare(runs, own)
    passed = all(a.passed for a in (*audits, *ledgers)) and not any(f.severity == "fail" for f in between)
    if as_json:
        found: dict[str, Any] = {"passed": passed, "runs": [a.to_dict() for a in audits]}
        found |= {"ledgers": [a.to_dict() for a in ledgers], "between": [f.to_dict() for f in between]}
        typer.echo(json.dumps(found, allow_nan=False))
    else:
        for one in audits:
            _show_run(one)
        for one in ledgers:
            _show_ledger(one)
        show_findings("Between them", between)
        say("Passed: nothing that was checked fails." if passed else "FAILED: see what is marked FAIL.")
    if not passed:
        raise typer.Exit(1)


def _show_run(one: Any) -> None:
    say(f"Run {shown(one.run_id)} of job {shown(one.job)}")
    if one.spending:
        names = list(next(iter(one.spending.values())).accountants)
        short = [name.split(" (")[0] for name in names]
        table = Table("site", "data set", *short, "all jobs", "cap", "delta", "unit", title="Epsilon of this run")
        table.caption = "; ".join(names)
        for site, spent in one.spending.items():
            cap = "–" if spent.cap is None else f"{spent.cap:g}"
            numbers = [f"{spent.accountants[n]:.3f}" if n in spent.accountants else "–" for n in names]
            jobs = f"{spent.total:.3f} ({spent.jobs} job{'s' * (spent.jobs != 1)})"
            row = (site, spent.dataset, *numbers, jobs, cap, f"{spent.delta:g}", spent.unit)
            table.add_row(*(harmless(cell) for cell in row))
        Console(highlight=False).print(table)
    say(_sums(one.sums))
    alike: dict[tuple[Any, ...], list[str]] = {}
    for site, left in one.releases.items():
        alike.setdefault(tuple(left), []).append(site)
    table = Table("sites", "what left each", "protected by", title="What left the sites")
    for left, sites in alike.items():
        for number, release in enumerate(left):
            table.add_row(
                "" if number else harmless(", ".join(sites)), harmless(release.what), harmless(release.protection)
            )
        table.add_section()
    Console(highlight=False).print(table)
    show_findings("Findings", one.findings)


def _sums(sums: Any) -> str:
    if not sums.masked:
        return f"The server saw every update of {sums.rounds} rounds: no secure aggregation."
    size = f"{sums.least}" if sums.least == sums.most else f"{sums.least} to {sums.most}"
    return (
        f"The server saw {sums.rounds} sums of {size} sites (at least {sums.threshold} by the rules) and nothing else "
        f"of any update; with {sums.colluders} site{'s' * (sums.colluders != 1)} on its side an update hides among "
        f"{sums.hidden_among}. If the masks had failed, each site's epsilon would be the same."
    )


def _show_ledger(one: Any) -> None:
    account = one.statement
    if account is None:
        say(f"Ledger {shown(one.place)}")
    else:
        say(f"Ledger {shown(one.place)}: {shown(account.site)}, data set '{shown(account.dataset)}'")
        table = Table("accountant", "epsilon of all jobs", title=f"At delta {account.delta:g}, per {account.unit}")
        for name, value in one.accountants.items():
            table.add_row(name, f"{value:.3f}")
        Console(highlight=False).print(table)
    show_findings("Findings", one.findings)


def show_findings(title: str, findings: Sequence[Any]) -> None:
    """Every finding with what to do; nothing where there are none."""
    if not findings:
        return
    console = Console(highlight=False)
    console.print(f"[bold]{title}[/]")
    for f in findings:
        console.print(f"  {SHOWN[f.severity]} [bold]{f.code}[/] at {harmless(f.where)}", soft_wrap=True)
        console.print(
            Padding(harmless(f.text) + (f"\n[dim]do:[/] {harmless(f.remedy)}" if f.remedy else ""), (0, 0, 0, 6))
        )
