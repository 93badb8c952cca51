"""A member's half of FLARE-SA/2: messages in, messages out, no network.

Key exchange and dealing once per epoch; then in each round: ready, the masked vector, the shares that open exactly one
sum. A check that fails ends the round here and reveals nothing.
"""

import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from hashlib import sha256
from typing import Any, NoReturn

import numpy as np

from fedmpt_core.secagg import messages as wire
from fedmpt_core.secagg.context import context as context_of
from fedmpt_core.secagg.errors import Abort, SecAggError, UnexpectedMessage
from fedmpt_core.secagg.identity import SiteIdentity, Trust
from fedmpt_core.secagg.key_exchange import KeyExchange
from fedmpt_core.secagg.keys import self_mask_key
from fedmpt_core.secagg.latch import Latch, digest_of, masked_digest
from fedmpt_core.secagg.masking import add_all
from fedmpt_core.secagg.policy import Terms
from fedmpt_core.secagg.roster import Roster

NEW, ADVERTISED, DEALT, READY, BEGUN, MASKED = "NEW", "ADVERTISED", "DEALT", "READY", "BEGUN", "MASKED"


@dataclass
class _Round:
    """What a member keeps of an open round: nothing that opens a mask but its shares of others'."""

    number: int
    attempt: int
    model: bytes
    slot: int = 0
    cohort: tuple[int, ...] = ()
    context: bytes = bytes(32)


def _step(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A request that came before gets the same bytes again; a refusal ends the round."""

    @wraps(handler)
    def answer(self: "SecAggClient", request: bytes, *rest: Any) -> Any:
        known = self._answers.get(handler.__name__)
        # the same round with another model is another request
        asked = sha256(b"".join(part for part in (request, *rest) if type(part) is bytes)).digest()
        if known and type(request) is bytes and hmac.compare_digest(known[0], asked):
            return known[1]
        try:
            reply = handler(self, request, *rest)
        except SecAggError:
            self.leave()
            raise
        self._answers[handler.__name__] = asked, reply
        return reply

    return answer


class SecAggClient:
    """One member in one run. Its state lives in memory only; `Latch` is what a restart remembers.

    Example:
        Three members and a server in one process, over the bytes that would travel. The server learns one sum.

        >>> import numpy as np
        >>> from fedmpt_core.secagg.client import SecAggClient
        >>> from fedmpt_core.secagg.context import model_digest
        >>> from fedmpt_core.secagg.identity import ChainCheck, SiteIdentity
        >>> from fedmpt_core.secagg.policy import Floors, Terms
        >>> from fedmpt_core.secagg.server import SecAggServer
        >>> terms = Terms("job-1", bytes(32), 2, Floors(), max_sites=3, first_round=1, rounds=1, attempts=0)
        >>> def member(name):
        ...     identity = SiteIdentity.ephemeral(name)  # a real site has a start-up kit and a roster
        ...     return SecAggClient(terms, identity, roster=None, root_pem=None, latch=None, store=lambda latch: None)
        >>> members, server = {name: member(name) for name in "abc"}, SecAggServer(terms, ChainCheck(None))

        Once: keys, and shares of the secrets to come.

        >>> request = server.open_epoch(1)
        >>> for name in members:
        ...     server.take_advertisement(name, members[name].advertise(request))
        >>> directory = server.directory()
        >>> for name in members:
        ...     server.take_deal(name, members[name].deal(directory))
        >>> for name, request in server.deals().items():
        ...     server.take_confirm(name, members[name].confirm(request))

        In each round: who has an update, masked vectors, shares that open their sum.

        >>> model = model_digest({"state": np.zeros(2, "<f4")})
        >>> request = server.open_round(1, 0, model)
        >>> for name in members:
        ...     members[name].begin(request, model)
        ...     server.take_ready(name, members[name].ready())
        >>> request = server.mask_request()
        >>> for name in members:
        ...     server.take_masked(name, members[name].mask(request, np.array([1, 20], dtype=np.uint32)))
        >>> request = server.open_request()
        >>> for name in members:
        ...     server.take_opened(name, members[name].open(request))
        >>> server.finish().words
        array([ 3, 60], dtype=uint32)
    """

    def __init__(
        self,
        terms: Terms,
        identity: SiteIdentity,
        roster: Roster | None,
        root_pem: bytes | None,
        latch: Latch | None,
        store: Callable[[Latch], None],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Sends nothing.

        Args:
            terms: worked out by this member.
            identity: its own certificate and key.
            roster: whom it trusts, by key; None only with an ephemeral identity.
            root_pem: certificate of the federation's root, with a roster.
            latch: what it remembers of this run; None when it never took part.
            store: called with each new `Latch`; on disk when it returns, or raises SecAggError(STORAGE).
            clock: seconds since 1970.

        Raises:
            SecAggError: POLICY, a real identity without a roster or the other way round; ROSTER, the roster has another
                key for this member than its own.
        """
        if identity.insecure != (roster is None):
            raise SecAggError(Abort.POLICY, "a start-up kit needs a roster, and an ephemeral identity must have none")
        if roster:
            roster.check_key(identity.name, identity.fingerprint)
        self.terms, self.name = terms, identity.name
        self._identity, self._clock = identity, clock
        self._trust = Trust(roster, root_pem)
        self._store, self._latch = store, latch or Latch(terms.job_id)
        self._answers: dict[str, tuple[bytes, bytes | None]] = {}
        self._state, self._epoch = NEW, 0
        self._exchange: KeyExchange | None = None
        self._masked_in: KeyExchange | None = None  # the epoch in which the latch's round was masked
        self._round: _Round | None = None
        self._left = bytes(32)  # context of the round that was left last, or a directory's digest

    def __repr__(self) -> str:
        return f"SecAggClient({self.name}, {self._state}, round {self._latch.round})"

    def __reduce__(self) -> NoReturn:
        raise SecAggError(Abort.POLICY, "a member's keys may not be copied or stored")

    @property
    def state(self) -> str:
        """NEW, ADVERTISED, DEALT, READY, BEGUN, MASKED or READY again: what came last, and what may come."""
        return self._state

    @property
    def latch(self) -> Latch:
        """What was said so far."""
        return self._latch

    @_step
    def advertise(self, request: bytes) -> bytes:
        """Answer ADQ1 with this member's keys of a new epoch, signed with the key of its certificate."""
        asked = wire.AdvertiseRequest.decode(request)
        if not hmac.compare_digest(asked.job_digest, self.terms.digest):
            raise SecAggError(
                Abort.CTX_MISMATCH, "the server's terms of the job are not this site's: both must run the same release"
            )
        if asked.epoch <= self._epoch:
            raise UnexpectedMessage(f"epoch {asked.epoch}", f"one after {self._epoch}")
        if self._exchange:
            self._exchange.erase()
        self.leave()
        self._answers.clear()
        self._state, self._epoch, self._left = NEW, asked.epoch, bytes(32)
        self._exchange = KeyExchange(
            self.terms, self._identity, self._trust, asked.epoch, asked.round, clock=self._clock
        )
        self._save(replace(self._latch, setup=(digest_of(self._exchange.advert),)))
        self._state = ADVERTISED
        return self._exchange.advert

    @_step
    def deal(self, request: bytes) -> bytes:
        """Answer DRC1, the directory of all adverts, with this member's secrets, shared with all of them."""
        exchange = self._in("a directory", ADVERTISED)
        self._state = NEW  # until every check has passed
        reply = self._setup(exchange, exchange.deal, request)
        least = self._least(exchange)
        if len(exchange.names) < least:
            raise SecAggError(
                Abort.POLICY,
                f"the directory has {len(exchange.names)} members, but one of {self._latch.members} was confirmed "
                f"before in this run, and no sum may have fewer than its threshold of {least}",
            )
        self._state = DEALT
        return reply

    @_step
    def confirm(self, request: bytes) -> bytes:
        """Answer DLS1, all dealings, with a signature over exactly these.

        Where a dealer's row does not open or fit, another DLS1 may follow, in which the dealer has shown it.
        """
        exchange = self._in("dealings", DEALT)
        reply = self._setup(exchange, exchange.confirm, request)
        self._save(replace(self._latch, members=max(self._latch.members, len(exchange.names))))
        self._state = READY
        return reply

    def show(self, request: bytes) -> bytes:
        """Answer SHW1, others' complaints about the rows that this member has dealt, by showing these rows."""
        if self._exchange is None:
            raise UnexpectedMessage("complaints", "a directory")
        return self._setup(self._exchange, self._exchange.show, request)

    @_step
    def begin(self, request: bytes, model_digest: bytes) -> None:
        """Check RND1, the start of a round; after it the member may train, and says `ready`.

        Args:
            request: the message.
            model_digest: of the global parameters that came with it, worked out by this member.
        """
        asked = wire.RoundRequest.decode(request, self.terms.max_sites)
        exchange = self._in("a round", READY, BEGUN, MASKED)
        if not hmac.compare_digest(asked.epoch, exchange.digest):
            raise SecAggError(Abort.CTX_MISMATCH, "a round of another epoch")
        if not hmac.compare_digest(asked.model_digest, model_digest):
            raise SecAggError(Abort.CTX_MISMATCH, "the model that came is not the one that the round names")
        self._check_order(asked)
        if not exchange.serves(asked.round):
            raise SecAggError(Abort.CTX_MISMATCH, f"the keys are not for round {asked.round}: exchange them anew")
        exchange.check_confirms(dict(asked.confirms))
        self.leave()
        again = asked.round == self._latch.round
        self._save(
            replace(
                self._latch,
                round=asked.round,
                attempt=asked.attempt,
                stage=self._latch.stage if again else "begun",
                model=model_digest.hex(),
                said=(),
                release="",
            )
        )
        self._round, self._state = _Round(asked.round, asked.attempt, model_digest), BEGUN
        for step in ("mask", "open"):
            self._answers.pop(step, None)

    def ready(self) -> bytes:
        """RDY1: this member has an update for the round that `begin` has opened."""
        exchange, now = self._in("an update", BEGUN), self._open()
        message = wire.Ready(exchange.digest, now.number, now.attempt, exchange.own, bytes(64))
        reply = replace(message, signature=exchange.sign(message.text)).encode()
        self._save(self._latch.saying(digest_of(reply)))
        return reply

    @_step
    def mask(self, request: bytes, vector: np.ndarray, release: str = "") -> bytes:
        """Answer MRQ1, the list of whose vectors shall be summed, with this member's under masks, MSK1.

        Args:
            request: the message; a further one may name fewer members, while no sum was opened.
            vector: (words,) uint32 of `encoding`; not changed.
            release: hex SHA-256 of the update in it, for the latch.

        Raises:
            SecAggError: no round is open, the list is none, another length, or the latch cannot be written; nothing may
                be sent then.
        """
        exchange, now = self._in("a list of members", BEGUN, MASKED), self._open()
        if vector.shape != (self.terms.words,) or vector.dtype != np.dtype("<u4"):
            raise SecAggError(
                Abort.OVERFLOW, f"the vector has shape {vector.shape}, the job has {self.terms.words} words"
            )
        asked = wire.MaskRequest.decode(request, self.terms.max_sites)
        if (asked.epoch, asked.round, asked.attempt) != (exchange.digest, now.number, now.attempt):
            raise SecAggError(Abort.CTX_MISMATCH, "a list of another epoch, round or attempt")
        self._check_cohort(exchange, asked.cohort)
        seed = exchange.take_seed(now.number, asked.slot)
        now.slot, now.cohort = asked.slot, asked.cohort
        now.context = context_of(
            self.terms.job_id, now.number, now.attempt, now.slot,
            epoch=exchange.digest, cohort=now.cohort, model=now.model,
        )  # fmt: skip
        edges = {m: exchange.pairs.edge_seed(m, now.context) for m in now.cohort if m != exchange.own}
        masked = vector.copy()
        plus = [self_mask_key(seed, now.context), *(edge for m, edge in edges.items() if exchange.own < m)]
        add_all(masked, plus, [edge for m, edge in edges.items() if exchange.own > m])
        exchange.pairs.advance(asked.slot + 1)  # nothing opens an edge any more
        message = wire.Masked(now.context, exchange.own, sha256(masked.data).digest(), bytes(64), masked)
        reply = replace(message, signature=exchange.sign(message.text)).encode()
        digest = masked_digest(reply[: len(reply) - masked.nbytes], message.digest)
        self._save(self._latch.saying(digest, stage="masked", context=now.context.hex(), release=release))
        self._masked_in, self._state = exchange, MASKED
        return reply

    @_step
    def open(self, request: bytes) -> bytes:
        """Answer OPQ1: shares of the self masks of exactly those whose list this member has masked for.

        Once in a round of training, whatever becomes of it: the latch is on disk before the shares leave.
        """
        exchange, now = self._in("a request to open a sum", MASKED), self._open()
        if not hmac.compare_digest(wire.OpenRequest.decode(request).context, now.context):
            raise SecAggError(Abort.CTX_MISMATCH, "a message of another job, round, attempt or list")
        message = wire.Opened(now.context, exchange.own, exchange.shares(now.slot, now.cohort), bytes(64))
        reply = replace(message, signature=exchange.sign(message.text)).encode()
        self._save(self._latch.saying(digest_of(reply), stage="opened"))
        self.leave()
        return reply

    def abort(self, error: SecAggError) -> bytes:
        """ABR1, which tells the server why this member left; empty when it has no keys yet."""
        if self._exchange is None or self._exchange.own == wire.NOBODY:
            return b""
        culprit = wire.NOBODY if error.culprit is None else error.culprit
        message = wire.AbortMessage(self._left, self._exchange.own, error.code, culprit, bytes(64))
        reply = replace(message, signature=self._exchange.sign(message.text)).encode()
        self._save(replace(self._latch, left=digest_of(reply)))
        return reply

    def leave(self) -> None:
        """Give up the open round, and forget what could open a mask of it; the epoch goes on."""
        if self._round and self._exchange:
            self._left = self._round.context
            self._exchange.forget(self._round.slot)
        self._round = None
        self._answers.pop("begin", None)  # what opened a round does not open it twice
        if self._state in (BEGUN, MASKED):
            self._state = READY

    def _setup(self, exchange: KeyExchange, step: Callable[[bytes], bytes], request: bytes) -> bytes:
        """One step of the key exchange, in the latch before its answer leaves."""
        try:
            reply = step(request)
        finally:
            self._left = exchange.directory
        self._save(replace(self._latch, setup=(*self._latch.setup, digest_of(reply))))
        return reply

    def _least(self, exchange: KeyExchange) -> int:
        """Fewest members of a sum: by the largest directory that this member has ever confirmed in the run.

        Otherwise a server could show smaller directories later, and have the same round summed by halves.
        """
        return self.terms.floors.threshold(max(len(exchange.names), self._latch.members))

    def _check_cohort(self, exchange: KeyExchange, cohort: tuple[int, ...]) -> None:
        least = self._least(exchange)
        if exchange.own not in cohort or not set(cohort) <= exchange.dealers:
            raise SecAggError(Abort.POLICY, "the list lacks this site, or holds one that has dealt nothing")
        if len(cohort) < least:
            raise SecAggError(
                Abort.BELOW_THRESHOLD,
                f"{len(cohort)} members are to be summed of a directory of {len(exchange.names)}, the threshold is "
                f"{least}",
            )

    def _check_order(self, asked: wire.RoundRequest) -> None:
        """Rounds only go up, and one that was opened, or masked in an earlier epoch, is used up.

        So no two sums of one round have an honest member in common (docs/secure-aggregation.md has the proof).
        """
        number, last = asked.round, self._latch
        if not self.terms.first_round <= number <= self.terms.rounds or asked.attempt > self.terms.attempts:
            raise SecAggError(
                Abort.POLICY,
                f"round {number} attempt {asked.attempt} is not one of rounds {self.terms.first_round} to "
                f"{self.terms.rounds} with {self.terms.attempts} further attempts",
            )
        if number > last.round:
            return
        if number < last.round:
            raise UnexpectedMessage(f"round {number}", f"round {last.round} or a later one")
        if last.stage == "opened" or (last.stage == "masked" and self._masked_in is not self._exchange):
            raise SecAggError(Abort.LATCHED, f"round {number} is used up at this site: go on with the next")
        if not hmac.compare_digest(bytes.fromhex(last.model), asked.model_digest):
            raise SecAggError(Abort.LATCHED, f"round {number} was begun here from other parameters")
        if asked.attempt <= last.attempt:
            raise UnexpectedMessage(f"round {number} attempt {asked.attempt}", f"one after attempt {last.attempt}")

    def _in(self, what: str, *states: str) -> KeyExchange:
        if self._state not in states or self._exchange is None:
            raise UnexpectedMessage(f"{what} in state {self._state}", " or ".join(states))
        return self._exchange

    def _open(self) -> _Round:
        if self._round is None:
            raise UnexpectedMessage("a message of a round", "the start of one")
        return self._round

    def _save(self, latch: Latch) -> None:
        self._store(latch)
        self._latch = latch
