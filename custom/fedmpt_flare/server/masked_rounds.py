"""The server's conversation with the sites in a masked job: key exchange, then three phases a round.

What the messages mean is `fedmpt_core.secagg.server`; here they become tasks, each with its own timeout.
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nvflare.apis.shareable import Shareable

from fedmpt_core.config.job import JobConfig
from fedmpt_core.federation.terms import secure_terms
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.secagg.context import model_digest
from fedmpt_core.secagg.encoding import Decoded
from fedmpt_core.secagg.errors import SecAggError
from fedmpt_core.secagg.identity import ChainCheck
from fedmpt_core.secagg.server import RoundLost, SecAggServer
from fedmpt_core.secagg.start_up_kit import load_root
from fedmpt_flare import tasks


class Take(Protocol):
    """What a phase does with a site's OK answer; raises ValueError when it cannot be used."""

    def __call__(self, site: str, answer: Shareable) -> None:
        """Take one answer."""
        ...


class Phase(Protocol):
    """Send one task to all `sites`, wait for each or the timeout; the names of those whose answer was taken."""

    def __call__(
        self,
        name: str,
        data: Shareable,
        sites: list[str],
        timeout: int,
        take: Take,
        *,
        private: Mapping[str, bytes] = ...,
    ) -> list[str]:
        """Run the phase."""
        ...


@dataclass
class SecureRound:
    """What a round gave.

    Attributes:
        mean: the decoded sum.
        survivors: whose updates are in it.
        sent: bytes of the protocol's messages by site.
        facts: for the record: cohort, threshold, attempt, transcript, seconds by phase.
    """

    mean: Decoded
    survivors: tuple[str, ...]
    sent: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)


class SecureRounds:
    """Runs the protocol over FLARE's tasks."""

    def __init__(
        self, job: JobConfig, run_id: str, layout: ParameterLayout, backbone_digest: str, kit: Path | None, phase: Phase
    ) -> None:
        """Sends nothing.

        Args:
            job: the agreed job.
            run_id: name of the run.
            layout: of the trained tensors.
            backbone_digest: that the sites agree on.
            kit: the server's start-up kit; None in a simulation.
            phase: how a task reaches the sites.

        Raises:
            SecAggError: the job's terms are impossible, or the kit cannot be used.
        """
        agreed = secure_terms(job, run_id, layout, backbone_digest)
        self._job, self._layout, self._encoding, self._phase = job, layout, agreed.encoding, phase
        self._server = SecAggServer(agreed.terms, ChainCheck(load_root(kit) if kit else None))
        self._number, self._attempt = 1, 0
        self._stale = True
        self._left_out: set[str] = set()
        self._blamed: dict[str, set[str]] = {}
        self._sent: Counter[str] = Counter()

    def round(self, sites: list[str], task: Shareable, state: Any, timeout: int, note: Take) -> SecureRound:
        """One round of training.

        Args:
            sites: who has joined the job.
            task: the training task, to which the protocol's message is added.
            state: (d,) global parameters.
            timeout: seconds for training.
            note: called with each answer that is used.

        Raises:
            RoundLost: there is no sum; what the sites may do next was noted.
        """
        self._sent.clear()
        seconds: dict[str, float] = {}
        try:
            return self._round([s for s in sites if s not in self._left_out], task, state, timeout, note, seconds)
        except RoundLost as lost:
            self._left_out |= set(lost.culprits)
            self._stale = True  # whoever missed the key exchange gets another chance
            if lost.signed:
                self._number, self._attempt = self._number + 1, 0
            else:
                self._attempt += 1
            raise
        except SecAggError as error:
            raise RoundLost(str(error)) from None

    def _round(
        self, sites: list[str], task: Shareable, state: Any, timeout: int, note: Take, seconds: dict[str, float]
    ) -> SecureRound:
        server, wait = self._server, self._job.secagg.phase_timeout
        if self._stale or server.expires_soon:
            self._exchange_keys(sites, wait, seconds)
        self._stale = False
        cohort = [s for s in sites if s in server.members]
        if self._attempt and not server.may_repeat(cohort):
            self._number, self._attempt = self._number + 1, 0
        digest = model_digest(self._layout.split(state))
        task[tasks.PROTOCOL] = server.open_round(self._number, self._attempt, cohort, digest)
        threshold = server.threshold

        def masked(site: str, answer: Shareable) -> None:
            note(site, answer)
            self._take(server.take_masked, site, answer)

        began = time.monotonic()
        self._phase(tasks.TRAIN, task, cohort, timeout, masked)
        request = server.consistency_request()
        seconds["train"] = time.monotonic() - began
        signed = self._ask(tasks.CONSISTENCY, request, server.survivors, wait, server.take_consistency, seconds)
        began = time.monotonic()
        private = server.unmask_requests()
        self._phase(
            tasks.UNMASK,
            tasks.message(),
            [s for s in signed if s in private],
            wait,
            lambda site, answer: self._take(server.take_unmask, site, answer),
            private=private,
        )
        found = server.finish()
        seconds["unmask"] = time.monotonic() - began
        facts = {
            "cohort": cohort,
            "threshold": threshold,
            "number": self._number,
            "attempt": self._attempt,
            "epoch": server.epoch,
            "transcript": found.transcript,
            "corrected": list(found.culprits),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        self._number, self._attempt = self._number + 1, 0
        mean = self._encoding.decode(found.words, len(found.survivors))
        return SecureRound(mean, found.survivors, dict(self._sent), facts)

    def blame(self, site: str, abort: bytes) -> str:
        """Read a site's signed reason for leaving; a member blamed by more than the assumed colluders is left out.

        Returns:
            The blamed member's name, or ''.
        """
        try:
            _, culprit = self._server.take_abort(site, abort)
        except SecAggError:
            return ""
        if culprit and culprit != site:
            self._blamed.setdefault(culprit, set()).add(site)
            if len(self._blamed[culprit]) > self._job.secagg.colluders:
                self._left_out.add(culprit)
        return culprit

    def _exchange_keys(self, sites: list[str], wait: int, seconds: dict[str, float]) -> None:
        names = sites if self._job.secagg.insecure_identities else []
        request = self._server.open_epoch(names)
        known = self._ask(tasks.ADVERTISE, request, sites, wait, self._server.take_advertisement, seconds)
        self._ask(tasks.CONFIRM, self._server.directory(), known, wait, self._server.take_confirm, seconds)

    def _ask(
        self, name: str, request: bytes, sites: list[str], wait: int, take: Any, seconds: dict[str, float]
    ) -> list[str]:
        began = time.monotonic()
        data = tasks.message(protocol=request)
        answered = self._phase(name, data, sites, wait, lambda site, answer: self._take(take, site, answer))
        seconds[name.removeprefix("secagg_")] = time.monotonic() - began
        return answered

    def _take(self, take: Any, site: str, answer: Shareable) -> None:
        data = answer.get(tasks.PROTOCOL)
        if type(data) is not bytes:
            raise ValueError("the answer holds no message of the protocol")
        take(site, data)
        self._sent[site] += len(data)
