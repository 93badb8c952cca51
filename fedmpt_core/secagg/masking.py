"""Masks: AES-256 in counter mode (SP 800-38A) from a zero counter, read as little-endian words, added modulo 2^32.

The keystream goes through one block that stays in the processor's cache; a fresh array per mask would cost several
times the cipher's work in page faults. No key is used for anything but one mask.
"""

import os
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_BYTES = 32
_WORD = np.dtype("<u4")
_BLOCK_WORDS = 1 << 16  # 256 KiB; measured: from here on the cipher is at full speed


class Masker:
    """Adds masks to vectors. Holds half a megabyte; not shared between threads."""

    def __init__(self) -> None:
        self._zeros = bytes(_BLOCK_WORDS * _WORD.itemsize)
        self._stream = bytearray(len(self._zeros) + 16)  # `update_into` wants room for a cipher block more
        self._words = np.frombuffer(self._stream, dtype=_WORD, count=_BLOCK_WORDS)

    def add(self, vector: np.ndarray, key: bytes) -> None:
        """Add a mask in place, modulo 2^32.

        Args:
            vector: (words,) little-endian uint32, contiguous and writable.
            key: 32 bytes, used for this mask only.

        Raises:
            ValueError: another dtype, layout or key length; nothing is changed then.
        """
        self.apply([(np.add, _key(key))], _checked(vector))

    def subtract(self, vector: np.ndarray, key: bytes) -> None:
        """Undo `add` with the same key. Arguments and errors are the same."""
        self.apply([(np.subtract, _key(key))], _checked(vector))

    def apply(self, steps: Sequence[tuple[np.ufunc, bytes]], vector: np.ndarray) -> None:
        """All masks of a block before the next block, while it is in the cache; `vector` and keys are checked ones."""
        ciphers = [(step, Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()) for step, key in steps]
        zeros = memoryview(self._zeros)
        for start in range(0, len(vector), _BLOCK_WORDS):
            part = vector[start : start + _BLOCK_WORDS]
            given, words = zeros[: part.nbytes], self._words[: len(part)]
            for step, cipher in ciphers:
                cipher.update_into(given, self._stream)
                step(part, words, out=part)
        self._words[: len(vector)] = 0  # the stream is as secret as its key


def add_all(vector: np.ndarray, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Add the masks of some keys and subtract those of others, in place.

    In one thread: the library holds Python's lock while it encrypts, so more threads were measured to gain nothing.

    Args:
        vector: (words,) little-endian uint32, contiguous and writable.
        plus: 32-byte keys of masks to add.
        minus: 32-byte keys of masks to subtract.

    Raises:
        ValueError: an argument is not so; nothing is changed then.
    """
    _checked(vector)
    steps = [(np.add, _key(key)) for key in plus] + [(np.subtract, _key(key)) for key in minus]
    Masker().apply(steps, vector)


def uniform_words(count: int) -> np.ndarray:
    """Secret uniform words under a fresh key of the operating system's randomness, (count,) uint32.

    Raises:
        ValueError: a negative count.
    """
    words = np.zeros(count, dtype=_WORD)
    Masker().add(words, os.urandom(KEY_BYTES))
    return words


def _checked(vector: np.ndarray) -> np.ndarray:
    if vector.dtype != _WORD or vector.ndim != 1:
        raise ValueError(f"the vector is {vector.dtype} of shape {vector.shape}, it must be uint32 of one dimension")
    if not vector.flags.c_contiguous or not vector.flags.writeable:
        raise ValueError("the vector is a strided view or read-only: give a copy of it")
    return vector


def _key(key: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise ValueError(f"a mask key has {len(key)} bytes, it must have {KEY_BYTES}")
    return key
