"""The contracts on who may import whom can fail; `make lint` holds the product to them."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

BROKEN = {
    "Rooms stand on each other": ("fedmpt_core/data/pictures.py", "fedmpt_core.model.base"),
    "Inside fedmpt_flare": ("custom/fedmpt_flare/tasks.py", "fedmpt_flare.cli.screen"),
    "The core knows neither FLARE nor a screen": ("fedmpt_core/training/loss.py", "rich"),
    "Rooms without torch": ("fedmpt_core/federation/server/averaging.py", "torch"),
    "An auditor runs the ledger": ("fedmpt_core/common/files.py", "numpy"),
    "Opacus gives": ("fedmpt_core/privacy/mechanism/sampling.py", "opacus"),
    "The method's parts": ("fedmpt_core/model/fedmpt/gating.py", "fedmpt_core.config.job"),
    "FLARE's half moves bytes": ("custom/fedmpt_flare/site/frames.py", "numpy"),
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What import-linter says of a copy in which every contract is broken in one place."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("fedmpt_core", "custom/fedmpt_flare"):
        shutil.copytree(
            REPOSITORY / folder,
            copy / folder,
            ignore=lambda at, names: [n for n in names if "." in n and not n.endswith(".py")],
        )
    shutil.copy(REPOSITORY / "pyproject.toml", copy)
    for file, imported in BROKEN.values():
        with (copy / file).open("a") as stream:
            stream.write(f"\nimport {imported}\n")
    environment = {**os.environ, "PYTHONPATH": f"{copy}:{copy / 'custom'}", "COLUMNS": "200"}
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    return " ".join(done.stdout.split())


@pytest.mark.parametrize("contract", BROKEN)
def test_a_forbidden_import_breaks_its_contract(verdicts: str, contract: str) -> None:
    file, imported = BROKEN[contract]
    module = file.removeprefix("custom/").removesuffix(".py").replace("/", ".")
    assert re.search(rf"{contract}(?:(?! KEPT ).)*? BROKEN", verdicts)
    assert f"{module} -> {imported}" in verdicts


def test_every_contract_is_among_them() -> None:
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert all(any(c["name"].startswith(start) for start in BROKEN) for c in contracts)
    assert len(contracts) == len(BROKEN)


@pytest.mark.parametrize(
    "line", ["print(1)", "os.environ['A']", "os.getenv('A')", "np.random.seed(0)", "torch.manual_seed(0)"]
)
def test_the_core_prints_nothing_reads_no_environment_and_seeds_nothing(line: str) -> None:
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--config",
        REPOSITORY / "pyproject.toml",
        "--select",
        "T20,TID251",
    ]
    code = f"import os\n\nimport numpy as np\nimport torch\n\n{line}\n"
    for file, fails in (("fedmpt_core/training/local.py", True), ("tests/local.py", False)):
        name = ["--stdin-filename", REPOSITORY / file, "-"]
        assert subprocess.run([*command, *name], input=code, text=True, capture_output=True).returncode == fails


def test_noise_for_privacy_is_drawn_by_the_keystream_alone() -> None:
    """Generators of numpy and torch can be guessed from their output; a self-test releases nothing."""
    drawn = re.compile(r"np\.random|torch\.(rand|normal|bernoulli|Generator)|^import random", re.MULTILINE)
    tests = ("self_test", "placement")  # of the mechanism, at a site's start
    modules = [path for path in (REPOSITORY / "fedmpt_core" / "privacy").rglob("*.py") if path.stem not in tests]
    assert len(modules) > 20
    assert not [path.name for path in modules if drawn.search(path.read_text())]
