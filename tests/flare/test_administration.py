"""A federation as its people use it: console and command line, roles, refusals, a site that goes and comes back."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedmpt_core.config import FederationConfig, JobConfig
from fedmpt_core.config_file import load_job
from fedmpt_core.privacy.accounting import epsilon
from fedmpt_core.privacy.budget import history, resolved
from fedmpt_core.privacy.ledger import read_ledger
from fedmpt_core.privacy.signing import verifier
from fedmpt_core.privacy.site_ledger import read_site_ledger
from fedmpt_core.result import load_model, load_record
from fedmpt_core.run_manifest import check_manifest, read_manifest
from fedmpt_core.site_config import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.tracking import scalars
from fedmpt_flare.recipe import TENSORBOARD
from fedmpt_flare.site_check import check_site_folder
from tests.federation import ADMIN, AUDITOR, DEPLOY, LEAD, REPOSITORY, SERVER, Federation

pytestmark = [pytest.mark.flare, pytest.mark.slow, pytest.mark.xdist_group("administration")]
SITES = ("site-1", "site-2", "site-3", "site-4")


@pytest.fixture(scope="module")
def metrics() -> Iterator[socket.socket]:
    """Where the server's monitoring sends to, instead of a statsd_exporter."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        found.bind(("127.0.0.1", 0))
        found.setblocking(False)
        yield found


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, metrics: socket.socket) -> Iterator[Federation]:
    root = tmp_path_factory.mktemp("administration")
    policy = SitePrivacyConfig("scenes", units=40, epsilon=20.0, delta=1e-5, show_budget=True)
    site = SiteConfig(
        DataConfig("scenes", train=40, val=20, test=20, shares=4, spurious_strength=0.9),
        privacy=policy,
        cache_dir=str(root / "cache"),
        device="cpu",
        threads=1,
    )
    sites = {
        name: dataclasses.replace(site, data=dataclasses.replace(site.data, share=n, evaluate=n == 1))
        for n, name in enumerate(SITES, start=1)
    }
    found = Federation(root / "all", sites)
    found.lose_sites_after(20)
    monitoring = (DEPLOY / "monitoring" / "metrics__p_resources.json").read_text()
    port = str(metrics.getsockname()[1])
    (found.local(SERVER) / "metrics__p_resources.json").write_text(monitoring.replace("9125", port))
    found.set_policy("site-2", show_budget=False)
    found.set_policy("site-3", share_ledger=False)
    with found:
        yield found
    assert found.processes() == []


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


def people(federation: Federation) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "HOME": str(federation.root), "PATH": path, "COLUMNS": "300"}


def submitted(federation: Federation, folder: Path) -> str:
    """A job's id, submitted by the lead through the command line."""
    code, said = nvflare(federation, LEAD, "--format", "json", "job", "submit", "-j", str(folder))
    assert code == 0, said
    return json.loads(said[said.index('{"schema') :].splitlines()[0])["data"]["job_id"]


def told_of(federation: Federation, folder: Path) -> str:
    """What the lead reads of a job that did not run."""
    job_id = submitted(federation, folder)
    code, _ = nvflare(federation, LEAD, "job", "wait", job_id)
    assert code != 0
    return nvflare(federation, LEAD, "job", "meta", job_id)[1]


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
    for site, said in manifest.sites.items():
        if site == "site-3":
            assert said["ledger"] == {"kept": "the site gave none"}
            continue
        copy = read_ledger(workspace / said["ledger"]["file"], verifier(workspace / said["ledger"]["certificate"]))
        policy = federation.policies[site].privacy
        assert policy
        own = read_site_ledger(policy, federation.kit(site))
        assert copy == own[: len(copy)]
        if said["head"]:
            assert copy[said["head"]["seq"]].hash == said["head"]["hash"]
    return record


def test_a_site_that_is_lost_costs_its_updates(federation: Federation) -> None:
    """Its power is cut in the second of three rounds; the others go on, and it is back in the next job, below."""
    lost = []

    def act(job_id: str, event: dict[str, Any]) -> None:
        if event["event"] == "training" and event["round"] == 2 and not lost:
            federation.kill("site-4")
            lost.append(job_id)

    outcome = federation.run_job(federation.export(demo("lost", rounds=3, round_timeout=15)), act)
    assert outcome.meta["status"] == "FINISHED:COMPLETED"
    assert lost == [outcome.job_id]
    assert [r["sites"] for r in outcome.record["rounds"][1:]] == [list(SITES), list(SITES[:3]), list(SITES[:3])]
    assert outcome.workspace
    ledgers = {site: said["ledger"] for site, said in read_manifest(outcome.workspace).sites.items()}
    assert ledgers["site-4"] == {"kept": "the site did not answer any more"}
    assert "file" in ledgers["site-1"]
    assert [f for f in check_site_folder(federation.kit("site-4").parent) if not f.fine] == []
    federation.start_one("site-4")
    federation.administer(LEAD, "wait", "4")


def test_a_job_through_the_console_and_what_it_leaves_to_lead_and_auditor(federation: Federation) -> None:
    folder = federation.export(demo("console", tracking=("tensorboard",)))
    said = console(federation, LEAD, f"submit_job {folder}")
    job_id = re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", said)[0]
    federation.administer(LEAD, "wait_job", job_id)
    assert "FINISHED:COMPLETED" in console(federation, LEAD, "list_jobs")
    console(federation, LEAD, f"download_job {job_id}")
    workspace = federation.kit(LEAD).parent / "transfer" / job_id / "workspace"
    record = check_run(federation, workspace, 2)
    assert [r["sites"] for r in record["rounds"][1:]] == [list(SITES)] * 2
    assert "mAP" in record["rounds"][2]
    code, _ = nvflare(federation, AUDITOR, "job", "download", job_id, "-o", "audited")
    assert code == 0
    check_run(federation, next((federation.root / "audited").glob(f"**/{job_id}/workspace")), 2)
    # the same figures through FLARE's analytics events
    events = EventAccumulator(str(next((workspace / TENSORBOARD).iterdir())))
    events.Reload()
    for tag, value in scalars(record["rounds"][2]).items():
        assert events.Scalars(tag)[-1].value == pytest.approx(value, rel=1e-4), tag
        assert events.Scalars(tag)[-1].step == 2


def test_everybody_s_budget_is_shown_where_the_site_allows_it(federation: Federation) -> None:
    said = console(federation, AUDITOR, "privacy_budget")
    for site in SITES:
        row = next(line for line in said.splitlines() if line.startswith(f"| {site}"))
        policy = federation.policies[site].privacy
        assert policy
        entries = read_site_ledger(policy, federation.kit(site))
        if site == "site-2":
            assert "this site does not show its budget (privacy.show_budget)" in row
            assert entries[-1].hash[:16] not in said
        else:
            assert f"{epsilon(history(entries), policy.delta):.3f}" in row
            assert f"| {policy.epsilon:g} " in row
            assert entries[-1].hash[:16] in row
    assert "site-1" not in console(federation, LEAD, "privacy_budget site-4").split("privacy_budget")[-1]
    assert "nowhere" in console(federation, LEAD, "privacy_budget nowhere")


def test_who_has_no_right_to_submit_is_told_so(federation: Federation) -> None:
    folder = federation.export(demo("forbidden"))
    for who in (AUDITOR, ADMIN):
        code, said = nvflare(federation, who, "job", "submit", "-j", str(folder))
        assert code != 0
        assert f"user '{who}' is not authorized for 'submit_job'" in said
        assert "not authorized" in console(federation, who, f"submit_job {folder}")
    assert "forbidden" not in nvflare(federation, LEAD, "job", "list")[1]


def test_jobs_that_may_not_run_are_refused_with_a_sentence_for_their_submitter(federation: Federation) -> None:
    before = {s: len(ledger_of(federation, s)) for s in SITES}

    code = federation.export(demo("code"))
    (code / "app" / "custom").mkdir()
    (code / "app" / "custom" / "extra.py").write_text("print('here')\n")
    assert "BYOC not permitted" in told_of(federation, code)

    release = federation.export(demo("release"))
    config = release / "app" / "config" / "config_fed_client.json"
    values = json.loads(config.read_text())
    values["executors"][0]["executor"]["args"]["release"] = "0.0.1"
    config.write_text(json.dumps(values))
    assert "the job was exported with fedmpt 0.0.1, this site runs" in told_of(federation, release)

    further = federation.export(demo("further"))
    config = further / "app" / "config" / "config_fed_client.json"
    values = json.loads(config.read_text())
    values["components"] = [{"id": "x", "path": "nvflare.app_common.widgets.convert_to_fed_event.ConvertToFedEvent"}]
    config.write_text(json.dumps(values))
    assert "the job configures more than an executor" in told_of(federation, further)

    costly = demo("costly")
    costly = dataclasses.replace(
        costly, privacy=dataclasses.replace(costly.privacy, epsilon=19.9, noise_multiplier=None)
    )
    said = told_of(federation, federation.export(resolved(costly)))
    assert "privacy budget: with this job, data set 'scenes' would reach epsilon" in said
    assert "the cap is 20" in said
    assert {s: len(ledger_of(federation, s)) for s in SITES} == before


def test_sites_that_cannot_start_leave_no_round_half_started(federation: Federation) -> None:
    before = {s: len(ledger_of(federation, s)) for s in SITES}
    good = dict(federation.policies)
    nowhere = DataConfig(path="/nowhere/manifest.csv")
    federation.set_site("site-1", dataclasses.replace(good["site-1"], data=nowhere))
    federation.set_site("site-2", dataclasses.replace(good["site-2"], device="cuda:7"))
    try:
        found = {
            site: next(f.text for f in check_site_folder(federation.kit(site).parent) if f.what == what)
            for site, what in (("site-1", "pictures"), ("site-2", "device"))
        }
        assert "/nowhere/manifest.csv: no such file or folder" in found["site-1"]
        assert "device='cuda:7': this machine shows" in found["site-2"]
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
    assert {s: len(ledger_of(federation, s)) for s in SITES} == before


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


def ledger_of(federation: Federation, site: str) -> Any:
    policy = federation.policies[site].privacy
    assert policy
    return read_site_ledger(policy, federation.kit(site))
