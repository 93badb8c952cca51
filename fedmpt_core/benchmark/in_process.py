"""A federation in one process: the rounds of a run in NVIDIA FLARE without its machinery.

Every site is a real `SiteSession` with its own model, batches and ledger; the frozen towers, and where the caller hands
them over the patch features, are shared by all of them. The server's half is the same `Rounds`. A test holds its
parameters equal to those of FLARE's simulator. Secure aggregation is left out: it adds the same numbers.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.federation.joined import Joined
from fedmpt_core.federation.server.rounds import Evaluation, MeanUpdate, Rounds, Training
from fedmpt_core.federation.site.session import SiteRecords, SiteSession, SiteUpdate
from fedmpt_core.federation.terms import encoding_of
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.privacy.ledger.site_ledger import with_ledger


@dataclass(frozen=True)
class Round:
    """What a round left.

    Attributes:
        row: the round as a run's record has it (`RunRecord.rounds`); round 0 is the start.
        state: (d,) float32 global parameters.
        loss: mean over the sites that took part of their mean training loss; None where nobody looks at it.
        steps: optimiser steps of all sites.
        cpu_seconds: CPU time of these steps, the sites' other work in the round included.
    """

    row: dict[str, Any]
    state: np.ndarray
    loss: float | None
    steps: int
    cpu_seconds: float


class Federation:
    """All sites of a job in this process; a `Carriage` that calls them one after the other.

    Attributes:
        sessions: by site.
    """

    stopped = False

    def __init__(self, job: JobConfig, sessions: Mapping[str, SiteSession], joined: Mapping[str, Joined]) -> None:
        """Trains nothing yet.

        Args:
            job: the job of the sessions.
            sessions: by site, prepared.
            joined: what each said when it was prepared.
        """
        self.sessions = sessions
        judged = any(one.evaluates for one in joined.values())  # else whoever runs this judges by itself
        self._job = job if judged else replace(job, federation=replace(job.federation, evaluate_every=0))
        self._joined = joined
        self._updates: dict[str, SiteUpdate] = {}
        self._cpu_seconds = 0.0

    def rounds(self) -> Iterator[Round]:
        """Round 0 and every round of training.

        Raises:
            FloatingPointError: training diverged.
        """
        rounds = Rounds(self._job, "in-process")
        rounds.join(self._joined)
        for row in rounds.run(self):
            losses = [u.metrics["loss"] for u in self._updates.values() if u.metrics]
            loss = float(np.mean(losses)) if losses else None
            yield Round(row, rounds.state, loss, sum(u.steps for u in self._updates.values()), self._cpu_seconds)

    def train(self, training: Training) -> None:
        """One round (`Carriage`)."""
        began = time.process_time()
        self._updates = {
            name: self.sessions[name].train(
                training.state, training.round, training.attempt, known_head=training.heads.get(name)
            )
            for name in training.sites
        }
        self._cpu_seconds = time.process_time() - began
        for name, update in self._updates.items():
            if self._job.privacy.distributed:
                training.note(name, update.privacy)
            else:
                training.take(name, update.block, self.sessions[name].weight(), update.privacy)
        if self._job.privacy.distributed:
            self._sum(training)

    def _sum(self, training: Training) -> None:
        """What masks would have opened, where sites share the noise of a sum."""
        total = np.zeros(training.layout.size, np.uint32)
        for update in self._updates.values():
            total += update.vector
        shares = [training.shares[name] for name in self._updates]
        decoded = encoding_of(self._job, training.layout).decode(total, shares)
        sent = {name: len(update.block) for name, update in self._updates.items()}
        training.take_mean(MeanUpdate(decoded.mean, sent, {}, total))

    def evaluate(self, evaluation: Evaluation) -> None:
        """One evaluation (`Carriage`)."""
        for name in evaluation.sites:
            figures = self.sessions[name].evaluate(evaluation.state, zero_shot=evaluation.round == 0)
            if figures is not None:
                evaluation.take(name, figures)


@contextmanager
def open_federation(
    job: JobConfig,
    sites: Mapping[str, SiteConfig],
    *,
    backbone: Backbone | None = None,
    data: Mapping[str, SiteRecords] | None = None,
) -> Iterator[Federation]:
    """A federation of prepared sites; ledgers that no site names last as long as the context.

    Args:
        job: the agreed job, noise multiplier worked out.
        sites: what each site has and allows.
        backbone: the job's frozen towers, shared by all sites; None lets each load its own.
        data: records by site, if they are loaded already.

    Raises:
        PrivacyRefused: a site's policy or budget does not allow the job.
        ValueError: data, weights or names that cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        sessions = {
            name: SiteSession(job, with_ledger(site, name, Path(folder) / name), name, backbone=backbone)
            for name, site in sites.items()
        }
        joined = {name: session.prepare(data=data[name] if data else None) for name, session in sessions.items()}
        yield Federation(job, sessions, joined)
        for session in sessions.values():
            session.end()
