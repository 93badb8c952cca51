"""The server's arithmetic: from a round's mean to the next global parameters. numpy only.

Where each site trains by itself the mean is of updates, and is added (federated averaging, McMahan et al. 2017). Where
sites share the noise of a sum the mean is a gradient, and one step of SGD or Adam is taken (Reddi et al. 2021). Either
way a mean that moves the parameters further than `federation.movement` allows is shortened first.

What follows from public sums costs no privacy, and whoever has them can do it again: an audit does.
"""

from collections.abc import Mapping

import numpy as np

from fedmpt_core.config.job import JobConfig
from fedmpt_core.federation.movement import first_averaged, scheduled, shortened
from fedmpt_core.federation.server.averaging import apply
from fedmpt_core.model.vector import ParameterLayout

_TINY = 1e-8  # of adam, as everywhere


class ServerOptimizer:
    """One run's.

    Attributes:
        shortened: whether the newest mean was longer than any that honest sites can give.
    """

    def __init__(self, job: JobConfig, layout: ParameterLayout) -> None:
        """At the start of a run."""
        self._job, self._layout, self.shortened = job, layout, False
        self._steps = job.privacy.distributed
        rates = job.server.group_rates
        factors = [rates.get(name.split(".")[0], 1.0) for name in layout.names]  # type: ignore[call-overload]
        self._factors = np.concatenate([np.full(s, f) for s, f in zip(map(_size, layout.shapes), factors, strict=True)])
        self._memory: dict[str, np.ndarray] = {}

    def next(self, state: np.ndarray, mean: np.ndarray, round_number: int) -> np.ndarray:
        """The next global parameters.

        Args:
            state: (d,) float32, before the round.
            mean: (d,) float64 mean of the sites' updates, or of their gradients.
            round_number: from 1.

        Returns:
            (d,) float32; sums are in float64.
        """
        update = self._step(mean, round_number) if self._steps else mean
        bounded = shortened(update, self._job, self._layout, round_number, state)
        self.shortened = bounded is not update
        after = apply(state, bounded)
        return self._averaged(after, round_number) if self._steps else after

    def memory(self) -> dict[str, np.ndarray]:
        """What it remembers of the rounds so far, (d,) float64 by name; empty for averaging."""
        return dict(self._memory)

    def recall(self, memory: Mapping[str, np.ndarray]) -> None:
        """Go on as another one that remembered this."""
        self._memory = dict(memory)

    def _step(self, gradient: np.ndarray, round_number: int) -> np.ndarray:
        server = self._job.server
        rate = scheduled(server.learning_rate, server.schedule, round_number, self._job.training.rounds)
        before = self._memory.get("velocity", np.zeros(len(gradient)))
        if server.optimizer == "sgd":
            self._memory["velocity"] = server.momentum * before + gradient
            return -rate * self._factors * self._memory["velocity"]
        squares = server.beta2 * self._memory.get("squares", np.zeros(len(gradient))) + (1 - server.beta2) * gradient**2
        self._memory["velocity"] = server.momentum * before + (1 - server.momentum) * gradient
        self._memory["squares"] = squares
        steps = float(self._memory.get("steps", np.zeros(1))[0]) + 1  # a round may be lost for good, and is no step
        self._memory["steps"] = np.array([steps])
        mean = self._memory["velocity"] / (1 - server.momentum**steps)
        return -rate * self._factors * mean / (np.sqrt(squares / (1 - server.beta2**steps)) + _TINY)

    def _averaged(self, after: np.ndarray, round_number: int) -> np.ndarray:
        """The parameters after a round; at the end of a run that averages, their mean over its last rounds."""
        first, last = first_averaged(self._job), self._job.training.rounds
        if round_number < first or first == last:
            return after
        self._memory["sum"] = self._memory.get("sum", np.zeros(len(after))) + after
        self._memory["summed"] = self._memory.get("summed", np.zeros(1)) + 1
        if round_number < last:
            return after
        return (self._memory["sum"] / self._memory["summed"]).astype(np.float32)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
