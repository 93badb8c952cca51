"""What server and sites of a masked job work out, each for itself, from the agreed job."""

from math import prod

import numpy as np

from fedmpt_core.common.release import RELEASE
from fedmpt_core.config.job import JobConfig
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.privacy.mechanism.shared_noise import MOST_NUMBERS, SharedNoise
from fedmpt_core.secagg.context import SUITE, job_digest
from fedmpt_core.secagg.encoding import Encoding, Integers
from fedmpt_core.secagg.policy import Floors, Terms


def floors_of(job: JobConfig) -> Floors:
    """The least protection that a job with masks gives a member."""
    return Floors(job.federation.min_sites, job.secagg.colluders)


def encoding_of(job: JobConfig, layout: ParameterLayout) -> Encoding | Integers:
    """How a job's updates travel.

    Raises:
        SecAggError: sums could run over.
        ValueError: the noise that sites share does not fit the grid, or there are too many numbers.
    """
    secagg = job.secagg
    if job.privacy.distributed:
        if layout.size > MOST_NUMBERS:
            raise ValueError(f"privacy.noise='distributed' is for {MOST_NUMBERS} numbers at most, not {layout.size}")
        shared = SharedNoise.of(job)
        bounds: dict[str, float] = {**job.privacy.group_norms}
        sizes = [prod(shape) for shape in layout.shapes]
        norms = [bounds[name.split(".")[0]] if bounds else job.privacy.max_grad_norm for name in layout.names]
        grid = np.repeat(np.array(norms) * 2.0**-shared.bits, sizes)
        batch = job.privacy.sample_rate * (secagg.max_weight or 1)
        return Integers(grid, shared.room, secagg.max_sites, batch)
    return Encoding(
        layout.size,
        max_sites=secagg.max_sites,
        value_range=secagg.value_range,
        fraction_bits=secagg.fraction_bits,
        rounding=secagg.rounding,
        metrics=tuple(secagg.metrics),
    )


def secure_terms(
    job: JobConfig, run_id: str, layout: ParameterLayout, backbone_digest: str
) -> tuple[Terms, Encoding | Integers]:
    """Terms and encoding of a run; equal at two parties only if job, release, layout and frozen weights are.

    Args:
        job: the agreed job, with masks.
        run_id: name of the run.
        layout: of the trained tensors.
        backbone_digest: SHA-256 hex of the frozen weights.

    Raises:
        SecAggError: the job's floors or encoding are impossible.
    """
    secagg, encoding = job.secagg, encoding_of(job, layout)
    facts = {
        "suite": SUITE,
        "job": job.digest(),
        "layout": layout.digest(),
        "words": encoding.words,
        "backbone": backbone_digest,
        "release": RELEASE,
    }
    failures = job.federation.max_failed_rounds
    terms = Terms(
        run_id,
        job_digest(facts),
        encoding.words,
        floors_of(job),
        secagg.max_sites,
        first_round=job.first_round,
        rounds=job.training.rounds,
        attempts=failures,
    )
    return terms, encoding
