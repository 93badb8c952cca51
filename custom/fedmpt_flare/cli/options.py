"""Options and arguments that several commands share, so that each has one spelling and one help text."""

from pathlib import Path
from typing import Annotated

import typer


class WrongUse(ValueError):
    """Options or arguments that do not go together, or a file that may not be written; the sentence says what to do."""


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

# of jobs and simulations
JobFile = Annotated[Path, typer.Argument(metavar="JOB.TOML", help="The agreed job.")]
SitesFile = Annotated[
    Path | None,
    typer.Option("--sites", metavar="FILE", help="What each simulated site has; default: site.toml beside the job."),
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Replaces the seed of the job.")]

# of a site
SiteFile = Annotated[Path, typer.Argument(metavar="SITE.TOML", help="The site's own file, fedmpt_site.toml.")]
SiteName = Annotated[str, typer.Option("--name", help="The site's name in the federation.")]
OwnKit = Annotated[
    Path, typer.Option("--kit", metavar="DIR", help="The site's startup folder, with key and certificate.")
]
Kit = Annotated[
    Path | None, typer.Option("--kit", metavar="DIR", help="The site's startup folder, whose key signs the ledger.")
]
Unsigned = Annotated[bool, typer.Option("--unsigned", help="For simulations, which have no keys.")]

# of whoever checks others
RosterFile = Annotated[
    list[str] | None,
    typer.Option(
        "--roster",
        metavar="[DATE=]FILE",
        help="The roster of keys that the sites agreed on; a later one with the day from which it holds.",
    ),
]
Policies = Annotated[
    list[Path] | None,
    typer.Option(
        "--policy", metavar="CARD.json", help="A site's policy card (`fedmpt site policy`); one for each known site."
    ),
]
Independent = Annotated[
    bool, typer.Option("--independent", help="Also recompute epsilon with an accountant of our own.")
]
SelfTest = Annotated[
    bool, typer.Option("--self-test", help="Also test this installation's mechanism with the job's settings.")
]


def check_signed(kit: Path | None, *, unsigned: bool) -> None:
    """Raises WrongUse unless exactly one of `--kit` and `--unsigned` was given."""
    if (kit is None) != unsigned:
        raise WrongUse("give --kit DIR, or --unsigned for a simulation")
