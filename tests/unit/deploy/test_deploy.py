"""Every file of deploy/ is read by the tool that it is for; the federation of tests/flare runs on them."""

import configparser
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import RunStatus
from nvflare.app_common.resource_managers.gpu_resource_manager import GPUResourceManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedmpt_core.config.toml import load_server, load_site
from fedmpt_core.secagg.start_up_kit import key_card_of
from fedmpt_flare.site.gpus import Gpus
from fedmpt_flare.tasks import CLASS_ALLOW_LIST, TRACKING_CLASSES
from tests.federation import DEPLOY, HEAVY, REPOSITORY, STATE
from tests.provisioning import SERVER, SITE, flare

TOOLS = Path(sys.executable).parent  # of this environment, which need not be on the PATH
LOCKED = dict(re.findall(r"^([a-z0-9_.-]+)==(\S+)", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE))
PEOPLE = {
    "admin@example.org": "project_admin",
    "it@hospital-a.example.org": "org_admin",
    "lead@example.org": "lead",
    "auditor@example.org": "member",
}


def own(folder: str, pattern: str) -> list[Path]:
    return sorted((DEPLOY / folder).rglob(pattern))


def test_the_project_file_gives_a_kit_to_everybody(provisioned: Path) -> None:
    assert {p.name for p in provisioned.iterdir()} >= {SERVER, SITE, "hospital-b", "hospital-c", *PEOPLE}
    card = key_card_of(provisioned / SITE / "startup")
    assert (card.name, card.org) == (SITE, "hospital_a")
    # as the runbook of upgrades says
    assert (card.expires - date.today()).days == 360


def test_two_sites_of_one_name_are_not_provisioned(tmp_path: Path) -> None:
    project = yaml.safe_load((DEPLOY / "provision" / "project.yml").read_text())
    project["participants"].append({**next(p for p in project["participants"] if p["name"] == SITE), "org": "other"})
    (tmp_path / "project.yml").write_text(yaml.safe_dump(project))
    with pytest.raises(AssertionError, match=SITE):
        flare("provision", "-p", tmp_path / "project.yml", "-w", tmp_path / "kits", home=tmp_path)


def classes(value: Any) -> Iterator[str]:
    """Every class that a JSON file of FLARE's names."""
    if isinstance(value, dict):
        yield from [value["path"]] if isinstance(value.get("path"), str) else []
        yield from value.get("class_allow_list", [])
        for part in value.values():
            yield from classes(part)
    elif isinstance(value, list):
        for part in value:
            yield from classes(part)


def test_json_files_are_json_and_every_class_can_be_imported() -> None:
    files = [*own(".", "*.json"), *own(".", "*.default")]
    assert len(files) >= 9
    named = {name for file in files for name in classes(json.loads(file.read_text()))}
    assert len(named) > 15
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize(("who", "kit"), [("site", SITE), ("server", SERVER)])
def test_our_resources_differ_from_flare_s_where_they_must_and_nowhere_else(
    who: str, kit: str, provisioned: Path, kits: Path
) -> None:
    """So that a release of FLARE with other defaults is noticed."""
    theirs = json.loads((provisioned / kit / "local" / "resources.json.default").read_text())
    ours = json.loads((kits / kit / "local" / "resources.json.default").read_text())
    assert theirs.pop("class_allow_list") != ours.pop("class_allow_list")
    dropped = {c["id"] for c in theirs["components"]} - {c["id"] for c in ours["components"]}
    if who == "site":
        assert (theirs.pop("allow_log_streaming"), ours.pop("allow_log_streaming")) == (True, False)
        assert ours.pop("app_validator") == {"path": "fedmpt_flare.site.budget_gate.BudgetGate"}
        assert dropped == {"site_log_streamer"}
    else:
        assert ours["servers"][0].pop("heart_beat_timeout") == 60
        assert theirs["servers"][0].pop("heart_beat_timeout") == 600
        assert ours.pop("app_validator") == {"path": "fedmpt_flare.server.job_gate.JobGate"}
        assert dropped == {"log_receiver"}
    text = json.dumps([c for c in theirs["components"] if c["id"] not in dropped])
    manager = f"{GPUResourceManager.__module__}.{GPUResourceManager.__name__}"
    assert (manager in text) == (who == "site")
    text = text.replace(manager, "fedmpt_flare.site.gpus.Gpus")  # the same, with a reason when it says no
    # FLARE's choice is one folder for all federations of a machine
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


def unknown(values: dict[str, Any], chart: dict[str, Any], above: str = "") -> Iterator[str]:
    """Keys that a chart's values do not have; what is empty in the chart may hold anything."""
    for key, value in values.items():
        if key not in chart:
            yield above + key
        elif isinstance(value, dict) and isinstance(chart[key], dict) and chart[key]:
            yield from unknown(value, chart[key], f"{above}{key}.")


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
        assert list(unknown(overlaid, values)) == []
        assert list(unknown({"image": {"pullPolice": "Always"}}, values)) == ["image.pullPolice"]
        chart = yaml.safe_load((out / "helm_chart" / "Chart.yaml").read_text())
        assert (chart["apiVersion"], chart["type"]) == ("v2", "application")


def test_kubernetes_accepts_our_manifests() -> None:
    documents = {p.name: yaml.safe_load(p.read_text()) for p in own("helm", "*.yaml") if "values" not in p.name}
    assert {name: d["kind"] for name, d in documents.items()} == {
        "workspace.yaml": "PersistentVolumeClaim",
        "network-site.yaml": "NetworkPolicy",
    }
    for document in documents.values():
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


def closure(names: Iterable[str]) -> set[str]:
    """These distributions and all that they need, by their normalised names."""
    needed: set[str] = set()
    asked = [Requirement(name) for name in names]
    while asked:
        wanted = asked.pop()
        name = canonicalize_name(wanted.name)
        if name in needed:
            continue
        needed.add(name)
        needs = [Requirement(r) for r in metadata.requires(name) or []]
        asked += [r for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    return needed


# Run with what is hidden as arguments: imports all that the server's files name, then whatever is imported anywhere in
# FLARE's launchers, which import their engine's library when a job starts. Prints what is missing.
INSIDE = """
import ast, importlib, inspect, json, sys
from importlib.machinery import PathFinder

hidden, modules, launchers = (set(json.loads(a)) for a in sys.argv[1:])


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
wanted = sorted(modules | launchers)
for module in sorted(launchers):
    for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(module)))):
        wanted += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        wanted += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
for name in wanted:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(error)
"""


def test_the_server_s_requirements_are_all_that_its_files_and_launchers_import() -> None:
    """Nothing heavy is in them, nothing that the lock does not pin, and nothing is missing, for any runtime."""
    lines = (DEPLOY / "docker" / "server-requirements.txt").read_text().splitlines()
    wanted = {line.partition("#")[0].strip() for line in lines} - {""}
    assert wanted <= set(LOCKED)
    inside = closure(wanted)
    assert not inside & {"torch", "torchvision", "opacus", "dp-accounting", "open-clip-torch", *HEAVY}
    files = [*own("server", "*.json"), *own("server", "*.default"), *own("monitoring", "metrics*.json")]
    named = {name.rpartition(".")[0] for file in files for name in classes(json.loads(file.read_text()))}
    named |= {"fedmpt_flare.job.recipe"}
    engines = {"docker_launcher", "k8s_launcher", "workspace_cell_transfer", "slurm.launcher"}
    launchers = {f"nvflare.app_opt.job_launcher.{name}" for name in engines}

    def missing(hidden: set[str]) -> set[str]:
        arguments = [json.dumps(sorted(names)) for names in (hidden, named, launchers)]
        command = [sys.executable, "-W", "ignore", "-c", INSIDE, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return {line.split("'")[1].partition(".")[0] for line in done.stdout.splitlines()}

    ours = {"fedmpt"}
    outside = {
        top
        for top, owners in metadata.packages_distributions().items()
        if not {canonicalize_name(o) for o in owners} & (inside | ours)
    }
    assert {"torch", "scipy", "pytest"} <= outside
    assert missing(outside) == set()
    assert missing(outside | {"kubernetes", "datadog", "docker"}) == {"kubernetes", "datadog", "docker"}


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
        text = (DEPLOY / "systemd" / f"fedmpt-{name}.service").read_text()
        assert "Environment=NVFLARE_SECURE_LOGGING=true" in text
        assert (f"Environment=HF_HOME={STATE}/weights" in text) == (name == "site")
        assert ("Environment=NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT=30" in text) == (name == "server")


def gpus(offered: int) -> Gpus:
    """A site's manager as its resources file says, but for the number of its GPUs."""
    resources = json.loads((DEPLOY / "site" / "local" / "resources.json.default").read_text())
    (manager,) = [c for c in resources["components"] if c["id"] == "resource_manager"]
    assert manager["path"] == f"{Gpus.__module__}.{Gpus.__name__}"
    return Gpus(**{**manager["args"], "num_of_gpus": offered, "ignore_host": True})


def test_jobs_share_a_site_s_gpu() -> None:
    """A job that asks for a GPU without naming memory leaves room for the next."""
    manager, fl_ctx = gpus(1), FLContext()
    for _ in range(2):
        free, token = manager.check_resources({"num_of_gpus": 1}, fl_ctx)
        assert free
        assert manager.allocate_resources({"num_of_gpus": 1}, token, fl_ctx) == {0: 0}


@pytest.mark.parametrize(("offered", "asked"), [(0, 1), (1, 2)])
def test_a_job_that_asks_for_more_gpus_than_the_site_has_is_told_so(offered: int, asked: int) -> None:
    """FLARE shows the second value to the submitter, a federation of tests/flare checks."""
    answer = gpus(offered).check_resources({"num_of_gpus": asked}, FLContext())
    assert answer == (False, f"the job asks for num_of_gpus={asked}, which this site does not have free")
    assert gpus(offered).check_resources({}, FLContext())[0]


def test_the_runbook_knows_every_state_of_a_job() -> None:
    page = (DEPLOY / "runbooks" / "04-watch.md").read_text()
    assert [status.value for status in RunStatus if f"`{status.value}`" not in page] == []
