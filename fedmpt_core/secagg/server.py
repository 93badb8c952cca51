"""The server's half of FLARE-SA/1: it adds masked vectors as they arrive and learns one sum a round.

No network and no knowledge of the vectors. Whatever a member sends is checked against the keys of its advert; a fault
costs the member that made it, and a round that cannot be opened is lost without anything revealed.
"""

import hmac
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import combinations

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedmpt_core.secagg import context as contexts
from fedmpt_core.secagg import messages as wire
from fedmpt_core.secagg.errors import Abort, SecAggError, UnexpectedMessage
from fedmpt_core.secagg.identity import SESSION_SECONDS, ChainCheck
from fedmpt_core.secagg.masking import add_all
from fedmpt_core.secagg.opening import Opening, suspects
from fedmpt_core.secagg.policy import Terms


class RoundLost(Exception):
    """The round ends without a sum, and nothing of any vector is known.

    Attributes:
        culprits: names of members whose fault it is shown to be; the next attempt goes without them.
        signed: whether members have signed a list of survivors, so that the round's number is used up.
    """

    def __init__(self, text: str, *, culprits: Sequence[str] = (), signed: bool = False) -> None:
        super().__init__(text)
        self.culprits, self.signed = tuple(culprits), signed


@dataclass(frozen=True)
class Sum:
    """What a round reveals.

    Attributes:
        words: (words,) uint32, the sum of the survivors' vectors mod 2^32.
        survivors: their names.
        culprits: names of members that dealt or sent wrong shares, which had to be corrected.
        transcript: hex SHA-256 over context, survivors and sum.
    """

    words: np.ndarray
    survivors: tuple[str, ...]
    culprits: tuple[str, ...]
    transcript: str


@dataclass
class _Member:
    name: str
    advert: wire.Advertisement
    raw: bytes
    voice: Ed25519PublicKey
    confirm: bytes = b""


@dataclass
class _Round:
    number: int
    attempt: int
    cohort: tuple[int, ...]
    threshold: int
    context: bytes
    total: np.ndarray
    masked: dict[int, wire.Masked] = field(default_factory=dict)
    survivors: tuple[int, ...] = ()
    signatures: dict[int, bytes] = field(default_factory=dict)
    shares: dict[int, wire.Unmasked] = field(default_factory=dict)


class SecAggServer:
    """One run. `take_...` may be called from several threads."""

    def __init__(self, terms: Terms, check: ChainCheck, *, clock: Callable[[], float] = time.time) -> None:
        """Sends nothing.

        Args:
            terms: worked out by the server.
            check: whom it takes for a member of the federation.
            clock: seconds since 1970.
        """
        self.terms, self._check, self._clock = terms, check, clock
        self._lock = threading.Lock()
        self._epoch, self._opened = 0, 0.0
        self._members: dict[int, _Member] = {}
        self._directory = b""
        self._round: _Round | None = None
        self._last: tuple[int, int, tuple[int, ...]] = (0, 0, ())  # number, threshold and cohort of the newest attempt

    @property
    def epoch(self) -> int:
        """Number of the newest key exchange; 0 before the first."""
        return self._epoch

    @property
    def members(self) -> list[str]:
        """Names that have confirmed the directory."""
        return sorted(m.name for m in self._members.values() if m.confirm)

    @property
    def expires_soon(self) -> bool:
        """Whether the sessions of this epoch end within a sixth of their time."""
        return self._clock() - self._opened > SESSION_SECONDS * 5 / 6

    @property
    def survivors(self) -> list[str]:
        """Names in the list that `consistency_request` has closed."""
        return self._names(self._now().survivors)

    @property
    def threshold(self) -> int:
        """Of the newest attempt."""
        return self._last[1]

    def open_epoch(self, names: Sequence[str] = ()) -> bytes:
        """Start a key exchange; any open round is given up.

        Args:
            names: all invited sites, only where identities are ephemeral.

        Returns:
            ADQ1, for every site.
        """
        self._epoch, self._opened, self._round = self._epoch + 1, self._clock(), None
        self._members, self._directory = {}, b""
        return wire.AdvertiseRequest(self.terms.digest, self._epoch, tuple(sorted(names, key=str.encode))).encode()

    def take_advertisement(self, site: str, data: bytes) -> None:
        """Note a member's keys. Raises SecAggError when they are not its own or not for this job and epoch."""
        advert = wire.Advertisement.decode(data)
        if (advert.job_digest, advert.epoch) != (self.terms.digest, self._epoch):
            raise SecAggError(Abort.CTX_MISMATCH, f"{site} advertises for another job, release or epoch")
        voice = Ed25519PublicKey.from_public_bytes(advert.signing_key)
        _verify(voice, advert.signature, advert.body, site)
        self._check.check(name=site, job_id=self.terms.job_id, now=int(self._clock()), **advert.credentials)
        with self._lock:
            if self._directory or advert.member in self._members:
                raise UnexpectedMessage(f"an advert of {site} as member {advert.member}", "one advert of each member")
            self._members[advert.member] = _Member(site, advert, data, voice)

    def directory(self) -> bytes:
        """DRC1, all adverts that agree on the roster. Raises RoundLost when they are fewer than a cohort."""
        rosters = Counter(m.advert.roster_digest for m in self._members.values())
        common = rosters.most_common(1)[0][0] if rosters else b""
        odd = sorted(m.name for m in self._members.values() if m.advert.roster_digest != common)
        self._members = {i: m for i, m in sorted(self._members.items()) if m.advert.roster_digest == common}
        if len(self._members) < self.terms.floors.min_cohort:
            differ = f"; {', '.join(odd)} rely on another roster" if odd else ""
            raise RoundLost(
                f"{len(self._members)} sites advertised keys, min_cohort={self.terms.floors.min_cohort}{differ}"
            )
        members = self._members.values()
        self._directory = contexts.directory_digest([(m.advert.body, m.advert.session) for m in members])
        return wire.Directory(tuple(m.raw for m in members)).encode()

    def take_confirm(self, site: str, data: bytes) -> None:
        """Note that a member has checked the directory. Raises SecAggError."""
        confirm = wire.Confirm.decode(data)
        member = self._member(site, confirm.member)
        _verify(member.voice, confirm.signature, wire.confirm_text(self.terms.digest, self._directory), site)
        member.confirm = confirm.signature

    def may_repeat(self, sites: Sequence[str]) -> bool:
        """Whether members would accept another attempt of the newest round with this cohort."""
        _, threshold, before = self._last
        cohort = self._cohort(sites)
        return set(cohort) <= set(before) and len(cohort) >= threshold

    def open_round(self, number: int, attempt: int, sites: Sequence[str], model_digest: bytes) -> bytes:
        """Start a round.

        Args:
            number: from 1, larger than that of any round whose survivors were signed.
            attempt: from 0, larger than that of the last attempt.
            sites: names of the cohort, all of them members.
            model_digest: of the global parameters that go with it.

        Returns:
            RND1, for every site of the cohort.

        Raises:
            SecAggError: POLICY, the cohort is too small.
        """
        cohort = self._cohort(sites)
        threshold = self.terms.floors.threshold(len(cohort))
        if self._last[0] == number:
            threshold = max(threshold, self._last[1])
        self._last = number, threshold, cohort
        roster = self._members[cohort[0]].advert.roster_digest
        digest = contexts.cohort_digest(self.terms.digest, roster, cohort)
        context = contexts.context(self.terms.job_id, number, attempt, digest, model_digest)
        total = np.zeros(self.terms.words, dtype="<u4")
        self._round = _Round(number, attempt, cohort, threshold, context, total)
        confirms = tuple((i, self._members[i].confirm) for i in cohort)
        return wire.RoundRequest(number, attempt, self._epoch, model_digest, cohort, confirms).encode()

    def take_masked(self, site: str, data: bytes) -> None:
        """Add a masked vector to the sum; the vector itself is not kept. Raises SecAggError when it is not used."""
        now = self._now()
        masked = wire.Masked.decode(data, cohort=len(now.cohort), words=self.terms.words)
        member = self._member(site, masked.member)
        if not hmac.compare_digest(masked.context, now.context) or masked.member not in now.cohort:
            raise SecAggError(Abort.CTX_MISMATCH, f"the vector of {site} is of another job, round or attempt")
        _verify(member.voice, masked.signature, masked.text, site)
        if not hmac.compare_digest(masked.digest, sha256(masked.vector.data).digest()):
            raise SecAggError(Abort.MALFORMED, f"the vector of {site} is not the one it signed")
        with self._lock:
            if now.survivors or masked.member in now.masked:
                raise UnexpectedMessage(f"a vector of {site}", "one vector of each member, before the round is closed")
            np.add(now.total, masked.vector, out=now.total)
            now.masked[masked.member] = masked.without_vector()

    def consistency_request(self) -> bytes:
        """Close the phase of masked vectors and name the survivors, CSY1.

        Raises:
            RoundLost: too few arrived, or two members do not agree on the edge between them. Another attempt with
                fresh masks may follow, as nothing was signed.
        """
        now = self._now()
        liars = self._disagreeing(now)
        if liars:
            raise RoundLost(
                f"members disagree on their common key: {', '.join(self._names(liars))}", culprits=self._names(liars)
            )
        if len(now.masked) < now.threshold:
            raise RoundLost(f"{len(now.masked)} of {len(now.cohort)} vectors arrived, the threshold is {now.threshold}")
        now.survivors = tuple(sorted(now.masked))
        return wire.ConsistencyRequest(now.context, now.survivors).encode()

    def take_consistency(self, site: str, data: bytes) -> None:
        """Note a survivor's signature over the list. Raises SecAggError."""
        now, consistent = self._now(), wire.Consistent.decode(data)
        member = self._member(site, consistent.member)
        if consistent.member not in now.survivors:
            raise UnexpectedMessage(f"a signature of {site}", "one of a survivor")
        text = wire.consistency_text(now.context, self._directory, now.survivors)
        _verify(member.voice, consistent.signature, text, site)
        with self._lock:
            now.signatures[consistent.member] = consistent.signature

    def unmask_requests(self) -> dict[str, bytes]:
        """UNQ1 by site, for every survivor that has signed. Raises RoundLost below the threshold."""
        now = self._now()
        if len(now.signatures) < now.threshold:
            raise RoundLost(
                f"{len(now.signatures)} of {len(now.survivors)} survivors signed, the threshold is {now.threshold}",
                signed=True,
            )
        signatures = tuple(sorted(now.signatures.items()))
        places = {m: place for place, m in enumerate(now.cohort)}
        requests = {}
        for recipient in now.signatures:
            place = places[recipient]
            # a member's rows leave out its own place
            sealed = tuple(now.masked[u].sealed[place - (places[u] < place)] for u in now.survivors if u != recipient)
            message = wire.UnmaskRequest(now.context, now.survivors, signatures, sealed)
            requests[self._members[recipient].name] = message.encode()
        return requests

    def take_unmask(self, site: str, data: bytes) -> None:
        """Note a survivor's shares. Raises SecAggError."""
        now = self._now()
        dropped = len(now.cohort) - len(now.survivors)
        unmasked = wire.Unmasked.decode(data, survivors=len(now.survivors), dropped=dropped)
        member = self._member(site, unmasked.member)
        if not hmac.compare_digest(unmasked.context, now.context) or unmasked.member not in now.signatures:
            raise SecAggError(Abort.CTX_MISMATCH, f"the shares of {site} are of another round, or it has not signed")
        _verify(member.voice, unmasked.signature, unmasked.text, site)
        with self._lock:
            now.shares[unmasked.member] = unmasked

    def finish(self) -> Sum:
        """Take the masks off the sum.

        Raises:
            RoundLost: too few shares, or too many wrong ones.
        """
        now = self._now()
        if len(now.shares) < now.threshold:
            raise RoundLost(
                f"{len(now.shares)} of {len(now.survivors)} survivors sent shares, the threshold is {now.threshold}",
                signed=True,
            )
        opening = Opening(now.context, now.cohort, now.survivors, now.threshold, now.masked, now.shares)
        try:
            self_masks, plus, minus = opening.masks()
        except SecAggError as error:
            raise RoundLost(str(error), culprits=self._names(opening.culprits), signed=True) from None
        # a dropped member's edge stayed in the sum with the sign of the survivor at its end
        add_all(now.total, minus, [*self_masks, *plus])
        text = wire.result_text(now.context, now.survivors, sha256(now.total.data).digest())
        result = Sum(
            now.total, tuple(self._names(now.survivors)), tuple(self._names(opening.culprits)), sha256(text).hexdigest()
        )
        self._round = None
        return result

    def take_abort(self, site: str, data: bytes) -> tuple[Abort, str]:
        """Read why a member left: the reason, and the name of the member that it blames or ''. Raises SecAggError."""
        abort = wire.AbortMessage.decode(data)
        member = self._member(site, abort.member)
        _verify(member.voice, abort.signature, abort.text, site)
        blamed = self._members.get(abort.culprit)
        if not self._round or not hmac.compare_digest(abort.context, self._round.context):
            return abort.code, ""  # of a round that is over, or before any
        return abort.code, blamed.name if blamed else ""

    def _disagreeing(self, now: _Round) -> list[int]:
        places = {m: place for place, m in enumerate(now.cohort)}
        arrived = sorted(now.masked)
        return suspects(
            (i, j)
            for i, j in combinations(arrived, 2)
            if now.masked[i].edge_commitments[places[j] - 1] != now.masked[j].edge_commitments[places[i]]
        )

    def _cohort(self, sites: Sequence[str]) -> tuple[int, ...]:
        chosen = set(sites)
        return tuple(sorted(i for i, m in self._members.items() if m.name in chosen and m.confirm))

    def _now(self) -> _Round:
        if self._round is None:
            raise UnexpectedMessage("a message of a round", "the start of one")
        return self._round

    def _member(self, site: str, number: int) -> _Member:
        member = self._members.get(number)
        if member is None or member.name != site:
            raise SecAggError(Abort.ROSTER, f"{site} speaks as member {number}, which it is not")
        return member

    def _names(self, members: Sequence[int]) -> list[str]:
        return [self._members[i].name for i in members]


def _verify(voice: Ed25519PublicKey, signature: bytes, text: bytes, site: str) -> None:
    try:
        voice.verify(signature, text)
    except InvalidSignature:
        raise SecAggError(
            Abort.BAD_SIG, f"the message of {site} is not signed with the key that it advertised"
        ) from None
