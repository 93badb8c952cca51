"""The `fedmpt` command. Arguments and exit codes here, drawing in `console`, work in `fedmpt_core`."""

import dataclasses
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.config.toml import ConfigError, load_job, load_sites, schema
from fedmpt_core.privacy.ledger.budget import resolved
from fedmpt_flare.cli import screen
from fedmpt_flare.cli.audit import audit
from fedmpt_flare.cli.bench import bench
from fedmpt_flare.cli.conditions import conditions
from fedmpt_flare.cli.ledger import ledger
from fedmpt_flare.cli.prepare import partition, prepare
from fedmpt_flare.cli.report import report
from fedmpt_flare.cli.roster import roster
from fedmpt_flare.cli.site import site

app = typer.Typer(
    help="Federated multi-label prompt tuning of vision-language models on NVIDIA FLARE.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB.TOML", help="The agreed job.")]
SiteFile = Annotated[
    Path | None,
    typer.Option("--sites", metavar="FILE", help="What each simulated site has; default: site.toml beside the job."),
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Replaces the seed of the job.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command()
def check(
    job: Annotated[Path | None, typer.Argument(metavar="JOB.TOML", help="The agreed job.")] = None,
    sites: SiteFile = None,
    seed: Seed = None,
    show_schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a job file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a job and the sites' data before any work is spent; show what a round costs."""
    if show_schema:
        typer.echo(json.dumps(schema(), indent=2))
        return
    if job is None:
        raise ConfigError("JOB.TOML is missing: name the job file to check")
    config, site_configs = _load(job, sites, seed, needs_sites=sites is not None or (job.parent / "site.toml").exists())
    from fedmpt_core.federation import preflight
    from fedmpt_core.model.backbone.load import load_backbone

    size = preflight.check_model(config, load_backbone(config.backbone))
    plan = preflight.check_privacy(config, site_configs, size)
    data = preflight.check_data(config, site_configs) if site_configs else {}
    if as_json:
        typer.echo(json.dumps(screen.check_json(config, size, data, plan)))
    else:
        screen.show_check(config, size, data, plan)


@app.command()
def simulate(
    job: JobFile,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for results; default: runs/NAME.")
    ] = None,
    sites: SiteFile = None,
    seed: Seed = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option("--tensorboard", metavar="DIR", help="Also write the rounds' figures for TensorBoard."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="DIR", help="Continue the run that was broken off in this folder."),
    ] = None,
    insecure_identities: Annotated[
        bool,
        typer.Option(
            "--insecure-identities",
            help="Let the simulated sites, which have no keys, make up their identity, as secagg.insecure_identities.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole federation on this machine, in NVIDIA FLARE's simulator."""
    config, site_configs = _load(job, sites, seed)
    if insecure_identities:
        config = dataclasses.replace(config, secagg=dataclasses.replace(config.secagg, insecure_identities=True))
    if config.secagg.masked and not config.secagg.insecure_identities:
        raise ConfigError(
            f"{job}: simulated sites have no keys to prove who they are: add --insecure-identities to rehearse with "
            "identities that they make up"
        )
    if resume:
        config = _resumed(config, resume)
    folder = (out or resume or Path("runs") / config.name).absolute()
    if resume and folder != resume.absolute():
        raise ConfigError(f"--out {out}: a continued run goes on in its own folder, {resume}: leave --out away")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: is not a folder")
    from fedmpt_core.federation import preflight
    from fedmpt_core.federation.run.curves import draw_curves
    from fedmpt_core.federation.run.record import CURVES, TIMING, load_record
    from fedmpt_core.federation.run.tracking import write_tensorboard
    from fedmpt_core.model.backbone.load import load_backbone
    from fedmpt_flare.job.simulation import Simulation

    began = time.monotonic()
    view = screen.RunView(config, quiet=as_json)
    view.step("checking job, weights and pictures")
    backbone = load_backbone(config.backbone)
    size = preflight.check_model(config, backbone)
    plan = preflight.check_privacy(config, site_configs, size)
    data = preflight.check_data(config, site_configs)
    view.show_start(size, data, plan)
    with view.features() as report:
        preflight.prepare_features(backbone, site_configs, data, report)
    prepared = time.monotonic()
    run = Simulation(config, site_configs, folder)
    view.step(f"starting NVIDIA FLARE's simulator; full log: {run.log}")
    with view.rounds() as follow:
        for event in run.run():
            follow(event)
    seconds = {"preparing": round(prepared - began, 1), **run.seconds}
    (folder / TIMING).write_text(json.dumps(seconds) + "\n")
    record = load_record(folder)
    if any("mAP" in row for row in record["rounds"]):  # a job may ask for no figures
        draw_curves(record, folder / CURVES)
    if tensorboard:
        write_tensorboard(record, tensorboard)
    if as_json:
        typer.echo(json.dumps(record))
    else:
        view.show_end(record, folder, seconds)


@app.command()
def export(
    job: JobFile,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder that receives the job folder.")] = Path(
        "exported"
    ),
    policies: Annotated[
        list[Path] | None,
        typer.Option(
            "--policy", metavar="CARD.json", help="A site's card (`fedmpt site policy`); give one for each known site."
        ),
    ] = None,
    seed: Seed = None,
) -> None:
    """Write a FLARE job folder for `nvflare job submit`: configuration only, no code.

    A job that a known site would refuse is not written.
    """
    config, _ = _load(job, None, seed, needs_sites=False)
    if config.secagg.insecure_identities:
        raise ConfigError(
            f"{job}: secagg.insecure_identities = true is for simulations, every site with a start-up kit refuses it: "
            "remove it"
        )
    from fedmpt_core.federation import preflight
    from fedmpt_core.federation.site.policy_card import PolicyCard
    from fedmpt_core.model.backbone.load import load_backbone

    cards = [PolicyCard.load(path) for path in policies or []]
    for card in cards:
        card.check(config)
    preflight.check_model(config, load_backbone(config.backbone))
    with screen.quiet():
        from fedmpt_flare.job.recipe import FedMPTRecipe

        FedMPTRecipe(config).export(str(out))
    if cards:
        screen.say(f"Within the policies of {', '.join(card.site for card in cards)}.")
    screen.say(f"Wrote {out / config.name} (job digest {config.digest()[:16]}). Submit it with:")
    screen.say(f"  nvflare job submit -j {out / config.name}")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that a run wrote.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files.")],
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Also write where each label was found, per condition, as heat maps."),
    ] = False,
    top: Annotated[int, typer.Option("--top", min=1, help="Labels to show per picture.")] = 5,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for heat maps; default: DIR/explanations."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Label pictures with a finished run's model."""
    from fedmpt_core.federation.prediction import Predictor

    predictor = Predictor.load(run)
    answers = [predictor.predict(path) for path in images]
    if explain:
        folder = out or run / "explanations"
        folder.mkdir(parents=True, exist_ok=True)
        answers = [predictor.explain(a, folder, top=top) for a in answers]
    if as_json:
        typer.echo(json.dumps([a.to_dict(top) for a in answers]))
    else:
        screen.show_predictions(answers, top, predictor)


app.command()(prepare)
app.command()(partition)
app.command()(bench)
app.command()(audit)
app.command()(report)
app.add_typer(conditions, name="conditions")
app.add_typer(roster, name="roster")
app.add_typer(site, name="site")
app.add_typer(ledger, name="ledger")


def _load(
    job: Path, sites: Path | None, seed: int | None, *, needs_sites: bool = True
) -> tuple[JobConfig, dict[str, SiteConfig]]:
    config = resolved(load_job(job, seed=seed))
    if not needs_sites:
        return config, {}
    found = load_sites(sites or job.parent / "site.toml")
    if len(found) < config.federation.min_sites:
        raise ConfigError(
            f"{sites or job.parent / 'site.toml'}: names {len(found)} sites, "
            f"the job needs min_sites={config.federation.min_sites}"
        )
    return config, found


def _resumed(config: JobConfig, folder: Path) -> JobConfig:
    from fedmpt_core.federation.run.record import CHECKPOINTS
    from fedmpt_core.federation.server.checkpoint import newest_checkpoint

    kept = newest_checkpoint(folder / CHECKPOINTS)
    continued = dataclasses.replace(config, resume=kept.resuming())
    kept.check(continued)
    return continued


def main() -> None:
    """Entry point: errors meant for people are one sentence on standard error and exit code 2."""
    from fedmpt_flare.job.simulation import SimulationFailed

    # Third-party notices are of no use to whoever runs a command; FLARE's own go to the log file.
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except SimulationFailed as error:
        screen.fail(str(error))
        sys.exit(1)
    except ValueError as error:
        screen.fail(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        screen.fail("stopped")
        sys.exit(130)
