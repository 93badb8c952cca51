"""The server's conversation with the sites in a masked job: key exchange, then three phases a round.

What the messages mean is `fedmpt_core.secagg.server`; here they become tasks, each with its own timeout.
"""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from nvflare.apis.shareable import Shareable

from fedmpt_core.config.job import JobConfig
from fedmpt_core.federation.server.rounds import MeanUpdate, RoundFailed, Training
from fedmpt_core.federation.terms import secure_terms
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.secagg.context import model_digest
from fedmpt_core.secagg.errors import SecAggError
from fedmpt_core.secagg.identity import ChainCheck
from fedmpt_core.secagg.server import RoundLost, SecAggServer
from fedmpt_core.secagg.start_up_kit import load_root
from fedmpt_flare import tasks
from fedmpt_flare.server.phases import Phase, Phases

TakeMessage = Callable[[str, bytes], None]


class MaskedRounds:
    """Runs the protocol over FLARE's tasks."""

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
        self._job, self._phases = job, phases
        self._server = SecAggServer(terms, ChainCheck(load_root(kit) if kit else None), clock=clock)
        self._number, self._attempt = 1, 0
        self._stale = True
        self._left_out: set[str] = set()
        self._accusers: dict[str, set[str]] = {}
        self._sent: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}

    def train(self, training: Training, task: Shareable, timeout: int) -> None:
        """One attempt at a round; the mean goes to `training`.

        Args:
            training: the attempt.
            task: the training task, to which the protocol's message is added.
            timeout: seconds for training.

        Raises:
            RoundFailed: there is no sum; what the sites may do next was noted.
        """
        self._sent.clear()
        self._seconds = {}
        try:
            self._train(training, task, timeout)
        except RoundLost as lost:
            self._left_out |= set(lost.culprits)
            self._stale = True  # whoever missed the key exchange gets another chance
            if lost.signed:
                self._next_number()
            else:
                self._attempt += 1
            raise RoundFailed(str(lost)) from None
        except SecAggError as error:
            raise RoundFailed(str(error)) from None

    def _train(self, training: Training, task: Shareable, timeout: int) -> None:
        server, wait = self._server, self._job.secagg.phase_timeout
        sites = [site for site in training.sites if site not in self._left_out]
        if self._stale or server.expires_soon:
            self._exchange_keys(sites, wait)
        self._stale = False
        cohort = [site for site in sites if site in server.members]
        if self._attempt and not server.may_repeat(cohort):
            self._next_number()
        digest = model_digest(training.layout.split(training.state))
        task[tasks.PROTOCOL] = server.open_round(self._number, self._attempt, cohort, digest)
        threshold = server.threshold

        def take_masked(site: str, answer: Shareable) -> None:
            training.note(site, answer[tasks.FIELDS].get(tasks.PRIVACY))
            self._take(server.take_masked, site, answer)

        began = time.monotonic()
        self._phases.run(Phase(tasks.TRAIN, task, cohort, timeout), take_masked, self._blame)
        request = server.consistency_request()
        self._seconds["train"] = time.monotonic() - began
        signed = self._ask(tasks.CONSISTENCY, request, server.survivors, wait, server.take_consistency)
        began = time.monotonic()
        private = server.unmask_requests()
        asked = [site for site in signed if site in private]
        self._run(Phase(tasks.UNMASK, tasks.message(), asked, wait, private), server.take_unmask)
        total = server.finish()
        self._seconds["unmask"] = time.monotonic() - began
        facts = {
            "cohort": cohort,
            "threshold": threshold,
            "number": self._number,
            "attempt": self._attempt,
            "epoch": server.epoch,
            "transcript": total.transcript,
            "corrected": list(total.culprits),
            "seconds": {name: round(value, 3) for name, value in self._seconds.items()},
        }
        self._next_number()
        mean = self._encoding.decode(total.words, len(total.survivors))
        sent = {site: self._sent[site] for site in total.survivors}
        training.take_mean(MeanUpdate(mean.mean, sent, facts | {"metrics": mean.metrics}))

    def _next_number(self) -> None:
        self._number, self._attempt = self._number + 1, 0

    def _exchange_keys(self, sites: list[str], wait: int) -> None:
        names = sites if self._job.secagg.insecure_identities else []
        request = self._server.open_epoch(names)
        known = self._ask(tasks.ADVERTISE, request, sites, wait, self._server.take_advertisement)
        self._ask(tasks.CONFIRM, self._server.directory(), known, wait, self._server.take_confirm)

    def _ask(self, name: str, request: bytes, sites: list[str], wait: int, take: TakeMessage) -> list[str]:
        began = time.monotonic()
        answered = self._run(Phase(name, tasks.message(protocol=request), sites, wait), take)
        self._seconds[name.removeprefix("secagg_")] = time.monotonic() - began
        return answered

    def _run(self, phase: Phase, take: TakeMessage) -> list[str]:
        return self._phases.run(phase, lambda site, answer: self._take(take, site, answer), self._blame)

    def _take(self, take: TakeMessage, site: str, answer: Shareable) -> None:
        data = answer.get(tasks.PROTOCOL)
        if type(data) is not bytes:
            raise ValueError("the answer holds no message of the protocol")
        take(site, data)
        self._sent[site] += len(data)

    def _blame(self, site: str, answer: Shareable) -> str:
        """Read a site's signed reason for leaving; a member blamed by more than the assumed colluders is left out."""
        abort = answer.get_header(tasks.ABORT)
        try:
            culprit = self._server.take_abort(site, abort)[1] if type(abort) is bytes else ""
        except SecAggError:
            return ""
        if culprit and culprit != site:
            self._accusers.setdefault(culprit, set()).add(site)
            if len(self._accusers[culprit]) > self._job.secagg.colluders:
                self._left_out.add(culprit)
        return f" (it blames {culprit})" if culprit else ""
