"""The messages of FLARE-SA/1: one class each, exact byte layouts, one byte string for one message.

Integers are big-endian, vectors little-endian uint32. `decode` takes bounds from what the reader knows, never from the
message. Signatures are made and checked elsewhere; `text` is what a signature covers.
"""

from dataclasses import dataclass, replace

import numpy as np

from fedmpt_core.secagg.context import SUITE, lp
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.shamir import SHARE_BYTES
from fedmpt_core.secagg.wire import Reader, id_list, signature_list, tag, u16, u32

NOBODY = 0xFFFF
SEAL_BYTES = 16  # the tag of AES-GCM
MAX_NAME, MAX_SESSION, MAX_CHAIN = 256, 1024, 32 * 1024
MAX_ADVERT = 170 + 64 + 3 * 4 + 2 * MAX_SESSION + MAX_CHAIN
_EMPTY = np.zeros(0, dtype="<u4")
_EMPTY.setflags(write=False)


@dataclass(frozen=True)
class AdvertiseRequest:
    """ADQ1, the server opens an epoch. `names` of all sites only where identities are ephemeral, else empty."""

    job_digest: bytes
    epoch: int
    names: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """tag, job digest 32, epoch u16, u16 count, names after their lengths."""
        names = b"".join(lp(name.encode()) for name in self.names)
        return tag("ADQ1") + self.job_digest + u16(self.epoch) + u16(len(self.names)) + names

    @staticmethod
    def decode(data: bytes, max_sites: int) -> "AdvertiseRequest":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "ADQ1")
        digest, epoch = r.take(32), r.number(2)
        raw = [r.sized(MAX_NAME) for _ in range(r.count(max_sites))]
        r.end()
        try:
            names = tuple(name.decode() for name in raw)
        except UnicodeDecodeError:
            raise SecAggError(Abort.MALFORMED, "ADQ1 holds a name that is no text") from None
        if list(raw) != sorted(set(raw)):
            r.refuse("lists names twice or out of order")
        return AdvertiseRequest(digest, epoch, names)


@dataclass(frozen=True)
class Advertisement:
    """ADV1, a member's keys of an epoch: signed with its new key, which its certificate's key has signed."""

    job_digest: bytes
    roster_digest: bytes
    member: int
    epoch: int
    exchange_key: bytes
    signing_key: bytes
    nonce: bytes
    signature: bytes
    session: bytes
    session_signature: bytes
    chain: bytes

    @property
    def body(self) -> bytes:
        """170 bytes: tag, suite u8, job and roster digests, member u16, epoch u16, X25519 and Ed25519 keys, nonce."""
        numbers = u16(self.member) + u16(self.epoch)
        keys = self.exchange_key + self.signing_key + self.nonce
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
        digests, numbers = (r.take(32), r.take(32)), (r.number(2), r.number(2))
        keys, signature = (r.take(32), r.take(32), r.take(32)), r.take(64)
        session, session_signature, chain = r.sized(MAX_SESSION), r.sized(MAX_SESSION), r.sized(MAX_CHAIN)
        r.end()
        return Advertisement(*digests, *numbers, *keys, signature, session, session_signature, chain)


@dataclass(frozen=True)
class Directory:
    """DRC1, all adverts as they came, ascending by member."""

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
class RoundRequest:
    """RND1, the server opens a round; with the confirmations of its cohort."""

    round: int
    attempt: int
    epoch: int
    model_digest: bytes
    cohort: tuple[int, ...]
    confirms: tuple[tuple[int, bytes], ...]

    def encode(self) -> bytes:
        """tag, round u32, attempt u16, epoch u16, model digest 32, cohort, confirmations."""
        numbers = u32(self.round) + u16(self.attempt) + u16(self.epoch)
        return tag("RND1") + numbers + self.model_digest + id_list(self.cohort) + signature_list(self.confirms)

    @staticmethod
    def decode(data: bytes, max_sites: int) -> "RoundRequest":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "RND1")
        request = RoundRequest(
            r.number(4), r.number(2), r.number(2), r.take(32), r.ids(max_sites), r.signatures(max_sites)
        )
        r.end()
        return request


@dataclass(frozen=True)
class Masked:
    """MSK1, a masked vector, commitments to its masks, and rows of shares sealed for each other member of the cohort.

    `edge_commitments` and `sealed` are by the other members, ascending. The signature covers the vector by `digest`.
    """

    context: bytes
    member: int
    digest: bytes
    self_commitment: bytes
    edge_commitments: tuple[bytes, ...]
    sealed: tuple[bytes, ...]
    signature: bytes
    vector: np.ndarray

    @property
    def text(self) -> bytes:
        """tag, context 32, member u16, words u32, digest 32, commitment 32, cohort u16, commitments, sealed rows."""
        head = tag("MSK1") + self.context + u16(self.member) + u32(len(self.vector)) + self.digest
        commitments = self.self_commitment + u16(len(self.sealed) + 1) + b"".join(self.edge_commitments)
        return head + commitments + b"".join(self.sealed)

    def encode(self) -> bytes:
        """The text, the signature, the words."""
        return b"".join((self.text, self.signature, self.vector.data))

    def without_vector(self) -> "Masked":
        """For whoever keeps the shares only; its `text` is no longer the signed one."""
        return replace(self, vector=_EMPTY)

    @staticmethod
    def decode(data: bytes, *, cohort: int, words: int) -> "Masked":
        """The vector is a read-only view of `data`. Raises SecAggError(MALFORMED)."""
        r = Reader(data, "MSK1")
        others, sealed = cohort - 1, SHARE_BYTES * cohort + SEAL_BYTES
        r.exactly(109 + (32 + sealed) * others + 64 + 4 * words)
        context, member, length, digest, own = r.take(32), r.number(2), r.number(4), r.take(32), r.take(32)
        size = r.number(2)
        if (length, size) != (words, cohort):
            r.refuse(f"says {length} words and a cohort of {size}, the round has {words} and {cohort}")
        commitments = tuple(r.take(32) for _ in range(others))
        rows = tuple(r.take(sealed) for _ in range(others))
        signature = r.take(64)
        vector = np.frombuffer(data, dtype="<u4", count=words, offset=len(data) - 4 * words)
        return Masked(context, member, digest, own, commitments, rows, signature, vector)


@dataclass(frozen=True)
class ConsistencyRequest:
    """CSY1, the server says who is in the sum."""

    context: bytes
    survivors: tuple[int, ...]

    def encode(self) -> bytes:
        """tag, context 32, survivors."""
        return tag("CSY1") + self.context + id_list(self.survivors)

    @staticmethod
    def decode(data: bytes, max_sites: int) -> "ConsistencyRequest":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "CSY1")
        request = ConsistencyRequest(r.take(32), r.ids(max_sites))
        r.end()
        return request


@dataclass(frozen=True)
class Consistent:
    """CNS1, a survivor's signature over `consistency_text`."""

    member: int
    signature: bytes

    def encode(self) -> bytes:
        """tag, member u16, signature 64."""
        return tag("CNS1") + u16(self.member) + self.signature

    @staticmethod
    def decode(data: bytes) -> "Consistent":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "CNS1")
        r.exactly(71)
        return Consistent(r.number(2), r.take(64))


@dataclass(frozen=True)
class UnmaskRequest:
    """UNQ1, to one survivor: the list again, signatures over it, and the rows that the others sealed for it."""

    context: bytes
    survivors: tuple[int, ...]
    signatures: tuple[tuple[int, bytes], ...]
    sealed: tuple[bytes, ...]

    def encode(self) -> bytes:
        """tag, context 32, survivors, signatures, sealed rows by the survivors but the recipient, ascending."""
        lists = id_list(self.survivors) + signature_list(self.signatures)
        return tag("UNQ1") + self.context + lists + b"".join(self.sealed)

    @staticmethod
    def decode(data: bytes, *, cohort: int, max_sites: int) -> "UnmaskRequest":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "UNQ1")
        context, survivors, signatures = r.take(32), r.ids(max_sites), r.signatures(max_sites)
        size, others = SHARE_BYTES * cohort + SEAL_BYTES, max(0, len(survivors) - 1)
        if r.left != size * others:
            r.refuse(f"has {r.left} bytes of sealed rows, expected are {size * others}")
        return UnmaskRequest(context, survivors, signatures, tuple(r.take(size) for _ in range(others)))


@dataclass(frozen=True)
class Unmasked:
    """UNM1, a survivor's shares.

    For every survivor, ascending, the share of its self mask; then for every survivor, and within it for every member
    that dropped out, ascending, the share of the key between the two.
    """

    context: bytes
    member: int
    self_shares: tuple[bytes, ...]
    edge_shares: tuple[tuple[bytes, ...], ...]
    signature: bytes

    @property
    def text(self) -> bytes:
        """tag, context 32, member u16, the shares, 33 bytes each."""
        edges = b"".join(share for shares in self.edge_shares for share in shares)
        return tag("UNM1") + self.context + u16(self.member) + b"".join(self.self_shares) + edges

    def encode(self) -> bytes:
        """The text and the signature."""
        return self.text + self.signature

    @staticmethod
    def decode(data: bytes, *, survivors: int, dropped: int) -> "Unmasked":
        """Raises SecAggError(MALFORMED)."""
        r = Reader(data, "UNM1")
        r.exactly(39 + SHARE_BYTES * survivors * (1 + dropped) + 64)
        context, member = r.take(32), r.number(2)
        own = tuple(r.take(SHARE_BYTES) for _ in range(survivors))
        edges = tuple(tuple(r.take(SHARE_BYTES) for _ in range(dropped)) for _ in range(survivors))
        return Unmasked(context, member, own, edges, r.take(64))


@dataclass(frozen=True)
class AbortMessage:
    """ABR1, why a member left a round. Always 106 bytes: its length tells nothing."""

    context: bytes
    member: int
    code: Abort
    culprit: int
    signature: bytes

    @property
    def text(self) -> bytes:
        """tag, context 32, member u16, code u8, culprit u16 (0xffff: nobody)."""
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


def confirm_text(job_digest: bytes, directory_digest: bytes) -> bytes:
    """What CFM1 signs."""
    return tag("DIR1") + job_digest + directory_digest


def consistency_text(context: bytes, directory_digest: bytes, survivors: tuple[int, ...]) -> bytes:
    """What CNS1 signs."""
    return tag("CON1") + context + directory_digest + id_list(survivors)


def result_text(context: bytes, survivors: tuple[int, ...], digest: bytes) -> bytes:
    """What a round gave: `digest` is the SHA-256 of the sum."""
    return tag("RES1") + context + id_list(survivors) + digest
