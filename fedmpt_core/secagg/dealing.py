"""Verifiable sharing of many secrets at once: every recipient can check its shares before a secret is used.

A dealer shares all its secrets and one random polynomial besides, commits to each recipient's row of shares with
hashes, and publishes one combination of the polynomials whose coefficients follow from the commitments (Fiat and Shamir
1986). A row fits when its shares combine to the published polynomial's value: shares of honest recipients that do not
lie on polynomials of the right degree pass with probability below 2^-250. The random polynomial hides the secrets. It
is the hash-based scheme of Atapoor, Baghery, Cozzo and Pedersen ("VSS from distributed ZK proofs", 2023), for a batch.

What it does not show is that a dealer masks with the secret that it dealt; one that does not has sent a false vector,
which no masking protocol rules out.
"""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from fedmpt_core.secagg.shamir import PRIME, SHARE_BYTES, polynomial, random_element, value
from fedmpt_core.secagg.wire import u16

LISTS = 4  # chosen: lists that a round of training can have; one more for each failure while vectors are masked
ROUNDS = 8  # chosen: rounds of training that an epoch serves; dealing for 8 costs a tenth of a second at 100 sites
SLOTS = LISTS * ROUNDS  # secrets of an epoch, each for one masked vector
ROW_BYTES = SHARE_BYTES * (SLOTS + 1)
DIGEST_BYTES = 32
LEAVES_BYTES = DIGEST_BYTES * (SLOTS + 1)
_TOP = PRIME.to_bytes(SHARE_BYTES, "big")


@dataclass(frozen=True)
class Dealing:
    """The public part.

    Attributes:
        label: what the dealing is bound to: directory and dealer, any bytes.
        rows: commitment to each recipient's row, 32 bytes, in the recipients' order.
        combination: coefficients, 33 bytes each, ascending; as many as the threshold.
    """

    label: bytes
    rows: tuple[bytes, ...]
    combination: tuple[bytes, ...]

    def fits(self, recipient: int, row: bytes) -> bool:
        """Whether a row, `ROW_BYTES` long, is the one committed to and lies on polynomials of the right degree."""
        if len(row) != ROW_BYTES or not self.commits(recipient, leaves(self.label, recipient, row)):
            return False
        shares = [row[at : at + SHARE_BYTES] for at in range(0, ROW_BYTES, SHARE_BYTES)]
        numbers = [int.from_bytes(share, "big") for share in (*shares, *self.combination)]
        if max(numbers) >= PRIME:
            return False
        mixed, published = numbers[: SLOTS + 1], numbers[SLOTS + 1 :]
        return value(mixed, _challenge(self.label, self.rows)) == value(published, recipient + 1)

    def commits(self, recipient: int, row_leaves: Sequence[bytes]) -> bool:
        """Whether the commitment to a recipient's row is that of these leaves."""
        return hmac.compare_digest(_row(row_leaves), self.rows[recipient])


def deal(secrets: Sequence[bytes], threshold: int, recipients: int, label: bytes) -> tuple[Dealing, list[bytes]]:
    """Share `SLOTS` secrets.

    Args:
        secrets: `shamir.random_element` each.
        threshold: shares that give one back, 2..recipients.
        recipients: how many.
        label: as in `Dealing`.

    Returns:
        The public part, and each recipient's row: 33 bytes for the random polynomial, then for each secret.

    Raises:
        ValueError: an argument outside its range.
    """
    if len(secrets) != SLOTS or threshold > recipients:
        raise ValueError(f"{len(secrets)} secrets, threshold={threshold}: give {SLOTS}, and at most {recipients}")
    polynomials = [polynomial(secret, threshold) for secret in (random_element(), *secrets)]
    rows = [b"".join(value(f, x).to_bytes(SHARE_BYTES, "big") for f in polynomials) for x in range(1, recipients + 1)]
    commitments = tuple(_row(leaves(label, place, row)) for place, row in enumerate(rows))
    challenge = _challenge(label, commitments)
    mixed = (value(column, challenge) for column in zip(*polynomials, strict=True))
    return Dealing(label, commitments, tuple(c.to_bytes(SHARE_BYTES, "big") for c in mixed)), rows


def slots_of(place: int) -> range:
    """Slots of an epoch's first round of training (0), its second (1), ..."""
    return range(LISTS * place + 1, LISTS * (place + 1) + 1)


def leaves(label: bytes, recipient: int, row: bytes) -> list[bytes]:
    """Commitment to each share of a row. A share has 256 random bits, so its hash hides it."""
    head = b"FLARE-SA/2/share\0" + label + u16(recipient)
    return [
        sha256(head + u16(slot) + row[slot * SHARE_BYTES : (slot + 1) * SHARE_BYTES]).digest()
        for slot in range(SLOTS + 1)
    ]


def share_of(row: bytes, slot: int) -> bytes:
    """The share of the secret of a slot, 1..SLOTS."""
    return row[slot * SHARE_BYTES : (slot + 1) * SHARE_BYTES]


def are_shares(
    labels: Sequence[bytes], recipient: int, slot: int, shares: Sequence[bytes], committed: Sequence[bytes]
) -> bool:
    """Whether shares, each of another dealing, are those that leaves commit to, and numbers of the field."""
    tail = u16(recipient) + u16(slot)
    digests = [
        sha256(b"FLARE-SA/2/share\0" + label + tail + share).digest()
        for label, share in zip(labels, shares, strict=True)
    ]
    numbers = all(len(share) == SHARE_BYTES and share < _TOP for share in shares)
    return numbers and hmac.compare_digest(b"".join(digests), b"".join(committed))


def _row(row_leaves: Sequence[bytes]) -> bytes:
    return sha256(b"FLARE-SA/2/row\0" + b"".join(row_leaves)).digest()


def _challenge(label: bytes, rows: Sequence[bytes]) -> int:
    return int.from_bytes(sha256(b"FLARE-SA/2/mix\0" + label + b"".join(rows)).digest(), "big")
