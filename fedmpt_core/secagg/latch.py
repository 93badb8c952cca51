"""What a member remembers on disk of what it has said, so that no restart makes it say two different things.

One small record per run, replaced as a whole before anything leaves. It holds digests and numbers, no secret, and is
what a guard compares outgoing messages with. Reading and writing files is the caller's part.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.wire import kind_of

LATCH_VERSION = 2
NUMBERS, LISTS = ("round", "attempt", "members", "version"), ("setup", "said")
Stage = Literal["none", "begun", "masked", "opened"]


class LatchError(SecAggError):
    """The record cannot be read, or is not one: nothing is signed then."""

    def __init__(self, text: str) -> None:
        super().__init__(Abort.STORAGE, text)


@dataclass(frozen=True)
class Latch:
    """How far a member went in a run.

    Attributes:
        job_id: the run.
        round: newest round of training that was begun; 0 before.
        attempt: its newest attempt; -1 before.
        stage: what was done in this round, in any of its attempts: it was `begun`, a vector `masked`, a sum `opened`.
        model: hex digest of the parameters that this round starts from.
        members: size of the largest directory that this member has confirmed.
        context: hex of the newest masked vector's context.
        release: hex SHA-256 of the update inside the masked vector, as the site's ledger names it; may be empty.
        setup: hex SHA-256 of the messages of the newest key exchange.
        said: hex SHA-256 of the messages of the newest attempt.
        left: hex SHA-256 of the newest message that says why the member left.
        continued_by: the run that goes on from this one, in which nothing is said any more; empty while there is none.
        version: version of this record.
    """

    job_id: str
    round: int = 0
    attempt: int = -1
    stage: Stage = "none"
    model: str = ""
    members: int = 0
    context: str = ""
    release: str = ""
    setup: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    left: str = ""
    continued_by: str = ""
    version: int = LATCH_VERSION

    def saying(self, message: str, **changes: object) -> "Latch":
        """With one more message of the attempt, by its `digest_of`."""
        return replace(self, said=(*self.said, message), **changes)

    def continued(self, job_id: str) -> "Latch":
        """For a run that goes on from this one: the rounds that were used up stay so."""
        return Latch(job_id, self.round, stage=self.stage, model=self.model)

    def has_said(self, message: bytes) -> bool:
        """Whether this message is one of the member's newest attempt or key exchange."""
        return digest_of(message) in (*self.setup, *self.said, self.left)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Latch":
        """Raises LatchError when the text is not such a record."""
        try:
            values = json.loads(text)
            known: dict[str, Any] = {k: tuple(v) if k in LISTS else v for k, v in values.items()}
            latch = Latch(**known)
            kinds = {k: type(v) for k, v in asdict(latch).items()}
            right = all(kinds[k] is (int if k in NUMBERS else tuple if k in LISTS else str) for k in kinds)
        except (ValueError, TypeError, KeyError, AttributeError):
            right, latch = False, Latch("")
        if not right or latch.version != LATCH_VERSION or latch.stage not in get_args(Stage):
            raise LatchError(
                "the record of what this site has said is damaged or of another release: it must not be deleted while "
                "the job runs, so end the job first"
            )
        return latch


def digest_of(message: bytes) -> str:
    """How a message is named; a masked vector by its own digest, which whoever makes it has at hand."""
    if kind_of(message) == "MSK1":
        words = 4 * int.from_bytes(message[39:43], "big")
        if words < len(message):
            head = len(message) - words
            return masked_digest(message[:head], hashlib.sha256(memoryview(message)[head:]).digest())
    return hashlib.sha256(message).hexdigest()


def masked_digest(head: bytes, vector_digest: bytes) -> str:
    """`digest_of` a masked vector: `head` is the message without it."""
    return hashlib.sha256(b"masked vector\0" + head + vector_digest).hexdigest()
