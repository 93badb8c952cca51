"""One run: a federation trained and judged, and what it cost."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedmpt_core.benchmark.cases import Case
from fedmpt_core.benchmark.in_process import Round, open_federation
from fedmpt_core.benchmark.inputs import ZERO_SHOT
from fedmpt_core.benchmark.judging import HeldOut, judge
from fedmpt_core.benchmark.results_file import ResultsFile
from fedmpt_core.benchmark.shared_records import SharedRecords
from fedmpt_core.common.release import PROGRAM
from fedmpt_core.config.job import JobConfig, ModelConfig
from fedmpt_core.model.base import TunedModel
from fedmpt_core.model.fedmpt.fedmpt import zero_shot_model
from fedmpt_core.training.local import DEFAULT_BATCH_SIZE

_REPEATS = 3


def run_missing(cases: Sequence[Case], finished: ResultsFile, shared: SharedRecords, on_run: Any = None) -> None:
    """Do every run that is not finished yet.

    Args:
        cases: in the order in which they share records.
        finished: the file of results, open; grows by each run.
        shared: towers and records.
        on_run: called with (case, result or None before the run, done, total).

    Raises:
        ValueError: data, settings or budgets that do not allow a run.
        FloatingPointError: training diverged.
    """
    missing = list({c.identity(): c for c in cases if c.identity() not in finished.results}.items())
    for done, (identity, case) in enumerate(missing):
        if on_run:
            on_run(case, None, done, len(missing))
        result = run(case, shared)
        finished.add(identity, result)
        if on_run:
            on_run(case, result, done + 1, len(missing))


def run(case: Case, shared: SharedRecords) -> dict[str, Any]:
    """Train and judge.

    Args:
        case: what to run.
        shared: towers and records.

    Returns:
        Plain values: `method`, `seed`, `figures` (as `judging.judge`, and `spurious_pairs`), `trained` (numbers),
        `bytes_per_round` (one site's update), `epsilon` (the most that a site has spent, 0 for zero-shot; None without
        differential privacy), `cpu_ms_per_step`, `pictures_per_step` (expected), `cpu_ms_zero_shot` (the zero-shot
        prompt on as many pictures), `sites`, `backbone`, `is_stand_in`, `job` (digest), `code`, `seconds`.
    """
    began, job = time.monotonic(), case.job
    backbone = shared.backbone(job.backbone)
    records = shared.records(job, case.sites, case.heterogeneity)
    facts: dict[str, Any] = {
        "trained": 0,
        "bytes_per_round": 0,
        "epsilon": 0.0 if job.privacy.private else None,
        "cpu_ms_per_step": 0.0,
        "pictures_per_step": 0.0,
    }
    if case.method == ZERO_SHOT:
        figures = judge(zero_shot_model(backbone, job.classes, job.model).to(shared.device), records.held_out)
    else:
        with open_federation(job, records.sites, backbone=backbone, data=records.data) as federation:
            rounds = list(federation.rounds())
            model = next(iter(federation.sessions.values())).model
            model.load_vector(rounds[-1].state)
            figures = judge(model, records.held_out)
        sizes = [len(data.train.targets) for data in records.data.values() if data.train]
        facts = _costs(job, model, rounds, sizes)
    figures["spurious_pairs"] = [[job.classes[a], job.classes[b]] for a, b in records.held_out.pairs]
    # the same for all methods, so that their ratios compare: softmax pooling, whatever the job has
    plain = zero_shot_model(backbone, job.classes, ModelConfig(components=())).to(shared.device)
    pictures = int(facts["pictures_per_step"]) or DEFAULT_BATCH_SIZE
    facts["cpu_ms_zero_shot"] = _inference_ms(plain, records.held_out, pictures)
    return {
        "method": case.method,
        "seed": job.seed,
        "figures": figures,
        **facts,
        "sites": len(records.sites),
        "backbone": backbone.name,
        "is_stand_in": backbone.is_stand_in,
        "job": job.digest(),
        "code": PROGRAM,
        "seconds": round(time.monotonic() - began, 1),
    }


def _costs(job: JobConfig, model: TunedModel, rounds: Sequence[Round], sizes: Sequence[int]) -> dict[str, Any]:
    steps = sum(r.steps for r in rounds)
    spent = [budget["epsilon"] for r in rounds for budget in r.row["privacy"].values()]
    if job.privacy.private:
        pictures = job.privacy.sample_rate * float(np.mean(sizes))
    else:
        pictures = float(np.mean([min(size, job.training.batch_size or DEFAULT_BATCH_SIZE) for size in sizes]))
    return {
        "trained": model.layout().size,
        "bytes_per_round": max(rounds[-1].row["bytes_sent"].values()),
        "epsilon": max(spent) if job.privacy.private else None,
        "cpu_ms_per_step": 1000 * sum(r.cpu_seconds for r in rounds) / steps,
        "pictures_per_step": pictures,
    }


def _inference_ms(model: TunedModel, held_out: HeldOut, pictures: int) -> float:
    """CPU milliseconds of a prediction on cached features, its text encoded before; the least of several."""
    rows = np.arange(pictures) % len(held_out.independent.targets)
    device = next(iter(model.trainable_parameters().values())).device
    batch, milliseconds = held_out.independent.features.batch(rows).to(device), []
    with torch.no_grad():
        text = model.text_features()
        for _ in range(_REPEATS):
            began = time.process_time()
            model(batch, text)
            milliseconds.append(1000 * (time.process_time() - began))
    return min(milliseconds)
