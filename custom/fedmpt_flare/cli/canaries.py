"""`fedmpt audit --canaries JOB.TOML`: the empirical run at one site, and what a person sees of it."""

import json
import os
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedmpt_core.config.site import SiteConfig
from fedmpt_core.config.toml import ConfigError, load_job, load_site, load_sites
from fedmpt_core.privacy.ledger.budget import resolved
from fedmpt_flare.cli.audit import show_findings
from fedmpt_flare.cli.screen import say

RESULT = "canaries.json"


def canaries(
    job: Path,
    *,
    sites: Path | None = None,
    site: str | None = None,
    kit: Path | None = None,
    out: Path | None = None,
    as_json: bool = False,
) -> bool:
    """Run it, write `canaries.json` for the site's own eyes, and show it.

    Args:
        job: the agreed job.
        sites: the site file; default: `site.toml` beside the job.
        site: the site; default: the first of a simulation's.
        kit: the site's start-up kit, where its ledger is signed.
        out: folder for the result; default: `runs/NAME-canaries`.
        as_json: print one JSON object and nothing else.

    Returns:
        Whether nothing contradicts the claim.

    Raises:
        ConfigError: a file cannot be used. Others as in `run_canaries`.
    """
    config = resolved(load_job(job))
    name, settings = _site(sites or job.parent / "site.toml", site)
    folder = (out or Path("runs") / f"{config.name}-canaries").absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written to ({error.strerror}): name another folder") from None
    from fedmpt_core.audit.canaries.run import run_canaries

    if not as_json:
        say(f"Canaries in the training of site {name}: {config.training.rounds} rounds, charged like a job.")
    report = run_canaries(
        config,
        settings,
        name,
        folder,
        kit=kit,
        on_round=lambda number: None if as_json else say(f"  round {number} of {config.training.rounds}"),
    )
    text = json.dumps(report.to_dict())
    target = folder / RESULT
    target.unlink(missing_ok=True)
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text + "\n")
    if as_json:
        typer.echo(text)
    else:
        _show(report, target)
    return report.passed


def _site(path: Path, name: str | None) -> tuple[str, SiteConfig]:
    try:
        name = name or next(iter(load_sites(path)))
    except ConfigError as error:
        raise ConfigError(f"{error}; for a real site's own file say which with --site NAME") from None
    return name, load_site(path, name)


def _show(report: Any, target: Path) -> None:
    attacks = [("gradient canaries", report.gradients), ("picture canaries", report.pictures)]
    shown = [(kind, attack) for kind, attack in attacks if attack]
    table = Table("", *(kind for kind, _ in shown), title="Attacks")
    rows = [
        ("planted", [f"{a.canaries}, {a.trained_on} trained on" for _, a in shown]),
        ("epsilon >=, by one run", [f"{a.one_run:.2f}" for _, a in shown]),
        ("  if the curve is Gaussian", [f"{a.gaussian_one_run:.2f}" for _, a in shown]),
        ("  and by thresholds", [f"{a.gaussian_threshold:.2f}" for _, a in shown]),
        ("AUROC", [f"{a.auroc:.3f} {_span(a.auroc_confidence)}" for _, a in shown]),
    ]
    for number, first in enumerate(report.gradients.sensitivity):
        found = [a.sensitivity[number] for _, a in shown]
        name = f"found at {100 * first.false_positive_rate:g} % false alarms"
        rows.append((name, [f"{s.rate:.3f} {_span(s.confidence)}, {s.false_positives} false" for s in found]))
    for name, cells in rows:
        table.add_row(name, *map(escape, cells))
    Console(highlight=False).print(table)
    say("Intervals at 95 %; the three bounds on epsilon hold together at 95 %.")
    if report.pictures is None:
        say("No picture canaries: the site has fewer than 40 units.")
    say(
        f"Claimed: epsilon {report.claim:.3f} at delta {report.delta:g} for each {report.unit}, {report.steps} steps. "
        f"Charged to {report.ledger} as {report.run_id}."
    )
    show_findings("Findings", report.findings)
    say(f"Wrote {target}. These figures have no noise: they stay at this site.")


def _span(interval: Any) -> str:
    return f"[{interval.low:.3f}, {interval.high:.3f}]"
