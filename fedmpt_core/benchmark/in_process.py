"""A federation as a plain loop in one process: the arithmetic of a run in NVIDIA FLARE without its machinery.

Every site is a real `SiteSession` with its own model, batches and ledger; the frozen towers, and where the caller hands
them over the patch features, are shared by all of them. A test holds its parameters equal to those of FLARE's
simulator. Secure aggregation is left out: it adds the same numbers.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.federation.server.averaging import apply, average
from fedmpt_core.federation.server.participation import participants
from fedmpt_core.federation.site.session import SiteRecords, SiteSession
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.privacy.ledger.site_ledger import create_ledger


@dataclass(frozen=True)
class Round:
    """What a round left.

    Attributes:
        number: from 1; 0 is the start.
        state: (d,) float32 global parameters.
        epsilon: what each site that took part has spent so far; empty without differential privacy.
        loss: mean over these sites of their mean training loss; None where nobody looks at it.
        sent: bytes of one site's update.
        steps: optimiser steps of all sites.
        cpu_seconds: CPU time of these steps, the sites' other work in the round included.
    """

    number: int
    state: np.ndarray
    epsilon: dict[str, float]
    loss: float | None = None
    sent: int = 0
    steps: int = 0
    cpu_seconds: float = 0.0


@contextmanager
def open_sessions(
    job: JobConfig,
    sites: Mapping[str, SiteConfig],
    *,
    backbone: Backbone | None = None,
    data: Mapping[str, SiteRecords] | None = None,
) -> Iterator[dict[str, SiteSession]]:
    """Sessions of all sites, prepared; ledgers that no site names last as long as the context.

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
            name: SiteSession(job, with_ledger(name, site, Path(folder)), name, backbone=backbone)
            for name, site in sites.items()
        }
        for name, session in sessions.items():
            session.prepare(data=data[name] if data else None)
        yield sessions


def train_rounds(job: JobConfig, sessions: Mapping[str, SiteSession]) -> Iterator[Round]:
    """Round 0 and every round of training.

    Args:
        job: the job of the sessions.
        sessions: prepared.

    Raises:
        FloatingPointError: training diverged.
    """
    state = next(iter(sessions.values())).model.vector()
    yield Round(0, state, {})
    for number in range(1, job.training.rounds + 1):
        asked = participants(
            list(sessions),
            job.federation.participation,
            least=job.federation.min_sites,
            seed=job.seed,
            round_number=number,
        )
        began = time.process_time()
        updates = {name: sessions[name].train(state, number) for name in asked}
        seconds = time.process_time() - began
        weights = {name: sessions[name].weight() for name in asked}
        state = apply(state, average({n: u.vector for n, u in updates.items()}, weights))
        losses = [u.metrics["loss"] for u in updates.values() if u.metrics]
        yield Round(
            number,
            state,
            {n: u.privacy["epsilon"] for n, u in updates.items() if u.privacy},
            float(np.mean(losses)) if losses else None,
            len(next(iter(updates.values())).block),
            sum(u.steps for u in updates.values()),
            seconds,
        )


def federate(
    job: JobConfig, sites: Mapping[str, SiteConfig], cache: str
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Yield (global parameters, figures of the evaluating sites' first) for round 0 and after every round.

    Args:
        job: the agreed job, noise multiplier worked out.
        sites: what each site has and allows.
        cache: folder of patch features for all of them.
    """
    cached = {name: dataclasses.replace(site, cache_dir=cache) for name, site in sites.items()}
    with open_sessions(job, cached) as sessions:
        for step in train_rounds(job, sessions):
            reports = (s.evaluate(step.state, zero_shot=step.number == 0) for s in sessions.values())
            figures = next((report for report in reports if report), {})
            known = {"epsilon": step.epsilon} if step.number else {}
            yield step.state, {**figures, **known, **({} if step.loss is None else {"loss": step.loss})}


def with_ledger(name: str, site: SiteConfig, folder: Path) -> SiteConfig:
    """The site with a new unsigned ledger below `folder`, unless it names one or has no policy."""
    if site.privacy is None or site.privacy.ledger:
        return site
    policy = dataclasses.replace(site.privacy, ledger=str(folder / name))
    create_ledger(policy, name, None)
    return dataclasses.replace(site, privacy=policy)
