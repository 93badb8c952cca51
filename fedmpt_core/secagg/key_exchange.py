"""One epoch of a member: fresh keys that its certificate's key has signed, secrets shared with all, and who is in it.

Every member checks for itself the directory of all adverts and then all dealings, and signs exactly these, so that no
two members go on with different ones, and no secret is used whose shares do not fit.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedmpt_core.secagg import messages as wire
from fedmpt_core.secagg.context import directory_digest, epoch_digest
from fedmpt_core.secagg.dealing import ROUNDS, ROW_BYTES, SLOTS, deal, leaves, share_of, slots_of
from fedmpt_core.secagg.errors import Abort, SecAggError, UnexpectedMessage
from fedmpt_core.secagg.identity import CLOCK_SKEW, SESSION_SECONDS, Session, SiteIdentity, Trust
from fedmpt_core.secagg.keys import PairwiseKeys
from fedmpt_core.secagg.policy import Terms
from fedmpt_core.secagg.shamir import SHARE_BYTES, random_element
from fedmpt_core.secagg.wire import u16


class KeyExchange:
    """A member's keys and secrets of one epoch. In memory only.

    Attributes:
        advert: the ADV1 message.
        names: the members' names in the directory's order; empty before.
        own: the member's place among them.
        directory: digest of the directory; 32 zeros before.
        digest: of the epoch, once all dealings are confirmed; empty before.
        threshold: of the directory.
    """

    def __init__(
        self,
        terms: Terms,
        identity: SiteIdentity,
        trust: Trust,
        epoch: int,
        first: int,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Draws the keys and signs the advert.

        Args:
            terms: of the run.
            identity: of the member.
            trust: whom it believes.
            epoch: its number.
            first: the first of the `ROUNDS` rounds of training that the epoch serves.
            clock: seconds since 1970.
        """
        self.names: tuple[str, ...] = ()
        self.own, self.threshold, self.directory, self.digest = wire.NOBODY, 0, bytes(32), b""
        self._terms, self._name, self._trust, self._clock = terms, identity.name, trust, clock
        self._epoch, self._first = epoch, first
        self._exchange: X25519PrivateKey | None = X25519PrivateKey.generate()
        self._signing = Ed25519PrivateKey.generate()
        self._voices: list[Ed25519PublicKey] = []
        self._heard: set[int] = set()  # members whose confirmation was checked
        self._pairs: PairwiseKeys | None = None
        self._expires = 0
        self._seeds: dict[int, bytes] = {}  # of this member's own masks, by slot
        self._dealt: list[bytes] = []  # rows that this member has dealt, until the epoch is confirmed
        self._rows: dict[int, bytearray] = {}  # shares that others and the member itself dealt to it, by dealer
        now, signing_key = int(clock()), self._signing.public_key().public_bytes_raw()
        session = Session(
            job_id=terms.job_id,
            site=identity.name,
            certificate_sha256=identity.certificate_sha256,
            signing_key=signing_key,
            not_before=now - CLOCK_SKEW,
            not_after=now + SESSION_SECONDS,
        ).encode()
        advert = wire.Advertisement(
            job_digest=terms.digest,
            roster_digest=trust.digest,
            epoch=epoch,
            round=first,
            exchange_key=self._exchange.public_key().public_bytes_raw(),
            signing_key=signing_key,
            nonce=os.urandom(32),
            signature=bytes(64),
            session=session,
            session_signature=identity.sign(session),
            chain=identity.chain,
        )
        self.advert = replace(advert, signature=self._signing.sign(advert.body)).encode()

    def __repr__(self) -> str:
        return f"KeyExchange({self._name}, epoch {self._epoch})"

    def __reduce__(self) -> NoReturn:
        raise SecAggError(Abort.POLICY, "a member's keys may not be copied or stored")

    def deal(self, request: bytes) -> bytes:
        """Check the directory, derive all edges, forget the exchange key, and share the secrets of all slots.

        Args:
            request: DRC1.

        Returns:
            DEA1.

        Raises:
            SecAggError: an advert is not of a trusted member for this job and epoch, or not this member's own.
        """
        encoded = wire.Directory.decode(request, self._terms.max_sites).adverts
        if self._exchange is None:
            raise UnexpectedMessage("a second directory", "dealings")
        if self.advert not in encoded:
            raise SecAggError(Abort.ROSTER, "the directory does not hold what this site advertised")
        adverts = [wire.Advertisement.decode(a) for a in encoded]
        self.directory = directory_digest([(a.body, a.session) for a in adverts])
        self._voices = [_voice(a, place) for place, a in enumerate(adverts)]
        sessions = [_session(a, place) for place, a in enumerate(adverts)]
        self.own, self.names = encoded.index(self.advert), tuple(session.site for session in sessions)
        if any(one.encode() >= other.encode() for one, other in zip(self.names, self.names[1:], strict=False)):
            raise SecAggError(Abort.ROSTER, "the directory is not in ascending order of distinct sites")
        for place, advert in enumerate(adverts):
            self._check(place, advert)
        keys = [a.exchange_key for a in adverts] + [a.signing_key for a in adverts]
        if len(set(keys)) != len(keys):
            raise SecAggError(Abort.ROSTER, "two members of the directory have the same key")
        self.threshold = self._terms.floors.threshold(len(adverts))
        peers = {place: a.exchange_key for place, a in enumerate(adverts) if place != self.own}
        self._pairs = PairwiseKeys(self.own, self._exchange, peers, self._terms.digest, self.directory)
        self._exchange = None  # forward secrecy rests on this
        self._expires = min(session.not_after for session in sessions)
        return self._deal(len(adverts))

    def confirm(self, request: bytes) -> bytes:
        """Check all dealings and the rows dealt to this member, and sign them.

        Args:
            request: DLS1.

        Returns:
            CFM1.

        Raises:
            SecAggError: BAD_SHARE with the culprit, a dealer's row does not open or fit; another code, the server's
                message is not one that a dealer signed.
        """
        deals = wire.Deals.decode(request, members=len(self.names), threshold=self.threshold)
        dealers = [one.member for one in deals.deals]
        if self.own not in dealers or dealers[-1] >= len(self.names):
            raise SecAggError(Abort.ROSTER, "the dealings lack this site's own, or have one of a stranger")
        if len(dealers) < self.threshold:
            raise SecAggError(
                Abort.BELOW_THRESHOLD,
                f"{len(dealers)} of {len(self.names)} members have dealt, the threshold is {self.threshold}",
            )
        for one in deals.deals:
            if one.directory != self.directory:
                raise SecAggError(Abort.CTX_MISMATCH, f"the dealing of member {one.member} is for another directory")
            self.verify(one.member, one.signature, one.text, "its dealing")
        others = [one for one in deals.deals if one.member != self.own]
        rows = {self.own: self._dealt[self.own]}
        for one, sealed in zip(others, deals.sealed, strict=True):
            rows[one.member] = self._row(one, sealed)
        own = deals.deals[dealers.index(self.own)]
        if not own.dealing.fits(self.own, rows[self.own]):
            raise SecAggError(Abort.ROSTER, "the dealings have another than this site's own")
        self._rows = {member: bytearray(row) for member, row in rows.items()}
        self.pairs.forget_rows()
        self.digest = epoch_digest(self.directory, [one.text for one in deals.deals])
        return wire.Confirm(self.own, self.sign(wire.confirm_text(self.digest))).encode()

    def show(self, request: bytes) -> bytes:
        """Answer SHW1: the rows dealt to members that complained, which they know already if they are honest.

        Returns:
            SHO1, for the server to compare with what this member has committed to.

        Raises:
            SecAggError: a complaint is not one about this member, or not signed by who makes it.
        """
        accusers = []
        for raw in wire.ShowRequest.decode(request, self._terms.max_sites).complaints:
            complaint = wire.AbortMessage.decode(raw)
            about = (complaint.context, complaint.code, complaint.culprit)
            if about != (self.directory, Abort.BAD_SHARE, self.own) or complaint.member in (self.own, *accusers):
                raise SecAggError(Abort.CTX_MISMATCH, "a complaint is of another directory or about another member")
            self.verify(complaint.member, complaint.signature, complaint.text, "its complaint")
            accusers.append(complaint.member)
        if not self._dealt or accusers != sorted(accusers):
            raise UnexpectedMessage("complaints", "complaints in ascending order, after this site has dealt")
        message = wire.Show(self.directory, self.own, tuple(self._dealt[m] for m in accusers), bytes(64))
        return replace(message, signature=self.sign(message.text)).encode()

    def check_confirms(self, confirms: Mapping[int, bytes]) -> None:
        """That enough members have confirmed this epoch, and no session has run out. Raises SecAggError."""
        if self._clock() > self._expires:
            raise SecAggError(Abort.BAD_CERT, "a member's session has expired: the server must start a new epoch")
        if len(confirms) < self.threshold or self.own not in confirms:
            raise SecAggError(
                Abort.BELOW_THRESHOLD,
                f"{len(confirms)} of {len(self.names)} members have confirmed, the threshold is {self.threshold}",
            )
        for member in confirms.keys() - self._heard:
            self.verify(member, confirms[member], wire.confirm_text(self.digest), "the directory and the dealings")
            self._heard.add(member)
        self._dealt.clear()  # no complaint is heard any more

    @property
    def pairs(self) -> PairwiseKeys:
        """The edges to all members. Raises UnexpectedMessage before there is a directory."""
        if self._pairs is None:
            raise UnexpectedMessage("a message of a round", "a directory")
        return self._pairs

    @property
    def dealers(self) -> set[int]:
        """Members whose shares this one holds; empty before they are confirmed."""
        return set(self._rows)

    def serves(self, number: int) -> bool:
        """Whether the epoch has secrets for a round of training."""
        return self._first <= number < self._first + ROUNDS

    def take_seed(self, number: int, slot: int) -> bytes:
        """The seed of this member's own mask; all that belongs to slots before is forgotten, as is the seed.

        A slot belongs to one round of training at all members: shares of it that were given in several would add up.

        Args:
            number: of the round.
            slot: one of the round's.

        Raises:
            SecAggError: CTX_MISMATCH, the slot is of another round or used up.
        """
        if slot not in slots_of(number - self._first) or slot not in self._seeds:
            raise SecAggError(Abort.CTX_MISMATCH, f"slot {slot} is not of round {number}, or it is used up")
        self.pairs.advance(slot)
        self.forget(slot - 1)
        seed = self._seeds[slot]
        self._seeds = {later: value for later, value in self._seeds.items() if later > slot}
        return seed

    def shares(self, slot: int, cohort: Sequence[int]) -> tuple[bytes, ...]:
        """This member's shares of the seeds of a cohort."""
        return tuple(share_of(bytes(self._rows[member]), slot) for member in cohort)

    def forget(self, slot: int) -> None:
        """Erase the shares of a slot and of all before."""
        until = SHARE_BYTES * (slot + 1)
        for row in self._rows.values():
            row[:until] = bytes(until)

    def sign(self, text: bytes) -> bytes:
        """Ed25519 signature of this epoch's key, 64 bytes."""
        return self._signing.sign(text)

    def verify(self, member: int, signature: bytes, text: bytes, what: str) -> None:
        """Raises SecAggError(BAD_SIG) naming the member and `what` it should have signed."""
        if member >= len(self._voices):
            raise SecAggError(Abort.ROSTER, f"member {member} is not in the directory")
        try:
            self._voices[member].verify(signature, text)
        except InvalidSignature:
            raise SecAggError(Abort.BAD_SIG, f"member {member} did not sign {what}") from None

    def erase(self) -> None:
        """Forget every key and share."""
        self._exchange = None
        self._seeds.clear()
        self._dealt.clear()
        self._rows.clear()
        if self._pairs:
            self._pairs.erase()

    def _deal(self, members: int) -> bytes:
        seeds = [random_element() for _ in range(SLOTS)]
        self._seeds = dict(enumerate(seeds, 1))
        dealing, self._dealt = deal(seeds, self.threshold, members, self.directory + u16(self.own))
        sealed = [self.pairs.seal(m, row) for m, row in enumerate(self._dealt) if m != self.own]
        message = wire.Deal(
            member=self.own,
            directory=self.directory,
            dealing=dealing,
            seals=tuple(sha256(row).digest() for row in sealed),
            signature=bytes(64),
            sealed=tuple(sealed),
            leaves=tuple(b"".join(leaves(dealing.label, m, row)) for m, row in enumerate(self._dealt)),
        )
        return replace(message, signature=self.sign(message.text)).encode()

    def _row(self, one: wire.Deal, sealed: bytes) -> bytes:
        """The row that a dealer committed to for this member: sealed, or shown to all where that did not open."""
        row = sealed[:ROW_BYTES]
        # before the seal: a dealer may have "sealed" the very bytes that are shown, to have its victim complain of them
        if sealed == wire.shown(row) and one.dealing.fits(self.own, row):
            return row
        if sha256(sealed).digest() != one.seals[self.own - (one.member < self.own)]:
            raise SecAggError(Abort.MALFORMED, f"the server sent another row than member {one.member} sealed")
        row = self.pairs.open(one.member, sealed)
        if not one.dealing.fits(self.own, row):
            raise SecAggError(
                Abort.BAD_SHARE, f"the shares that {self.names[one.member]} dealt do not fit", culprit=one.member
            )
        return row

    def _check(self, place: int, advert: wire.Advertisement) -> None:
        name = self.names[place]
        try:
            agreed = (advert.job_digest, advert.roster_digest) == (self._terms.digest, self._trust.digest)
            if not agreed or (advert.epoch, advert.round) != (self._epoch, self._first):
                raise SecAggError(
                    Abort.ROSTER,
                    f"{name} has another job, roster or epoch than {self._name}: compare the digests of the rosters",
                )
            self.verify(place, advert.signature, advert.body, f"the keys of {name}")
            self._trust.check(name=name, job_id=self._terms.job_id, now=int(self._clock()), **advert.credentials)
        except SecAggError as error:
            raise SecAggError(error.code, str(error), culprit=place) from None


def _voice(advert: wire.Advertisement, place: int) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(advert.signing_key)
    except ValueError:
        raise SecAggError(Abort.ROSTER, f"member {place} has no signing key", culprit=place) from None


def _session(advert: wire.Advertisement, place: int) -> Session:
    try:
        return Session.decode(advert.session)
    except SecAggError as error:
        raise SecAggError(error.code, str(error), culprit=place) from None
