"""Which global parameters a site takes from the server: those that training can have made of the ones it knows.

A server may send any numbers: parameters that single out a record, saturate a gate, or make rounding large. A site
knows where the run began and the last parameters that it was sent, and how many rounds lie between, trained with it or
without. One round moves them by no more than `federation.movement` says, so k rounds by no more than k times that.
"""

from hashlib import sha256

import numpy as np

from fedmpt_core.config.job import JobConfig
from fedmpt_core.federation.movement import largest_change
from fedmpt_core.model.vector import ParameterLayout

ROUNDING = 2.0**-22  # of the norm, in a round: parameters travel as float32


class StateRefused(ValueError):
    """The global parameters are none that this run can have. The sentence holds public numbers of the job only."""


class States:
    """What a site knows of the global parameters of one run."""

    def __init__(self, job: JobConfig, layout: ParameterLayout, initial: bytes) -> None:
        """Knows the start.

        Args:
            job: the agreed job.
            layout: of the trained tensors.
            initial: the site's own initial parameters in wire bytes.
        """
        self._job, self._layout = job, layout
        self._start = self._last = 0, layout.decode(initial)  # rounds of training behind it, and the parameters

    def before(self, round_number: int, block: bytes) -> np.ndarray:
        """The parameters that a round of training starts from.

        Args:
            round_number: of training.
            block: the parameters in wire bytes.

        Returns:
            (d,) float32.

        Raises:
            StateRefused: the job has no such round, or no training leads to these parameters; nothing was noted.
            LayoutError: they are not of the job's layout, or not finite.
        """
        first, last = self._job.first_round, self._job.training.rounds
        if not first <= round_number <= last:
            raise StateRefused(f"the training round is not one of {first} to {last}")
        return self.after(round_number - 1, block)

    def after(self, trained: int, block: bytes) -> np.ndarray:
        """The parameters after so many rounds of training, as an evaluation gets them; otherwise as `before`."""
        begin, last = self._job.first_round - 1, self._job.training.rounds
        if not begin <= trained <= last:
            raise StateRefused(f"the round of evaluation is not one of {begin} to {last}")
        state = self._layout.decode(block)
        agreed = self._job.resume.state if self._job.resume and trained == begin else ""
        if agreed and sha256(block).hexdigest() != agreed:
            raise StateRefused("the global parameters are not those that resume.state names")
        if trained < self._last[0]:
            raise StateRefused(f"the global parameters of round {trained} came after those of round {self._last[0]}")
        self._compare(self._start, trained, state)
        self._compare(self._last, trained, state)
        self._last = trained, state
        if agreed:
            self._start = self._last
        return state

    def _compare(self, known: tuple[int, np.ndarray], trained: int, state: np.ndarray) -> None:
        since, before = known
        norm, allowed = float(np.linalg.norm(before.astype(np.float64))), 0.0
        for number in range(since + 1, trained + 1):
            largest = largest_change(self._job, self._layout, number, norm + allowed)
            allowed += largest + ROUNDING * (norm + allowed + largest)
        steps = state.astype(np.float64) - before
        # every update is cut off at the range, so no number moves further
        if self._job.secagg.masked and not self._job.privacy.distributed:
            furthest = (trained - since) * self._job.secagg.value_range * (1 + ROUNDING)
            _need(float(np.abs(steps).max(initial=0.0)), furthest, since, "secagg.value_range")
        _need(float(np.linalg.norm(steps)), allowed, since, "federation.max_movement, L2 norm")


def _need(moved: float, allowed: float, since: int, what: str) -> None:
    if not moved <= allowed:
        raise StateRefused(
            f"the global parameters moved by {moved:.3g} since round {since + 1}, at most {allowed:.3g} can be ({what})"
        )
