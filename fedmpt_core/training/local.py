"""One site's work in one round: a few optimiser steps from the global parameters, and the difference they made.

McMahan et al. 2017, algorithm 1, with the paper's loss and schedule. Optimiser state starts anew in every round, so a
site's answer depends on the global parameters, its records and the seed alone. Never: batch statistics, un-noised
metrics on training records that leave the site.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmpt_core.config.job import LossConfig, TrainingConfig
from fedmpt_core.model.base import TunedModel
from fedmpt_core.model.device import PieceSize, in_pieces
from fedmpt_core.model.features.cache import PatchFeatures
from fedmpt_core.training.loss import asymmetric_loss

DEFAULT_BATCH_SIZE = 32


@dataclass(frozen=True)
class TrainingRecords:
    """A site's R records to train on; they stay at the site.

    Attributes:
        features: their patch features.
        targets: (R, C) in {0, 1}, or 2 where nobody knows.
        units: (R,) int64 unit of privacy of each record, from 0 without gaps; `np.arange(R)` when each is its own.
    """

    features: PatchFeatures
    targets: np.ndarray
    units: np.ndarray


@dataclass(frozen=True)
class LocalUpdate:
    """What a round computed at a site.

    Attributes:
        vector: (d,) float32, local minus global parameters in layout order.
        steps: optimiser steps done.
        losses: of each step, mean over the batch of the loss summed over classes; they stay at the site. Empty under
            differential privacy, which looks at no loss.
    """

    vector: np.ndarray
    steps: int
    losses: tuple[float, ...] = ()


def local_update(
    model: TunedModel,
    features: PatchFeatures,
    targets: np.ndarray,
    *,
    state: np.ndarray,
    round_number: int,
    training: TrainingConfig,
    loss: LossConfig,
    generator: np.random.Generator,
) -> LocalUpdate:
    """Train from `state` on this site's records.

    Args:
        model: the site's model, on its device; its parameters are overwritten.
        features: R records' patch features.
        targets: (R, C) in {0, 1}.
        state: (d,) float32 global parameters.
        round_number: from 1; sets the learning rate of the schedule.
        training: steps, batch size, optimiser.
        loss: the asymmetric loss.
        generator: fixes the order of the records.

    Returns:
        The update and the losses of its steps.

    Raises:
        FloatingPointError: loss or parameters became NaN or infinite.
        DeviceFull: not even one record fits the device.
    """
    layout = model.layout()
    model.load_vector(state)
    trained = model.trainable_parameters()
    device = next(iter(trained.values())).device
    optimizer = make_optimizer(model, training, round_number)
    labels = torch.from_numpy(np.ascontiguousarray(targets)).to(torch.float32)
    means, size = list[float](), PieceSize(training.batch_size or DEFAULT_BATCH_SIZE)
    text = None
    if not any(name.startswith("contexts.") for name in trained):
        with torch.no_grad():
            text = model.text_features()  # the same in every step
    for step, batch in enumerate(_batches(len(features), training, generator)):
        optimizer.zero_grad(set_to_none=True)
        losses: list[float] = []

        def forward_and_back(start: int, stop: int, batch: np.ndarray = batch, losses: list[float] = losses) -> None:
            rows = batch[start:stop]
            prediction = model(features.batch(rows).to(device), text)
            per_record = asymmetric_loss(
                prediction.log_positive, prediction.log_negative, labels[rows].to(device), loss
            )
            objective = training.loss_weight * per_record.sum() / len(batch)
            gradients = torch.autograd.grad(objective, list(trained.values()), allow_unused=True)
            for parameter, gradient in zip(trained.values(), gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            losses.append(float(per_record.detach().sum()))

        in_pieces(len(batch), size, forward_and_back)
        mean = sum(losses) / len(batch)
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss became {mean} in round {round_number}, step {step}: "
                f"lower learning_rate={training.learning_rate}"
            )
        optimizer.step()
        means.append(mean)
    update = model.vector() - state
    if not np.isfinite(update).all():
        raise FloatingPointError(
            f"parameters became NaN or infinite in round {round_number}: lower learning_rate={training.learning_rate}"
        )
    layout.encode(update)
    return LocalUpdate(update, len(means), tuple(means))


def make_optimizer(model: TunedModel, training: TrainingConfig, round_number: int) -> torch.optim.Optimizer:
    """A fresh optimizer over the trained parameters, at the learning rates of the round (from 1).

    Raises:
        ValueError: `group_rates` names a group that is not trained.
    """
    rate = training.learning_rate
    if training.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * (round_number - 1) / training.rounds))
    members: dict[str, list[Tensor]] = {}
    for name, parameter in model.trainable_parameters().items():
        members.setdefault(name.split(".")[0], []).append(parameter)
    rates: dict[str, float] = {**training.group_rates}
    strange = sorted(set(rates) - set(members))
    if strange:
        raise ValueError(f"training.group_rates names {strange[0]!r}, trained are {', '.join(members)}: remove it")
    parameters: Any = [{"params": tensors, "lr": rate * rates.get(group, 1.0)} for group, tensors in members.items()]
    if training.optimizer == "adam":
        return torch.optim.Adam(
            parameters, lr=rate, betas=(training.momentum, 0.999), weight_decay=training.weight_decay
        )
    return torch.optim.SGD(parameters, lr=rate, momentum=training.momentum, weight_decay=training.weight_decay)


def _batches(records: int, training: TrainingConfig, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Shuffled passes over all records, cut into batches; a last short batch is kept."""
    size = training.batch_size or DEFAULT_BATCH_SIZE
    steps = training.local_steps or training.local_epochs * math.ceil(records / size)

    def passes() -> Iterator[np.ndarray]:
        while True:
            order = generator.permutation(records)
            yield from (order[start : start + size] for start in range(0, records, size))

    return islice(passes(), steps)
