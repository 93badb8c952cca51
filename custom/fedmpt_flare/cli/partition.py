"""`fedmpt partition`: one data set divided over simulated sites."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fedmpt_core.config.datasets import Division
from fedmpt_flare.cli.options import JobFile, Seed, SitesFile, WrongUse


def partition(
    job: JobFile,
    sites: SitesFile = None,
    kind: Annotated[Division | None, typer.Option("--kind", help="How to divide; default: the sites' file.")] = None,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="Number of parts; default: one for each site of the file.")
    ] = None,
    heterogeneity: Annotated[
        float | None, typer.Option("--heterogeneity", help="Number of parts as a share of the classes, in (0, 1].")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="For dirichlet: concentration; default: the sites' file.")
    ] = None,
    seed: Seed = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Partition to write; default: the sites' file.")
    ] = None,
) -> None:
    """Divide a data set over simulated sites once, so that all runs and methods share the division."""
    from fedmpt_core.config.toml import load_job, load_sites
    from fedmpt_core.data.partition import sites_for

    config = load_job(job, seed=seed)
    file = sites or job.parent / "site.toml"
    site_configs = load_sites(file)
    site = next(iter(site_configs.values()))
    divided = kind or site.data.partition
    if alpha is not None and divided != "dirichlet":
        raise WrongUse(f"--alpha {alpha:g}: '{divided}' has none: leave it out, or add --kind dirichlet")
    if count and heterogeneity:
        raise WrongUse("--count and --heterogeneity both say how many parts there are: give one of them")
    parts = sites_for(heterogeneity, len(config.classes)) if heterogeneity is not None else count or len(site_configs)
    place = out or (Path(site.data.partition_file) if site.data.partition_file else None)
    if place is None:
        raise WrongUse(f"{file}: names no data.partition_file: say with --out where the partition goes")
    from fedmpt_core.data.partition_file import save_partition
    from fedmpt_core.federation.make_partition import divide
    from fedmpt_flare.cli.screen import progress

    with progress() as report:
        made, dataset = divide(
            config,
            site,
            divided,
            parts,
            alpha=site.data.dirichlet_alpha if alpha is None else alpha,
            on_progress=partial(report, "patch features"),
        )
    save_partition(made, dataset, place)
    sizes = [len(part) for part in made.parts]
    typer.echo(
        f"Wrote {place}: {len(dataset)} records in {parts} parts of {min(sizes)} to {max(sizes)}, by {made.kind}"
    )
    if parts != len(site_configs):
        typer.echo(f"{file} names {len(site_configs)} sites: a run with this partition needs {parts}")
