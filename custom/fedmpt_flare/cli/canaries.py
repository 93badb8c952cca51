"""`fedmpt canaries`: the empirical run at one site, and what a person sees of it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmpt_flare.cli.options import AsJson, JobFile, Kit, WrongUse

if TYPE_CHECKING:
    from fedmpt_core.audit.canaries.bounds import Interval
    from fedmpt_core.audit.canaries.run import CanaryReport
    from fedmpt_core.config.site import SiteConfig

RESULT = "canaries.json"


def canaries(
    job: JobFile,
    sites: Annotated[
        Path | None,
        typer.Option("--sites", metavar="FILE", help="The site's own file, or a simulation's; default: site.toml."),
    ] = None,
    site: Annotated[
        str | None, typer.Option("--site", metavar="NAME", help="The site; default: the first of a simulation's.")
    ] = None,
    kit: Kit = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for the result; default: runs/NAME-canaries.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a site's share of a job with planted canaries and attack it. At the site; charged to its ledger like a job.

    Writes `canaries.json`, for the site's own eyes. Exit code 0: nothing contradicts the claim. 1: something does.
    """
    from fedmpt_core.common.files import write_whole
    from fedmpt_core.config.toml import load_job
    from fedmpt_core.privacy.ledger.budget import resolved

    config = resolved(load_job(job))
    name, settings = _site(sites or job.parent / "site.toml", site)
    folder = (out or Path("runs") / f"{config.name}-canaries").absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise WrongUse(f"--out {folder}: cannot be written to ({error.strerror}): name another folder") from None
    from fedmpt_core.audit.canaries.run import run_canaries

    def on_round(number: int) -> None:
        if not as_json:
            typer.echo(f"  round {number} of {config.training.rounds}")

    if not as_json:
        typer.echo(f"Canaries in the training of site {name}: {config.training.rounds} rounds, charged like a job.")
    report = run_canaries(config, settings, name, folder, kit=kit, on_round=on_round)
    text = json.dumps(report.to_dict())
    target = folder / RESULT
    write_whole(target, f"{text}\n".encode())
    if as_json:
        typer.echo(text)
    else:
        _show(report, target)
    if not report.passed:
        raise typer.Exit(1)


def _site(path: Path, name: str | None) -> "tuple[str, SiteConfig]":
    from fedmpt_core.config.toml import ConfigError, load_site, load_sites

    try:
        name = name or next(iter(load_sites(path)))
    except ConfigError as error:
        raise ConfigError(f"{error}; for a real site's own file say which with --site NAME") from None
    return name, load_site(path, name)


def _show(report: "CanaryReport", target: Path) -> None:
    from fedmpt_flare.cli.screen import show_findings, show_table

    attacks = [("gradient canaries", report.gradients), ("picture canaries", report.pictures)]
    made = [(kind, attack) for kind, attack in attacks if attack]
    rows = [
        ("planted", [f"{a.canaries}, {a.trained_on} trained on" for _, a in made]),
        ("epsilon >=, by one run", [f"{a.one_run:.2f}" for _, a in made]),
        ("  if the curve is Gaussian", [f"{a.gaussian_one_run:.2f}" for _, a in made]),
        ("  and by thresholds", [f"{a.gaussian_threshold:.2f}" for _, a in made]),
        ("AUROC", [f"{a.auroc:.3f} {_span(a.auroc_confidence)}" for _, a in made]),
    ]
    for number, first in enumerate(report.gradients.sensitivity):
        rates = [a.sensitivity[number] for _, a in made]
        name = f"found at {100 * first.false_positive_rate:g} % false alarms"
        rows.append((name, [f"{s.rate:.3f} {_span(s.confidence)}, {s.false_positives} false" for s in rates]))
    show_table("Attacks", ("", *(kind for kind, _ in made)), [(name, *cells) for name, cells in rows])
    typer.echo("Intervals at 95 %; the three bounds on epsilon hold together at 95 %.")
    if report.pictures is None:
        typer.echo("No picture canaries: the site has fewer than 40 units.")
    typer.echo(
        f"Claimed: epsilon {report.claim:.3f} at delta {report.delta:g} for each {report.unit}, {report.steps} steps. "
        f"Charged to {report.ledger} as {report.run_id}."
    )
    show_findings("Findings", report.findings)
    typer.echo(f"Wrote {target}. These figures have no noise: they stay at this site.")


def _span(interval: "Interval") -> str:
    return f"[{interval.low:.3f}, {interval.high:.3f}]"
