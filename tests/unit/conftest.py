"""Kits that several modules look at: made once in every test process, not to be changed."""

import shutil
from pathlib import Path

import pytest

from tests.federation import DEPLOY
from tests.provisioning import SERVER, SITE, flare, overlay


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
