"""A task as a site reads it: every part of its kind, or a refusal. Nothing of it was believed, trained or charged yet.

A server can send what it likes; FLARE hands on whatever its serialisation knows. So nothing looks into a `Shareable` at
a site but this module.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from fedmpt_core.config.job import JobConfig
from fedmpt_core.privacy.ledger.chain import LedgerError, LedgerHead
from fedmpt_flare import tasks

PRIVATE_TASKS = (tasks.CONFIRM, tasks.SHOW)  # each site gets a message of its own
PROTOCOL_TASKS = (tasks.ADVERTISE, tasks.DEAL, tasks.MASK, tasks.OPEN, *PRIVATE_TASKS)
MOST = 2**31  # chosen: above every round and attempt that a job can have


class RequestError(ValueError):
    """A task that the protocol does not know so. The sentence holds public names and bounds, nothing of the task."""


@dataclass(frozen=True)
class Request:
    """One task.

    Attributes:
        task: one of `tasks.TASKS`.
        round: of training; None where the task has none.
        attempt: at it, from 0; None likewise.
        job_digest: of `join`.
        vector: global parameters in wire bytes; None where the task has none.
        protocol: a message of secure aggregation; None where the task has none. That of `PRIVATE_TASKS`
            is for this site alone.
        head: the newest entry of this site's ledger that the server has seen (`LedgerHead.to_dict`), if any.
    """

    task: str
    round: int | None = None
    attempt: int | None = None
    job_digest: str = ""
    vector: bytes | None = None
    protocol: bytes | None = None
    head: dict[str, Any] | None = None

    @staticmethod
    def read(task: Any, shareable: Shareable, fl_ctx: FLContext, site: str) -> "Request":
        """What was asked of a site.

        Raises:
            RequestError: a part is missing or of another kind than the protocol names.
        """
        if type(task) is not str or task not in tasks.TASKS:
            raise RequestError(f"the task is not one of {', '.join(tasks.TASKS)}")
        headers = shareable.get_header
        training = task == tasks.TRAIN
        peer = fl_ctx.get_peer_context() if task in PRIVATE_TASKS else None
        protocol = shareable.get(tasks.PROTOCOL)
        if task in PRIVATE_TASKS:
            protocol = peer.get_prop(tasks.FOR_YOU) if peer else None
        return Request(
            task,
            _count(headers(tasks.ROUND), tasks.ROUND) if training or task == tasks.VALIDATE else None,
            _count(headers(tasks.ATTEMPT), tasks.ATTEMPT) if training else None,
            _part(headers(tasks.JOB_DIGEST), str, tasks.JOB_DIGEST) if task == tasks.JOIN else "",
            _part(shareable.get(tasks.VECTOR), bytes, tasks.VECTOR) if training or task == tasks.VALIDATE else None,
            None if protocol is None else _part(protocol, bytes, tasks.PROTOCOL),
            _head(shareable.get(tasks.FIELDS), site) if training else None,
        )

    def check(self, job: JobConfig) -> None:
        """Whether the job has such a task; what the job says decides, not what was set up.

        Raises:
            RequestError: a message of secure aggregation in a job without masks, or none where one must be; a round or
                an attempt that the job does not have.
        """
        carries = self.task in PROTOCOL_TASKS or (self.task == tasks.TRAIN and job.secagg.masked)
        if self.protocol is not None and not job.secagg.masked:
            raise RequestError("the job has no masks (secagg.mechanism = 'none'), and a message of them came")
        if carries and not job.secagg.masked:
            raise RequestError(f"the job has no masks (secagg.mechanism = 'none'), so there is no task {self.task}")
        if carries and self.protocol is None:
            raise RequestError(f"the job has masks, and {self.task} came without the protocol's message")
        if self.protocol is not None and not carries:
            raise RequestError(f"{self.task} came with a message of the protocol, which it does not have")
        if self.task == tasks.LEDGER and not job.privacy.private:
            raise RequestError("the job has no differential privacy, so it asks for no ledger")
        if self.task == tasks.VALIDATE and not job.is_judged(self.round or 0):
            raise RequestError(f"the job asks for no figures of round {self.round} (federation.evaluate_every)")
        first, last, most = job.first_round, job.training.rounds, job.federation.max_failed_rounds
        if self.task == tasks.TRAIN and not (self.round is not None and first <= self.round <= last):
            raise RequestError(f"the training round is not one of {first} to {last}")
        if self.task == tasks.TRAIN and not (self.attempt is not None and self.attempt <= most):
            raise RequestError(f"the attempt is not one of 0 to {most} (federation.max_failed_rounds)")

    @property
    def step(self) -> tuple[int | None, int | None]:
        """Round and attempt."""
        return self.round, self.attempt

    def content(self) -> bytes:
        """Digest of all that is asked."""
        digest = hashlib.sha256(repr((self.task, self.step, self.job_digest, self.head)).encode())
        for part in (self.vector, self.protocol):
            digest.update(b"-" if part is None else len(part).to_bytes(8, "big") + part)
        return digest.digest()


def _part(value: Any, kind: type, name: str) -> Any:
    if type(value) is not kind:
        raise RequestError(f"{name} is missing or not of the kind {kind.__name__}")
    return value


def _count(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < MOST:
        raise RequestError(f"{name} is missing or no whole number from 0 to {MOST - 1}")
    return value


def _head(fields: Any, site: str) -> dict[str, Any] | None:
    heads = fields.get(tasks.HEADS, {}) if isinstance(fields, Mapping) else None
    if not isinstance(heads, Mapping):
        raise RequestError(f"{tasks.FIELDS} is missing or holds no table {tasks.HEADS}")
    head = heads.get(site)
    if head is None:
        return None
    try:
        return LedgerHead.from_dict(head).to_dict()
    except (LedgerError, TypeError, AttributeError):
        raise RequestError(f"{tasks.HEADS} holds no head of this site's ledger") from None
