"""Keys of FLARE-SA/1: what two members share, one edge each, and the commitments that open it to nobody.

X25519 (RFC 7748) gives each pair a secret, HKDF-SHA256 (RFC 5869) everything else, AES-256-GCM (SP 800-38D) seals
shares. Every info string is the bare label and its fields, all of fixed length, with nothing between or after them:

    root (64 bytes) = HKDF(X25519(i, j), "root" | job digest | directory digest | u16 min(i, j) | u16 max(i, j))
    mask chain, share chain of round 0 = its halves; of round r + 1 = HKDF(chain of round r, "next")
    edge seed  = HKDF(mask chain, "mask" | ctx)                    AES-256-CTR key of the mask of the edge
    share key  = HKDF(share chain, "shr" | ctx | u16 from | u16 to)
    self mask  = HKDF(b, "self" | ctx)                             AES-256-CTR key of a member's own mask
    com_b      = SHA-256("com" | ctx | b)
    com_k      = SHA-256("edge" | ctx | u16 min(i, j) | u16 max(i, j) | edge seed)

with HKDF's salt "FLARE-SA/1" and 32 bytes but for the root. The chains only go forward, so keys of finished rounds
cannot be had from a member later. Python may keep copies of what is overwritten here: erasing is best effort.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmpt_core.secagg.errors import Abort, SecAggError

KEY_BYTES = 32
SALT = b"FLARE-SA/1"
_NONCE = bytes(12)  # every share key seals one row only


class PairwiseKeys:
    """What a member shares with each other member in one epoch. Not for several threads at once.

    Lives in memory only: no `repr` shows it, and it cannot be copied or pickled.
    """

    def __init__(
        self, own: int, private: X25519PrivateKey, peers: Mapping[int, bytes], job: bytes, directory: bytes
    ) -> None:
        """Derives the roots of all edges, for round 0. The caller drops `private` then: forward secrecy needs it.

        Args:
            own: roster id of the member, 0..65535.
            private: its exchange key of this epoch.
            peers: by roster id, the 32-byte public exchange key of every other member.
            job: `context.job_digest`, 32 bytes.
            directory: `context.directory_digest`, 32 bytes.

        Raises:
            SecAggError: ROSTER, a peer has no usable key (one of low order gives a secret that everyone knows), or is
                the member itself.
            ValueError: an id or a digest outside its range.
        """
        self._own, self._round = own, 0
        self._erased = False
        self._chains: dict[int, tuple[bytearray, bytearray]] = {}  # for masks, for shares
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
            self._chains[peer] = bytearray(root[:KEY_BYTES]), bytearray(root[KEY_BYTES:])

    def __repr__(self) -> str:
        return f"PairwiseKeys(member {self._own}, {len(self._chains)} edges, round {self._round})"

    def __reduce__(self) -> NoReturn:
        raise SecAggError(Abort.POLICY, "a member's keys may not be copied or stored")

    def advance(self, round_number: int) -> None:
        """Go on to a round, overwriting the keys of all before. The round that it is in already changes nothing.

        Args:
            round_number: from 0. The work grows with it: the caller bounds it by the rounds of the job.

        Raises:
            SecAggError: CTX_MISMATCH, an earlier round, whose keys are gone.
        """
        self._check()
        if round_number < self._round:
            raise SecAggError(
                Abort.CTX_MISMATCH, f"round {round_number} came, but the keys before round {self._round} are erased"
            )
        for chains in self._chains.values():
            for chain in chains:
                for _ in range(round_number - self._round):
                    chain[:] = _hkdf(chain, b"next")
        self._round = round_number

    def edge_seed(self, peer: int, ctx: bytes) -> bytes:
        """AES-256-CTR key of the mask shared with a peer in the current round, 32 bytes; the same at both ends.

        Raises:
            SecAggError: ROSTER, no such peer; CTX_MISMATCH, erased.
        """
        return _hkdf(self._edge(peer)[0], b"mask" + _digest(ctx, "ctx"))

    def seal(self, recipient: int, ctx: bytes, row: bytes) -> bytes:
        """Encrypt a row of shares for one recipient.

        The nonce is constant, so for one recipient and ctx only one row may ever leave the member.

        Args:
            recipient: roster id.
            ctx: of the attempt, 32 bytes.
            row: any length.

        Returns:
            Ciphertext and tag, 16 bytes longer than the row.

        Raises:
            SecAggError: ROSTER, no such peer; CTX_MISMATCH, erased.
        """
        key, info = self._share_key(self._own, recipient, ctx)
        return AESGCM(key).encrypt(_NONCE, row, info)

    def open(self, sender: int, ctx: bytes, sealed: bytes) -> bytes:
        """The row that `sender` sealed for this member under the same ctx and round.

        Raises:
            SecAggError: BAD_SHARE, it is not; ROSTER, no such peer; CTX_MISMATCH, erased.
        """
        key, info = self._share_key(sender, self._own, ctx)
        try:
            return AESGCM(key).decrypt(_NONCE, sealed, info)
        except InvalidTag:
            raise SecAggError(
                Abort.BAD_SHARE,
                f"the row of shares from member {sender} to {self._own} does not open: it was sealed for another "
                "round, model, cohort or member, or changed on the way",
                culprit=sender,
            ) from None

    def erase(self) -> None:
        """Overwrite every key. All later calls but this raise SecAggError(CTX_MISMATCH)."""
        for chains in self._chains.values():
            for chain in chains:
                chain[:] = bytes(KEY_BYTES)
        self._chains.clear()
        self._erased = True

    def _check(self) -> None:
        if self._erased:
            raise SecAggError(Abort.CTX_MISMATCH, f"the keys of member {self._own} are erased: start a new epoch")

    def _edge(self, peer: int) -> tuple[bytearray, bytearray]:
        self._check()
        if peer not in self._chains:
            raise SecAggError(Abort.ROSTER, f"member {peer} has no edge to member {self._own} in this epoch")
        return self._chains[peer]

    def _share_key(self, sender: int, recipient: int, ctx: bytes) -> tuple[bytes, bytes]:
        chain = self._edge(recipient if sender == self._own else sender)[1]
        info = b"shr" + _digest(ctx, "ctx") + _id(sender) + _id(recipient)
        return _hkdf(chain, info), info


def self_mask_key(seed: bytes, ctx: bytes) -> bytes:
    """AES-256-CTR key of a member's own mask, 32 bytes, from its 32 random bytes b. Raises ValueError on a length."""
    return _hkdf(_key(seed), b"self" + _digest(ctx, "ctx"))


def commit_self(seed: bytes, ctx: bytes) -> bytes:
    """Commitment to b (com_b), 32 bytes; hides it because b has 256 random bits. Raises ValueError on a length."""
    return sha256(b"com" + _digest(ctx, "ctx") + _key(seed)).digest()


def commit_edge(edge: bytes, ctx: bytes, one: int, other: int) -> bytes:
    """Commitment to an edge seed (com_k), 32 bytes; the same from both ends.

    Args:
        edge: 32 bytes.
        ctx: of the attempt, 32 bytes.
        one: roster id of an end, 0..65535.
        other: of the other end.

    Raises:
        ValueError: a length or an id outside its range, or both ends the same.
    """
    return sha256(b"edge" + _digest(ctx, "ctx") + _pair(one, other) + _key(edge)).digest()


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


def _key(value: bytes) -> bytes:
    if len(value) != KEY_BYTES:
        raise ValueError(f"a seed has {len(value)} bytes, it must have {KEY_BYTES}")
    return value
