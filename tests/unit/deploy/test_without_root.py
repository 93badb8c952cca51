"""The page for sites without root: after its commands nothing needs, or lies in, a place of root's."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

from fedmpt_core.config.toml import load_site
from tests.federation import DEPLOY

PAGE = DEPLOY / "hospital" / "without-root.md"
PLACES_OF_ROOT = ("/opt/", "/var/lib/")


def test_its_commands_leave_a_site_and_a_unit_that_need_no_root(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "site" / "local", tmp_path / "fedmpt" / "site" / "local")
    shutil.copytree(DEPLOY / "systemd", tmp_path / "fedmpt" / "deploy" / "systemd")
    commands = re.findall(r"^```sh site\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    for text in commands:
        subprocess.run(["bash", "-euo", "pipefail", "-c", text], cwd=tmp_path, env={"HOME": str(tmp_path)}, check=True)

    settings = tmp_path / "fedmpt" / "site" / "local" / "fedmpt_site.toml"
    site = load_site(settings, "hospital-a")
    assert site.privacy
    assert Path(site.privacy.ledger) == tmp_path / "fedmpt" / "state" / "ledgers"
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    file = tmp_path / ".config" / "systemd" / "user" / "fedmpt-site.service"
    unit.read(file)
    service = unit["Service"]
    assert service["ExecStart"].startswith(f"{tmp_path}/fedmpt/site/startup/")
    assert {"NoNewPrivileges", "UMask", "LimitCORE"} <= set(service)
    assert not {"User", "ProtectSystem", "ProtectHome", "ReadWritePaths"} & set(
        service
    )  # a user's systemd has no right to
    assert unit["Install"]["WantedBy"] == "default.target"
    for text in (settings.read_text(), file.read_text()):
        assert not [place for place in PLACES_OF_ROOT if place in text]
