"""Kill a training site over and over: `python -m tests.crash FOLDER KILLS` prints what was released, as JSON.

Each child trains round after round like a site: reserve, noisy steps, commit, hand the update on (here: append its
digest to a file, which is what the server saw). It is killed with SIGKILL at a random moment. Children are forked
from a process that has torch loaded, since importing it would take longer than a round.
"""

import dataclasses
import hashlib
import json
import os
import random
import select
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from fedmpt_core.config.job import JobConfig, ModelConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from fedmpt_core.privacy.accounting.epsilon import Steps, epsilon
from fedmpt_core.privacy.ledger.budget import Budget
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, open_ledger
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.private_update import private_update
from fedmpt_core.training.local import LocalUpdate
from tests.fakes import FakeBackbone, Table

RELEASED = "released.txt"
JOB = JobConfig(
    "crash",
    ("cat", "dog"),
    model=ModelConfig(conditions=("color",), adapter_width=2, iterations=5),
    training=TrainingConfig(rounds=100_000, local_steps=2),
    privacy=PrivacyConfig(epsilon=100.0, sample_rate=0.5, noise_multiplier=60.0),
)


def policy(folder: Path) -> SitePrivacyConfig:
    """The site's policy; wide enough for every round."""
    return SitePrivacyConfig("crash", units=8, epsilon=150.0, delta=1e-5, ledger=str(folder))


def one_round(model: FedMPT, round_number: int, keystream: Keystream) -> LocalUpdate:
    """Two noisy steps on eight records."""
    targets = np.tile(np.array([[1, 0], [0, 1]], np.uint8), (4, 1))
    return private_update(
        model,
        Table(torch.randn(8, 9, 16, generator=torch.Generator().manual_seed(0))),  # type: ignore[arg-type]
        targets,
        np.arange(8),
        state=model.vector(),
        round_number=round_number % JOB.training.rounds,
        job=JOB,
        declared_units=8,
        keystream=keystream,
    )


def site(folder: Path, model: FedMPT, number: int, started: int) -> None:
    """Train until killed."""
    ledger = open_ledger(policy(folder), "site", None)
    job = dataclasses.replace(JOB, training=dataclasses.replace(JOB.training, rounds=1))
    budget = Budget(job, SiteConfig(DataConfig(path="x"), privacy=policy(folder)), ledger, f"job-{number}")
    keystream = Keystream()
    os.write(started, b"!")
    for round_number in range(1, 100_000):
        reservation = budget.reserve(round_number, 0, {"rng_key_id": keystream.key_id})
        update = one_round(model, round_number, keystream)
        digest = hashlib.sha256(model.layout().encode(update.vector)).hexdigest()
        budget.commit(reservation, digest)
        with (folder / RELEASED).open("ab", buffering=0) as stream:
            stream.write(f"job-{number} {round_number} {digest}\n".encode())


def main(folder: Path, kills: int) -> None:
    """Fork, wait for a random moment, kill; again."""
    warnings.filterwarnings("ignore")  # newer Pythons warn of forks beside threads; this process has started none
    torch.set_num_threads(1)
    model = FedMPT(FakeBackbone(), JOB.classes, JOB.model.conditions, JOB.model, 0)
    create_ledger(policy(folder), "site", None)
    # Rounds and accounting once here, for what they import on first use.
    one_round(model, 0, Keystream())
    epsilon([Steps(0.5, 60.0, 2)], 1e-5)
    began = time.monotonic()
    one_round(model, 0, Keystream())
    window = max(0.08, 10 * (time.monotonic() - began))  # a few rounds, however busy the machine is
    chance, died = random.Random(0), 0
    for number in range(kills):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                site(folder, model, number, write)
            finally:
                os._exit(3)
        os.close(write)
        os.read(read, 1)
        until = time.monotonic() + chance.uniform(0, window)
        while (left := until - time.monotonic()) > 0:
            select.select([read], [], [], left)  # ends early when the child ended by itself, which is a failure
            if os.waitpid(child, os.WNOHANG)[0]:
                raise SystemExit("a site ended by itself: see its error above")
        os.kill(child, signal.SIGKILL)
        died += os.waitpid(child, 0)[1] == signal.SIGKILL
        os.close(read)
    print(json.dumps({"killed": died}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
