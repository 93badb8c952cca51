"""A member's half of FLARE-SA/1: messages in, messages out, no network (Bonawitz et al. 2017, malicious server).

Key exchange once per epoch, then in each round the masked vector with the sealed shares, the signature over the list
of survivors, and the shares that open exactly one sum. A check that fails ends the round here and reveals nothing.
"""

import hmac
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from hashlib import sha256
from typing import Any, NoReturn

import numpy as np

from fedmpt_core.secagg import context as contexts
from fedmpt_core.secagg import messages as wire
from fedmpt_core.secagg.errors import Abort, SecAggError, UnexpectedMessage
from fedmpt_core.secagg.identity import SiteIdentity, Trust
from fedmpt_core.secagg.key_exchange import KeyExchange
from fedmpt_core.secagg.keys import commit_edge, commit_self, self_mask_key
from fedmpt_core.secagg.latch import Latch, digest_of, masked_digest
from fedmpt_core.secagg.masking import add_all
from fedmpt_core.secagg.policy import Terms
from fedmpt_core.secagg.roster import Roster
from fedmpt_core.secagg.shamir import SHARE_BYTES, split

NEW, ADVERTISED, READY, TRAINING, MASKED, CONSISTENT = "NEW", "ADVERTISED", "READY", "TRAINING", "MASKED", "CONSISTENT"


@dataclass
class _Round:
    """What a member keeps of an open round: nothing that opens a mask but its own row of shares."""

    number: int
    attempt: int
    request: bytes
    cohort: tuple[int, ...]
    threshold: int
    context: bytes
    own_row: bytes = field(default=b"", repr=False)
    survivors: tuple[int, ...] = ()

    def need(self, count: int, what: str) -> None:
        if count < self.threshold:
            raise SecAggError(
                Abort.BELOW_THRESHOLD,
                f"{count} {what} of {len(self.cohort)} members, the threshold is {self.threshold}",
            )

    def check(self, context: bytes) -> None:
        if not hmac.compare_digest(context, self.context):
            raise SecAggError(Abort.CTX_MISMATCH, "a message of another job, round or attempt")


def _step(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A request that came before gets the same bytes again; a refusal ends the round or the key exchange."""

    @wraps(handler)
    def answer(self: "SecAggClient", request: bytes, *rest: Any) -> Any:
        known = self._answers.get(handler.__name__)
        if known and hmac.compare_digest(known[0], sha256(request).digest()):
            return known[1]
        try:
            reply = handler(self, request, *rest)
        except SecAggError:
            self._leave_round()
            raise
        if reply is not None:
            self._answers[handler.__name__] = sha256(request).digest(), reply
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
        >>> terms = Terms("job-1", bytes(32), words=2, floors=Floors(), max_sites=3, rounds=1, attempts=0)
        >>> def member(name):
        ...     identity = SiteIdentity.ephemeral(name)  # a real site has a start-up kit and a roster
        ...     return SecAggClient(terms, identity, roster=None, root_pem=None, latch=None, store=lambda latch: None)
        >>> members, server = {name: member(name) for name in "abc"}, SecAggServer(terms, ChainCheck(None))

        Once: keys.

        >>> request = server.open_epoch(list(members))
        >>> for name in members:
        ...     server.take_advertisement(name, members[name].advertise(request))
        >>> directory = server.directory()
        >>> for name in members:
        ...     server.take_confirm(name, members[name].confirm(directory))

        In each round: masked vectors, signatures over who is in the sum, shares that open it.

        >>> model = model_digest({"state": np.zeros(2, "<f4")})
        >>> request = server.open_round(1, 0, server.members, model)
        >>> for name in members:
        ...     train_first = members[name].begin(request, model) is None
        ...     server.take_masked(name, members[name].mask(np.array([1, 20], dtype=np.uint32)))
        >>> request = server.consistency_request()
        >>> for name in members:
        ...     server.take_consistency(name, members[name].consistency(request))
        >>> for name, request in server.unmask_requests().items():
        ...     server.take_unmask(name, members[name].unmask(request))
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
            SecAggError: POLICY, a real identity without a roster or the other way round.
        """
        if identity.insecure != (roster is None):
            raise SecAggError(Abort.POLICY, "a start-up kit needs a roster, and an ephemeral identity must have none")
        self.terms, self.name = terms, identity.name
        self._identity, self._clock = identity, clock
        self._trust = Trust(roster, root_pem) if roster else None
        self._store, self._latch = store, latch or Latch(terms.job_id)
        self._answers: dict[str, tuple[bytes, bytes]] = {}
        self._state, self._epoch = NEW, 0
        self._exchange: KeyExchange | None = None
        self._round: _Round | None = None
        self._left = bytes(32)  # context of the round that was left last

    def __repr__(self) -> str:
        return f"SecAggClient({self.name}, {self._state}, round {self._latch.round})"

    def __reduce__(self) -> NoReturn:
        raise SecAggError(Abort.POLICY, "a member's keys may not be copied or stored")

    @property
    def round(self) -> int:
        """Number of the open round, 0 between rounds."""
        return self._round.number if self._round else 0

    @property
    def state(self) -> str:
        """NEW, ADVERTISED, READY, TRAINING, MASKED, CONSISTENT or READY again: what came last, and what may come."""
        return self._state

    @property
    def latch(self) -> Latch:
        """What was said so far."""
        return self._latch

    @_step
    def advertise(self, request: bytes) -> bytes:
        """Answer ADQ1 with this member's keys of a new epoch, signed with the key of its certificate."""
        asked = wire.AdvertiseRequest.decode(request, self.terms.max_sites)
        if not hmac.compare_digest(asked.job_digest, self.terms.digest):
            raise SecAggError(
                Abort.CTX_MISMATCH, "the server's terms of the job are not this site's: both must run the same release"
            )
        if asked.epoch <= self._epoch:
            raise UnexpectedMessage(f"epoch {asked.epoch}", f"one after {self._epoch}")
        if self._identity.insecure:
            if self.name not in asked.names:
                raise SecAggError(Abort.ROSTER, f"{self.name} is not among the names that the server gave")
            self._trust = Trust(Roster.unpinned(asked.names), None)
        elif asked.names:
            raise SecAggError(Abort.POLICY, "the server offers a list of members, but this site trusts its roster only")
        if self._exchange:
            self._exchange.erase()
        self._leave_round()
        self._answers.clear()
        if self._trust is None:
            raise SecAggError(Abort.POLICY, "this site has no roster")
        self._state, self._epoch = NEW, asked.epoch
        self._exchange = KeyExchange(self.terms, self._identity, self._trust, asked.epoch, clock=self._clock)
        self._save(replace(self._latch, setup=(digest_of(self._exchange.advert),)))
        self._state = ADVERTISED
        return self._exchange.advert

    @_step
    def confirm(self, request: bytes) -> bytes:
        """Answer DRC1, the directory of all adverts, with a signature over exactly that directory."""
        exchange = self._in("a directory", ADVERTISED)
        self._state = NEW  # until every check has passed
        reply = exchange.confirm(request)
        self._save(replace(self._latch, setup=(*self._latch.setup, digest_of(reply))))
        self._state = READY
        return reply

    @_step
    def begin(self, request: bytes, model_digest: bytes) -> bytes | None:
        """Check RND1, the start of a round.

        Args:
            request: the message.
            model_digest: of the global parameters that came with it, worked out by this member.

        Returns:
            None: the member shall train and call `mask`. MSK1 when the same request came before.
        """
        asked = wire.RoundRequest.decode(request, self.terms.max_sites)
        exchange = self._in("a round", READY, TRAINING, MASKED, CONSISTENT)
        if asked.epoch != exchange.epoch:
            raise UnexpectedMessage(f"a round of epoch {asked.epoch}", f"epoch {exchange.epoch}")
        self._check_order(asked.round, asked.attempt, sha256(request).digest())
        threshold = self._threshold(asked)
        exchange.check_cohort(asked.cohort, dict(asked.confirms))
        if not hmac.compare_digest(asked.model_digest, model_digest):
            raise SecAggError(Abort.CTX_MISMATCH, "the model that came is not the one that the round names")
        self._leave_round()
        exchange.pairs.advance(asked.round)
        cohort = contexts.cohort_digest(self.terms.digest, exchange.roster_digest, asked.cohort)
        context = contexts.context(self.terms.job_id, asked.round, asked.attempt, cohort, model_digest)
        self._round = _Round(
            asked.round, asked.attempt, sha256(request).digest(), tuple(asked.cohort), threshold, context
        )
        for step in ("begin", "consistency", "unmask"):
            self._answers.pop(step, None)
        self._state = TRAINING
        return None

    def mask(self, vector: np.ndarray, release: str = "") -> bytes:
        """The masked vector of the round that `begin` has opened, MSK1.

        Args:
            vector: (words,) uint32 of `encoding`; not changed.
            release: hex SHA-256 of the update in it, for the latch.

        Raises:
            SecAggError: no round is open, another length, or the latch cannot be written; nothing may be sent then.
        """
        exchange = self._in("a vector", TRAINING)
        if vector.shape != (self.terms.words,) or vector.dtype != np.dtype("<u4"):
            raise SecAggError(
                Abort.OVERFLOW, f"the vector has shape {vector.shape}, the job has {self.terms.words} words"
            )
        now, own, pairs = self._open(), exchange.own, exchange.pairs
        others = [m for m in now.cohort if m != own]
        seed = os.urandom(32)
        edges = {m: pairs.edge_seed(m, now.context) for m in others}
        masked = vector.copy()
        plus = [self_mask_key(seed, now.context), *(edges[m] for m in others if own < m)]
        add_all(masked, plus, [edges[m] for m in others if own > m])
        shares = [split(secret, now.threshold, len(now.cohort)) for secret in (seed, *edges.values())]
        rows = {m: b"".join(s[place] for s in shares) for place, m in enumerate(now.cohort)}
        message = wire.Masked(
            context=now.context,
            member=own,
            digest=sha256(masked.data).digest(),
            self_commitment=commit_self(seed, now.context),
            edge_commitments=tuple(commit_edge(edges[m], now.context, own, m) for m in others),
            sealed=tuple(pairs.seal(m, now.context, rows[m]) for m in others),
            signature=bytes(64),
            vector=masked,
        )
        reply = replace(message, signature=exchange.sign(message.text)).encode()
        digest = masked_digest(reply[: len(reply) - masked.nbytes], message.digest)
        fresh = Latch(
            self.terms.job_id,
            now.number,
            now.attempt,
            cohort=now.cohort,
            threshold=now.threshold,
            setup=self._latch.setup,
            release=release,
        )
        try:
            self._save(fresh.saying(digest, stage="masked", context=now.context.hex()))
        except SecAggError:
            self._leave_round()  # no second vector under the keys of this context, even though the first never left
            raise
        self._answers["begin"] = now.request, reply
        now.own_row, self._state = rows[own], MASKED
        return reply

    @_step
    def consistency(self, request: bytes) -> bytes:
        """Answer CSY1: latch the list of survivors on disk, then sign it."""
        exchange, now = self._in("a list of survivors", MASKED), self._open()
        asked = wire.ConsistencyRequest.decode(request, self.terms.max_sites)
        now.check(asked.context)
        if exchange.own not in asked.survivors or not set(asked.survivors) <= set(now.cohort):
            raise SecAggError(Abort.POLICY, "the survivors lack this site or hold one outside the cohort")
        now.need(len(asked.survivors), "survivors")
        text = wire.consistency_text(now.context, exchange.directory, asked.survivors)
        reply = wire.Consistent(exchange.own, exchange.sign(text)).encode()
        self._save(self._latch.saying(digest_of(reply), stage="signed", survivors=digest_of(text)))
        now.survivors, self._state = tuple(asked.survivors), CONSISTENT
        return reply

    @_step
    def unmask(self, request: bytes) -> bytes:
        """Answer UNQ1: shares of the latched survivors' self masks and of their edges to the dropped, no others."""
        exchange, now = self._in("an unmask request", CONSISTENT), self._open()
        asked = wire.UnmaskRequest.decode(request, cohort=len(now.cohort), max_sites=self.terms.max_sites)
        now.check(asked.context)
        if tuple(asked.survivors) != now.survivors:
            raise SecAggError(Abort.LATCHED, "the survivors are not those that this site has signed")
        text = wire.consistency_text(now.context, exchange.directory, now.survivors)
        signers = [member for member, _ in asked.signatures]
        if len(set(signers)) != len(signers) or not set(signers) <= set(now.survivors):
            raise SecAggError(Abort.POLICY, "a signature is given twice or by a member outside the survivors")
        now.need(len(signers), "signatures")
        for member, signature in asked.signatures:
            exchange.verify(member, signature, text, "the survivors")
        others = [m for m in now.survivors if m != exchange.own]
        rows = {exchange.own: now.own_row}
        for member, sealed in zip(others, asked.sealed, strict=True):
            rows[member] = exchange.pairs.open(member, now.context, sealed)
            if len(rows[member]) != SHARE_BYTES * len(now.cohort):
                raise SecAggError(Abort.BAD_SHARE, f"member {member} sealed a row of another length", culprit=member)
        dropped = [m for m in now.cohort if m not in now.survivors]
        message = wire.Unmasked(
            context=now.context,
            member=exchange.own,
            self_shares=tuple(rows[m][:SHARE_BYTES] for m in now.survivors),
            edge_shares=tuple(tuple(_edge_share(rows[m], now.cohort, m, d) for d in dropped) for m in now.survivors),
            signature=bytes(64),
        )
        reply = replace(message, signature=exchange.sign(message.text)).encode()
        self._save(self._latch.saying(digest_of(reply), stage="released"))
        self._leave_round()
        exchange.pairs.advance(now.number + 1)  # what the round's masks were made of is gone
        return reply

    def abort(self, error: SecAggError) -> bytes:
        """ABR1, which tells the server why this member left; empty when it has no keys yet."""
        if self._exchange is None:
            return b""
        culprit = wire.NOBODY if error.culprit is None else error.culprit
        message = wire.AbortMessage(self._left, self._exchange.own, error.code, culprit, bytes(64))
        reply = replace(message, signature=self._exchange.sign(message.text)).encode()
        self._save(replace(self._latch, left=digest_of(reply)))
        return reply

    def leave(self) -> None:
        """Give up the open round, for a reason that this class knows nothing of."""
        self._leave_round()

    def _threshold(self, asked: wire.RoundRequest) -> int:
        """Of a round; another attempt may neither bring in members nor lower it.

        Otherwise a server could open one attempt with the signatures of some members, and another with the signatures
        of the rest, and members that masked in both would be in two sums.
        """
        threshold, last = self.terms.floors.threshold(len(asked.cohort)), self._latch
        if last.stage == "none" or asked.round != last.round:
            return threshold
        threshold = max(threshold, last.threshold)
        if not set(asked.cohort) <= set(last.cohort) or threshold > len(asked.cohort):
            raise SecAggError(
                Abort.POLICY,
                f"attempt {asked.attempt} of round {asked.round} has members that the last did not have, or fewer than "
                f"its threshold of {last.threshold}",
            )
        return threshold

    def _check_order(self, number: int, attempt: int, request: bytes) -> None:
        """Rounds only go up; an attempt is repeated only while nothing of the round was signed."""
        if not 1 <= number <= self.terms.rounds or attempt > self.terms.attempts:
            raise SecAggError(
                Abort.POLICY,
                f"round {number} attempt {attempt} is beyond the job's {self.terms.rounds} rounds and "
                f"{self.terms.attempts} further attempts",
            )
        last = self._latch
        if number == last.round and last.stage in ("signed", "released"):
            raise SecAggError(Abort.LATCHED, f"round {number} has a signed list of survivors: it cannot be repeated")
        if last.stage != "none" and (number, attempt) <= (last.round, last.attempt):
            raise UnexpectedMessage(f"round {number} attempt {attempt}", f"one after {last.round}, {last.attempt}")
        begun = self._round
        if begun and (begun.number, begun.attempt) == (number, attempt) and begun.request != request:
            raise UnexpectedMessage(f"round {number} attempt {attempt} with other content", "what came before")

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

    def _leave_round(self) -> None:
        """Forget what could open a mask of the round; the keys of the epoch stay."""
        if self._round:
            self._left, self._round = self._round.context, None
        if self._state in (TRAINING, MASKED, CONSISTENT):
            self._state = READY


def _edge_share(row: bytes, cohort: tuple[int, ...], member: int, dropped: int) -> bytes:
    place = 1 + [m for m in cohort if m != member].index(dropped)
    return row[place * SHARE_BYTES : (place + 1) * SHARE_BYTES]
