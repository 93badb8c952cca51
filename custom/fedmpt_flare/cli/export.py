"""`fedmpt export`: a job as FLARE's own console submits it."""

from pathlib import Path
from typing import Annotated

import typer

from fedmpt_flare.cli.options import JobFile, Policies, Seed, WrongUse


def export(
    job: JobFile,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder that receives the job folder.")] = Path(
        "exported"
    ),
    policies: Policies = None,
    seed: Seed = None,
) -> None:
    """Write a FLARE job folder for `nvflare job submit`: configuration only, no code.

    A job that a known site would refuse is not written.
    """
    from fedmpt_core.config.toml import load_job
    from fedmpt_core.privacy.ledger.budget import resolved

    config = resolved(load_job(job, seed=seed))
    if config.secagg.insecure_identities:
        raise WrongUse(
            f"{job}: secagg.insecure_identities = true is for simulations, every site with a start-up kit refuses it: "
            "remove it"
        )
    from fedmpt_core.federation import preflight
    from fedmpt_core.federation.site.policy_card import PolicyCard
    from fedmpt_core.model.backbone.load import load_backbone
    from fedmpt_flare.cli.screen import quiet
    from fedmpt_flare.job.recipe import FedMPTRecipe

    cards = [PolicyCard.load(path) for path in policies or []]
    for card in cards:
        card.check(config)
    preflight.check_model(config, load_backbone(config.backbone))
    with quiet():
        FedMPTRecipe(config).export(str(out))
    if cards:
        typer.echo(f"Within the policies of {', '.join(card.site for card in cards)}.")
    typer.echo(f"Wrote {out / config.name} (job digest {config.digest()[:16]}). Submit it with:")
    typer.echo(f"  nvflare job submit -j {out / config.name}")
