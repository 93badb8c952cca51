"""The release as it is installed: a wheel in an environment of its own, with no checkout anywhere near."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from fedmpt_core.config.toml import load_job
from fedmpt_core.federation.run.record import load_record
from tests.federation import DEPLOY, REPOSITORY

pytestmark = [pytest.mark.flare, pytest.mark.slow, pytest.mark.thorough, pytest.mark.xdist_group("wheel")]


def run(*command: object, cwd: Path) -> str:
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=outside, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=REPOSITORY)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of an environment with the wheel and this environment's packages, all but this checkout."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, symlinks=True)
    (packages,) = root.glob("lib/python*/site-packages")
    # a folder that a .pth file adds is searched, but its own .pth files, one of which names the checkout, are not read
    (packages / "those_of_the_tests.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    pip = (sys.executable, "-m", "pip", "--python", root / "bin" / "python")
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=root)
    return root / "bin"


def test_nothing_of_the_checkout_is_used(installed: Path, tmp_path: Path) -> None:
    code = "import fedmpt_core, fedmpt_flare; print(fedmpt_core.__file__, fedmpt_flare.__file__)"
    files = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(installed.parent) for file in files)


def test_a_job_is_begun_from_any_folder(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_text("path,labels,split\n1.jpg,cat|dog,train\n2.jpg,,test\n")
    run(installed / "fedmpt", "init", "mine", "manifest.csv", cwd=tmp_path)
    assert load_job(tmp_path / "mine" / "job.toml").classes == ("cat", "dog")


def test_the_first_command_after_an_installation_does_something(installed: Path, tmp_path: Path) -> None:
    shown = run(installed / "fedmpt", "demo", cwd=tmp_path)
    assert "demo: 3 sites, 20 labels" in shown
    assert "Wrote result.json, model.safetensors" in shown
    record = load_record(tmp_path / "runs" / "demo")
    assert record["outcome"] == "completed"
    scores = [row["mAP"] for row in record["rounds"]]
    assert scores[-1] > scores[0]
    audited = run(installed / "fedmpt", "audit", "runs/demo", cwd=tmp_path)
    assert "Passed: nothing that was checked fails." in audited
    assert "Wrote runs/demo/report.html" in run(installed / "fedmpt", "report", "runs/demo", cwd=tmp_path)


OFFLINE = dict(
    re.findall(
        r"^```sh (online|offline)\n(.*?)^```$",
        (DEPLOY / "hospital" / "offline.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
)
FEW = 'dependencies = ["tomli-w", "threadpoolctl"]'  # of the project's own, which take gigabytes


def typed(text: str, cwd: Path, *, namespace: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    # whatever this machine's pip is set to, such as a folder of wheels, is no part of the page
    environment = {k: v for k, v in os.environ.items() if not (namespace and k.startswith("PIP_"))}
    environment |= {"PIP_CONFIG_FILE": os.devnull} if namespace else {}
    command = [*namespace, "bash", "-euo", "pipefail", "-c", text]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_what_was_collected_online_installs_where_there_is_no_network(tmp_path: Path) -> None:
    alone = ("unshare", "--map-root-user", "--net")
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine gives no namespace without network")
    online, offline = tmp_path / "online", tmp_path / "offline"
    for part in ("fedmpt_core", "custom", "jobs"):
        shutil.copytree(REPOSITORY / part, online / "fedmpt" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "LICENSE", "requirements.lock"):
        shutil.copy(REPOSITORY / name, online / "fedmpt" / name)
    project = re.sub(
        r"^dependencies = \[\n.*?^\]$", FEW, (REPOSITORY / "pyproject.toml").read_text(), flags=re.MULTILINE | re.DOTALL
    )
    project = re.sub(r"^demo = .*", "demo = []", project, flags=re.MULTILINE)
    (online / "fedmpt" / "pyproject.toml").write_text(project)
    collected = typed(OFFLINE["online"], online)
    assert collected.returncode == 0, collected.stderr[-3000:]
    offline.mkdir()
    shutil.move(online / "wheelhouse", offline / "wheelhouse")

    interfaces = typed("tail -n +3 /proc/net/dev | cut -d: -f1", offline, namespace=alone)
    assert interfaces.stdout.split() == ["lo"]
    installed = typed(OFFLINE["offline"], offline, namespace=alone)
    assert installed.returncode == 0, installed.stdout[-2000:] + installed.stderr[-2000:]
    assert "No broken requirements found." in installed.stdout

    (lost,) = (offline / "wheelhouse").glob("tomli_w-*.whl")
    lost.unlink()
    shutil.rmtree(offline / "venv")
    refused = typed(OFFLINE["offline"].replace("(cd wheelhouse", "true || (cd wheelhouse"), offline, namespace=alone)
    assert refused.returncode
    assert "No matching distribution found for tomli-w" in refused.stderr
