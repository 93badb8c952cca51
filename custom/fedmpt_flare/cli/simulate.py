"""`fedmpt simulate`: a whole federation on this machine."""

import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmpt_flare.cli.check import simulated_sites
from fedmpt_flare.cli.options import AsJson, JobFile, Seed, SitesFile, WrongUse

if TYPE_CHECKING:
    from fedmpt_core.config.job import JobConfig


def simulate(
    job: JobFile,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for results; default: runs/NAME.")
    ] = None,
    sites: SitesFile = None,
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
    config = _rehearsed(job, seed, resume, insecure_identities=insecure_identities)
    site_configs = simulated_sites(config, sites or job.parent / "site.toml")
    folder = (out or resume or Path("runs") / config.name).absolute()
    if resume and folder != resume.absolute():
        raise WrongUse(f"--out {out}: a continued run goes on in its own folder, {resume}: leave --out away")
    if folder.exists() and not folder.is_dir():
        raise WrongUse(f"--out {folder}: is not a folder")
    from fedmpt_core.common.files import write_whole
    from fedmpt_core.federation import preflight
    from fedmpt_core.federation.run.curves import draw_curves
    from fedmpt_core.federation.run.record import CURVES, TIMING, load_record
    from fedmpt_core.federation.run.tracking import write_tensorboard
    from fedmpt_core.model.backbone.load import load_backbone
    from fedmpt_flare.cli.run_view import RunView
    from fedmpt_flare.cli.screen import fail, progress
    from fedmpt_flare.job.simulation import Simulation, SimulationFailed

    began = time.monotonic()
    view = RunView(config, quiet=as_json)
    view.step("checking job, weights and pictures")
    backbone = load_backbone(config.backbone)
    size = preflight.check_model(config, backbone)
    plan = preflight.check_privacy(config, site_configs, size)
    data = preflight.check_data(config, site_configs)
    view.show_start(size, data, plan)
    with progress(quiet=as_json) as report:
        preflight.prepare_features(backbone, site_configs, data, partial(report, "patch features"))
    prepared = time.monotonic()
    run = Simulation(config, site_configs, folder)
    view.step(f"starting NVIDIA FLARE's simulator; full log: {run.log}")
    try:
        with view.rounds() as follow:
            for event in run.run():
                follow(event)
    except SimulationFailed as error:
        fail(str(error))
        raise typer.Exit(1) from None
    seconds = {"preparing": round(prepared - began, 1), **run.seconds}
    write_whole(folder / TIMING, json.dumps(seconds).encode() + b"\n", mode=None)
    record = load_record(folder)
    if any("mAP" in row for row in record["rounds"]):  # a job may ask for no figures
        draw_curves(record, folder / CURVES)
    if tensorboard:
        write_tensorboard(record, tensorboard)
    if as_json:
        typer.echo(json.dumps(record))
    else:
        view.show_end(record, folder, seconds)


def _rehearsed(file: Path, seed: int | None, resume: Path | None, *, insecure_identities: bool) -> "JobConfig":
    from fedmpt_core.config.toml import load_job
    from fedmpt_core.privacy.ledger.budget import resolved

    job = load_job(file, seed=seed)
    job = _resumed(job, resume) if resume else resolved(job)
    if insecure_identities:
        job = dataclasses.replace(job, secagg=dataclasses.replace(job.secagg, insecure_identities=True))
    if job.secagg.masked and not job.secagg.insecure_identities:
        raise WrongUse(
            f"{file}: simulated sites have no keys to prove who they are: add --insecure-identities to rehearse with "
            "identities that they make up"
        )
    return job


def _resumed(job: "JobConfig", folder: Path) -> "JobConfig":
    from fedmpt_core.federation.run.record import CHECKPOINTS, LEDGERS
    from fedmpt_core.federation.server.checkpoint import newest_checkpoint
    from fedmpt_core.federation.server.continuation import continuation
    from fedmpt_core.privacy.ledger.ledger import read_ledger
    from fedmpt_core.privacy.ledger.site_ledger import SUFFIX

    ledgers = [read_ledger(path) for path in sorted((folder / LEDGERS).glob(f"*/*{SUFFIX}"))]
    return continuation(job, newest_checkpoint(folder / CHECKPOINTS), ledgers)
