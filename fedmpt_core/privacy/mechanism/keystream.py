"""Secret random numbers for noise and sampling: AES-256 in counter mode under a key that lives in one process.

Every purpose has a stream of its own (HKDF-SHA256, RFC 5869) that only moves forward, so no two draws ever share
bytes. The key is 256 bits of the operating system's randomness and never leaves the object: not in `repr`, not in
pickles, not in files. A commitment to it, `key_id`, goes into the ledger, where a key used twice would show.
"""

import hashlib
import os
from typing import NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

KEY_BYTES = 32
_UNIT = 2.0**-53


class KeystreamError(RuntimeError):
    """A stream was used where its secrecy or freshness is not certain."""


class Keystream:
    """Streams of secret uniform words and normal numbers.

    Attributes:
        name: how the generator is called in records.
    """

    name = "AES-256-CTR"

    def __init__(self, key: bytes | None = None) -> None:
        """Draws a fresh key.

        Args:
            key: 32 bytes instead of fresh ones; for tests, which need the same numbers twice.

        Raises:
            ValueError: a key of another length.
        """
        key = os.urandom(KEY_BYTES) if key is None else key
        if len(key) != KEY_BYTES:
            raise ValueError(f"the key has {len(key)} bytes, it must have {KEY_BYTES}")
        self._key = key
        self._process = os.getpid()
        self._streams: dict[str, object] = {}

    @property
    def key_id(self) -> str:
        """SHA-256 hex commitment to the key; says nothing of the numbers."""
        return hashlib.sha256(b"fedmpt keystream commitment\0" + self._key).hexdigest()

    def __repr__(self) -> str:
        return f"Keystream({self.name})"

    def __reduce__(self) -> NoReturn:
        raise KeystreamError("a keystream may not be copied or stored: two copies would give the same noise")

    def words(self, purpose: str, count: int) -> np.ndarray:
        """The next `count` uniform words of a purpose, (count,) uint64.

        Raises:
            KeystreamError: called in a forked child, which would repeat the parent's numbers.
        """
        if os.getpid() != self._process:
            raise KeystreamError("this process was forked from the one that drew the key: draw a new Keystream in it")
        stream = self._streams.get(purpose)
        if stream is None:
            secret = HKDFExpand(SHA256(), KEY_BYTES, b"fedmpt/1/" + purpose.encode()).derive(self._key)
            stream = self._streams[purpose] = Cipher(algorithms.AES256(secret), modes.CTR(bytes(16))).encryptor()
        return np.frombuffer(stream.update(bytes(8 * count)), dtype="<u8")  # type: ignore[attr-defined]

    def normals(self, purpose: str, count: int) -> np.ndarray:
        """The next `count` standard normal numbers of a purpose, (count,) float64, by Box and Muller (1958).

        The radius comes from a 106-bit uniform, so tails reach 12 standard deviations; 53 bits would end at 8.6.
        """
        pairs = (count + 1) // 2
        words = self.words(purpose, 3 * pairs).reshape(3, pairs) >> np.uint64(11)  # 53 bits each
        high, low, turn = words.astype(np.float64)
        uniform = (high + (low + 1) * _UNIT) * _UNIT  # (0, 1]
        radius, angle = np.sqrt(-2 * np.log(uniform)), 2 * np.pi * _UNIT * turn
        return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:count]
