"""The release as it is installed: a wheel in an environment of its own, with no checkout anywhere near."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from fedmpt_core.federation.run.record import load_record
from tests.federation import REPOSITORY

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
