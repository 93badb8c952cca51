"""What several modules look at: made once in every test process, not to be changed."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.federation import DEPLOY
from tests.provisioning import SERVER, SITE, flare, overlay

if TYPE_CHECKING:  # a run's job is calibrated when it is loaded: only tests that look at one wait for it
    from fedmpt_core.audit.known_keys import KnownKeys
    from tests.audited import Federation


@pytest.fixture(scope="session")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As deploy/provision/project.yml makes them."""
    root = tmp_path_factory.mktemp("provisioned")
    flare("provision", "-p", DEPLOY / "provision" / "project.yml", "-w", root / "kits", home=root)
    return root / "kits" / "fedmpt" / "prod_00"


@pytest.fixture(scope="session")
def kits(provisioned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site's and the server's, with the files of deploy/ in `local`."""
    root = tmp_path_factory.mktemp("kits")
    for name, who in ((SITE, "site"), (SERVER, "server")):
        overlay(Path(shutil.copytree(provisioned / name, root / name)), who)
    return root


@pytest.fixture(scope="session")
def keys(provisioned: Path) -> "KnownKeys":
    """What an auditor knows who was given the roster."""
    from tests.audited import roster_of

    return roster_of(provisioned)


@pytest.fixture(scope="session")
def audited(provisioned: Path, tmp_path_factory: pytest.TempPathFactory) -> "Federation":
    """Ledgers of three sites, and the runs `earlier` and `run-1` that were charged to them."""
    from tests.audited import CAPS, SITES, Federation

    caps = dict(zip(SITES, CAPS, strict=True))
    federation = Federation(tmp_path_factory.mktemp("audited"), provisioned, cap=caps)
    federation.run("earlier")
    federation.run("run-1")
    return federation


@pytest.fixture
def folder(audited: "Federation", tmp_path: Path) -> Path:
    """A copy of `run-1`, to be changed."""
    return Path(shutil.copytree(audited.root / "run-1", tmp_path / "run-1"))
