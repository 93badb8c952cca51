"""`fedmpt audit` of 5 runs of 200 rounds at 20 sites, 40,000 signed entries and their earlier copies, as a user calls
it: the whole process, imports included. Beside it the time to start the program and do nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from fedmpt_core.privacy.ledger.budget import resolved
from fedmpt_core.secagg.start_up_kit import write_roster
from tests.audited import JOB, Federation, provision, roster_of
from tests.bench.measure import Row

SITES, JOBS, ROUNDS, BOUND = 20, 5, 200, 10.0


def run() -> list[Row]:
    """Make the runs, then time the audit."""
    names = tuple(f"site-{number:02}" for number in range(1, SITES + 1))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        kits = provision(root, names)
        federation = Federation(root, kits, names, cap=200.0)
        training = replace(JOB.training, rounds=ROUNDS, local_steps=1)
        job = resolved(replace(JOB, training=training, privacy=replace(JOB.privacy, noise_multiplier=None)))
        runs = [federation.run(f"run-{number}", job) for number in range(1, JOBS + 1)]
        anchors = roster_of(kits, names)
        if anchors.roster is None:
            raise RuntimeError("the kits make no roster")
        write_roster(root / "roster.json", anchors.roster)
        places = [str(run) for run in runs]
        audited, printed = _timed(["audit", *places, "--roster", str(root / "roster.json"), "--json"])
        idle, _ = _timed(["audit", "--help"])
    summary = json.loads(printed)
    if not summary["passed"] or len(summary["runs"]) != JOBS:
        raise RuntimeError("the audit did not pass what it was to be timed with")
    what = f"audit of {JOBS} jobs, {SITES} sites, {ROUNDS} rounds (s; other: starting the program)"
    return [Row(what, f"{audited:.1f}", f"{idle:.1f}", f"{audited / idle:.1f}", f"<= {BOUND:g} s", audited <= BOUND)]


def _timed(arguments: list[str]) -> tuple[float, str]:
    command = [str(Path(sys.executable).parent / "fedmpt"), *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"})
    return time.perf_counter() - start, done.stdout
