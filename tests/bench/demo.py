"""The demo job as a user runs it: seconds, told apart, and the peak memory of one of its sites."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedmpt_core.config.toml import load_job, load_sites
from fedmpt_core.privacy.ledger.budget import resolved
from fedmpt_core.privacy.ledger.site_ledger import with_ledger
from tests.bench.measure import Row, in_own_process, peak_mib

JOB = Path(__file__).parents[2] / "jobs" / "demo"


def run() -> list[Row]:
    """Simulate the demo with an empty feature cache, then measure one site alone."""
    with tempfile.TemporaryDirectory() as folder:
        home = {"HOME": folder}
        out = Path(folder) / "out"
        command = [
            sys.executable,
            "-m",
            "fedmpt_flare",
            "simulate",
            str(JOB / "job.toml"),
            "--out",
            str(out),
            "--json",
        ]
        start = time.monotonic()
        subprocess.run(command, check=True, env={**os.environ, **home}, stdout=subprocess.DEVNULL)
        total = time.monotonic() - start
        timing = json.loads((out / "timing.json").read_text())
        site = in_own_process("tests.bench.demo", folder)
    parts = ", ".join(f"{k} {v:.0f}" for k, v in timing.items())
    return [
        Row(f"demo, installed, empty cache (s; {parts})", f"{total:.0f}", "–", "–", "<= 120", total <= 120),
        Row(
            "peak memory of a site of the demo (MiB)",
            f"{site['peak_mib']:.0f}",
            "–",
            "–",
            "<= 2048",
            site["peak_mib"] <= 2048,
        ),
    ]


def one_site(cache: str) -> None:
    """What a site's trainer does, in this process."""
    from fedmpt_core.federation.site.session import SiteSession

    job = resolved(load_job(JOB / "job.toml"))
    site = dataclasses.replace(load_sites(JOB / "site.toml")["site-1"], cache_dir=cache)
    session = SiteSession(job, with_ledger(site, "site-1", Path(cache) / "site-1"), "site-1")
    state = session.prepare().initial
    session.train(state, 1)
    session.evaluate(state)
    print(json.dumps({"peak_mib": peak_mib()}))


if __name__ == "__main__" and len(sys.argv) == 2:
    one_site(sys.argv[1])
