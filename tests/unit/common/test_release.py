"""Which release this is, and what decides its results."""

import tomllib
from pathlib import Path

from fedmpt_core.common.release import PROGRAM, RELEASE, named, package_versions

ROOT = Path(__file__).parents[3]


def test_the_release_is_that_of_the_project() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == RELEASE
    assert f"fedmpt {RELEASE}" == PROGRAM == named("fedmpt")


def test_what_is_not_installed_is_said_or_left_out() -> None:
    assert named("no-such-package") == "no-such-package, not installed here"
    versions = package_versions()
    assert versions["fedmpt"] == RELEASE
    assert {"python", "torch", "numpy"} <= set(versions)
