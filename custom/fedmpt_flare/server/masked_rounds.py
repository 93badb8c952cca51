"""The server's conversation with the sites in a masked job: key exchange, then training and two short phases a round.

What the messages mean is `fedmpt_core.secagg.server`; here they become tasks, each with its own timeout.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.shareable import Shareable

from fedmpt_core.config.job import JobConfig
from fedmpt_core.federation.server.rounds import MeanUpdate, RoundFailed, RoundUsedUp, Training
from fedmpt_core.federation.terms import secure_terms
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.secagg.context import model_digest
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.identity import ChainCheck
from fedmpt_core.secagg.server import RoundLost, SecAggServer
from fedmpt_core.secagg.start_up_kit import load_root
from fedmpt_flare import tasks
from fedmpt_flare.server.phases import Phase, Phases, refusal_of

TakeMessage = Callable[[str, bytes], None]


class MaskedRounds:
    """Runs the protocol over FLARE's tasks.

    Attributes:
        left_out: by site, what it was shown to have done, or which of its keys others do not know; nothing goes on with
            it in this run.
    """

    def __init__(
        self,
        job: JobConfig,
        run_id: str,
        layout: ParameterLayout,
        backbone_digest: str,
        kit: Path | None,
        phases: Phases,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Sends nothing.

        Args:
            job: the agreed job.
            run_id: name of the run.
            layout: of the trained tensors.
            backbone_digest: that the sites agree on.
            kit: the server's start-up kit; None in a simulation.
            phases: how a task reaches the sites.
            clock: seconds since 1970.

        Raises:
            SecAggError: the job's terms are impossible, or the kit cannot be used.
        """
        terms, self._encoding = secure_terms(job, run_id, layout, backbone_digest)
        self._phases, self._wait, self._colluders = phases, job.secagg.phase_timeout, job.secagg.colluders
        self._server = SecAggServer(terms, ChainCheck(load_root(kit) if kit else None), clock=clock)
        self.left_out: dict[str, str] = {}
        self._stale = True
        self._reasons: dict[str, str] = {}  # by site, why it is not in the newest attempt
        self._ready = self._used_up = 0  # sites with an update, and those that have the round behind them
        self._sent: Counter[str] = Counter()
        self._seconds = defaultdict[str, float](float)

    def train(self, training: Training, task: Shareable, timeout: int) -> None:
        """One attempt at a round; the mean goes to `training`.

        Args:
            training: the attempt.
            task: the training task, to which the protocol's message is added.
            timeout: seconds for training.

        Raises:
            RoundFailed: there is no sum; RoundUsedUp, and there will be none in this round.
        """
        self._sent.clear()
        self._seconds.clear()
        self._reasons, self._ready, self._used_up = {}, 0, 0
        try:
            self._train(training, task, timeout)
        except RoundLost as lost:
            self._leave_out(lost.culprits)
            self._stale = True  # whoever missed the key exchange gets another chance
            # sites that have the round behind them from a run that broke off: the next round is theirs too
            behind = self._used_up > self._colluders and self._ready + self._used_up >= self._server.threshold
            if lost.used_up or behind:
                raise RoundUsedUp(str(lost), before=not lost.used_up) from None
            raise RoundFailed(str(lost)) from None
        except SecAggError as error:
            raise RoundFailed(str(error)) from None

    def _train(self, training: Training, task: Shareable, timeout: int) -> None:
        server = self._server
        if self._stale or not server.serves(training.round):
            self._new_epoch(training.round, training.sites)
        digest = model_digest(training.layout.split(training.state))
        task[tasks.PROTOCOL] = server.open_round(training.round, training.attempt, digest)

        def take_ready(site: str, answer: Shareable) -> None:
            # first what it has spent: a site that does not say so is in no sum
            training.note(site, answer[tasks.FIELDS].get(tasks.PRIVACY))
            self._take(server.take_ready, site, answer)

        began = time.monotonic()
        phase = Phase(tasks.TRAIN, task, server.members, timeout)
        self._ready = len(self._phases.run(phase, take_ready, self._refused))
        self._seconds["train"] += time.monotonic() - began
        cohort = self._masked()
        self._ask(tasks.OPEN, server.open_request(), cohort, server.take_opened)
        total = server.finish()
        self._leave_out(total.culprits)
        decoded = self._encoding.decode(total.words, [training.shares[site] for site in cohort])
        facts = {
            "cohort": cohort,
            "members": server.size,
            "threshold": server.threshold,
            "attempt": training.attempt,
            "epoch": server.epoch,
            "transcript": total.transcript,
            "left_out": self._absent(training.sites, cohort),
            "faults": total.culprits,
            "beyond": decoded.beyond,
            "seconds": {name: round(value, 3) for name, value in self._seconds.items()},
        }
        sent = {site: self._sent[site] for site in cohort}
        training.take_mean(MeanUpdate(decoded.mean, sent, facts | {"metrics": decoded.metrics}, total.words))

    def _masked(self) -> list[str]:
        """Vectors of all that are ready; without those of sites that fail meanwhile, which costs nobody a training."""
        gone: list[str] = []
        while True:
            request = self._server.mask_request(gone)
            cohort = self._server.cohort
            self._ask(tasks.MASK, request, cohort, self._server.take_masked)
            gone = self._server.missing
            if not gone:
                return cohort
            for site in gone:
                self._reasons.setdefault(site, "it had an update and sent no masked vector")

    def _new_epoch(self, number: int, sites: list[str]) -> None:
        """Exchange keys; whoever is at fault is left out, and the others begin again. Raises RoundLost."""
        while True:
            try:
                self._exchange_keys(number, [site for site in sites if site not in self.left_out])
                self._stale = False
                return
            except RoundLost as lost:
                if not lost.culprits:
                    raise
                self._leave_out(lost.culprits)

    def _exchange_keys(self, number: int, sites: list[str]) -> None:
        server = self._server
        known = self._ask(tasks.ADVERTISE, server.open_epoch(number), sites, server.take_advertisement)
        self._ask(tasks.DEAL, server.directory(), known, server.take_deal)
        self._ask_each(tasks.CONFIRM, server.deals(), server.take_confirm)
        while complaints := server.show_requests():
            shown: dict[str, bytes] = {}
            self._ask_each(tasks.SHOW, complaints, shown.__setitem__)
            if faults := server.judge(shown):
                raise RoundLost("; ".join(f"{site}: {why}" for site, why in faults.items()), culprits=faults)
            self._ask_each(tasks.CONFIRM, server.shown_deals(), server.take_confirm)

    def _leave_out(self, culprits: Mapping[str, str]) -> None:
        for site in culprits.keys() - self.left_out.keys():
            self._phases.leave_out(site, culprits[site])
        self.left_out |= culprits

    def _absent(self, sites: list[str], cohort: list[str]) -> dict[str, str]:
        reasons = self._reasons | self.left_out
        return {site: reasons.get(site, "it did not answer") for site in sites if site not in cohort}

    def _ask(self, name: str, request: bytes, sites: list[str], take: TakeMessage) -> list[str]:
        return self._run(Phase(name, tasks.message(protocol=request), sites, self._wait), take)

    def _ask_each(self, name: str, requests: Mapping[str, bytes], take: TakeMessage) -> list[str]:
        return self._run(Phase(name, tasks.message(), sorted(requests), self._wait, requests), take)

    def _run(self, phase: Phase, take: TakeMessage) -> list[str]:
        began = time.monotonic()
        taken = self._phases.run(phase, lambda site, answer: self._take(take, site, answer), self._refused)
        self._seconds[phase.task.removeprefix("secagg_")] += time.monotonic() - began
        return taken

    def _take(self, take: TakeMessage, site: str, answer: Shareable) -> None:
        data: Any = answer.get(tasks.PROTOCOL)
        try:
            if type(data) is not bytes:
                raise ValueError("the answer holds no message of the protocol")
            take(site, data)
        except ValueError as error:
            self._reasons[site] = str(error)
            raise
        self._sent[site] += len(data)

    def _refused(self, site: str, answer: Shareable) -> str:
        """Note why a site refuses, and hear the complaint that it signed."""
        self._reasons[site] = refusal_of(answer)
        abort = answer.get_header(tasks.ABORT)
        try:
            code, culprit = self._server.take_abort(site, abort) if type(abort) is bytes else (None, "")
        except SecAggError:
            return ""
        self._used_up += code == Abort.LATCHED
        return f" (it blames {culprit})" if culprit else ""
