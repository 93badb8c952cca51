"""Kill a training site over and over: `python -m tests.crash FOLDER KILLS` prints how many died, as JSON.

Each child is a site in a job of its own that trains round after round and hands every update on (here: appends its
digest to a file, which is what the server saw). It is killed with SIGKILL shortly after the ledger or that file has
grown, so that the kills strike between the steps of a round and not just in its longest one. Children are forked from
a process that has torch loaded, since importing it would take longer than a round.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from fedmpt_core.config.job import JobConfig, ModelConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.federation.site.session import SiteRecords, SiteSession
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, ledger_path
from tests.fakes import FakeBackbone, Table, training_records
from tests.settings import REHEARSED

RELEASED = "released.txt"
# every record in every step: then a site's accountants take least of its time
JOB = JobConfig(
    "crash",
    ("cat", "dog"),
    model=ModelConfig(conditions=("color",), adapter_width=2, iterations=5),
    training=TrainingConfig(rounds=1, local_steps=2),
    privacy=PrivacyConfig(epsilon=100.0, sample_rate=1.0, noise_multiplier=60.0),
    secagg=REHEARSED,
)


class Records(Table):
    """Eight records with what the ledger's fingerprint is made of."""

    def digests(self) -> list[str]:
        return [str(row) for row in range(len(self))]


def policy(folder: Path) -> SitePrivacyConfig:
    """The site's policy; wide enough for every round."""
    return SitePrivacyConfig("crash", units=8, epsilon=150.0, delta=1e-5, ledger=str(folder))


def site(folder: Path, number: int, rounds: int) -> None:
    """Train so many rounds, or until killed."""
    settings = SiteConfig(DataConfig(path="x"), privacy=policy(folder))
    session = SiteSession(JOB, settings, "site", run_id=f"job-{number}", backbone=FakeBackbone())
    features = Records(torch.randn(8, 9, 16, generator=torch.Generator().manual_seed(0)))
    targets = np.tile(np.array([[1, 0], [0, 1]], np.uint8), (4, 1))
    state = session.prepare(data=SiteRecords(training_records(features, targets))).initial
    for round_number in range(1, rounds + 1):
        digest = hashlib.sha256(session.train(state, round_number).block).hexdigest()
        with (folder / RELEASED).open("ab", buffering=0) as stream:
            stream.write(f"job-{number} {round_number} {digest}\n".encode())


def wait_and_kill(child: int, watched: Path, growths: int, seconds: float) -> bool:
    """Kill the child so many seconds after a file has grown so often; False when it ended by itself."""
    size = watched.stat().st_size
    while growths:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0002)  # leaves the child a processor; short beside what lies between two steps
        now = watched.stat().st_size
        growths, size = growths - (now > size), now
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def main(folder: Path, kills: int) -> None:
    """Fork, wait for a moment drawn at random, kill; again."""
    warnings.filterwarnings("ignore")  # newer Pythons warn of forks beside threads; this process has started none
    torch.set_num_threads(1)
    create_ledger(policy(folder), "site", None)
    site(folder, 0, 1)  # for what a round and its accounting import on first use
    chance = random.Random(0)
    for number in range(1, kills + 1):
        child = os.fork()
        if child == 0:
            try:
                site(folder, number, rounds=100_000)
            finally:
                os._exit(3)
        watched = chance.choice((ledger_path(policy(folder)), folder / RELEASED))
        if not wait_and_kill(child, watched, chance.randint(1, 5), chance.choice((0.0, chance.uniform(0, 0.05)))):
            raise SystemExit("a site ended by itself: see its error above")
    print(json.dumps({"killed": kills}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
