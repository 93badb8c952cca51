"""The server's half of a run: whom to ask, what to make of the answers, when to evaluate, what to keep.

How the sites are reached is a `Carriage`'s business: FLARE's tasks in a run, plain calls where all sites live in one
process. A round that too few sites answered is tried again, `federation.max_failed_rounds` times in the whole job.
Every round is with the `Keeper` before the next one starts. numpy only, no torch.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from fedmpt_core.config.job import JobConfig
from fedmpt_core.federation.figures import are_figures
from fedmpt_core.federation.joined import Joined
from fedmpt_core.federation.run.record import RunRecord, mean_figures
from fedmpt_core.federation.server.averaging import average
from fedmpt_core.federation.server.checkpoint import Checkpoint, CheckpointError
from fedmpt_core.federation.server.optimizer import ServerOptimizer
from fedmpt_core.federation.server.participation import participants
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.privacy.ledger.chain import LedgerHead


class RoundFailed(RuntimeError):
    """Too few sites answered; a round of training may be tried again."""


class RoundUsedUp(RoundFailed):
    """Sites have opened a sum in this round, or were about to, and refuse it from now on; the next one may follow.

    Attributes:
        before: whether they did so before this attempt, in a run that broke off.
    """

    def __init__(self, text: str, *, before: bool) -> None:
        super().__init__(text)
        self.before = before


@dataclass(frozen=True)
class MeanUpdate:
    """What a round of training gave.

    Attributes:
        update: (d,) float64 mean over the sites in it, of their updates, or of their gradients where they share noise.
        total: (d,) uint32, the sum of masked words that it was made of; None without masks.
        sent: by each of these sites, bytes that it sent.
        facts: what the record says of the masks; empty without.
    """

    update: np.ndarray
    sent: dict[str, int]
    facts: dict[str, Any]
    total: np.ndarray | None = None


@dataclass
class Ask:
    """What sites are asked.

    Attributes:
        round: from 1; 0 is the model before any training.
        sites: whom, sorted.
        layout: of the trained tensors.
        state: (d,) float32 global parameters.
    """

    round: int
    sites: list[str]
    layout: ParameterLayout
    state: np.ndarray

    def vector(self) -> bytes:
        """The parameters in wire bytes."""
        return self.layout.encode(self.state)


@dataclass
class Training(Ask):
    """One attempt at a round of training, and what came of it: updates one by one, or a mean that masks gave.

    Attributes:
        attempt: from 0; a further one asks for the same round again.
        heads: by site, the newest entry of its ledger that the server has seen.
        shares: by site, its declared weight over the largest one, (0, 1].
        private: whether a site must say what it has spent.
        privacy: by site, what it said of its budget in this attempt.
    """

    attempt: int
    heads: dict[str, dict[str, Any]]
    shares: dict[str, float]
    private: bool
    privacy: dict[str, dict[str, Any]] = field(default_factory=dict)
    _updates: dict[str, np.ndarray] = field(default_factory=dict, init=False)
    _weights: dict[str, float] = field(default_factory=dict, init=False)
    _sent: dict[str, int] = field(default_factory=dict, init=False)
    _mean: MeanUpdate | None = field(default=None, init=False)

    def take(self, site: str, update: bytes, weight: float, privacy: Any = None) -> None:
        """A site's own update.

        Args:
            site: its name.
            update: local minus global parameters in wire bytes.
            weight: of the site in the mean, positive and finite.
            privacy: what it says of its budget.

        Raises:
            ValueError: the answer cannot be used; nothing of it was.
        """
        if type(update) is not bytes:
            raise ValueError(f"the update is of the kind {type(update).__name__}, not bytes")
        vector = self.layout.decode(update)
        if not (type(weight) is float and math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight={weight!r:.100}: must be a positive finite number")
        self.note(site, privacy)
        self._updates[site], self._weights[site], self._sent[site] = vector, weight, len(update)

    def note(self, site: str, privacy: Any) -> None:
        """Keep what a site says of its budget, the head of its ledger above all. Raises ValueError when it does not."""
        if not self.private:
            return
        match privacy:
            case {"epsilon": float(epsilon), "delta": float(delta), "head": {**head}}:
                head = LedgerHead.from_dict(head).to_dict()
                self.privacy[site] = {"epsilon": epsilon, "delta": delta, "head": head}
            case _:
                raise ValueError("it does not say what it has spent")

    def take_mean(self, mean: MeanUpdate) -> None:
        """The mean over sites whose own updates nobody has seen."""
        self._mean = mean

    def mean(self, least: int) -> MeanUpdate:
        """What came, averaged. Raises RoundFailed where fewer than `least` sites sent an update."""
        if self._mean:
            return self._mean
        _need(len(self._updates), least, "train")
        sent = {site: self._sent[site] for site in sorted(self._sent)}
        return MeanUpdate(average(self._updates, self._weights), sent, {})


@dataclass
class Evaluation(Ask):
    """One evaluation of the global model, and what came of it.

    Attributes:
        figures: by site, those of `training.evaluation.evaluate`.
    """

    figures: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def take(self, site: str, figures: Mapping[str, Any]) -> None:
        """A site's figures. Raises ValueError when they are none."""
        if not isinstance(figures, Mapping):
            raise ValueError(f"the figures are of the kind {type(figures).__name__}, not a table by name")
        self.figures[site] = figures


class Carriage(Protocol):
    """Takes what is asked to the sites and brings their answers back.

    Each call returns when all sites that were asked have answered, or time is up, and has handed over what came.
    """

    @property
    def stopped(self) -> bool:
        """Whether somebody has ended the job."""
        ...

    def train(self, training: Training) -> None:
        """One attempt at a round. Raises RoundFailed when it can give no mean."""
        ...

    def evaluate(self, evaluation: Evaluation) -> None:
        """One evaluation; sites that give no figures are left out of the mean. Raises RoundFailed."""
        ...


class Keeper:
    """Writes a run down while it goes on; this one keeps nothing."""

    def event(self, kind: str, **values: Any) -> None:
        """Something happened, for whoever watches."""

    def write_record(self, record: RunRecord) -> None:
        """The record has grown."""

    def write_model(self, layout: ParameterLayout, state: np.ndarray) -> None:
        """The parameters have moved."""

    def write_sum(self, round_number: int, total: np.ndarray) -> None:
        """What was opened in a round of shared noise, (d,) uint32: private already, and what the model follows from."""

    def write_start(self, layout: ParameterLayout, state: np.ndarray, memory: Mapping[str, np.ndarray]) -> None:
        """From where a run of shared noise begins: the parameters, and what the optimizer remembers."""

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """A round is complete; another run may go on from here."""


class Rounds:
    """One run: `join`, then `run`, then `end`; before all of them `resume`, where the job says so.

    Attributes:
        record: what happened so far.
        sites: by name, what each that takes part said when it joined.
        layout: of the trained tensors, known after `join`.
        state: (d,) float32 global parameters, known after `join`.
    """

    def __init__(self, job: JobConfig, run_id: str, keeper: Keeper | None = None) -> None:
        """Asks nobody.

        Args:
            job: the agreed job.
            run_id: name of the run.
            keeper: writes it down; None keeps nothing.
        """
        self._job, self._run_id, self._keeper = job, run_id, keeper or Keeper()
        self.record = RunRecord.start(job, run_id)
        self.sites: dict[str, Joined] = {}
        self.layout, self.state = ParameterLayout((), ()), np.zeros(0, np.float32)
        self._privacy: dict[str, dict[str, Any]] = {}  # by site, what it last said of its budget
        self._failed_attempts = 0
        self._resumed: Checkpoint | None = None

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. Raises CheckpointError when it does not fit the job.

        Record and model hold all finished rounds from here on, also where nobody joins any more.
        """
        checkpoint.check(self._job)
        self._resumed, kept = checkpoint, checkpoint.record
        names = ("rounds", "lost", "sites", "backbone", "is_stand_in")
        self.record = replace(self.record, **{name: getattr(kept, name) for name in names})
        self._keeper.write_model(checkpoint.layout, checkpoint.state)

    def join(self, answers: Mapping[str, Joined], absent: Mapping[str, str] | None = None) -> None:
        """Who takes part, and with which layout and initial parameters.

        Sites must agree byte for byte on the initial parameters and on the frozen weights; one that differs from the
        majority is left out.

        Args:
            answers: by site, what it said.
            absent: by site, why one that was invited does not join.

        Raises:
            RoundFailed: fewer than `federation.min_sites` are left.
        """
        least = self._job.federation.min_sites
        _need(len(answers), least, "join")
        starts = {site: answer.start for site, answer in answers.items()}
        common = Counter(starts.values()).most_common(1)[0][0]
        odd = sorted(site for site, start in starts.items() if start != common)
        if odd:
            logging.getLogger(__name__).warning(
                "%s start from other weights than the rest and are left out", ", ".join(odd)
            )
            self._keeper.event("left_out", sites=odd, reason="other backbone weights or initial parameters")
        self.sites = {site: answers[site] for site in sorted(answers) if site not in odd}
        _need(len(self.sites), least, "join")
        one = next(iter(self.sites.values()))
        self.layout, self.state = one.layout, one.initial
        self._optimizer = ServerOptimizer(self._job, self.layout)
        reasons = dict(absent or {}) | dict.fromkeys(odd, "it has other frozen weights or initial parameters")
        self.record = self.record.joined({site: joined.fields() for site, joined in self.sites.items()}, reasons)
        self._keeper.event("joined", sites=list(self.sites), backbone=one.backbone, stand_in=one.is_stand_in)

    def run(self, carriage: Carriage) -> Iterator[dict[str, Any]]:
        """All rounds.

        Args:
            carriage: reaches the sites.

        Yields:
            Each finished round as the record has it (`RunRecord.rounds`), round 0 first unless the run is resumed.

        Raises:
            RuntimeError: too many attempts failed, the job was stopped, or it asks for figures and gets none.
            CheckpointError: the job continues a run and `resume` was not called.
        """
        figures = self._job.federation.evaluate_every
        if figures and not any(joined.evaluates for joined in self.sites.values()):
            raise RuntimeError(
                f"federation.evaluate_every = {figures} asks for figures, and no site that joined holds test pictures "
                "that show a label: nothing was trained; let a site evaluate (data.evaluate = true), or ask for none, "
                "federation.evaluate_every = 0"
            )
        if self._resumed:
            self._continue(self._resumed)
        elif self._job.resume:
            raise CheckpointError(f"the job continues run '{self._job.resume.job}': give its checkpoint to `resume`")
        else:
            yield self._finish(carriage, 0, time.monotonic(), MeanUpdate(np.zeros(0), {}, {}))
        if self._job.privacy.distributed:
            self._keeper.write_start(self.layout, self.state, self._optimizer.memory())
        for number in range(self._job.first_round, self._job.training.rounds + 1):
            try:
                began, mean = self._train(carriage, number)
            except RoundUsedUp as error:
                self.record = self.record.without_round(number, str(error))
                continue
            self.state = self._optimizer.next(self.state, mean.update, number)
            if self._optimizer.shortened:
                self._keeper.event("shortened", round=number)  # a site has sent what no honest one can
            if self._job.privacy.distributed and mean.total is not None:
                self._keeper.write_sum(number, mean.total)
            yield self._finish(carriage, number, began, mean)
        if figures and not any("mAP" in row for row in self.record.rounds):
            raise RuntimeError(
                f"all rounds are done, but no site gave figures, for which federation.evaluate_every = {figures} asks; "
                "the model is complete, and each site's log says why it gave none"
            )

    def end(self, outcome: str) -> None:
        """The record's last state."""
        self.record = self.record.ended_as(outcome)
        self._keeper.write_record(self.record)

    def _continue(self, earlier: Checkpoint) -> None:
        if earlier.layout != self.layout:
            raise RuntimeError("the checkpoint has another layout than the sites: both must be of one release")
        self.state, self._privacy = earlier.state, dict(earlier.privacy)
        self._optimizer.recall(earlier.memory)
        self._keep(earlier.round)  # who goes on from this run counts what it spends, also where it completes no round

    def _keep(self, number: int) -> None:
        """Model, record and checkpoint after a round; of one round, whatever ends the run."""
        privacy, memory = dict(self._privacy), self._optimizer.memory()
        self._keeper.write_model(self.layout, self.state)
        self._keeper.write_checkpoint(
            Checkpoint(self._run_id, self._job, number, self.layout, self.state, self.record, privacy, memory)
        )
        self._keeper.write_record(self.record)

    def _train(self, carriage: Carriage, number: int) -> tuple[float, MeanUpdate]:
        """When the attempt that gave a mean began, and the mean."""
        attempt = 0
        while True:
            began = time.monotonic()
            try:
                return began, self._attempt(carriage, number, attempt)
            except RoundFailed as error:
                used_up = isinstance(error, RoundUsedUp)
                attempt, self._failed_attempts = attempt + 1, self._failed_attempts + (not used_up or not error.before)
                logging.getLogger(__name__).warning("round %d failed: %s", number, error)
                self._keeper.event("round_failed", round=number, reason=str(error))
                if carriage.stopped or self._failed_attempts > self._job.federation.max_failed_rounds:
                    raise RuntimeError(f"round {number} failed: {error}") from error
                if used_up:
                    raise

    def _attempt(self, carriage: Carriage, number: int, attempt: int) -> MeanUpdate:
        asked = participants(self.sites, self._job, number, attempt)
        heads = {site: budget["head"] for site, budget in self._privacy.items()}
        shares = {site: self._share(site) for site in asked}
        training = Training(number, asked, self.layout, self.state, attempt, heads, shares, self._job.privacy.private)
        self._keeper.event("training", round=number, sites=asked)
        try:
            carriage.train(training)
            return training.mean(self._job.federation.min_sites)
        finally:
            self._privacy |= training.privacy  # charged at the site, whatever became of the round

    def _share(self, site: str) -> float:
        if self._job.federation.weighting == "equal" or self._job.secagg.max_weight is None:
            return 1.0
        return min(1.0, self.sites[site].weight / self._job.secagg.max_weight)

    def _finish(self, carriage: Carriage, number: int, began: float, mean: MeanUpdate) -> dict[str, Any]:
        figures = self._evaluate(carriage, number)
        privacy = {site: self._privacy[site] for site in mean.sent if site in self._privacy}
        seconds = time.monotonic() - began
        self.record = self.record.with_round(number, seconds, mean.sent, figures, privacy, mean.facts)
        if number:
            self._keep(number)
        else:
            self._keeper.write_record(self.record)
        self._keeper.event("round", **self.record.rounds[-1])
        return self.record.rounds[-1]

    def _evaluate(self, carriage: Carriage, number: int) -> dict[str, Any]:
        """Mean figures; none where the job asks for none now, or no site can give any."""
        asked = [site for site, joined in self.sites.items() if joined.evaluates]
        if not asked or not self._job.is_judged(number):
            return {}
        self._keeper.event("evaluating", round=number, sites=asked)
        evaluation = Evaluation(number, asked, self.layout, self.state)
        with suppress(RoundFailed):  # the job was ended: the round is trained and paid for, so it is kept
            carriage.evaluate(evaluation)
        given = {site: values for site, values in sorted(evaluation.figures.items()) if are_figures(values, self._job)}
        for site in sorted({*evaluation.figures} - {*given}):
            self._keeper.event("dropped", site=site, phase="validate", reason="what it sent are no figures of the job")
        return mean_figures([*given.values()])


def _need(answered: int, least: int, phase: str) -> None:
    if answered < least:
        raise RoundFailed(f"{phase}: {answered} sites answered, min_sites={least}; each site's log says why it did not")
