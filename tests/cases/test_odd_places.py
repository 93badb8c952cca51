"""Terminals and folders that are not as a developer's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedmpt_core.config.job import JobConfig
from fedmpt_flare.job.simulation import Simulation
from tests.settings import UNPROTECTED

JOB = JobConfig("j", ("cat", "dog"), privacy=UNPROTECTED)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "utf-8"])
def test_no_output_dies_at_a_sign_that_the_terminal_lacks(encoding: str) -> None:
    script = (
        "from fedmpt_flare.cli.screen import fail, never_fail_at_a_sign, show_table\n"
        "never_fail_at_a_sign()\n"
        "show_table('a–b …', ('site', 'val'), [('Zürich', '–'), ('\\udce9', '东京')])\n"
        "fail('µ → x')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "80"},
    )
    out = run.stdout.decode(encoding)
    assert run.returncode == 0, run.stderr
    assert ("a–b …" if encoding in ("utf-8", "cp1252") else "a-b ...") in out
    assert r"\udce9" in out and ("东京" if encoding == "utf-8" else r"\u4e1c\u4eac") in out
    assert ("µ" if encoding != "ascii" else r"\xb5") in run.stderr.decode(encoding)


def test_help_is_readable_everywhere() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fedmpt_flare", "predict", "--help"],
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert run.returncode == 0 and b"exit code 1" in run.stdout, run.stderr


@pytest.mark.parametrize("folder", ["my temporary files", "it's", "a#b", 'the "big" disk', "back\\slash"])
def test_a_place_that_flare_cannot_name_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / folder).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / folder))
    with pytest.raises(ValueError, match=r"TMPDIR is at .*set TMPDIR to another folder, for example TMPDIR=/tmp"):
        Simulation(JOB, {}, tmp_path / "out")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / folder / "python"))
    with pytest.raises(ValueError, match=r"Python is at .*install it elsewhere"):
        Simulation(JOB, {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
