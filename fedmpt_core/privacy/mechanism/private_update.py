"""One site's work in one round under differential privacy: `local_update` with DP-SGD steps (Abadi et al. 2016).

Every number of the update that depends on a record has gone through the noise of `PrivateOptimizer`: the optimizer's
state starts anew in every round, and learning rate, number of steps and divisor are public. Must never: look at a
loss, stop early, use the true number of records, or reuse a keystream.
"""

import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fedmpt_core.config.job import JobConfig
from fedmpt_core.model.base import TunedModel
from fedmpt_core.model.device import PieceSize, in_pieces
from fedmpt_core.model.features.cache import PatchFeatures
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.machinery import REAL, Machinery
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from fedmpt_core.privacy.mechanism.noise import PrivateOptimizer
from fedmpt_core.privacy.mechanism.placement import block_rows, filled_up
from fedmpt_core.training.local import LocalUpdate, TrainingRecords


def private_update(
    model: TunedModel,
    records: TrainingRecords,
    *,
    state: np.ndarray,
    round_number: int,
    job: JobConfig,
    mechanism: Mechanism,
    declared_units: int,
    keystream: Keystream,
    machinery: Machinery = REAL,
    micro_batch: int = 64,
    plant: Callable[[PrivateOptimizer], None] | None = None,
) -> LocalUpdate:
    """Train from `state` on this site's records, the noisy steps of a round.

    Args:
        model: the site's model, on its device; its parameters are overwritten.
        records: R of them, or none.
        state: (d,) float32 global parameters.
        round_number: from 1; sets the learning rate of the schedule.
        job: training and loss.
        mechanism: what is done in each step, as it was charged.
        declared_units: the site's public number of units; the true one stays out of every formula.
        keystream: secret randomness of this process.
        machinery: what does the steps.
        micro_batch: most records whose gradients are held at once; with 1 no record is ever beside another.
        plant: called in each step when all units are in the sum and none of the noise is: where an audit adds units of
            its own.

    Returns:
        The update; where sites share their noise the words of the noisy sum, (d,) uint32, in its place.

    Raises:
        FloatingPointError: parameters became NaN or infinite.
        DeviceFull: not even one record fits the device.
        ValueError: the mechanism does not fit the model, or shares the noise of more than one step: the next ones would
            follow from a sum that one share alone protects.
    """
    if mechanism.shared and mechanism.steps_per_round != 1:
        raise ValueError(f"{mechanism.steps_per_round} steps in a round: sites that share their noise take one")
    model.load_vector(state)
    device = next(iter(model.trainable_parameters().values())).device
    labels = torch.from_numpy(np.ascontiguousarray(records.targets)).to(torch.float32)
    engine, optimizer = machinery.round(mechanism, model, job, round_number, declared_units, keystream)
    if mechanism.shared and list(optimizer.private) != list(model.trainable_parameters()):
        raise ValueError("privacy.engine must be 'exact' where sites share their noise: it goes on what is summed")
    records_of = _records_by_unit(records.units)
    steps, share, size = 0, None, PieceSize(block_rows(mechanism.sample_rate * declared_units, micro_batch))
    for batch in machinery.draws(mechanism, len(records_of), keystream):
        engine.encode()

        def accumulate(start: int, stop: int, batch: np.ndarray = batch) -> None:
            chosen = [records_of[unit] for unit in batch[start:stop]]
            engine.fill(_portions(chosen, records.features, labels, size.rows, device), len(chosen))
            optimizer.clip_and_accumulate()

        in_pieces(len(batch), size, accumulate)
        if plant:
            plant(optimizer)
        engine.fill((), 0)  # all units are in the sum: the step adds noise to it and nothing else
        if mechanism.shared:
            share = optimizer.share()
        else:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        steps += 1
    if optimizer.not_finite:  # told to people at the site alone: it depends on the records
        logging.getLogger(__name__).warning(
            "round %d: %d times in %d steps the gradient of a unit was NaN or infinite and counted as zero, so that "
            "unit taught nothing: lower training.learning_rate, or set backbone.precision = 'float32'",
            round_number,
            optimizer.not_finite,
            steps,
        )
    if share is not None:
        return LocalUpdate(share, steps)
    update = model.vector() - state
    if not np.isfinite(update).all():
        raise FloatingPointError(
            f"parameters became NaN or infinite in round {round_number}: "
            f"lower learning_rate={job.training.learning_rate}"
        )
    return LocalUpdate(update, steps)


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
        patches, targets = filled_up(features.batch(part), labels[part], size)  # one shape: its kernels round alike
        yield patches.to(device), targets.to(device), owner[i : i + size].to(device)
