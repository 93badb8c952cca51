"""`fedmpt demo`: the first command after an installation, from any folder."""

from pathlib import Path
from typing import Annotated

import typer

from fedmpt_flare.cli.options import AsJson, Seed
from fedmpt_flare.cli.simulate import simulate


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for results.")] = Path("runs/demo"),
    seed: Seed = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="DIR", help="Continue the demo that was broken off in this folder."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the demo: three simulated hospitals, drawn pictures, differential privacy, no GPU; about two minutes."""
    from fedmpt_flare.job.shipped import shipped

    simulate(shipped("demo") / "job.toml", out=None if resume else out, seed=seed, resume=resume, as_json=as_json)
