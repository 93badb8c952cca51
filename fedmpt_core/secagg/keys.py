"""Keys of FLARE-SA/2: what two members share, and what masks are made of.

X25519 (RFC 7748) gives each pair a secret, HKDF-SHA256 (RFC 5869) everything else, AES-256-GCM (SP 800-38D) seals
shares. Every info string is the bare label and its fields, all of fixed length, with nothing between or after them:

    root (64 bytes) = HKDF(X25519(i, j), "root" | job digest | directory digest | u16 min(i, j) | u16 max(i, j))
    mask chain of slot 0, row secret = its halves; mask chain of slot s + 1 = HKDF(mask chain of slot s, "next")
    edge seed  = HKDF(mask chain of the slot, "mask" | ctx)        AES-256-CTR key of the mask of the edge
    row key    = HKDF(row secret, "row" | u16 from | u16 to)       seals the shares dealt from one to the other
    self mask  = HKDF(b, "self" | ctx)                             AES-256-CTR key of a member's own mask

with HKDF's salt "FLARE-SA/2" and 32 bytes but for the root. The chain only goes forward, so keys of finished rounds
cannot be had from a member later. Python may keep copies of what is overwritten here: erasing is best effort.
"""

from collections.abc import Mapping
from typing import NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmpt_core.secagg.errors import Abort, SecAggError

KEY_BYTES = 32
SALT = b"FLARE-SA/2"
_NONCE = bytes(12)  # every row key seals one row only


class PairwiseKeys:
    """What a member shares with each other member in one epoch. Not for several threads at once.

    Lives in memory only: no `repr` shows it, and it cannot be copied or pickled.
    """

    def __init__(
        self, own: int, private: X25519PrivateKey, peers: Mapping[int, bytes], job: bytes, directory: bytes
    ) -> None:
        """Derives the roots of all edges, for slot 0. The caller drops `private` then: forward secrecy needs it.

        Args:
            own: id of the member, 0..65535.
            private: its exchange key of this epoch.
            peers: by id, the 32-byte public exchange key of every other member.
            job: `context.job_digest`, 32 bytes.
            directory: `context.directory_digest`, 32 bytes.

        Raises:
            SecAggError: ROSTER, a peer has no usable key (one of low order gives a secret that everyone knows), or is
                the member itself.
            ValueError: an id or a digest outside its range.
        """
        self._own, self._slot = own, 0
        self._chains: dict[int, bytearray] = {}
        self._row_secrets: dict[int, bytearray] = {}
        for peer, public in peers.items():
            if peer == own:
                raise SecAggError(Abort.ROSTER, f"member {own} is its own peer: leave it out", culprit=own)
            info = b"root" + _digest(job, "job") + _digest(directory, "directory") + _pair(own, peer)
            try:
                secret = private.exchange(X25519PublicKey.from_public_bytes(public))
            except ValueError:
                raise SecAggError(
                    Abort.ROSTER, f"member {peer} has an exchange key of low order or of wrong length", culprit=peer
                ) from None
            root = _hkdf(secret, info, 2 * KEY_BYTES)
            self._chains[peer], self._row_secrets[peer] = bytearray(root[:KEY_BYTES]), bytearray(root[KEY_BYTES:])

    def __repr__(self) -> str:
        return f"PairwiseKeys(member {self._own}, {len(self._chains)} edges, slot {self._slot})"

    def __reduce__(self) -> NoReturn:
        raise SecAggError(Abort.POLICY, "a member's keys may not be copied or stored")

    def advance(self, slot: int) -> None:
        """Go on to a slot, overwriting the keys of all before. The slot that it is in already changes nothing.

        Args:
            slot: from 0. The work grows with it: the caller bounds it by the slots of an epoch.

        Raises:
            SecAggError: CTX_MISMATCH, an earlier slot, whose keys are gone.
        """
        if slot < self._slot:
            raise SecAggError(Abort.CTX_MISMATCH, f"slot {slot} came, but the keys before slot {self._slot} are erased")
        for chain in self._chains.values():
            for _ in range(slot - self._slot):
                chain[:] = _hkdf(chain, b"next")
        self._slot = slot

    def edge_seed(self, peer: int, ctx: bytes) -> bytes:
        """AES-256-CTR key of the mask shared with a peer in the current slot, 32 bytes; the same at both ends.

        Raises:
            SecAggError: ROSTER, no such peer, or the keys are erased.
        """
        return _hkdf(_of(self._chains, peer), b"mask" + _digest(ctx, "ctx"))

    def seal(self, recipient: int, row: bytes) -> bytes:
        """Encrypt the row of shares that this member deals to one recipient; once, as the nonce is constant.

        Args:
            recipient: its id.
            row: any length.

        Returns:
            Ciphertext and tag, 16 bytes longer than the row.

        Raises:
            SecAggError: ROSTER, no such peer, or the keys are erased.
        """
        key, info = self._row_key(recipient, self._own, recipient)
        return AESGCM(key).encrypt(_NONCE, row, info)

    def open(self, sender: int, sealed: bytes) -> bytes:
        """The row that `sender` sealed for this member.

        Raises:
            SecAggError: BAD_SHARE, it is not; ROSTER, no such peer, or the keys are erased.
        """
        key, info = self._row_key(sender, sender, self._own)
        try:
            return AESGCM(key).decrypt(_NONCE, sealed, info)
        except InvalidTag:
            raise SecAggError(
                Abort.BAD_SHARE,
                f"the row of shares from member {sender} to {self._own} does not open: it was sealed for another "
                "directory or member",
                culprit=sender,
            ) from None

    def forget_rows(self) -> None:
        """Overwrite what rows are sealed with: all of them were dealt."""
        _wipe(self._row_secrets)

    def erase(self) -> None:
        """Overwrite every key. All later calls but this raise SecAggError(ROSTER)."""
        _wipe(self._row_secrets)
        _wipe(self._chains)

    def _row_key(self, peer: int, sender: int, recipient: int) -> tuple[bytes, bytes]:
        info = b"row" + _id(sender) + _id(recipient)
        return _hkdf(_of(self._row_secrets, peer), info), info


def usable(public: bytes) -> bool:
    """Whether an exchange key is 32 bytes and not of low order, which would make secrets that everyone knows."""
    try:
        return bool(X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public)))
    except ValueError:
        return False


def self_mask_key(seed: bytes, ctx: bytes) -> bytes:
    """AES-256-CTR key of a member's own mask, 32 bytes, from its secret b of a slot, 33 bytes."""
    return _hkdf(seed, b"self" + _digest(ctx, "ctx"))


def _of(keys: Mapping[int, bytearray], peer: int) -> bytearray:
    if peer not in keys:
        raise SecAggError(Abort.ROSTER, f"member {peer} has no edge to this one in this epoch, or its key is erased")
    return keys[peer]


def _wipe(keys: dict[int, bytearray]) -> None:
    for key in keys.values():
        key[:] = bytes(KEY_BYTES)
    keys.clear()


def _hkdf(secret: bytes | bytearray, info: bytes, length: int = KEY_BYTES) -> bytes:
    return HKDF(SHA256(), length, SALT, info).derive(secret)


def _id(member: int) -> bytes:
    if not 0 <= member < 1 << 16:
        raise ValueError(f"member id {member} is not in 0..65535")
    return member.to_bytes(2, "big")


def _pair(one: int, other: int) -> bytes:
    if one == other:
        raise ValueError(f"an edge has two ends, both are member {one}")
    return _id(min(one, other)) + _id(max(one, other))


def _digest(value: bytes, what: str) -> bytes:
    if len(value) != 32:
        raise ValueError(f"the {what} digest has {len(value)} bytes, it must have 32")
    return value
