"""One epoch of a member: fresh keys, signed with its certificate's key, and who else is in it.

The directory of all adverts is checked by every member for itself and confirmed with a signature, so that no two
members go on with different ones.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedmpt_core.secagg import messages as wire
from fedmpt_core.secagg.context import directory_digest
from fedmpt_core.secagg.errors import Abort, SecAggError, UnexpectedMessage
from fedmpt_core.secagg.identity import SESSION_SECONDS, Session, SiteIdentity, Trust
from fedmpt_core.secagg.keys import PairwiseKeys
from fedmpt_core.secagg.policy import Terms

CLOCK_SKEW = 300  # seconds by which clocks of two sites may differ


class KeyExchange:
    """A member's keys of one epoch.

    Attributes:
        epoch: its number, from 1.
        own: roster id of the member.
        advert: the ADV1 message.
        directory: digest of the confirmed directory; empty before.
    """

    def __init__(
        self,
        terms: Terms,
        identity: SiteIdentity,
        trust: Trust,
        epoch: int,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Draws the keys and signs the advert. Raises SecAggError when the roster lacks the member."""
        self.epoch, self.directory = epoch, b""
        self._terms, self._name, self._trust, self._clock = terms, identity.name, trust, clock
        self.own = trust.roster.id_of(identity.name)
        self._exchange: X25519PrivateKey | None = X25519PrivateKey.generate()
        self._signing = Ed25519PrivateKey.generate()
        self._voices: dict[int, Ed25519PublicKey] = {}
        self._heard: set[int] = set()
        self._pairs: PairwiseKeys | None = None
        self._expires = 0
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
            roster_digest=trust.roster.digest(),
            member=self.own,
            epoch=epoch,
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
        return f"KeyExchange({self._name}, epoch {self.epoch})"

    def __reduce__(self) -> NoReturn:
        raise SecAggError(Abort.POLICY, "a member's keys may not be copied or stored")

    @property
    def roster_digest(self) -> bytes:
        """Of the members that this one trusts."""
        return self._trust.roster.digest()

    @property
    def members(self) -> set[int]:
        """Roster ids in the confirmed directory; empty before."""
        return set(self._voices)

    @property
    def pairs(self) -> PairwiseKeys:
        """The edges to all members. Raises UnexpectedMessage before the directory is confirmed."""
        if self._pairs is None:
            raise UnexpectedMessage("a message of a round", "a directory")
        return self._pairs

    def confirm(self, request: bytes) -> bytes:
        """Check the directory, derive all edges, forget the exchange key.

        Args:
            request: DRC1.

        Returns:
            CFM1.

        Raises:
            SecAggError: an advert is not of a trusted member for this job and epoch, or not this member's own.
        """
        encoded = wire.Directory.decode(request, self._terms.max_sites).adverts
        adverts = [wire.Advertisement.decode(a) for a in encoded]
        ids = [a.member for a in adverts]
        if len(ids) < self._terms.floors.min_cohort:
            raise SecAggError(
                Abort.POLICY, f"the directory has {len(ids)} members, min_cohort={self._terms.floors.min_cohort}"
            )
        if ids != sorted(set(ids)):
            raise SecAggError(Abort.ROSTER, "the directory is not in ascending order of distinct members")
        if self.advert not in encoded:
            raise SecAggError(Abort.ROSTER, "the directory does not hold what this site advertised", culprit=self.own)
        for advert in adverts:
            self._check(advert)
        keys = [a.exchange_key for a in adverts] + [a.signing_key for a in adverts]
        if len(set(keys)) != len(keys):
            raise SecAggError(Abort.ROSTER, "two members of the directory have the same key")
        if self._exchange is None:
            raise UnexpectedMessage("a second directory", "a round")
        peers = {a.member: a.exchange_key for a in adverts if a.member != self.own}
        digest = directory_digest([(a.body, a.session) for a in adverts])
        self._pairs = PairwiseKeys(self.own, self._exchange, peers, self._terms.digest, digest)
        self._exchange = None  # forward secrecy rests on this
        self.directory = digest
        self._voices = {a.member: Ed25519PublicKey.from_public_bytes(a.signing_key) for a in adverts}
        self._expires = min(Session.decode(a.session).not_after for a in adverts)
        return wire.Confirm(self.own, self.sign(self._confirm_text())).encode()

    def check_cohort(self, cohort: Sequence[int], confirms: Mapping[int, bytes]) -> None:
        """Every member of a cohort has confirmed this directory, and no session has run out. Raises SecAggError."""
        if self.own not in cohort or not set(cohort) <= self.members:
            raise SecAggError(Abort.ROSTER, "the cohort lacks this site or holds a member outside the directory")
        if self._clock() > self._expires:
            raise SecAggError(Abort.BAD_CERT, "a member's session has expired: the server must start a new epoch")
        for member in cohort:
            if member in self._heard:
                continue
            if member not in confirms:
                raise SecAggError(Abort.BAD_SIG, f"member {member} has not confirmed the directory", culprit=member)
            self.verify(member, confirms[member], self._confirm_text(), "the directory")
            self._heard.add(member)

    def sign(self, text: bytes) -> bytes:
        """Ed25519 signature of this epoch's key, 64 bytes."""
        return self._signing.sign(text)

    def verify(self, member: int, signature: bytes, text: bytes, what: str) -> None:
        """Raises SecAggError(BAD_SIG) naming the member and `what` it should have signed."""
        try:
            self._voices[member].verify(signature, text)
        except InvalidSignature:
            raise SecAggError(Abort.BAD_SIG, f"member {member} did not sign {what}", culprit=member) from None

    def erase(self) -> None:
        """Forget every key that opens a mask."""
        self._exchange = None
        if self._pairs:
            self._pairs.erase()

    def _confirm_text(self) -> bytes:
        return wire.confirm_text(self._terms.digest, self.directory)

    def _check(self, advert: wire.Advertisement) -> None:
        roster, member = self._trust.roster, advert.member
        name = roster.name_of(member)
        agreed = (advert.job_digest, advert.roster_digest) == (self._terms.digest, roster.digest())
        if not agreed or advert.epoch != self.epoch:
            raise SecAggError(
                Abort.ROSTER,
                f"{name} has another job, roster or epoch than {self._name}: compare the digests of the rosters",
                culprit=member,
            )
        try:
            Ed25519PublicKey.from_public_bytes(advert.signing_key).verify(advert.signature, advert.body)
        except InvalidSignature:
            raise SecAggError(Abort.BAD_SIG, f"the keys of {name} are not signed by it", culprit=member) from None
        self._trust.check(name=name, job_id=self._terms.job_id, now=int(self._clock()), **advert.credentials)
