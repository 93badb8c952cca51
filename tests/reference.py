"""The federation as a plain loop in one process: what FLARE's run must equal, and a quick way to compare settings."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fedmpt_core.aggregation import apply, average
from fedmpt_core.config import JobConfig
from fedmpt_core.session import SiteSession
from fedmpt_core.site_config import SiteConfig


def federate(
    job: JobConfig, sites: Mapping[str, SiteConfig], cache: str
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Yield (global parameters, figures of the evaluating sites' first) for round 0 and after every round."""
    sessions = {n: SiteSession(job, dataclasses.replace(s, cache_dir=cache), n) for n, s in sites.items()}
    ready = {name: session.prepare() for name, session in sessions.items()}
    judge = next(sessions[n] for n, r in ready.items() if r.evaluates)
    state = next(iter(ready.values())).initial
    yield state, judge.evaluate(state, zero_shot=True) or {}
    for number in range(1, job.training.rounds + 1):
        updates = {name: session.train(state, number).vector for name, session in sessions.items()}
        weights = {name: session.weight() for name, session in sessions.items()}
        state = apply(state, average(updates, weights))
        yield state, judge.evaluate(state) or {}
