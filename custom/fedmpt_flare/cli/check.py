"""`fedmpt check`: what is wrong with a job and the sites' data, before any work is spent."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmpt_flare.cli.options import AsJson, Seed, SitesFile, WrongUse

if TYPE_CHECKING:
    from fedmpt_core.config.job import JobConfig
    from fedmpt_core.config.site import SiteConfig


def check(
    job: Annotated[Path | None, typer.Argument(metavar="JOB.TOML", help="The agreed job.")] = None,
    sites: SitesFile = None,
    seed: Seed = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Also show every key of the job, every label and how epsilon comes about.")
    ] = False,
    show_schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a job file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a job and the sites' data before any work is spent; show what a round costs."""
    from fedmpt_core.config.toml import load_job, schema

    if show_schema:
        typer.echo(json.dumps(schema(), indent=2))
        return
    if job is None:
        raise WrongUse("JOB.TOML is missing: name the job file to check")
    from fedmpt_core.privacy.ledger.budget import resolved

    config, file = resolved(load_job(job, seed=seed)), sites or job.parent / "site.toml"
    site_configs = simulated_sites(config, file) if sites or file.exists() else {}
    from fedmpt_core.federation import preflight
    from fedmpt_core.federation.advice import advice
    from fedmpt_core.model.backbone.load import load_backbone
    from fedmpt_flare.cli.run_view import show_check

    size = preflight.check_model(config, load_backbone(config.backbone))
    plan = preflight.check_privacy(config, site_configs, size)
    data = preflight.check_data(config, site_configs) if site_configs else {}
    doubts = advice(config, site_configs, size, data, plan)
    if as_json:
        report = {
            "privacy": plan and dataclasses.asdict(plan),
            "warnings": doubts,
            "config": config.to_dict(),
            "config_digest": config.digest(),
            "backbone": size.backbone,
            "is_stand_in": size.is_stand_in,
            "trained_floats": size.groups,
            "mib_per_update": size.mib_per_update,
            "sites": {n: _counts(config, d) for n, d in data.items()},
        }
        typer.echo(json.dumps(report))
    else:
        show_check(config, size, data, plan, doubts, verbose=verbose)


def _counts(job: "JobConfig", counts: Any) -> dict[str, Any]:
    labels = dict(zip(job.classes, map(int, counts.positives), strict=True))
    own = {name: getattr(counts, name) for name in ("train", "val", "test", "units", "unlabelled")}
    return own | {"labels": labels}


def simulated_sites(job: "JobConfig", file: Path) -> "dict[str, SiteConfig]":
    """The sites of a simulation, enough for the job. Raises ConfigError."""
    from fedmpt_core.config.toml import ConfigError, load_sites
    from fedmpt_core.secagg.policy import LEAST_COHORT

    sites = load_sites(file)
    if len(sites) < job.federation.min_sites:
        way_out = (
            "; with fewer than three set [secagg] mechanism = 'none' and [federation] min_sites in the job, and "
            "[secagg] allow_unmasked = true in the sites' file: the server then sees every update"
        )
        raise ConfigError(
            f"{file}: names {len(sites)} sites, the job needs min_sites={job.federation.min_sites}: name more"
            f"{way_out if job.secagg.masked and len(sites) < LEAST_COHORT else ', or lower min_sites'}"
        )
    return sites
