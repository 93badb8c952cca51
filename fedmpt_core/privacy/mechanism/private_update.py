"""One site's work in one round under differential privacy: `local_update` with DP-SGD steps (Abadi et al. 2016).

Every number of the update that depends on a record has gone through the noise of `PrivateOptimizer`: the optimizer's
state starts anew in every round, and learning rate, number of steps and divisor are public. Must never: look at a
loss, stop early, use the true number of records, or reuse a keystream.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fedmpt_core.config.job import JobConfig, PrivacyConfig
from fedmpt_core.model.base import TunedModel
from fedmpt_core.model.device import PieceSize, in_pieces
from fedmpt_core.model.features.cache import PatchFeatures
from fedmpt_core.privacy.mechanism.gradients import TEXT, GradientEngine
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.noise import ClipGroup, PrivateOptimizer
from fedmpt_core.privacy.mechanism.sampling import poisson_batches
from fedmpt_core.training.local import LocalUpdate, StepRecord, make_optimizer


def private_update(
    model: TunedModel,
    features: PatchFeatures,
    targets: np.ndarray,
    units: np.ndarray,
    *,
    state: np.ndarray,
    round_number: int,
    job: JobConfig,
    declared_units: int,
    keystream: Keystream,
    on_step: Callable[[StepRecord], None] | None = None,
    plant: Callable[[PrivateOptimizer], None] | None = None,
) -> LocalUpdate:
    """Train from `state` on this site's records, `job.steps_per_round` noisy steps.

    Args:
        model: the site's model, on its device; its parameters are overwritten.
        features: R records' patch features.
        targets: (R, C) in {0, 1}.
        units: (R,) int64 unit of each record, from 0 without gaps; `np.arange(R)` when each is its own.
        state: (d,) float32 global parameters.
        round_number: from 1; sets the learning rate of the schedule.
        job: training, loss and privacy settings, noise multiplier worked out.
        declared_units: the site's public number of units; the true one stays out of every formula.
        keystream: secret randomness of this process.
        on_step: called after each step.
        plant: called in each step when all units are in the sum and none of the noise is: where an audit adds units of
            its own.

    Returns:
        The update and its step records.

    Raises:
        FloatingPointError: parameters became NaN or infinite.
        DeviceFull: not even one record fits the device.
        ValueError: the job's noise multiplier is not worked out.
    """
    model.load_vector(state)
    device = next(iter(model.trainable_parameters().values())).device
    labels = torch.from_numpy(np.ascontiguousarray(targets)).to(torch.float32)
    engine, optimizer = mechanism(model, job, round_number, declared_units, keystream)
    records_of = _records_by_unit(units)
    records, size = [], PieceSize(job.privacy.micro_batch)
    steps = poisson_batches(len(records_of), job.privacy.sample_rate, job.steps_per_round, keystream)
    for step, batch in enumerate(steps):
        start = time.perf_counter()
        engine.encode()

        def accumulate(start: int, stop: int, batch: np.ndarray = batch) -> None:
            chosen = [records_of[unit] for unit in batch[start:stop]]
            engine.fill(_portions(chosen, features, labels, size.rows, device), len(chosen))
            optimizer.clip_and_accumulate()

        for _ in in_pieces(len(batch), size, accumulate):
            pass
        if plant:
            plant(optimizer)
        engine.fill((), 0)  # all units are in the sum: the step adds noise to it and nothing else
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        records.append(StepRecord(step, None, time.perf_counter() - start))
        if on_step:
            on_step(records[-1])
    if optimizer.not_finite:  # told to people at the site alone: it depends on the records
        logging.getLogger(__name__).warning(
            "round %d: %d times in %d steps the gradient of a unit was NaN or infinite and counted as zero, so that "
            "unit taught nothing: lower training.learning_rate, or set backbone.precision = 'float32'",
            round_number,
            optimizer.not_finite,
            len(records),
        )
    update = model.vector() - state
    if not np.isfinite(update).all():
        raise FloatingPointError(
            f"parameters became NaN or infinite in round {round_number}: "
            f"lower learning_rate={job.training.learning_rate}"
        )
    return LocalUpdate(update, tuple(records))


def mechanism(
    model: TunedModel, job: JobConfig, round_number: int, declared_units: int, keystream: Keystream
) -> tuple[GradientEngine, PrivateOptimizer]:
    """The engine and the optimizer of a round. Raises ValueError when the job's settings do not fit the model."""
    privacy = job.privacy
    if privacy.noise_multiplier is None:
        raise ValueError("privacy.noise_multiplier is not worked out: nothing may be trained with this job")
    feature_space = privacy.engine == "feature_space"
    engine = GradientEngine(model, job.loss, job.training.loss_weight, feature_space=feature_space)
    optimizer = PrivateOptimizer(
        make_optimizer(model, job.training, round_number),
        engine.private,
        clip_groups(engine.private, privacy),
        noise_multiplier=privacy.noise_multiplier,
        expected_batch_size=privacy.sample_rate * declared_units,
        keystream=keystream,
    )
    optimizer.attach_step_hook(lambda _: engine.pull_back())
    return engine, optimizer


def clip_groups(private: Mapping[str, nn.Parameter], privacy: PrivacyConfig) -> list[ClipGroup]:
    """One flat group, or one for each entry of `group_norms`, which must then name exactly the trained groups."""
    if not privacy.group_norms:
        return [ClipGroup(tuple(private), privacy.max_grad_norm)]
    members: dict[str, list[str]] = {}
    for name in private:
        members.setdefault("contexts" if name == TEXT else name.split(".")[0], []).append(name)
    if set(members) != set(privacy.group_norms):
        raise ValueError(
            f"privacy.group_norms names {', '.join(sorted(privacy.group_norms))}, "
            f"trained are {', '.join(sorted(members))}: give each trained group one bound"
        )
    return [ClipGroup(tuple(members[group]), bound) for group, bound in sorted(privacy.group_norms.items())]


def _records_by_unit(units: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(units, kind="stable")
    return np.split(order, np.cumsum(np.bincount(units))[:-1]) if len(units) else []


def _portions(
    chosen: list[np.ndarray], features: PatchFeatures, labels: Tensor, size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    rows = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
    owner = torch.from_numpy(np.repeat(np.arange(len(chosen)), [len(c) for c in chosen]))
    for i in range(0, len(rows), size):
        part = rows[i : i + size]
        yield features.batch(part).to(device), labels[part].to(device), owner[i : i + size].to(device)
