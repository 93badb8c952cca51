"""A federation on one machine: FLARE's simulator in a process of its own, watched through its event file.

Run as `python -m fedmpt_flare.job.simulation SPEC` it is that process; `Simulation` starts it and follows it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import tomli_w

from fedmpt_core.common.files import write_whole
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.config.toml import job_from_dict, without_none
from fedmpt_core.federation.run.lock import held
from fedmpt_core.federation.run.record import (
    CHECKPOINTS,
    EVENTS,
    LEDGER_COPIES,
    LEDGERS,
    LOG,
    MANIFEST,
    MODEL,
    RESULT,
    left_by_a_run,
)
from fedmpt_core.privacy.ledger.site_ledger import with_ledger
from fedmpt_flare.tasks import CLASS_ALLOW_LIST, TRACKING_CLASSES
from fedmpt_flare.workspace import RUN_FILE, SERVER_FILE, SIMULATED_JOB, SITE_FILE

_POLL_SECONDS = 0.1


class SimulationFailed(Exception):
    """The simulated federation did not complete; the message says why, or which log does."""


class Simulation:
    """One simulated run into an output folder.

    Ledgers and checkpoints are kept in that folder from the start, so that a run that was killed can be continued.
    """

    def __init__(self, job: JobConfig, sites: dict[str, SiteConfig], out: Path) -> None:
        """Prepares nothing yet.

        Args:
            job: the agreed job.
            sites: settings of each simulated site.
            out: folder for results; made if missing. A job that continues a run goes on with the ledgers and the
                checkpoint in it; any other needs one that no run has left anything in.

        Raises:
            ValueError: FLARE cannot work where this process keeps its temporary files, or with its Python.
        """
        _require_plain_places()
        self._job, self._sites, self._out = job, sites, out
        self.log = out / LOG
        self.seconds: dict[str, float] = {}  # wall time of FLARE's start, the sites' start, the rounds, FLARE's stop

    def run(self) -> Iterator[dict[str, Any]]:
        """Run to the end, yielding the workflow's events as they come.

        Raises:
            SimulationFailed: the run failed, left no completed record, or has no place to write to.
            FolderTaken: another run goes on in the folder.
        """
        try:
            self._out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SimulationFailed(f"{self._out} cannot be made ({error.strerror}): name another folder") from None
        with held(self._out) as lock:
            if self._job.resume is None and (left := left_by_a_run(self._out)):
                raise SimulationFailed(f"{self._out} holds {', '.join(left)} of another run: name another folder")
            workspace = Path(tempfile.mkdtemp(prefix="fedmpt-"))
            try:
                yield from self._follow(workspace, lock)
            finally:
                self._collect(workspace)
                shutil.rmtree(workspace, ignore_errors=True)

    def _follow(self, workspace: Path, lock: int) -> Iterator[dict[str, Any]]:
        prepare_workspace(self._job, self._sites, workspace, self._out.absolute())
        spec = workspace / "spec.json"
        spec.write_text(json.dumps({"job": self._job.to_dict(), "sites": list(self._sites)}))
        with self.log.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - our own module, no shell
                [sys.executable, "-W", "ignore", "-m", __name__, str(spec)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=workspace,
                pass_fds=(lock,),  # held until this process has ended too, also where ours is killed
                env=os.environ | {"PYTHONIOENCODING": "utf-8"},  # whatever the terminal has: it writes the log
            )
        try:
            outcome, began, marks = None, time.time(), dict[str, float]()
            for event in _events(workspace, process):
                marks.setdefault(event["event"], event["time"])
                if event["event"] in ("completed", "failed"):
                    outcome = event
                yield event
            ended = time.time()
            starts = [began, *(marks.get(name, ended) for name in ("joining", "joined", "completed")), ended]
            names = ("FLARE start", "sites start", "rounds", "FLARE stop")
            self.seconds = {name: round(b - a, 1) for name, (a, b) in zip(names, pairwise(starts), strict=True)}
            if outcome is None:
                raise SimulationFailed(
                    f"FLARE's simulator ended with exit code {process.returncode} before the job did"
                )
            if outcome["event"] == "failed":
                raise SimulationFailed(outcome["reason"])
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _collect(self, workspace: Path) -> None:
        run = _run_folder(workspace)
        for name in (RESULT, MODEL, MANIFEST):
            if run and (run / name).exists():
                write_whole(self._out / name, (run / name).read_bytes(), mode=None)
        if run and (run / LEDGER_COPIES).exists():
            shutil.copytree(run / LEDGER_COPIES, self._out / LEDGER_COPIES, dirs_exist_ok=True)
        for trainer_log in sorted(workspace.glob("**/trainer.log")):
            with self.log.open("ab") as log:
                log.write(f"\n==== trainer of {trainer_log.parents[1].name} ====\n".encode() + trainer_log.read_bytes())


def _require_plain_places() -> None:
    """That FLARE can start the sites' processes, by command lines that it takes apart at blanks and quotes.

    Raises ValueError.
    """
    for what, place in (("TMPDIR", tempfile.gettempdir()), ("Python", sys.executable)):
        if re.search(r"""[\s'"\\#]""", place):
            remedy = (
                "set TMPDIR to another folder, for example TMPDIR=/tmp" if what == "TMPDIR" else "install it elsewhere"
            )
            raise ValueError(
                f"{what} is at {place!r}, and NVIDIA FLARE's simulator can use no path with blanks, quotes, "
                f"'\\' or '#' in it: {remedy}"
            )


def _run_folder(workspace: Path) -> Path | None:
    return next((p.parent for p in workspace.glob(f"*/server/{SIMULATED_JOB}/{EVENTS}")), None)


def _events(workspace: Path, process: "subprocess.Popen[bytes]") -> Iterator[dict[str, Any]]:
    """Lines of the event file until the simulator has ended and all are read."""
    position = 0
    while True:
        ended = process.poll() is not None
        run = _run_folder(workspace)
        if run:
            with (run / EVENTS).open("rb") as stream:
                stream.seek(position)
                data = stream.read()
            whole = data[: data.rfind(b"\n") + 1]
            position += len(whole)
            for line in whole.splitlines():
                yield json.loads(line)
        if ended:
            return
        time.sleep(_POLL_SECONDS)


def prepare_workspace(job: JobConfig, sites: Mapping[str, SiteConfig], workspace: Path, keep: Path) -> None:
    """Write the policy files that a real site would have into the simulator's `local/` folder.

    Args:
        job: the agreed job.
        sites: settings of each simulated site.
        workspace: of the simulator.
        keep: folder for ledgers and checkpoints.
    """
    local = workspace / job.name / "local"
    local.mkdir(parents=True)
    (local / "resources.json").write_text(
        json.dumps({"format_version": 2, "class_allow_list": [*CLASS_ALLOW_LIST, *TRACKING_CLASSES]})
    )
    plain = {name: without_none(asdict(with_ledger(site, name, keep / LEDGERS / name))) for name, site in sites.items()}
    (local / SITE_FILE).write_text(tomli_w.dumps({"sites": plain}), encoding="utf-8")
    (local / SERVER_FILE).write_text(tomli_w.dumps({"checkpoints": str(keep / CHECKPOINTS)}), encoding="utf-8")
    (local / RUN_FILE).write_text(f"simulation-{uuid.uuid4()}\n", encoding="utf-8")


def _main(spec_path: Path) -> None:
    from nvflare.recipe import SimEnv

    from fedmpt_flare.job.recipe import FedMPTRecipe

    spec, workspace = json.loads(spec_path.read_text()), str(spec_path.parent)
    # one thread per site: with fewer, FLARE ends a site's process between tasks and the trainer with it
    env = SimEnv(clients=spec["sites"], num_threads=len(spec["sites"]), workspace_root=workspace)
    FedMPTRecipe(job_from_dict(spec["job"])).execute(env)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
