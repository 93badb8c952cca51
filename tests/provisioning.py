"""Kits as FLARE provisions them from deploy/, and the files that their owners copy over them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.federation import DEPLOY

SITE, SERVER = "hospital-a", "fl.example.org"


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
