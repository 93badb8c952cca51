"""The federation as a plain loop in one process: what FLARE's run must equal, and a quick way to compare settings."""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedmpt_core.aggregation import apply, average
from fedmpt_core.config import JobConfig
from fedmpt_core.privacy.site_ledger import create_ledger
from fedmpt_core.session import SiteSession
from fedmpt_core.site_config import SiteConfig


def federate(
    job: JobConfig, sites: Mapping[str, SiteConfig], cache: str
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Yield (global parameters, figures of the evaluating sites' first) for round 0 and after every round."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = {
            n: SiteSession(job, with_ledger(n, dataclasses.replace(s, cache_dir=cache), Path(folder)), n)
            for n, s in sites.items()
        }
        ready = {name: session.prepare() for name, session in sessions.items()}
        judge = next(sessions[n] for n, r in ready.items() if r.evaluates)
        state = next(iter(ready.values())).initial
        yield state, judge.evaluate(state, zero_shot=True) or {}
        for number in range(1, job.training.rounds + 1):
            updates = {name: session.train(state, number) for name, session in sessions.items()}
            weights = {name: session.weight() for name, session in sessions.items()}
            state = apply(state, average({n: u.vector for n, u in updates.items()}, weights))
            spent = {n: u.privacy["epsilon"] for n, u in updates.items() if u.privacy}
            losses = [u.metrics["loss"] for u in updates.values() if u.metrics]
            loss = {"loss": float(np.mean(losses))} if losses else {}
            yield state, {**(judge.evaluate(state) or {}), "epsilon": spent, **loss}


def with_ledger(name: str, site: SiteConfig, folder: Path) -> SiteConfig:
    """The site with a new unsigned ledger below `folder`, unless it names one or has no policy."""
    if site.privacy is None or site.privacy.ledger:
        return site
    policy = dataclasses.replace(site.privacy, ledger=str(folder / name))
    create_ledger(policy, name, None)
    return dataclasses.replace(site, privacy=policy)
