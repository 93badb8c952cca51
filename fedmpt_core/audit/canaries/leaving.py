"""The updates that leave in a canary run, each worked out again from what was attacked.

Canaries attack sums with noise. An update is made of these by public steps alone: the division, the way back through
the text tower, the optimizer. One that is exactly that shows no more than they do; any other is a failure, whatever
the attack finds.
"""

from typing import Any

import numpy as np

from fedmpt_core.audit.finding import Finding
from fedmpt_core.config.job import JobConfig
from fedmpt_core.model.base import TunedModel
from fedmpt_core.privacy.charged_training import ChargedTraining
from fedmpt_core.privacy.mechanism.noise import PrivateOptimizer
from fedmpt_core.privacy.mechanism.replay import EXACT, HALF, Replay, Tape

WRONG = "the implementation is wrong: treat the run, and every run of this release, as unprotected"


class Leaving:
    """What leaves one site, round by round.

    Attributes:
        findings: one for each round whose update is something else.
    """

    def __init__(self, site: str, units: int, charged: ChargedTraining, model: TunedModel, job: JobConfig) -> None:
        """Keeps from now on what the run's keystream draws; `units` is the site's declared number."""
        self._site, self._units, self._charged, self._model, self._job = site, units, charged, model, job
        self._tape = charged.keystream = Tape(charged.keystream)
        self._sums: list[dict[str, np.ndarray]] = []
        self.findings: list[Finding] = []

    def note(self, optimizer: PrivateOptimizer) -> None:
        """The sums of a step, canaries in them and the noise not."""
        tensors: dict[str, Any] = optimizer.private
        self._sums.append({name: tensor.summed_grad.cpu().numpy().copy() for name, tensor in tensors.items()})

    def after(self, number: int, state: np.ndarray, update: np.ndarray) -> np.ndarray:
        """The parameters after a round, whose update is compared.

        Args:
            number: of the round, from 1.
            state: (d,) parameters at its start.
            update: (d,) what leaves.
        """
        charged = self._charged
        replay = Replay(
            self._model,
            self._job,
            charged.mechanism,
            state=state,
            round_number=number,
            divisor=charged.mechanism.sample_rate * self._units,
            noise=iter(self._tape.normal),
        )
        for sums in self._sums:
            replay.step(sums)
        on_gpu = next(iter(self._model.trainable_parameters().values())).is_cuda
        half = on_gpu and self._job.backbone.precision == "auto"
        error = replay.error(update, HALF if half else EXACT)
        for kept in (self._sums, self._tape.normal, self._tape.sampled):
            kept.clear()
        if error > 1:
            text = (
                f"the update of round {number} is not what its sums, noise, divisor and steps give: it differs by "
                f"{error:.3g} times the rounding, so that the attack on the releases says nothing of it"
            )
            self.findings.append(Finding("canary-update-differs", "fail", self._site, text, WRONG))
        return state + update
