"""`fedmpt simulate`: a whole federation on this machine."""

import dataclasses
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmpt_flare.cli.check import simulated_sites
from fedmpt_flare.cli.options import AsJson, JobFile, Seed, SitesFile, WrongUse

if TYPE_CHECKING:
    from fedmpt_core.config.job import JobConfig
    from fedmpt_core.config.site import SiteConfig


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
    if resume and out and out.absolute() != resume.absolute():
        raise WrongUse(f"--out {out}: a continued run goes on in its own folder, {resume}: leave --out away")
    config = _rehearsed(job, seed, resume, insecure_identities=insecure_identities)
    site_configs = simulated_sites(config, sites or job.parent / "site.toml")
    place = out or resume or Path("runs") / config.name
    command = ["fedmpt", "simulate", str(job), *(["--sites", str(sites)] if sites else [])]
    command += [*(["--seed", str(seed)] if seed is not None else []), *["--insecure-identities"] * insecure_identities]
    _require_own_folder(place, resume, command)
    folder = place.absolute()
    from fedmpt_core.common.files import write_whole
    from fedmpt_core.federation import preflight
    from fedmpt_core.federation.run.curves import draw_curves
    from fedmpt_core.federation.run.record import CURVES, TIMING, load_record
    from fedmpt_core.federation.run.tracking import write_tensorboard
    from fedmpt_core.model.backbone.load import load_backbone
    from fedmpt_flare.cli.run_view import RunView
    from fedmpt_flare.cli.screen import fail, interruptible, progress
    from fedmpt_flare.job.simulation import Simulation, SimulationFailed

    began = time.monotonic()
    view = RunView(config, quiet=as_json)
    view.step("checking job, weights and pictures")
    run = Simulation(config, site_configs, folder)
    try:
        with interruptible(partial(_how_to_go_on, place, command)):
            backbone = load_backbone(config.backbone)
            size = preflight.check_model(config, backbone)
            plan = preflight.check_privacy(config, _with_ledgers(site_configs, folder), size)
            data = preflight.check_data(config, site_configs)
            view.show_start(size, data, plan)
            with progress(quiet=as_json) as report:
                preflight.prepare_features(backbone, site_configs, data, partial(report, "patch features"))
            prepared = time.monotonic()
            view.step(f"starting NVIDIA FLARE's simulator; full log: {run.log}")
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


def _require_own_folder(place: Path, resume: Path | None, command: Sequence[str]) -> None:
    """Raises WrongUse where another run's files are, or none can be written; FolderTaken where one goes on."""
    from fedmpt_core.common.files import require_place
    from fedmpt_core.federation.run.lock import require_free
    from fedmpt_core.federation.run.record import left_by_a_run

    if place.exists() and not place.is_dir():
        raise WrongUse(f"--out {place}: is not a folder")
    require_free(place)
    left = left_by_a_run(place)
    if left and not resume:
        free = next(path for n in count(2) if not (path := place.with_name(f"{place.name}-{n}")).exists())
        raise WrongUse(
            f"--out {place}: holds a run already ({', '.join(left)}), of which nothing was touched: name another "
            f"folder, for example --out {shlex.quote(str(free))}; a run that broke off goes on with "
            f"`{shlex.join([*command, '--resume', str(place)])}`"
        )
    require_place(place)


def _how_to_go_on(place: Path, command: Sequence[str]) -> str:
    from fedmpt_core.federation.run.record import CHECKPOINTS, left_by_a_run

    if any((place / CHECKPOINTS).glob("*/*")):
        return f"; go on with `{shlex.join([*command, '--resume', str(place)])}`"
    if left_by_a_run(place):
        return f" before the first round was complete: there is nothing to go on from, and {place} can be deleted"
    return " before training began; the same command begins again"


def _with_ledgers(sites: "Mapping[str, SiteConfig]", folder: Path) -> "dict[str, SiteConfig]":
    """The sites with the ledgers that a run has left in its folder."""
    from fedmpt_core.federation.run.record import LEDGERS

    kept = {}
    for name, site in sites.items():
        ledger = folder / LEDGERS / name
        simulated = site.privacy and not site.privacy.ledger and ledger.is_dir()
        policy = dataclasses.replace(site.privacy, ledger=str(ledger)) if site.privacy and simulated else site.privacy
        kept[name] = dataclasses.replace(site, privacy=policy)
    return kept


def _resumed(job: "JobConfig", folder: Path) -> "JobConfig":
    """Raises WrongUse, with the numbers that would do, where what was charged leaves too little for the job."""
    from fedmpt_core.federation.run.record import CHECKPOINTS, LEDGERS
    from fedmpt_core.federation.server.checkpoint import newest_checkpoint
    from fedmpt_core.federation.server.continuation import continuation
    from fedmpt_core.privacy.ledger.ledger import read_ledger
    from fedmpt_core.privacy.ledger.site_ledger import SUFFIX

    ledgers = [read_ledger(path) for path in sorted((folder / LEDGERS).glob(f"*/*{SUFFIX}"))]
    goes_on = continuation(job, newest_checkpoint(folder / CHECKPOINTS), ledgers)
    least = goes_on.privacy.epsilon
    if least > job.privacy.epsilon:
        raise WrongUse(
            f"to go on would spend epsilon {least:g}, the job allows {job.privacy.epsilon:g}: the attempt that broke "
            f"off is charged, and federation.max_failed_rounds = {job.federation.max_failed_rounds} leaves no room for "
            f"it. Nothing was touched. To go on, set epsilon = {least:g} and noise_multiplier = "
            f"{goes_on.privacy.noise_multiplier} in [privacy] of the job, and at least that epsilon in [privacy] of "
            "the sites' file, which is their cap"
        )
    return goes_on
