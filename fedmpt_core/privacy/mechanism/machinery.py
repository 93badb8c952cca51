"""What does the steps of a `Mechanism`: the only place that makes gradient engine, optimizer and sampler from one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from torch import nn

from fedmpt_core.config.job import JobConfig
from fedmpt_core.model.base import TunedModel
from fedmpt_core.privacy.mechanism.gradients import TEXT, GradientEngine
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from fedmpt_core.privacy.mechanism.noise import ClipGroup, PrivateOptimizer
from fedmpt_core.privacy.mechanism.sampling import poisson_batches
from fedmpt_core.training.local import make_optimizer


@dataclass(frozen=True)
class Machinery:
    """The parts; a test puts broken ones here.

    Attributes:
        optimizer: clips, sums, adds noise, divides.
        engine: makes the gradients of single units.
        batches: (units, sample rate, steps, keystream) -> indices of each step's units.
        keystream: makes a run's secret randomness.
    """

    optimizer: type[PrivateOptimizer] = PrivateOptimizer
    engine: type[GradientEngine] = GradientEngine
    batches: Callable[[int, float, int, Keystream], Iterator[np.ndarray]] = poisson_batches
    keystream: Callable[[], Keystream] = Keystream

    def gradients(self, mechanism: Mechanism, model: TunedModel, job: JobConfig) -> GradientEngine:
        """The engine; the job says which loss."""
        feature_space = mechanism.engine == "feature_space"
        return self.engine(model, job.loss, job.training.loss_weight, feature_space=feature_space)

    def noisy(
        self,
        mechanism: Mechanism,
        step: torch.optim.Optimizer,
        private: Mapping[str, nn.Parameter],
        units: float,
        keystream: Keystream,
    ) -> PrivateOptimizer:
        """The optimizer that lets `step` see noisy gradients of `private` alone, for a public number of units.

        Raises:
            ValueError: the bounds do not fit the private parameters.
        """
        return self.optimizer(
            step,
            private,
            clip_groups(private, mechanism),
            noise_multiplier=mechanism.share_multiplier,
            expected_batch_size=mechanism.sample_rate * units,
            keystream=keystream,
            grid_bits=mechanism.grid_bits,
            limit=mechanism.shared.limit if mechanism.shared else inf,
        )

    def round(
        self,
        mechanism: Mechanism,
        model: TunedModel,
        job: JobConfig,
        round_number: int,
        units: float,
        keystream: Keystream,
    ) -> tuple[GradientEngine, PrivateOptimizer]:
        """Engine and optimizer of a round (from 1), joined. Raises ValueError when the job does not fit the model."""
        engine = self.gradients(mechanism, model, job)
        step = make_optimizer(model, job.training, round_number)
        optimizer = self.noisy(mechanism, step, engine.private, units, keystream)
        optimizer.attach_step_hook(lambda _: engine.pull_back())
        return engine, optimizer

    def draws(self, mechanism: Mechanism, units: int, keystream: Keystream) -> Iterator[np.ndarray]:
        """The units of each step of a round, as `poisson_batches` gives them."""
        return self.batches(units, mechanism.sample_rate, mechanism.steps_per_round, keystream)


REAL = Machinery()


def clip_groups(private: Mapping[str, nn.Parameter], mechanism: Mechanism) -> list[ClipGroup]:
    """One flat group, or one for each bound by group, which must then name exactly the trained groups.

    Raises:
        ValueError: other groups are trained than are bounded.
    """
    bounds = mechanism.bounds
    if not isinstance(bounds, Mapping):
        return [ClipGroup(tuple(private), bounds)]
    members: dict[str, list[str]] = {}
    for name in private:
        members.setdefault("contexts" if name == TEXT else name.split(".")[0], []).append(name)
    if set(members) != set(bounds):
        raise ValueError(
            f"privacy.group_norms names {', '.join(sorted(bounds))}, "
            f"trained are {', '.join(sorted(members))}: give each trained group one bound"
        )
    return [ClipGroup(tuple(members[group]), bound) for group, bound in sorted(bounds.items())]
