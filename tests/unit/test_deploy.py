"""Every file of deploy/ is read by the tool that it is for; the federation of tests/flare runs on them."""

import configparser
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from nvflare.apis.event_type import EventType
from nvflare.app_common.resource_managers.gpu_resource_manager import GPUResourceManager

from fedmpt_core.config_file import load_server, load_site
from fedmpt_core.kit import card_of, load_identity
from fedmpt_flare.tasks import CLASS_ALLOW_LIST, TRACKING_CLASSES
from tests.federation import DEPLOY, HEAVY, REPOSITORY, STATE

SITE, SERVER = "hospital-a", "fl.example.org"
TOOLS = Path(sys.executable).parent  # of this environment, which need not be on the PATH
LOCKED = dict(re.findall(r"^([a-z0-9_.-]+)==(\S+)", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE))
PEOPLE = {
    "admin@example.org": "project_admin",
    "it@hospital-a.example.org": "org_admin",
    "lead@example.org": "lead",
    "auditor@example.org": "member",
}


def flare(*arguments: Any, home: Path) -> str:
    """What `nvflare` prints, with a HOME of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "nvflare.cli", *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, "HOME": str(home)}, cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def overlay(kit: Path, who: str) -> Path:
    """A kit with the files that its owner copies into `local`."""
    for file in (DEPLOY / who / "local").iterdir():
        shutil.copy(file, kit / "local" / file.name)
    return kit


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provisioned from project.yml as it stands."""
    root = tmp_path_factory.mktemp("provisioned")
    flare("provision", "-p", DEPLOY / "provision" / "project.yml", "-w", root / "kits", home=root)
    found = root / "kits" / "fedmpt" / "prod_00"
    overlay(found / SITE, "site")
    overlay(found / SERVER, "server")
    return found


def own(folder: str, pattern: str) -> list[Path]:
    return sorted((DEPLOY / folder).rglob(pattern))


def test_the_project_file_gives_a_kit_to_everybody(kits: Path) -> None:
    assert {p.name for p in kits.iterdir()} >= {SERVER, SITE, "hospital-b", "hospital-c", *PEOPLE}
    card = card_of(kits / SITE / "startup")
    assert (card.name, card.org) == (SITE, "hospital_a")


def test_two_sites_of_one_name_are_not_provisioned(tmp_path: Path) -> None:
    project = yaml.safe_load((DEPLOY / "provision" / "project.yml").read_text())
    project["participants"].append({**next(p for p in project["participants"] if p["name"] == SITE), "org": "other"})
    (tmp_path / "project.yml").write_text(yaml.safe_dump(project))
    with pytest.raises(AssertionError, match=SITE):
        flare("provision", "-p", tmp_path / "project.yml", "-w", tmp_path / "kits", home=tmp_path)


def test_distributed_provisioning_leaves_every_key_where_it_was_made(tmp_path: Path) -> None:
    files = DEPLOY / "provision"
    said = flare("cert", "init", "--profile", files / "profile.yaml", "-o", tmp_path / "ca", home=tmp_path)
    assert "finger" in said.lower()
    for who, name in (("server", SERVER), ("site", SITE), ("lead", "lead@example.org")):
        flare("cert", "request", "-p", files / f"{who}.yaml", "--out", tmp_path / who, home=tmp_path)
        request = next((tmp_path / who).glob("*.request.zip"))
        signed = tmp_path / f"{who}.signed.zip"
        flare(
            *("cert", "approve", request, "--ca-dir", tmp_path / "ca", "--profile", files / "profile.yaml"),
            *("--out", signed),
            home=tmp_path,
        )
        root = json.loads((tmp_path / "ca" / "ca.json").read_text())
        fingerprint = next(v for k, v in root.items() if "fingerprint" in k)
        flare(
            *("package", signed, "--request-dir", tmp_path / who, "--fingerprint", fingerprint),
            *("-w", tmp_path / "kits"),
            home=tmp_path,
        )
        kit = next((tmp_path / "kits").glob(f"*/prod_00/{name}"))
        assert (kit / "startup").is_dir()
        key = next((tmp_path / who).glob("*.key"))
        assert not any(key.read_bytes() in p.read_bytes() for p in (tmp_path / "ca").iterdir())
    assert load_identity(next((tmp_path / "kits").glob(f"*/prod_00/{SITE}")) / "startup").name == SITE


def test_json_files_are_json_and_every_class_can_be_imported() -> None:
    def classes(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from [value["path"]] if isinstance(value.get("path"), str) else []
            yield from value.get("class_allow_list", [])
            for part in value.values():
                yield from classes(part)
        elif isinstance(value, list):
            for part in value:
                yield from classes(part)

    files = [*own(".", "*.json"), *own(".", "*.default")]
    assert len(files) >= 9
    found = {name for file in files for name in classes(json.loads(file.read_text()))}
    assert len(found) > 15
    for name in found:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize(("who", "kit"), [("site", SITE), ("server", SERVER)])
def test_our_resources_differ_from_flare_s_where_they_must_and_nowhere_else(
    tmp_path: Path, who: str, kit: str, kits: Path
) -> None:
    """So that a release of FLARE with other defaults is noticed."""
    fresh = tmp_path / "fresh"
    flare("provision", "-p", DEPLOY / "provision" / "project.yml", "-w", fresh, home=tmp_path)
    theirs = json.loads((fresh / "fedmpt" / "prod_00" / kit / "local" / "resources.json.default").read_text())
    ours = json.loads((kits / kit / "local" / "resources.json.default").read_text())
    assert theirs.pop("class_allow_list") != ours.pop("class_allow_list")
    dropped = {c["id"] for c in theirs["components"]} - {c["id"] for c in ours["components"]}
    if who == "site":
        assert (theirs.pop("allow_log_streaming"), ours.pop("allow_log_streaming")) == (True, False)
        assert ours.pop("app_validator") == {"path": "fedmpt_flare.guards.BudgetGate"}
        assert dropped == {"site_log_streamer"}
    else:
        assert ours["servers"][0].pop("heart_beat_timeout") == 60
        assert theirs["servers"][0].pop("heart_beat_timeout") == 600
        assert dropped == {"log_receiver"}
    # FLARE's choice is one folder for all federations of a machine
    text = json.dumps([c for c in theirs["components"] if c["id"] not in dropped])
    assert json.dumps(ours["components"]) == text.replace("/tmp/nvflare/jobs-storage", f"{STATE}/jobs")
    rest = json.dumps({k: v for k, v in theirs.items() if k != "components"}, sort_keys=True)
    mine = json.dumps({k: v for k, v in ours.items() if k != "components"}, sort_keys=True)
    assert mine == rest.replace("/tmp/nvflare/snapshot-storage", f"{STATE}/snapshots")


def test_sites_allow_our_classes_alone_and_the_server_tracking_too(kits: Path) -> None:
    site = json.loads((kits / SITE / "local" / "resources.json.default").read_text())
    server = json.loads((kits / SERVER / "local" / "resources.json.default").read_text())
    assert site["class_allow_list"] == list(CLASS_ALLOW_LIST)
    assert server["class_allow_list"] == [*CLASS_ALLOW_LIST, *TRACKING_CLASSES]


@pytest.mark.parametrize("who", ["site", "server"])
def test_no_role_may_bring_code_or_run_commands(who: str) -> None:
    roles = json.loads((DEPLOY / who / "local" / "authorization.json").read_text())["permissions"]
    assert set(roles) == set(PEOPLE.values())
    for rights in roles.values():
        assert (rights["byoc"], rights["shell_commands"]) == ("none", "none")
    assert [role for role, rights in roles.items() if rights["submit_job"] != "none"] == ["lead"]
    assert roles["member"]["download_job"] == "any"
    assert roles["member"]["manage_job"] == roles["member"]["operate"] == "none"


def test_the_toml_files_are_read_by_our_strict_schema(kits: Path) -> None:
    site = load_site(kits / SITE / "local" / "fedmpt_site.toml", SITE)
    assert site.privacy is not None
    assert not site.privacy.allow_unprotected
    assert not site.secagg.allow_unmasked
    assert not site.data.evaluate
    assert load_server(kits / SERVER / "local" / "fedmpt_server.toml").checkpoints == f"{STATE}/checkpoints"


@pytest.mark.parametrize("runtime", ["docker", "k8s", "slurm"])
@pytest.mark.parametrize("kit", [SITE, SERVER])
def test_deploy_prepare_takes_our_runtimes_and_keeps_our_guards(
    tmp_path: Path, kits: Path, runtime: str, kit: str
) -> None:
    config = yaml.safe_load((DEPLOY / "runtime" / f"{runtime}.yaml").read_text())
    if runtime == "slurm" and kit == SERVER:
        del config["parent"]  # as the file says
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "prepared"
    flare("deploy", "prepare", kits / kit, "--config", tmp_path / "config.yaml", "--output", out, home=tmp_path)
    before = json.loads((kits / kit / "local" / "resources.json.default").read_text())
    after = json.loads((out / "local" / "resources.json.default").read_text())
    assert not (out / "local" / "resources.json").exists()
    for key in ("app_validator", "class_allow_list", "allow_log_streaming", "class_list_enforcement_mode"):
        assert after.get(key) == before.get(key)
    assert {c["id"] for c in after["components"]} >= {f"{runtime}_launcher", "resource_manager"}
    for name in ("privacy.json", "fedmpt_site.toml") if kit == SITE else ("fedmpt_server.toml",):
        assert (out / "local" / name).read_text() == (kits / kit / "local" / name).read_text()
    if runtime == "k8s":
        values = yaml.safe_load((out / "helm_chart" / "values.yaml").read_text())
        overlaid = yaml.safe_load((DEPLOY / "helm" / f"values-{'site' if kit == SITE else 'server'}.yaml").read_text())
        unknown = set(overlaid) - set(values)
        assert not unknown, f"the chart has no {unknown}"
        chart = yaml.safe_load((out / "helm_chart" / "Chart.yaml").read_text())
        assert (chart["apiVersion"], chart["type"]) == ("v2", "application")


def test_kubernetes_accepts_our_manifests() -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "helm" / "workspace.yaml").read_text()))
    assert [d["kind"] for d in documents] == ["PersistentVolumeClaim", "NetworkPolicy"]
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_yaml_passes_its_linter() -> None:
    rules = "{extends: default, rules: {line-length: {max: 130}, document-start: disable, comments: {min-spaces-from-content: 1}}}"  # noqa: E501
    done = subprocess.run([TOOLS / "yamllint", "-d", rules, str(DEPLOY)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_dockerfiles_pass_their_linter_and_run_as_nobody_special() -> None:
    for file in own("docker", "Dockerfile.*"):
        done = subprocess.run([TOOLS / "hadolint", str(file)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")
        text = file.read_text()
        assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)
        assert "HEALTHCHECK" in text
        assert "NVFLARE_SECURE_LOGGING=true" in text
        for base in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
            assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-bookworm", base)
        for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
            assert all((REPOSITORY / name).exists() for name in source.split())


def test_the_server_s_image_holds_nothing_heavy_and_nothing_unlocked() -> None:
    lines = (DEPLOY / "docker" / "server-requirements.txt").read_text().splitlines()
    wanted = {line for line in lines if not line.startswith("#")}
    assert wanted <= set(LOCKED)
    assert not wanted & {"torch", "torchvision", "opacus", "dp-accounting", *HEAVY}


def test_units_start_what_a_kit_holds(kits: Path) -> None:
    for name, kit in (("server", SERVER), ("site", SITE)):
        unit = configparser.ConfigParser(strict=False, interpolation=None)
        unit.read(DEPLOY / "systemd" / f"fedmpt-{name}.service")
        start = unit["Service"]["ExecStart"].split()
        assert start[0].startswith(unit["Service"]["WorkingDirectory"] + "/")
        script = kits / kit / start[0].removeprefix(unit["Service"]["WorkingDirectory"] + "/")
        assert os.access(script, os.X_OK)
        assert start[1] == "--once"
        assert "--once)" in script.read_text()
        assert STATE in unit["Service"]["ReadWritePaths"]


def test_monitoring_watches_events_that_flare_has() -> None:
    events = {v for k, v in vars(EventType).items() if k.isupper()} | {"_job"}
    dashboard = json.loads((DEPLOY / "monitoring" / "grafana_dashboard.json").read_text())
    alerts = yaml.safe_load((DEPLOY / "monitoring" / "alerts.yml").read_text())
    queries = [t["expr"] for p in dashboard["panels"] for t in p["targets"]]
    queries += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    named = {event for query in queries for event in re.findall(r'event="([^"]+)"', query)}
    assert len(named) >= 5
    assert named <= events
    mapping = yaml.safe_load((DEPLOY / "monitoring" / "statsd_mapping.yml").read_text())["mappings"]
    for metric, name, event in (
        ("_client_heartbeat_received_count", "flare_events_total", "_client_heartbeat_received"),
        ("_job_time_taken", "flare_seconds", "_job"),
    ):
        rule = next(m for m in mapping if re.fullmatch(m["match"], metric))
        assert rule["name"] == name
        assert re.sub(rule["match"], rule["labels"]["event"].replace("$", "\\"), metric) == event
    for group in alerts["groups"]:
        assert all((REPOSITORY / rule["annotations"]["runbook"]).exists() for rule in group["rules"])
    prometheus = yaml.safe_load((DEPLOY / "monitoring" / "prometheus.yml").read_text())
    assert all((DEPLOY / "monitoring" / name).exists() for name in prometheus["rule_files"])


def test_jobs_share_a_site_s_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With our resources file: a job that asks for a GPU without naming memory leaves room for the next."""
    manager = GPUResourceManager(num_of_gpus=1, mem_per_gpu_in_GiB=0, ignore_host=True)
    from nvflare.apis.fl_context import FLContext

    first = manager.check_resources({"num_of_gpus": 1}, FLContext())
    second = manager.check_resources({"num_of_gpus": 1}, FLContext())
    assert first[0]
    assert second[0]
