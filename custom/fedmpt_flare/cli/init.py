"""`fedmpt init`: a job and its sites to begin with, from the sites' own manifests where they are at hand."""

from pathlib import Path
from typing import Annotated

import typer

from fedmpt_flare.cli.options import WrongUse


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that receives job.toml and site.toml.")],
    manifests: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MANIFEST...", help="One for each site: labels, sizes and settings come from them."),
    ] = None,
    epsilon: Annotated[
        float, typer.Option("--epsilon", min=0.01, max=200, help="Most that the job may spend at a site.")
    ] = 8.0,
    no_privacy: Annotated[
        bool, typer.Option("--no-privacy", help="Train without differential privacy; updates then tell of pictures.")
    ] = False,
) -> None:
    """Write a job.toml and a site.toml with settings that suit the number of pictures and the privacy asked for."""
    from fedmpt_core.common.files import require_place, write_whole
    from fedmpt_core.config.starter import SiteStart, starter_job, starter_sites
    from fedmpt_core.data.survey import survey

    paths = [folder / "job.toml", folder / "site.toml"]
    there = [str(path) for path in paths if path.exists()]
    if there:
        raise WrongUse(f"{', '.join(there)}: exists already: name another folder, nothing was touched")
    require_place(folder)
    if manifests:
        sites, labels = survey(manifests)
    else:
        sites = [SiteStart(f"hospital-{x}", f"hospital-{x}/manifest.csv", "", 500, x == "a") for x in "abc"]
        labels = ("cat", "dog", "chair")
    name = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "-" for c in folder.absolute().name)[:64]
    bound = None if no_privacy else epsilon
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(paths[0], starter_job(name or "mine", labels, sites, bound).encode(), mode=None)
    write_whole(paths[1], starter_sites(sites, bound).encode(), mode=None)
    typer.echo(f"Wrote {paths[0]} and {paths[1]}: {len(labels)} labels, {len(sites)} sites.")
    if not manifests:
        typer.echo("Put your labels into the one and your manifests and numbers of pictures into the other. Then:")
    typer.echo(f"  fedmpt check {paths[0]}")
    typer.echo(f"  fedmpt simulate {paths[0]}{' --insecure-identities' if len(sites) > 2 else ''} --out runs/{name}")
