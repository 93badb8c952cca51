"""What a job's container gets, asked of FLARE's own launchers: the commands of deploy/README.md on real kits, then a
stand-in for the Docker engine and for the cluster. No container runs here.
"""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml
from nvflare.apis.fl_constant import ConnectionSecurity, FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobProcessArgs
from nvflare.apis.workspace import Workspace
from nvflare.app_opt.job_launcher.docker_launcher import ClientDockerJobLauncher, ServerDockerJobLauncher
from nvflare.app_opt.job_launcher.k8s_launcher import ClientK8sJobLauncher, ServerK8sJobLauncher

from fedmpt_flare.site.check import check_site_folder
from tests.federation import DEPLOY, REPOSITORY
from tests.provisioning import SERVER, SITE

JOB = "11111111-1111-4111-8111-111111111111"
WORKSPACE = "/var/tmp/nvflare/workspace"
BLOCK = re.compile(r"^```sh (?P<runtime>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Mount:
    """Where a folder is seen, which one it is, and whether it may be written to and outlives its reader."""

    target: str
    source: str
    kept: bool


def prepared(root: Path, kit: Path, runtime: str) -> Path:
    """The commands of deploy/README.md, on a copy of a kit."""
    shutil.copytree(kit, root / "KIT")
    (root / "fedmpt").symlink_to(REPOSITORY)
    (commands,) = [b["text"] for b in BLOCK.finditer((DEPLOY / "README.md").read_text()) if b["runtime"] == runtime]
    environment = {"HOME": str(root), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    command = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / f"KIT-{runtime}"


def context(kit: Path, name: str) -> FLContext:
    """What the parent process has when it starter a job."""
    parent = FLContext()
    cell = SimpleNamespace(get_fqcn=lambda: name, register_request_cb=lambda **_: None)
    parent.set_prop("__identity_name__", name, private=True)
    parent.set_prop("__engine__", SimpleNamespace(cell=cell), private=True)
    parent.set_prop(FLContextKey.WORKSPACE_OBJECT, Workspace(str(kit), name), private=True)
    parent.set_prop(FLContextKey.ARGS, SimpleNamespace(workspace=str(kit), set=["secure_train=true"]), private=True)
    arguments = {
        JobProcessArgs.EXE_MODULE: ("-m", "nvflare.private.fed.app.client.worker_process"),
        JobProcessArgs.PARENT_URL: ("-p", "stcp://parent:8102"),
        JobProcessArgs.PARENT_CONN_SEC: ("-s", ConnectionSecurity.MTLS),
    }
    parent.set_prop(FLContextKey.JOB_PROCESS_ARGS, arguments, private=True)
    return parent


def launcher(kit: Path, name: str, classes: dict[str, Any]) -> Any:
    """The launcher that the prepared kit names, with its arguments."""
    components = json.loads((kit / "local" / "resources.json.default").read_text())["components"]
    (component,) = [c for c in components if c["path"].rpartition(".")[2] in classes]
    return classes[component["path"].rpartition(".")[2]](**component["args"])


def docker_job(kit: Path, name: str) -> tuple[dict[str, Any], list[Mount]]:
    """What a job's container is started with."""
    starter = launcher(kit, name, {c.__name__: c for c in (ClientDockerJobLauncher, ServerDockerJobLauncher)})
    asked: dict[str, Any] = {}

    class Started(Exception):
        pass

    def run(image: str, **options: Any) -> None:
        asked.update(options, image=image)
        raise Started

    starter.workspace = starter.WORKSPACE_MOUNT = str(kit)  # the parent sees the kit where this test does
    networks, containers = SimpleNamespace(get=lambda name: name), SimpleNamespace(run=run)
    engine = SimpleNamespace(ping=lambda: True, networks=networks, containers=containers)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Started):
        patch.setattr("docker.from_env", lambda: engine)
        starter.launch_job({"job_id": JOB, "study": "default"}, context(kit, name))
    mounts = [
        Mount(m["Target"].replace(str(kit), WORKSPACE), m["Source"] or "", m["Type"] == "bind" and not m["ReadOnly"])
        for m in asked["mounts"]
    ]
    return asked, mounts


def docker_parent(kit: Path) -> list[Mount]:
    """What the parent's start script mounts."""
    script = (kit / "startup" / "start_docker.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    mounts = re.findall(r'^ +-v "?([^":]+)"?:(\S+) \\$', script, re.MULTILINE)
    assert len(mounts) == 2
    return [Mount(target, source.replace("$HOST_WORKSPACE", str(kit)), True) for source, target in mounts]


def k8s_job(kit: Path, name: str) -> tuple[dict[str, Any], list[Mount]]:
    """A job's pod."""
    starter = launcher(kit, name, {c.__name__: c for c in (ClientK8sJobLauncher, ServerK8sJobLauncher)})
    asked: list[dict[str, Any]] = []

    def create(body: dict[str, Any], namespace: str) -> Any:
        asked.append(body)
        return SimpleNamespace(metadata=SimpleNamespace(uid="1"))

    running = SimpleNamespace(status=SimpleNamespace(phase="Running"))
    starter.core_v1 = SimpleNamespace(
        create_namespaced_pod=create,
        read_namespaced_pod=lambda **_: running,
        create_namespaced_secret=lambda **_: None,
        patch_namespaced_secret=lambda **_: None,
    )
    starter.launch_job({"job_id": JOB, "study": "default"}, context(kit, name))
    (pod,) = asked
    (container,) = pod["spec"]["containers"]
    claims = {v["name"]: v.get("persistentVolumeClaim", {}).get("claimName") for v in pod["spec"]["volumes"]}
    mounts = []
    for mount in container["volumeMounts"]:
        claim = claims[mount["name"]]
        source = f"{claim}/{mount.get('subPath', '')}" if claim else ""
        mounts.append(Mount(mount["mountPath"], source, bool(claim) and not mount.get("readOnly")))
    return pod, mounts


def k8s_parent(kit: Path) -> list[Mount]:
    """What the chart mounts in the parent's pod."""
    volume = yaml.safe_load((kit / "helm_chart" / "values.yaml").read_text())["persistence"]["workspace"]
    return [Mount(volume["mountPath"], volume["claimName"], True)]


def place(path: str, mounts: list[Mount]) -> str | None:
    """Which folder a path of a container is; None when it may not be written to or ends with the container."""
    above = [m for m in mounts if PurePosixPath(path).is_relative_to(m.target)]
    if not above:
        return None
    nearest = max(above, key=lambda m: len(PurePosixPath(m.target).parts))
    rest = PurePosixPath(path).relative_to(nearest.target)
    return str(PurePosixPath(nearest.source) / rest) if nearest.kept else None


def named(local: Path) -> set[str]:
    """Every absolute path in the participant's own files."""

    def paths(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for part in value.values():
                yield from paths(part)
        elif isinstance(value, str) and value.startswith("/"):
            yield value

    absolute = {path for file in local.glob("fedmpt_*.toml") for path in paths(tomllib.loads(file.read_text()))}
    assert absolute
    return absolute


@pytest.mark.parametrize("name", [SITE, SERVER])
@pytest.mark.parametrize(
    ("runtime", "job", "parent"), [("docker", docker_job, docker_parent), ("k8s", k8s_job, k8s_parent)]
)
def test_jobs_and_parent_share_all_that_outlives_a_job(
    tmp_path: Path,
    kits: Path,
    runtime: str,
    job: Callable[[Path, str], tuple[dict[str, Any], list[Mount]]],
    parent: Callable[[Path], list[Mount]],
    name: str,
) -> None:
    kit = prepared(tmp_path, kits / name, runtime)
    asked, seen = job(kit, name)
    wanted = named(kit / "local")
    assert len(wanted) == (3 if name == SITE else 1)
    if runtime == "docker":
        wanted.add(asked["environment"]["HF_HOME"])
        assert asked["image"] == "registry.example.org/fedmpt-site:0.1.0"
        assert asked["environment"]["NVFLARE_SECURE_LOGGING"] == "true"
        assert asked["cap_drop"] == ["ALL"]
    else:
        kubernetes_validate.validate(asked, kubernetes_validate.latest_version(), strict=True)
        (container,) = asked["spec"]["containers"]
        wanted |= {e["value"] for e in container["env"] if e["name"] == "HF_HOME"}
        assert container["image"] == "registry.example.org/fedmpt-site:0.1.0"
        assert asked["spec"]["securityContext"]["runAsNonRoot"] is True
    assert len(wanted) == (4 if name == SITE else 2)
    for path in wanted:
        assert place(path, seen) is not None, f"a job cannot keep {path}: {seen}"
        assert place(path, seen) == place(path, parent(kit)), path
    # the broken twin: below the kit, where a parent keeps things and a job's are gone
    assert place(f"{WORKSPACE}/other/ledgers", parent(kit)) is not None
    assert place(f"{WORKSPACE}/other/ledgers", seen) is None
    assert place(f"{WORKSPACE}/local/fedmpt_site.toml", seen) is None
    if name == SITE:
        checks = {f.what: f for f in check_site_folder(kit)}
        assert all(checks[what].fine for what in ("start-up kit", "guards", "rights", "site file")), checks
