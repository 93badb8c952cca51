"""A federation as hospitals run it, on one machine: real kits, mutual TLS, one process each, guards at every site.

The processes are started directly, since FLARE's `start.sh` hides them and starts them again. Whatever talks to the
server as an administrator does so in a process of its own (`tests.administrator`), because FLARE's session leaves
threads behind.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import psutil
import tomli_w
import yaml

from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.config.toml import without_none
from fedmpt_core.federation.run.record import EVENTS
from fedmpt_core.privacy.ledger.site_ledger import create_ledger
from fedmpt_core.secagg.identity import root_sha256
from fedmpt_core.secagg.roster import Member, Roster
from fedmpt_core.secagg.start_up_kit import load_identity, load_root, write_roster
from fedmpt_flare.workspace import SITE_FILE

REPOSITORY = Path(__file__).parents[1]
DEPLOY = REPOSITORY / "deploy"
STATE = "/var/lib/fedmpt"  # in the files of deploy/, which is where their readers put their own folder
PROJECT, SERVER = "fedmpt", "fl.example.org"
ADMIN, OPERATOR, LEAD, AUDITOR = (
    "admin@example.org",
    "it@hospital-a.example.org",  # of the first site's organisation
    "lead@example.org",
    "auditor@example.org",
)
# what the server does without; deploy/docker/Dockerfile.server installs none of it
HEAVY = ("torch", "torchvision", "open_clip", "timm", "transformers", "opacus", "dp_accounting", "scipy", "sklearn")
HEAVY += ("matplotlib", "pyarrow", "PIL")
ROSTER = "secagg_roster.json"
LONGEST = 300  # seconds for anything to happen; reached only when something hangs
# FLARE asks what is installed, so these are hidden rather than broken
LIGHT = f"""
import sys
from importlib.machinery import PathFinder


class Light(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {HEAVY!r} else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Light
"""


@dataclass(frozen=True)
class Outcome:
    """What the submitter of a job gets.

    Attributes:
        job_id: FLARE's name of the job.
        meta: FLARE's record of the job; `status` and `job_deploy_detail` above all.
        workspace: the server's folder of the job, with `result.json`; None when the job never ran.
    """

    job_id: str
    meta: dict[str, Any]
    workspace: Path | None

    @property
    def record(self) -> dict[str, Any]:
        """`result.json`."""
        assert self.workspace is not None, f"the job left no folder: {self.meta}"
        return json.loads((self.workspace / "result.json").read_text())

    @property
    def events(self) -> list[dict[str, Any]]:
        """The workflow's events, in order."""
        assert self.workspace is not None, f"the job left no folder: {self.meta}"
        return [json.loads(line) for line in (self.workspace / "events.jsonl").read_text().splitlines()]

    def sentence_of(self, site: str) -> str:
        """What a site's parent process said of the job when it was deployed."""
        sentences = [d for d in self.meta["job_deploy_detail"] if d.startswith(f"{site}: ")]
        assert len(sentences) == 1, self.meta
        return sentences[0]


class Federation:
    """One server and some sites below a new folder; leaving the `with` block ends every process that it started."""

    def __init__(self, root: Path, sites: Mapping[str, SiteConfig]) -> None:
        """Provisions kits and writes each site's policy, guards, roster and ledger; starts nothing.

        Args:
            root: new folder; kits, logs, jobs, ledgers and results all lie in it, and it is everybody's HOME.
            sites: their settings; each policy gets a new, signed ledger below `root`.
        """
        self.root, self.sites = root.resolve(), list(sites)
        self.policies: dict[str, SiteConfig] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = {**os.environ, "HOME": str(self.root), "OMP_NUM_THREADS": "1"}
        self._environment |= {"NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "10", "NVFLARE_SECURE_LOGGING": "true"}
        self._provision()
        # everybody shares one machine's processors here, so a site's accountants take longer than FLARE's ten seconds
        self._edit_resources(SERVER, lambda r: r["servers"][0].update(admin_timeout=float(LONGEST)))
        roster = Roster(
            root_sha256(load_root(self.kit(SERVER))),
            {name: Member(load_identity(self.kit(name)).fingerprint, _org(name)) for name in sites},
        )
        for name, site in sites.items():
            write_roster(self.local(name) / ROSTER, roster)
            site = replace(site, secagg=replace(site.secagg, roster=ROSTER))
            if site.privacy:
                policy = replace(site.privacy, ledger=str(self.state(name) / "ledgers"))
                create_ledger(policy, name, self.kit(name))
                site = replace(site, privacy=policy)
            self.set_site(name, site)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def state(self, who: str) -> Path:
        """Where the participant keeps what outlives a job."""
        return self.root / "state" / who

    def local(self, who: str) -> Path:
        """The participant's own configuration folder."""
        return self._home(who) / "local"

    def kit(self, who: str) -> Path:
        """The participant's key and certificate."""
        return self._home(who) / "startup"

    def set_site(self, name: str, site: SiteConfig) -> None:
        """Write a site's settings, as its operator would; the next job finds them."""
        self.policies[name] = site
        (self.local(name) / SITE_FILE).write_text(tomli_w.dumps(without_none(asdict(site))), encoding="utf-8")

    def set_policy(self, name: str, **changes: Any) -> None:
        """Change fields of a site's privacy policy."""
        site = self.policies[name]
        assert site.privacy is not None
        self.set_site(name, replace(site, privacy=replace(site.privacy, **changes)))

    def allow_at_server(self, class_path: str, source: str) -> None:
        """Put a module of one class beside the server's own, as whoever runs the server can do. Before `start`."""
        self._install(SERVER, class_path, source)
        self._edit_resources(SERVER, lambda r: r["class_allow_list"].append(class_path))

    def lose_sites_after(self, seconds: int) -> None:
        """Without a sign of life; deploy/ waits a minute. Before `start`."""
        self._edit_resources(SERVER, lambda r: r["servers"][0].update(heart_beat_timeout=seconds))

    @contextmanager
    def filter_before_guard(self, site: str, class_path: str, source: str) -> Iterator[None]:
        """Let a faulty filter of the site's own change answers before the guard sees them, in jobs of this block."""
        self._install(site, class_path, source)
        path = self.local(site) / "privacy.json"
        before = path.read_text()
        privacy = json.loads(before)
        privacy["scopes"][0]["task_result_filters"].insert(0, {"path": class_path})
        path.write_text(json.dumps(privacy))
        try:
            yield
        finally:
            path.write_text(before)

    def start(self) -> None:
        """Start everybody; returns when every site is registered at the server."""
        for who in (SERVER, *self.sites):
            self.start_one(who)
        self.wait_for_all()

    def wait_for_all(self, since: float = 0.0) -> None:
        """Until the server has heard of every site since a time (of `time.time`)."""
        self.administer(ADMIN, "wait", str(len(self.sites)), str(since))

    def restart(self, who: str) -> None:
        """Start a participant whose processes ended; returns when the server knows it by its new process."""
        since = time.time()
        self.start_one(who)
        self.wait_for_all(since)

    def start_one(self, who: str) -> None:
        """Start one participant's parent process."""
        role = "server" if who == SERVER else "client"
        command = [sys.executable, "-u", "-m", f"nvflare.private.fed.app.{role}.{role}_train"]
        command += ["-m", str(self._home(who)), "-s", f"fed_{role}.json", "--set", "secure_train=true"]
        command += [f"org={_org(who)}", "config_folder=config"] + ([] if who == SERVER else [f"uid={who}"])
        (self._home(who) / "transfer").mkdir(exist_ok=True)
        environment = self._environment
        if who == SERVER:
            path = os.pathsep.join([str(self.root / "light"), *filter(None, [os.environ.get("PYTHONPATH")])])
            environment = {**environment, "PYTHONPATH": path}
        with (self._home(who) / "console.log").open("ab") as log:
            self._processes[who] = subprocess.Popen(
                command,
                cwd=self._home(who),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def kill(self, who: str) -> None:
        """End a participant's processes at once, as a power cut does."""
        for process in self.processes():
            with suppress(psutil.Error):
                if self._belongs(process, who):
                    process.kill()
        self._processes[who].wait()

    def stop(self) -> None:
        """End every process; none is left when this returns."""
        alive = self.processes()
        while alive:
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(alive, timeout=20)
            alive = self.processes()
        for process in self._processes.values():
            process.wait()

    def processes(self) -> list[psutil.Process]:
        """All that run for this federation; trainers and job processes too, which FLARE puts into other sessions."""
        # the product's own are not dumpable, so who is not root cannot read their environment
        started = {process.pid for process in self._processes.values()}
        return [p for p in psutil.process_iter() if _home_of(p) == str(self.root) or started & _line_of(p)]

    def export(self, job: JobConfig) -> Path:
        """The job's folder, as its submitter exports it."""
        return self.export_all(job)[0]

    def export_all(self, *jobs: JobConfig) -> list[Path]:
        """The same for several jobs in one process."""
        folder = self.root / "exported"
        code = (
            "import sys, json; from fedmpt_core.config.toml import job_from_dict\n"
            "from fedmpt_flare.job.recipe import FedMPTRecipe\n"
            "for job in json.loads(sys.argv[1]): FedMPTRecipe(job_from_dict(job)).export(sys.argv[2])"
        )
        values = json.dumps([job.to_dict() for job in jobs])
        _run([sys.executable, "-W", "ignore", "-c", code, values, str(folder)], self._environment)
        return [folder / job.name for job in jobs]

    def run_job(
        self,
        folder: Path,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        *,
        submit: Callable[[Path], str] | None = None,
    ) -> Outcome:
        """Submit as the lead, wait for the end, download.

        Args:
            folder: the exported job.
            on_event: called in a thread of its own with the job's id and each of the workflow's events as they come.
            submit: does so in another way, which gives the job's id; then nothing is downloaded either.
        """
        ended = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(self._watch, on_event, ended)
            try:
                if submit:
                    meta = self.wait_for(submit(folder))[0]
                    outcome = Outcome(meta["job_id"], meta, None)
                else:
                    outcome = self._outcomes("job", str(folder))[0]
            finally:
                ended.set()
            watching.result()
        return outcome

    def submit(self, *folders: Path) -> list[str]:
        """The ids of jobs, submitted by the lead in this order."""
        return self._lead_is_told("submit", *map(str, folders))

    def wait_for(self, *job_ids: str) -> list[dict[str, Any]]:
        """FLARE's records of jobs that have ended."""
        return self._lead_is_told("metas", *job_ids)

    def results(self, *job_ids: str) -> list[Outcome]:
        """What the lead downloads of jobs that have ended."""
        return self._outcomes("results", *job_ids)

    def detail(self, job_id: str, beginning: str) -> str:
        """The line of what `nvflare job meta` shows as Deployment that begins so, as soon as it is there."""
        return self._lead_is_told("detail", job_id, beginning)

    def _outcomes(self, *order: str) -> list[Outcome]:
        results = self._lead_is_told(*order)
        return [Outcome(r["meta"]["job_id"], r["meta"], r["workspace"] and Path(r["workspace"])) for r in results]

    def _lead_is_told(self, *order: str) -> Any:
        return json.loads(self.administer(LEAD, *order).splitlines()[-1])

    def abort(self, job_id: str) -> None:
        """Abort a running job, as its submitter does."""
        self.administer(LEAD, "abort", job_id)

    def trainer(self, site: str) -> psutil.Process | None:
        """The site's trainer process, if one runs."""
        return self._process(site, ("fedmpt_flare.site.trainer_main",))

    def job_process(self, who: str) -> psutil.Process | None:
        """The process of the running job at a site or the server."""
        return self._process(who, ("server.runner_process", "client.worker_process"))

    def _process(self, who: str, names: tuple[str, ...]) -> psutil.Process | None:
        for process in self.processes():
            with suppress(psutil.Error):
                named = any(name in part for part in process.cmdline() for name in names)
                if named and self._belongs(process, who):
                    return process
        return None

    def _belongs(self, process: psutil.Process, who: str) -> bool:
        place = str(self._home(who))
        if self._processes[who].pid in _line_of(process) or any(p.startswith(place) for p in process.cmdline()):
            return True
        with suppress(psutil.AccessDenied):
            return process.cwd() == place
        return False

    def _watch(self, on_event: Callable[[str, dict[str, Any]], None] | None, ended: threading.Event) -> None:
        """Follow the event file of the newest job."""
        known = set(self._home(SERVER).glob(f"*/{EVENTS}"))
        path, position = None, 0
        while on_event and not ended.wait(0.05):
            path = path or next(iter(set(self._home(SERVER).glob(f"*/{EVENTS}")) - known), None)
            data = path.read_bytes()[position:] if path and path.exists() else b""
            whole = data[: data.rfind(b"\n") + 1]
            position += len(whole)
            for line in whole.splitlines():
                on_event(path.parent.name if path else "", json.loads(line))

    def _home(self, who: str) -> Path:
        return self.root / "kits" / PROJECT / "prod_00" / who

    def _provision(self) -> None:
        """As deploy/ says, but for names, addresses and folders."""
        project = yaml.safe_load((DEPLOY / "provision" / "project.yml").read_text())
        given = {p["type"]: p for p in project["participants"]}
        server = {**given["server"], "fed_learn_port": free_port()}
        server |= {"default_host": "localhost", "host_names": ["localhost", "127.0.0.1"]}
        clients = [{**given["client"], "name": name, "org": _org(name)} for name in self.sites]
        admins = [p for p in project["participants"] if p["type"] == "admin"]
        for operator in (p for p in admins if p["name"] == OPERATOR):
            operator["org"] = _org(self.sites[0])
        project["participants"] = [server, *clients, *admins]
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / "project.yml"
        path.write_text(yaml.safe_dump(project), encoding="utf-8")
        command = [sys.executable, "-W", "ignore", "-m", "nvflare.cli", "provision", "--force"]
        _run([*command, "-p", str(path), "-w", str(self.root / "kits")], self._environment)
        for who in (SERVER, *self.sites):
            for file in (DEPLOY / ("server" if who == SERVER else "site") / "local").iterdir():
                text = file.read_text(encoding="utf-8").replace(STATE, str(self.state(who)))
                (self.local(who) / file.name).write_text(text, encoding="utf-8")
        (self.root / "light").mkdir()
        (self.root / "light" / "sitecustomize.py").write_text(LIGHT, encoding="utf-8")

    def _install(self, who: str, class_path: str, source: str) -> None:
        custom = self.local(who) / "custom"
        custom.mkdir(exist_ok=True)
        (custom / f"{class_path.rpartition('.')[0]}.py").write_text(source, encoding="utf-8")

    def _edit_resources(self, who: str, edit: Callable[[dict[str, Any]], None]) -> None:
        path = self.local(who) / "resources.json.default"
        resources = json.loads(path.read_text())
        edit(resources)
        path.write_text(json.dumps(resources, indent=2))

    def administer(self, who: str, *arguments: str, timeout: float = 2 * LONGEST) -> str:
        """What `tests.administrator` prints, with somebody's kit."""
        command = [sys.executable, "-W", "ignore", "-m", "tests.administrator", str(self._home(who)), who, *arguments]
        return _run(command, self._environment, timeout=timeout)


def _org(who: str) -> str:
    return "consortium" if who == SERVER else who.replace("-", "_")


def free_port() -> int:
    """A port of the loopback interface that nobody uses just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _home_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("HOME")
    except (psutil.Error, OSError):
        return None


def _line_of(process: psutil.Process) -> set[int]:
    """A process and all above it."""
    try:
        return {process.pid, *(parent.pid for parent in process.parents())}
    except psutil.Error:
        return set()


def _run(command: Iterable[str], environment: Mapping[str, str], *, timeout: float = LONGEST) -> str:
    done = subprocess.run(
        list(command), cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout
