"""A federation as its people use it: console and command line, roles, refusals, a site that goes and comes back."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedmpt_core.common.signing import verifier
from fedmpt_core.config.job import FederationConfig, JobConfig
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.config.toml import load_job
from fedmpt_core.federation.run.manifest import check_manifest, read_manifest
from fedmpt_core.federation.run.record import load_model, load_record
from fedmpt_core.federation.run.tracking import scalars
from fedmpt_core.privacy.accounting.epsilon import epsilon
from fedmpt_core.privacy.ledger.budget import history, resolved
from fedmpt_core.privacy.ledger.ledger import read_ledger
from fedmpt_core.privacy.ledger.site_ledger import read_site_ledger
from fedmpt_flare.job.recipe import TENSORBOARD
from fedmpt_flare.site.check import check_site_folder
from tests.federation import ADMIN, AUDITOR, DEPLOY, LEAD, OPERATOR, REPOSITORY, SERVER, Federation

pytestmark = [pytest.mark.flare, pytest.mark.thorough, pytest.mark.xdist_group("administration")]
SITES = ("site-1", "site-2", "site-3", "site-4")
FURTHER = {"id": "x", "path": "nvflare.app_common.widgets.convert_to_fed_event.ConvertToFedEvent"}
UNLISTED = "nvflare.app_common.workflows.cyclic_ctl.CyclicController"


@pytest.fixture(scope="module")
def metrics() -> Iterator[socket.socket]:
    """Where the server's monitoring sends to, instead of a statsd_exporter."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        receiver.bind(("127.0.0.1", 0))
        receiver.setblocking(False)
        yield receiver


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, metrics: socket.socket) -> Iterator[Federation]:
    root = tmp_path_factory.mktemp("administration")
    policy = SitePrivacyConfig("scenes", units=20, epsilon=20.0, delta=1e-5, show_budget=True)
    site = SiteConfig(
        DataConfig("scenes", train=20, val=8, test=8, shares=4, spurious_strength=0.9),
        privacy=policy,
        cache_dir=str(root / "cache"),
        device="cpu",
        threads=1,
    )
    sites = {
        name: dataclasses.replace(site, data=dataclasses.replace(site.data, share=n, evaluate=n == 1))
        for n, name in enumerate(SITES, start=1)
    }
    federation = Federation(root / "all", sites)
    federation.lose_sites_after(20)
    monitoring = (DEPLOY / "monitoring" / "metrics__p_resources.json").read_text()
    port = str(metrics.getsockname()[1])
    (federation.local(SERVER) / "metrics__p_resources.json").write_text(monitoring.replace("9125", port))
    federation.set_policy("site-2", show_budget=False)
    federation.set_policy("site-3", share_ledger=False)
    with federation:
        yield federation
    assert federation.processes() == []


def demo(name: str, *, rounds: int = 2, **federation: Any) -> JobConfig:
    """The demo job, for real sites and fewer rounds."""
    agreed = load_job(REPOSITORY / "jobs" / "demo" / "job.toml")
    settings = {"min_sites": 3, "join_timeout": 300, "round_timeout": 120, "max_failed_rounds": 1, **federation}
    return resolved(
        dataclasses.replace(
            agreed,
            name=name,
            training=dataclasses.replace(agreed.training, rounds=rounds, local_steps=2),
            secagg=dataclasses.replace(agreed.secagg, insecure_identities=False, phase_timeout=60),
            federation=FederationConfig(**settings),
        )
    )


def console(federation: Federation, who: str, *lines: str) -> str:
    """What FLARE's console prints when somebody types these lines."""
    done = subprocess.run(
        [str(federation.kit(who) / "fl_admin.sh")],
        input="\n".join([who, *lines, "bye", ""]),
        env=people(federation),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


def nvflare(federation: Federation, who: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output of FLARE's command line with somebody's kit."""
    command = [sys.executable, "-W", "ignore", "-m", "nvflare.cli", *arguments]
    command += ["--startup-kit", str(federation.kit(who).parent)]
    done = subprocess.run(
        command, env=people(federation), capture_output=True, text=True, timeout=300, cwd=federation.root, check=False
    )
    return done.returncode, done.stdout + done.stderr


def side_by_side(federation: Federation, *orders: tuple[str, ...]) -> list[tuple[int, str]]:
    """What `nvflare` gives to several people, or for several orders, at once; most of its seconds are waiting."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda order: nvflare(federation, *order), orders))


def people(federation: Federation) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "HOME": str(federation.root), "PATH": path, "COLUMNS": "300"}


def check_run(federation: Federation, workspace: Path, rounds: int) -> dict[str, Any]:
    """Model, record, manifest, ledgers and figures of a downloaded run."""
    record, manifest = load_record(workspace), read_manifest(workspace)
    check_manifest(manifest, workspace)
    kit = federation.kit(SERVER)
    assert manifest.server["certificate"] == (kit / "server.crt").read_text()
    assert manifest.root == (kit / "rootCA.pem").read_text()
    assert "torch" in manifest.sites["site-1"]["versions"]
    assert (record["outcome"], manifest.outcome) == ("completed", "completed")
    assert [r["round"] for r in record["rounds"]] == list(range(rounds + 1))
    assert [r["survivors"] for r in manifest.rounds] == [r["sites"] for r in record["rounds"]]
    assert load_model(workspace)[2].any()
    assert {"result.json", "model.safetensors"} <= set(manifest.files)
    kept = {"site-3": "the site gave none", "site-4": "the site did not answer any more"}
    for site, entry in manifest.sites.items():
        if site in kept:
            assert entry["ledger"] == {"kept": kept[site]}
            continue
        copy = read_ledger(workspace / entry["ledger"]["file"], verifier(workspace / entry["ledger"]["certificate"]))
        policy = federation.policies[site].privacy
        assert policy
        own = read_site_ledger(policy, federation.kit(site))
        assert copy == own[: len(copy)]
        if entry["head"]:
            assert copy[entry["head"]["seq"]].hash == entry["head"]["hash"]
    return record


def test_a_job_through_the_console_survives_a_site_and_leaves_all_to_lead_and_auditor(federation: Federation) -> None:
    """One site's power is cut in the second of three rounds; the others go on. It is back in a later job, below."""
    lost = []

    def submit(folder: Path) -> str:
        printed = console(federation, LEAD, f"submit_job {folder}")
        return re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", printed)[0]

    def act(job_id: str, event: dict[str, Any]) -> None:
        if event["event"] == "training" and event["round"] == 2 and not lost:
            federation.kill("site-4")
            lost.append(job_id)

    job = demo("console", rounds=3, round_timeout=15, tracking=("tensorboard",))
    job_id = federation.run_job(federation.export(job), act, submit=submit).job_id
    assert lost == [job_id]
    assert "FINISHED:COMPLETED" in console(federation, LEAD, "list_jobs", f"download_job {job_id}")
    workspace = federation.kit(LEAD).parent / "transfer" / job_id / "workspace"
    record = check_run(federation, workspace, 3)
    assert [r["sites"] for r in record["rounds"][1:]] == [list(SITES), list(SITES[:3]), list(SITES[:3])]
    assert "mAP" in record["rounds"][3]
    code, _ = nvflare(federation, AUDITOR, "job", "download", job_id, "-o", "audited")
    assert code == 0
    check_run(federation, next((federation.root / "audited").glob(f"**/{job_id}/workspace")), 3)
    # the same figures through FLARE's analytics events
    events = EventAccumulator(str(next((workspace / TENSORBOARD).iterdir())))
    events.Reload()
    for tag, value in scalars(record["rounds"][3]).items():
        assert events.Scalars(tag)[-1].value == pytest.approx(value, rel=1e-4), tag
        assert events.Scalars(tag)[-1].step == 3
    assert [f for f in check_site_folder(federation.kit("site-4").parent) if not f.fine] == []
    federation.restart("site-4")


def test_everybody_s_budget_is_shown_where_the_site_allows_it(federation: Federation) -> None:
    table = console(federation, AUDITOR, "privacy_budget")
    for site in SITES:
        row = next(line for line in table.splitlines() if line.startswith(f"| {site}"))
        policy = federation.policies[site].privacy
        assert policy
        entries = read_site_ledger(policy, federation.kit(site))
        if site == "site-2":
            assert "this site does not show its budget (privacy.show_budget)" in row
            assert entries[-1].hash[:16] not in table
        else:
            assert f"{epsilon(history(entries), policy.delta):.3f}" in row
            assert f"| {policy.epsilon:g} " in row
            assert entries[-1].hash[:16] in row
    assert "site-1" not in console(federation, LEAD, "privacy_budget site-4").split("privacy_budget")[-1]
    assert "nowhere" in console(federation, LEAD, "privacy_budget nowhere")


@pytest.fixture(scope="module")
def sound(federation: Federation) -> Path:
    """An exported job that could run, for tests that change a copy."""
    return federation.export(demo("sound"))


def changed(sound: Path, name: str, side: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of an exported job whose configuration for the server or the clients somebody has edited."""
    folder = Path(shutil.copytree(sound, sound.parent / "changed" / name))
    edit(folder / "app" / "config" / f"config_fed_{side}.json", change)
    return folder


def at_one_site(folder: Path) -> Path:
    """The job, sent to the server and one site: enough for what the server alone refuses."""
    edit(folder / "meta.json", lambda meta: meta.update(deploy_map={"app": ["server", "site-1"]}, min_clients=1))
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_who_has_no_right_to_submit_is_told_so(federation: Federation, sound: Path) -> None:
    code, printed = nvflare(federation, AUDITOR, "job", "submit", "-j", str(sound))
    assert code != 0
    assert f"user '{AUDITOR}' is not authorized for 'submit_job'" in printed
    assert "not authorized" in console(federation, ADMIN, f"submit_job {sound}")
    printed = nvflare(federation, LEAD, "job", "list")[1]
    assert "console" in printed
    assert "sound" not in printed


def test_jobs_that_may_not_run_are_refused_with_a_sentence_for_their_submitter(
    federation: Federation, sound: Path
) -> None:
    before = charged(federation)
    costly = demo("costly")
    privacy = dataclasses.replace(costly.privacy, epsilon=19.9, noise_multiplier=None)
    code = changed(sound, "code", "client", lambda v: None)
    (code / "app" / "custom").mkdir()
    (code / "app" / "custom" / "extra.py").write_text("print('here')\n")
    costly = resolved(dataclasses.replace(costly, privacy=privacy))
    costly_folder, gpus_folder = federation.export_all(costly, demo("gpus", gpus=1))
    jobs = {
        "code": code,
        "costly": costly_folder,
        "release": changed(
            sound, "release", "client", lambda v: v["executors"][0]["executor"]["args"].update(release="0.0.1")
        ),
        "server": at_one_site(
            changed(sound, "server", "server", lambda v: v["workflows"][0]["args"].update(release="0.0.1"))
        ),
        "class": at_one_site(
            changed(sound, "class", "server", lambda v: v["workflows"][0].update(path=UNLISTED, args={}))
        ),
        "gpus": gpus_folder,
    }
    ids = dict(zip(jobs, federation.submit(*jobs.values()), strict=True))
    refused = [name for name in jobs if name != "gpus"]
    metas = dict(zip(refused, federation.wait_for(*(ids[name] for name in refused)), strict=True))

    def detail(name: str) -> str:
        assert metas[name]["status"] == "FINISHED:FAILED_TO_RUN"
        return str(metas[name]["job_deploy_detail"])

    assert "BYOC not permitted" in detail("code")
    assert "the job was exported with fedmpt 0.0.1, this site runs" in detail("release")
    assert "what is left at this site does not suffice" in detail("costly")
    # what the submitter types
    orders = [("meta", "costly"), ("logs", "class"), ("meta", "gpus")]
    wanted = [(LEAD, "--format", "json", "job", order, ids[name]) for order, name in orders]
    costly_meta, class_log, gpus_meta = (printed for _, printed in side_by_side(federation, *wanted))
    assert "privacy budget: what is left at this site does not suffice for the job" in costly_meta
    # the server refuses before any site is asked
    assert "server: the job is refused: the job was exported with fedmpt 0.0.1, the server runs" in detail("server")
    # what FLARE alone can see ends the job before any round
    assert metas["class"]["status"] == "FINISHED:EXECUTION_EXCEPTION"
    assert "ComponentNotAuthorized" in class_log
    assert UNLISTED in class_log
    # a job that asks for what no site has is tried again for ever, and says why
    for site in SITES:
        assert f"{site}: the job asks for num_of_gpus=1, which this site does not have free" in gpus_meta
    assert "ABORTED" in nvflare(federation, LEAD, "job", "abort", ids["gpus"], "--force")[1]
    assert charged(federation) == before


def test_sites_that_cannot_start_leave_no_round_half_started(federation: Federation) -> None:
    before = charged(federation)
    good = dict(federation.policies)
    nowhere = DataConfig(path="/nowhere/manifest.csv")
    federation.set_site("site-1", dataclasses.replace(good["site-1"], data=nowhere))
    federation.set_site("site-2", dataclasses.replace(good["site-2"], device="cuda:7"))
    try:
        findings = {
            site: next(f.text for f in check_site_folder(federation.kit(site).parent) if f.what == what)
            for site, what in (("site-1", "pictures"), ("site-2", "device"))
        }
        assert "/nowhere/manifest.csv: no such file or folder" in findings["site-1"]
        assert "device='cuda:7': this machine shows" in findings["site-2"]
        outcome = federation.run_job(federation.export(demo("broken")))
    finally:
        for site in ("site-1", "site-2"):
            federation.set_site(site, good[site])
    assert outcome.meta["status"] != "FINISHED:COMPLETED"
    assert outcome.record["outcome"].startswith("failed: join: 2 sites answered, min_sites=3")
    assert outcome.record["rounds"] == []
    for site, sentence in (("site-1", "/nowhere/manifest.csv"), ("site-2", "device='cuda:7'")):
        refused = next(e["reason"] for e in outcome.events if e["event"] == "dropped" and e["site"] == site)
        assert refused == "join was refused at the site; the reason is in its trainer.log"
        log = federation.kit(site).parent / outcome.job_id / "trainer.log"
        assert sentence in log.read_text()
    assert charged(federation) == before


def test_a_study_reaches_its_own_sites_and_people_and_the_guards_hold_in_it(
    federation: Federation, sound: Path
) -> None:
    members = [f"--site-org=site_{n}:site-{n}" for n in (1, 2, 3)]
    for order in (("register", "labels", *members), ("add-user", "labels", LEAD)):
        code, printed = nvflare(federation, ADMIN, "study", *order)
        assert code == 0, printed
    job = changed(sound, "further", "client", lambda v: v.update(components=[FURTHER]))
    code, printed = nvflare(federation, LEAD, "--format", "json", "job", "submit", "-j", str(job), "--study", "labels")
    assert code == 0, printed
    job_id = json.loads(printed[printed.index('{"schema') :].splitlines()[0])["data"]["job_id"]
    code, _ = nvflare(federation, LEAD, "job", "wait", job_id, "--study", "labels")
    assert code != 0
    (_, meta), (_, jobs), (_, own), (code, printed) = side_by_side(
        federation,
        (LEAD, "--format", "json", "job", "meta", job_id, "--study", "labels"),
        (LEAD, "job", "list"),
        (LEAD, "job", "list", "--study", "labels"),
        (AUDITOR, "job", "submit", "-j", str(job), "--study", "labels"),
    )
    for site in SITES:
        assert (f"{site}: NVFLARE_ERROR: the job configures more than an executor" in meta) == (site != "site-4")
    assert (job_id in jobs, job_id in own) == (False, True)
    assert code != 0
    assert f"user '{AUDITOR}' is not mapped to study 'labels'" in printed


def test_a_site_s_operator_operates_that_site_and_nothing_else(federation: Federation, sound: Path) -> None:
    orders = [f"configure_site_log {target} INFO" for target in ("client site-1", "client site-2", "server")]
    own, other, server, submitted, _ = console(federation, OPERATOR, *orders, f"submit_job {sound}").split("Done [")
    assert "successfully configured site-1 log" in own
    for refused in (other, server):
        assert f"user '{OPERATOR}' is not authorized for 'configure_site_log'" in refused
    assert f"user '{OPERATOR}' is not authorized for 'submit_job'" in submitted


def test_monitoring_hears_what_the_dashboard_shows(federation: Federation, metrics: socket.socket) -> None:
    names: set[str] = set()
    with suppress(BlockingIOError):
        while True:
            names |= {line.split(":")[0] for line in metrics.recv(1 << 16).decode().splitlines()}
    mapping = yaml.safe_load((DEPLOY / "monitoring" / "statsd_mapping.yml").read_text())["mappings"]
    heard = {
        re.sub(rule["match"], rule["labels"]["event"].replace("$", "\\"), name)
        for name in names
        for rule in mapping
        if re.fullmatch(rule["match"], name)
    }
    shown = set(re.findall(r'event=\\"([^"\\]+)', (DEPLOY / "monitoring" / "grafana_dashboard.json").read_text()))
    assert {"_client_heartbeat_received", "_client_register_processed", "_job_started", "_job"} <= shown
    assert shown - heard <= {"_job_aborted"}, heard  # no job is aborted here


def charged(federation: Federation) -> dict[str, int]:
    """How many rounds each site's ledger charges; what a job held while it was there is no charge."""
    return {s: sum(entry.kind == "reserve" for entry in ledger_of(federation, s)) for s in SITES}


def ledger_of(federation: Federation, site: str) -> Any:
    policy = federation.policies[site].privacy
    assert policy
    return read_site_ledger(policy, federation.kit(site))
