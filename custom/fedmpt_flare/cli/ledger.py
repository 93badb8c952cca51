"""`fedmpt ledger`: a site's own view of its privacy budget, and what becomes of a ledger. Nothing is sent."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmpt_flare.cli.options import AsJson, Kit, SiteFile, SiteName, Unsigned, WrongUse, check_signed

if TYPE_CHECKING:
    from fedmpt_core.config.site import SitePrivacyConfig
    from fedmpt_core.privacy.accounting.epsilon import Steps
    from fedmpt_core.privacy.ledger.statement import Statement

ledger = typer.Typer(help="A site's privacy ledgers: what was spent, by which job, what is left.", no_args_is_help=True)


@ledger.command()
def create(site_file: SiteFile, name: SiteName, kit: Kit = None, unsigned: Unsigned = False) -> None:
    """Start the ledger of a data set that no job has trained on yet.

    A missing ledger is never started by a job: who lost one must restore it.
    """
    from fedmpt_core.privacy.ledger.site_ledger import create_ledger, ledger_path

    policy = _policy(site_file, name, kit, unsigned)
    create_ledger(policy, name, kit)
    typer.echo(f"Started {ledger_path(policy)}: epsilon 0 of {policy.epsilon:g} spent.")


@ledger.command()
def show(
    site_file: SiteFile,
    name: SiteName,
    kit: Kit = None,
    unsigned: Unsigned = False,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="JOB.TOML", help="Also say what this job would cost.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What was spent on each data set, by which job, what is left, and what a planned job would cost.

    With --plan, exit code 1 says that the job does not fit.
    """
    from fedmpt_core.config.toml import load_job
    from fedmpt_core.privacy.ledger.budget import check_policy, resolved
    from fedmpt_core.privacy.ledger.site_ledger import ledger_path, read_site_ledgers
    from fedmpt_core.privacy.ledger.statement import spending_plan, statements

    policy = _policy(site_file, name, kit, unsigned)
    ledgers = read_site_ledgers(policy, kit)
    accounts = statements(policy, ledgers)
    planned = None
    if plan:
        if policy.dataset not in ledgers:
            raise WrongUse(f"{ledger_path(policy)} is missing: start it with `fedmpt ledger create`, or restore it")
        job = resolved(load_job(plan))
        if not job.privacy.private:
            raise WrongUse(f"{plan}: trains without differential privacy: no ledger is charged and nothing limits it")
        check_policy(job, policy)
        planned = spending_plan(job, policy, ledgers[policy.dataset])
    if as_json:
        report: dict[str, Any] = {"ledgers": [account.to_dict() for account in accounts]}
        typer.echo(json.dumps(report | ({"plan": vars(planned)} if planned else {})))
    else:
        for account in accounts:
            _show(account)
    if planned and not as_json:
        typer.echo(
            f"Job {planned.job} would spend epsilon {planned.epsilon:.3f}; '{policy.dataset}' would then be at "
            f"{planned.total:.3f} of {policy.epsilon:g}. It fits {planned.repeats} time{'s' * (planned.repeats != 1)} "
            "in a row."
        )
    if planned and not planned.repeats:
        raise typer.Exit(1)


@ledger.command()
def export(
    site_file: SiteFile,
    name: SiteName,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the export.")],
    kit: Kit = None,
    unsigned: Unsigned = False,
) -> None:
    """Write the ledger with certificates and account, signed, for an authority: `fedmpt audit DIR` checks it."""
    from fedmpt_core.privacy.ledger.export import export_ledger

    policy = _policy(site_file, name, kit, unsigned)
    written = export_ledger(policy, name, kit, out)
    typer.echo(f"Wrote {', '.join(written.files)} and export.json to {out}.")


@ledger.command()
def rotate(
    site_file: SiteFile,
    name: SiteName,
    old_kit: Annotated[
        Path, typer.Option("--old-kit", metavar="DIR", help="The startup folder whose key signs the ledger so far.")
    ],
    kit: Annotated[Path, typer.Option("--kit", metavar="DIR", help="The startup folder whose key signs from now on.")],
) -> None:
    """Hand all ledgers to a new key, after the site's kit was renewed. The old key is needed for it."""
    from fedmpt_core.privacy.ledger import succession

    policy = _policy(site_file, name, kit, unsigned=False)
    changed = succession.rotate(policy, name, old_kit, kit)
    for path in changed:
        typer.echo(f"{path} is signed by the key of {kit} from now on.")
    if not changed:
        typer.echo("Nothing to do: all ledgers are signed by this key already.")


@ledger.command()
def migrate(
    site_file: SiteFile,
    name: SiteName,
    sources: Annotated[
        list[str], typer.Option("--from", metavar="DATASET", help="Old name of the data set; several are merged.")
    ],
    kit: Kit = None,
    unsigned: Unsigned = False,
) -> None:
    """Go on under the data set's new name in SITE.TOML: its ledger carries every charge, the old ones are closed."""
    from fedmpt_core.privacy.ledger import succession
    from fedmpt_core.privacy.ledger.site_ledger import ledger_path

    policy = _policy(site_file, name, kit, unsigned)
    count = succession.migrate(policy, name, kit, sources)
    typer.echo(f"Started {ledger_path(policy)} with {count} charges of {', '.join(sources)}, which are closed now.")


def _policy(site_file: Path, name: str, kit: Path | None, unsigned: bool) -> "SitePrivacyConfig":
    from fedmpt_core.config.toml import ConfigError, load_site

    site = load_site(site_file, name)
    if site.privacy is None:
        raise ConfigError(f"{site_file}: has no [privacy] table: write the site's policy first")
    check_signed(kit, unsigned=unsigned)
    return site.privacy


def _show(account: "Statement") -> None:
    from fedmpt_core.common.text import shown
    from fedmpt_flare.cli.screen import show_table

    cap = f" of {account.cap:g}, {account.left:.3f} left" if account.cap is not None else ""
    state = f"; closed, goes on as '{account.successor}'" if account.successor else ""
    title = f"{account.dataset}: epsilon {account.total:.3f}{cap} (delta {account.delta:g}, per {account.unit}){state}"
    rows = []
    for job in account.jobs:
        mechanism = "; ".join(map(_mechanism, job.mechanisms))
        counts = (str(n) if job.first else "–" for n in (job.rounds, job.attempts, job.released))
        first = job.first[:16].replace("T", " ") or "carried"
        rows.append((shown(job.job), first, *counts, mechanism, f"{job.epsilon:.3f}"))
    show_table(shown(title), ("job", "first", "rounds", "attempts", "released", "mechanism", "epsilon alone"), rows)
    for hold in account.held:
        what = _mechanism(hold.steps)
        typer.echo(f"{shown(hold.job)} holds {what} until it ends, at the latest until {hold.until[:19]}Z.")
    if account.held:
        typer.echo(f"With all that is held, epsilon is {account.reach:.3f}: that counts against other jobs.")
    if account.if_masks_fail != account.reach:
        most = f" of {account.cap_alone:g}" if account.cap_alone is not None else ""
        typer.echo(f"If the masks fail, where sites shared their noise: epsilon {account.if_masks_fail:.3f}{most}.")
    for cap in account.caps:
        before = f", changed from {cap.before:g}" if cap.before is not None else ""
        typer.echo(f"Cap {cap.epsilon:g} since {cap.time[:19]}Z{before}.")
    if account.cap is not None and account.cap != (account.caps[-1].epsilon if account.caps else None):
        typer.echo(f"The site's file says {account.cap:g}: the ledger notes that change when the next job asks.")
    if account.open:
        typer.echo(f"{account.open} attempts were charged and released nothing; they count all the same.")
    if account.torn:
        typer.echo(account.torn)


def _mechanism(steps: "Steps") -> str:
    shared = f" shared by {steps.honest}" if steps.honest > 1 else ""
    return f"{steps.count} steps, rate {steps.sample_rate:g}, noise {steps.noise_multiplier:g}{shared}"
