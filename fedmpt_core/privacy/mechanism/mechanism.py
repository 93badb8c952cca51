"""What a site does to its records in every private step, as a value: what runs and what it costs both follow from it.

Made from the job by `Mechanism.of`, once for a run. `machinery` builds gradient engine, clipping, noise and sampler
from it; the accountant prices its `steps`; the ledger holds its `describe()`, from which a round is charged; and the
self-test holds what runs against that description. So what runs and what is charged cannot drift apart.

Must never: need torch, since FLARE's parent process and auditors price jobs too; hold what cannot change a result.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal, Self, TypeAlias

from fedmpt_core.config.job import JobConfig
from fedmpt_core.privacy.accounting.epsilon import Steps
from fedmpt_core.privacy.mechanism.shared_noise import SharedNoise

Name: TypeAlias = Literal[
    "poisson-subsampled-gaussian", "poisson-subsampled-gaussian-share", "gaussian co-occurrence counts"
]
DP_SGD: Name = "poisson-subsampled-gaussian"
SHARES: Name = "poisson-subsampled-gaussian-share"
COUNTS: Name = "gaussian co-occurrence counts"
GRID_BITS = 20  # released numbers lie on a grid of 2^-20 of the clip bound


@dataclass(frozen=True)
class Mechanism:
    """Steps that take units by Poisson sampling, clip each one's gradient, sum, and add Gaussian noise.

    Attributes:
        unit: what is protected, `record` or `group`.
        sample_rate: probability of each unit to be in a step, (0, 1].
        noise_multiplier: standard deviation of the noise over the clip bound, above 0; of the noise in a sum, where
            sites share it.
        bounds: on the L2 norm of what one unit adds, or one bound for each group of parameters.
        steps_per_round: steps between two releases, at least 1.
        engine: which gradients are clipped, `exact` or `feature_space`; empty where there is no model.
        shared: how sites share the noise of a sum; None where each adds the whole.
        name: what ledgers call it. All kinds cost what `steps` says.
    """

    unit: str
    sample_rate: float
    noise_multiplier: float
    bounds: float | Mapping[str, float]
    steps_per_round: int
    engine: str = ""
    shared: SharedNoise | None = None
    name: Name = DP_SGD

    @classmethod
    def of(cls, job: JobConfig) -> Self:
        """A job's.

        Raises:
            ValueError: its noise multiplier is not worked out.
        """
        privacy = job.privacy
        if privacy.noise_multiplier is None:
            raise ValueError("privacy.noise_multiplier is not worked out: nothing may be trained with this job")
        return cls(
            privacy.unit,
            privacy.sample_rate,
            privacy.noise_multiplier,
            {**privacy.group_norms} or privacy.max_grad_norm,
            job.steps_per_round,
            privacy.engine,
            SharedNoise.of(job) if privacy.distributed else None,
            SHARES if privacy.distributed else DP_SGD,
        )

    @property
    def share_multiplier(self) -> float:
        """Standard deviation of what one site adds over the clip bound."""
        return self.noise_multiplier / sqrt(self.shared.honest if self.shared else 1)

    @property
    def grid_bits(self) -> int:
        """Released numbers lie on a grid of 2^-grid_bits of the clip bound."""
        return self.shared.bits if self.shared else GRID_BITS

    def steps(self, count: int | None = None) -> Steps:
        """What an accountant prices: so many steps, or those of a round."""
        count = self.steps_per_round if count is None else count
        return Steps(self.sample_rate, self.noise_multiplier, count, self.shared.honest if self.shared else 1)

    def describe(self) -> dict[str, Any]:
        """What the ledger says of a round: all that its price follows from, and what was clipped."""
        price = self.steps()
        return {
            "mechanism": self.name,
            "unit": self.unit,
            **({"engine": self.engine} if self.engine else {}),
            "max_grad_norm": dict(self.bounds) if isinstance(self.bounds, Mapping) else self.bounds,
            "sample_rate": price.sample_rate,
            "noise_multiplier": price.noise_multiplier,
            "steps": price.count,
            **self._sharing(),
        }

    def _sharing(self) -> dict[str, Any]:
        if self.shared is None:
            return {}
        return {
            "noise": "distributed",
            "share_multiplier": self.share_multiplier,
            "honest": self.shared.honest,
            "min_sites": self.shared.min_sites,
            "colluders": self.shared.colluders,
        }
