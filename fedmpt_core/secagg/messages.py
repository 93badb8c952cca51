"""The messages of FLARE-SA/2: one class each, exact byte layouts, one byte string for one message.

Integers are big-endian, vectors little-endian uint32. `decode` takes bounds from what the reader knows, never from the
message. Signatures are made and checked elsewhere; `text` is what a signature covers. A member's number is its place in
the directory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256

import numpy as np

from fedmpt_core.secagg.context import SUITE, lp
from fedmpt_core.secagg.dealing import LEAVES_BYTES, ROW_BYTES, Dealing
from fedmpt_core.secagg.errors import Abort
from fedmpt_core.secagg.shamir import SHARE_BYTES
from fedmpt_core.secagg.wire import Reader, id_list, signature_list, tag, u16, u32

NOBODY = 0xFFFF
SEALED_BYTES = ROW_BYTES + 16  # the tag of AES-GCM
MAX_SESSION, MAX_CHAIN = 1024, 32 * 1024
MAX_ADVERT = 172 + 64 + 3 * 4 + 2 * MAX_SESSION + MAX_CHAIN
_EMPTY = np.zeros(0, dtype="<u4")
_EMPTY.setflags(write=False)


@dataclass(frozen=True)
class AdvertiseRequest:
    """ADQ1, the server opens an epoch, for `dealing.ROUNDS` rounds of training from `round` on."""

    job_digest: bytes
    epoch: int
    round: int

    def encode(self) -> bytes:
        """tag, job digest 32, epoch u16, round u32."""
        return tag("ADQ1") + self.job_digest + u16(self.epoch) + u32(self.round)

    @staticmethod
    def decode(data: bytes) -> "AdvertiseRequest":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "ADQ1")
        r.exactly(43)
        return AdvertiseRequest(r.take(32), r.number(2), r.number(4))


@dataclass(frozen=True)
class Advertisement:
    """ADV1, a member's keys of an epoch: signed with its new key, which its certificate's key has signed."""

    job_digest: bytes
    roster_digest: bytes
    epoch: int
    round: int
    exchange_key: bytes
    signing_key: bytes
    nonce: bytes
    signature: bytes
    session: bytes
    session_signature: bytes
    chain: bytes

    @property
    def body(self) -> bytes:
        """172 bytes: tag, suite u8, job and roster digests, epoch u16, round u32, X25519 and Ed25519 keys, nonce."""
        numbers, keys = u16(self.epoch) + u32(self.round), self.exchange_key + self.signing_key + self.nonce
        return tag("ADV1") + bytes([SUITE]) + self.job_digest + self.roster_digest + numbers + keys

    @property
    def credentials(self) -> dict[str, bytes]:
        """What shows whose signing key it is, by the names that `ChainCheck.check` and `Trust.check` have for it."""
        names = ("session", "session_signature", "signing_key", "chain")
        return {name: getattr(self, name) for name in names}

    def encode(self) -> bytes:
        """The body, its signature, then session, the session's signature and the chain after their lengths."""
        return self.body + self.signature + lp(self.session) + lp(self.session_signature) + lp(self.chain)

    @staticmethod
    def decode(data: bytes) -> "Advertisement":
        """Raises SecAggError(MALFORMED), also for another suite."""
        r = Reader(data, "ADV1")
        suite = r.number(1)
        if suite != SUITE:
            r.refuse(f"is of suite {suite}, this release speaks {SUITE}")
        digests, numbers = (r.take(32), r.take(32)), (r.number(2), r.number(4))
        keys, signature = (r.take(32), r.take(32), r.take(32)), r.take(64)
        session, session_signature, chain = r.sized(MAX_SESSION), r.sized(MAX_SESSION), r.sized(MAX_CHAIN)
        r.end()
        return Advertisement(*digests, *numbers, *keys, signature, session, session_signature, chain)


@dataclass(frozen=True)
class Directory:
    """DRC1, all adverts as they came, in the order of the sites' names (UTF-8)."""

    adverts: tuple[bytes, ...]

    def encode(self) -> bytes:
        """tag, u16 count, adverts after their lengths."""
        return tag("DRC1") + u16(len(self.adverts)) + b"".join(map(lp, self.adverts))

    @staticmethod
    def decode(data: bytes, max_sites: int) -> "Directory":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "DRC1")
        adverts = tuple(r.sized(MAX_ADVERT) for _ in range(r.count(max_sites)))
        r.end()
        return Directory(adverts)


@dataclass(frozen=True)
class Deal:
    """DEA1, a member's secrets of an epoch, shared: what all may see, and a sealed row for each other member.

    `sealed` and `seals`, their digests, are by the other members, ascending. `leaves` are commitments to single shares,
    by member, for the server; they follow from what the signature covers.
    """

    member: int
    directory: bytes
    dealing: Dealing
    seals: tuple[bytes, ...]
    signature: bytes
    sealed: tuple[bytes, ...] = ()
    leaves: tuple[bytes, ...] = ()

    @cached_property
    def text(self) -> bytes:
        """tag, member u16, directory digest 32, commitments to rows, combination, digests of the sealed rows."""
        public = b"".join((*self.dealing.rows, *self.dealing.combination, *self.seals))
        return tag("DEA1") + u16(self.member) + self.directory + public

    def encode(self) -> bytes:
        """The text, the signature, the sealed rows, the leaves."""
        return b"".join((self.text, self.signature, *self.sealed, *self.leaves))

    @staticmethod
    def text_bytes(members: int, threshold: int) -> int:
        """Length of the text."""
        return 39 + 32 * members + SHARE_BYTES * threshold + 32 * (members - 1)

    @staticmethod
    def read(r: Reader, members: int, threshold: int) -> "Deal":
        """Text and signature only. Raises SecAggError(MALFORMED)."""
        member, directory = r.number(2), r.take(32)
        rows = tuple(r.take(32) for _ in range(members))
        combination = tuple(r.take(SHARE_BYTES) for _ in range(threshold))
        seals = tuple(r.take(32) for _ in range(members - 1))
        return Deal(member, directory, Dealing(directory + u16(member), rows, combination), seals, r.take(64))

    @staticmethod
    def decode(data: bytes, *, members: int, threshold: int) -> "Deal":
        """Raises SecAggError(MALFORMED), also when rows or leaves are not those that the text names."""
        r = Reader(data, "DEA1")
        r.exactly(Deal.text_bytes(members, threshold) + 64 + SEALED_BYTES * (members - 1) + LEAVES_BYTES * members)
        deal = Deal.read(r, members, threshold)
        sealed = tuple(r.take(SEALED_BYTES) for _ in range(members - 1))
        leaves = tuple(r.take(LEAVES_BYTES) for _ in range(members))
        if any(sha256(row).digest() != seal for row, seal in zip(sealed, deal.seals, strict=True)):
            r.refuse("holds a sealed row that it does not name")
        if not all(deal.dealing.commits(place, _parts(line)) for place, line in enumerate(leaves)):
            r.refuse("holds commitments to shares that are not those of its rows")
        return replace(deal, sealed=sealed, leaves=leaves)

    def leaf(self, recipient: int, slot: int) -> bytes:
        """Commitment to one share."""
        return self.leaves[recipient][32 * slot : 32 * slot + 32]


@dataclass(frozen=True)
class Deals:
    """DLS1, to one member: what all may see of every dealing, and the rows sealed for this member by the others.

    Both ascend by dealer; a member that has dealt nothing is left out of both. In place of a sealed row may stand one
    that its dealer has shown, as `shown` has it.
    """

    deals: tuple[Deal, ...]
    sealed: tuple[bytes, ...]

    def encode(self) -> bytes:
        """tag, u16 count, each dealing's text without its tag, and signature; the sealed rows."""
        public = b"".join(deal.text[5:] + deal.signature for deal in self.deals)
        return tag("DLS1") + u16(len(self.deals)) + public + b"".join(self.sealed)

    @staticmethod
    def decode(data: bytes, *, members: int, threshold: int) -> "Deals":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "DLS1")
        count = r.count(members)
        size = (Deal.text_bytes(members, threshold) - 5 + 64) * count + SEALED_BYTES * max(0, count - 1)
        r.exactly(7 + size)
        deals = tuple(Deal.read(r, members, threshold) for _ in range(count))
        r.ascending(tuple(deal.member for deal in deals))
        return Deals(deals, tuple(r.take(SEALED_BYTES) for _ in range(count - 1)))


@dataclass(frozen=True)
class Confirm:
    """CFM1, a member's signature over `confirm_text`."""

    member: int
    signature: bytes

    def encode(self) -> bytes:
        """tag, member u16, signature 64."""
        return tag("CFM1") + u16(self.member) + self.signature

    @staticmethod
    def decode(data: bytes) -> "Confirm":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "CFM1")
        r.exactly(71)
        return Confirm(r.number(2), r.take(64))


@dataclass(frozen=True)
class ShowRequest:
    """SHW1, to a dealer: members say that the rows it dealt them are wrong; their signed complaints (ABR1)."""

    complaints: tuple[bytes, ...]

    def encode(self) -> bytes:
        """tag, u16 count, complaints of 106 bytes."""
        return tag("SHW1") + u16(len(self.complaints)) + b"".join(self.complaints)

    @staticmethod
    def decode(data: bytes, max_sites: int) -> "ShowRequest":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "SHW1")
        count = r.count(max_sites)
        r.exactly(7 + 106 * count)
        return ShowRequest(tuple(r.take(106) for _ in range(count)))


@dataclass(frozen=True)
class Show:
    """SHO1, a dealer shows the rows that it dealt to those that complained, ascending."""

    directory: bytes
    member: int
    rows: tuple[bytes, ...]
    signature: bytes

    @property
    def text(self) -> bytes:
        """tag, directory digest 32, member u16, the rows."""
        return tag("SHO1") + self.directory + u16(self.member) + b"".join(self.rows)

    def encode(self) -> bytes:
        """The text and the signature."""
        return self.text + self.signature

    @staticmethod
    def decode(data: bytes, rows: int) -> "Show":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "SHO1")
        r.exactly(39 + ROW_BYTES * rows + 64)
        return Show(r.take(32), r.number(2), tuple(r.take(ROW_BYTES) for _ in range(rows)), r.take(64))


@dataclass(frozen=True)
class RoundRequest:
    """RND1, the server opens a round of training; with the confirmations of the epoch's members."""

    epoch: bytes
    round: int
    attempt: int
    model_digest: bytes
    confirms: tuple[tuple[int, bytes], ...]

    def encode(self) -> bytes:
        """tag, epoch digest 32, round u32, attempt u16, model digest 32, confirmations."""
        numbers = u32(self.round) + u16(self.attempt)
        return tag("RND1") + self.epoch + numbers + self.model_digest + signature_list(self.confirms)

    @staticmethod
    def decode(data: bytes, max_sites: int) -> "RoundRequest":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "RND1")
        request = RoundRequest(r.take(32), r.number(4), r.number(2), r.take(32), r.signatures(max_sites))
        r.end()
        return request


@dataclass(frozen=True)
class Ready:
    """RDY1, a member has an update for the round."""

    epoch: bytes
    round: int
    attempt: int
    member: int
    signature: bytes

    @property
    def text(self) -> bytes:
        """tag, epoch digest 32, round u32, attempt u16, member u16."""
        return tag("RDY1") + self.epoch + u32(self.round) + u16(self.attempt) + u16(self.member)

    def encode(self) -> bytes:
        """The text and the signature."""
        return self.text + self.signature

    @staticmethod
    def decode(data: bytes) -> "Ready":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "RDY1")
        r.exactly(109)
        return Ready(r.take(32), r.number(4), r.number(2), r.number(2), r.take(64))


@dataclass(frozen=True)
class MaskRequest:
    """MRQ1, the server names whose vectors are to be in the sum, and the slot whose secrets mask them."""

    epoch: bytes
    round: int
    attempt: int
    slot: int
    cohort: tuple[int, ...]

    def encode(self) -> bytes:
        """tag, epoch digest 32, round u32, attempt u16, slot u16, cohort."""
        numbers = u32(self.round) + u16(self.attempt) + u16(self.slot)
        return tag("MRQ1") + self.epoch + numbers + id_list(self.cohort)

    @staticmethod
    def decode(data: bytes, max_sites: int) -> "MaskRequest":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "MRQ1")
        request = MaskRequest(r.take(32), r.number(4), r.number(2), r.number(2), r.ids(max_sites))
        r.end()
        return request


@dataclass(frozen=True)
class Masked:
    """MSK1, a masked vector. The signature covers it by `digest`."""

    context: bytes
    member: int
    digest: bytes
    signature: bytes
    vector: np.ndarray

    @property
    def text(self) -> bytes:
        """tag, context 32, member u16, words u32, digest 32."""
        return tag("MSK1") + self.context + u16(self.member) + u32(len(self.vector)) + self.digest

    def encode(self) -> bytes:
        """The text, the signature, the words."""
        return b"".join((self.text, self.signature, self.vector.data))

    @staticmethod
    def decode(data: bytes, words: int) -> "Masked":
        """The vector is a read-only view of `data`. Raises SecAggError(MALFORMED)."""
        r = Reader(data, "MSK1")
        r.exactly(139 + 4 * words)
        context, member, length, digest, signature = r.take(32), r.number(2), r.number(4), r.take(32), r.take(64)
        if length != words:
            r.refuse(f"says {length} words, the job has {words}")
        vector = np.frombuffer(data, dtype="<u4", count=words, offset=len(data) - 4 * words)
        return Masked(context, member, digest, signature, vector)


@dataclass(frozen=True)
class OpenRequest:
    """OPQ1, the server asks to open the sum of a context."""

    context: bytes

    def encode(self) -> bytes:
        """tag, context 32."""
        return tag("OPQ1") + self.context

    @staticmethod
    def decode(data: bytes) -> "OpenRequest":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "OPQ1")
        r.exactly(37)
        return OpenRequest(r.take(32))


@dataclass(frozen=True)
class Opened:
    """OPN1, a member's shares of the self masks of the whole cohort, ascending."""

    context: bytes
    member: int
    shares: tuple[bytes, ...]
    signature: bytes

    @property
    def text(self) -> bytes:
        """tag, context 32, member u16, the shares, 33 bytes each."""
        return tag("OPN1") + self.context + u16(self.member) + b"".join(self.shares)

    def encode(self) -> bytes:
        """The text and the signature."""
        return self.text + self.signature

    @staticmethod
    def decode(data: bytes, cohort: int) -> "Opened":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "OPN1")
        r.exactly(39 + SHARE_BYTES * cohort + 64)
        return Opened(r.take(32), r.number(2), tuple(r.take(SHARE_BYTES) for _ in range(cohort)), r.take(64))


@dataclass(frozen=True)
class AbortMessage:
    """ABR1, why a member left an epoch or a round, and by whose fault. Always 106 bytes: its length tells nothing."""

    context: bytes
    member: int
    code: Abort
    culprit: int
    signature: bytes

    @property
    def text(self) -> bytes:
        """tag, context 32 (of a round, or a directory's digest), member u16, code u8, culprit u16 (0xffff: nobody)."""
        return tag("ABR1") + self.context + u16(self.member) + bytes([self.code]) + u16(self.culprit)

    def encode(self) -> bytes:
        """The text and the signature."""
        return self.text + self.signature

    @staticmethod
    def decode(data: bytes) -> "AbortMessage":
        """Raises SecAggError(MALFORMED), also for a code that does not exist."""
        r = Reader(data, "ABR1")
        r.exactly(106)
        context, member, code, culprit = r.take(32), r.number(2), r.number(1), r.number(2)
        if code not in list(Abort):
            r.refuse(f"gives reason {code}, which does not exist")
        return AbortMessage(context, member, Abort(code), culprit, r.take(64))


def shown(row: bytes) -> bytes:
    """A row in the clear, as long as a sealed one."""
    return row + bytes(SEALED_BYTES - ROW_BYTES)


def confirm_text(epoch: bytes) -> bytes:
    """What CFM1 signs: `context.epoch_digest`."""
    return tag("EPO1") + epoch


def result_text(context: bytes, cohort: tuple[int, ...], digest: bytes) -> bytes:
    """What a round gave: `digest` is the SHA-256 of the sum."""
    return tag("RES1") + context + id_list(cohort) + digest


def _parts(leaves: bytes) -> Sequence[bytes]:
    return [leaves[at : at + 32] for at in range(0, len(leaves), 32)]
