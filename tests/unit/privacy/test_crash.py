"""`kill -9` of a training site, again and again: the ledger verifies and never shows less than what left the site."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedmpt_core.privacy.ledger.budget import held
from fedmpt_core.privacy.ledger.site_ledger import read_site_ledger
from tests import crash

KILLS = 24


@pytest.mark.slow
def test_a_killed_site_has_charged_whatever_it_released(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.crash", str(tmp_path), str(KILLS)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {"killed": KILLS}

    entries = read_site_ledger(crash.policy(tmp_path), None)  # raises unless every line verifies
    reserved = {(e.job, e.round): e.hash for e in entries if e.kind == "reserve"}
    committed = {(e.job, e.round): (e.reservation, e.release) for e in entries if e.kind == "commit"}
    released = [line.split() for line in (tmp_path / crash.RELEASED).read_text().splitlines()]
    for name, number, digest in released:
        assert committed[name, int(number)] == (reserved[name, int(number)], digest)
    # the kills struck where they matter: between promise and release, and after releases
    assert len(reserved) > len(committed) > 0
    assert len(committed) >= len(released) > KILLS / 2
    steps = sum(int(e.details["steps"]) for e in entries if e.kind == "reserve")
    assert steps == 2 * len(reserved) >= 2 * len(released)
    # what the dead hold is told from what they were charged, and runs out
    assert {h.job for h in held(entries)} <= {e.job for e in entries if e.kind == "hold"}
    assert held(entries, datetime.now(UTC) + timedelta(days=30)) == []
    keys = {e.details["rng_key_id"]: e.job for e in entries if e.kind == "reserve"}
    assert len(keys) == len({e.job for e in entries if e.kind == "reserve"})
