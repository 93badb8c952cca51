"""Digests that bind every key, share and signature of FLARE-SA/2 to one job, roster, cohort, round and model.

Members that disagree on anything hashed here derive different keys: their masks do not cancel and their shares do not
open. Every field has a fixed length or a length before it, so no two different inputs hash the same bytes. The labels
are frozen; a change of any is a new suite. Hash: SHA-256 (FIPS 180-4); integers are big-endian.
"""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from fedmpt_core.common.canonical import canonical
from fedmpt_core.secagg.errors import Abort, SecAggError

SUITE = 2
DIGEST_BYTES = 32


def lp(data: bytes) -> bytes:
    """`data` after its length, 4 bytes. Raises ValueError from 2^32 bytes on."""
    return _unsigned(len(data), 4, "a length") + data


def job_digest(terms: Mapping[str, Any]) -> bytes:
    """Digest of all that the members of a job agree on, 32 bytes.

    Args:
        terms: what JSON can hold: None, bool, int, finite float, text, lists, and mappings with text as keys.

    Raises:
        ValueError: NaN, an infinity, or a key that is not text.
        TypeError: any other value.
    """
    return sha256(b"FLARE-SA/2/job\0" + lp(canonical(_plain(terms)))).digest()


def roster_digest(members: Iterable[tuple[str, bytes]]) -> bytes:
    """Digest of who may take part, 32 bytes.

    Args:
        members: common name and SHA-256 (32 bytes) of the certificate's SubjectPublicKeyInfo, in any order.

    Raises:
        SecAggError: ROSTER, a name twice or a key digest of another length.
    """
    ordered = sorted(members, key=lambda member: member[0].encode())
    for place, (name, spki) in enumerate(ordered):
        if place and ordered[place - 1][0] == name:
            raise SecAggError(Abort.ROSTER, f"the roster holds {name!r} twice: remove one of them")
        if len(spki) != DIGEST_BYTES:
            raise SecAggError(Abort.ROSTER, f"the key digest of {name!r} has {len(spki)} bytes, not {DIGEST_BYTES}")
    return sha256(b"FLARE-SA/1/roster\0" + b"".join(lp(name.encode()) + spki for name, spki in ordered)).digest()


def model_digest(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Digest of the global parameters of a round, 32 bytes; the same on every machine.

    Args:
        tensors: by name, any shape; bool, integers or floats of any byte order and memory layout.

    Raises:
        ValueError: another dtype, whose bytes do not say what it holds, or 2^32 bytes or more in one tensor.
    """
    digest = sha256(b"FLARE-SA/2/model\0")
    for name in sorted(tensors, key=str.encode):
        tensor = tensors[name]
        if tensor.dtype.kind not in "biuf":
            raise ValueError(f"tensor {name!r} is {tensor.dtype}: give bool, an integer or a float type of numpy")
        dtype = tensor.dtype.newbyteorder("<")
        size = b"".join(_unsigned(n, 4, f"a side of {name!r}") for n in tensor.shape)
        raw = np.ascontiguousarray(tensor, dtype=dtype)
        digest.update(lp(name.encode()) + lp(dtype.str.encode()) + lp(size))
        digest.update(_unsigned(raw.nbytes, 4, f"the bytes of {name!r}"))
        digest.update(raw.reshape(-1).view(np.uint8).data)
    return digest.digest()


def context(
    job_id: str, round_number: int, attempt: int, slot: int, *, epoch: bytes, cohort: Sequence[int], model: bytes
) -> bytes:
    """What every mask and share of one attempt at one round is bound to (ctx), 32 bytes.

    Args:
        job_id: name of the run.
        round_number: of training, 0..2^32 - 1.
        attempt: 0..65535, counts the retries of the round.
        slot: 0..65535, which of the epoch's secrets masks it.
        epoch: `epoch_digest`: who exchanged which keys and shares.
        cohort: ids whose vectors are in the sum, 0..65535, strictly ascending.
        model: `model_digest`.

    Raises:
        SecAggError: MALFORMED, the ids are not so.
        ValueError: a number or a digest outside its range.
    """
    ids = list(cohort)
    if ids != sorted(set(ids)) or any(not 0 <= i < 1 << 16 for i in ids):
        raise SecAggError(Abort.MALFORMED, f"the cohort {ids} is not of distinct ids 0..65535 in ascending order")
    turn = _unsigned(round_number, 4, "round") + _unsigned(attempt, 2, "attempt") + _unsigned(slot, 2, "slot")
    members = b"".join(i.to_bytes(2, "big") for i in ids)
    rest = lp(_digest(epoch, "epoch")) + lp(members) + lp(_digest(model, "model"))
    return sha256(b"FLARE-SA/2/ctx\0" + lp(job_id.encode()) + turn + rest).digest()


def directory_digest(entries: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Digest of the keys that all members of an epoch have seen (dd), 32 bytes.

    Args:
        entries: of each member, ascending by id, the body of its ADV1 message and the session that its certificate
            signed.

    Raises:
        ValueError: more than 65535 entries.
    """
    count = _unsigned(len(entries), 2, "the number of entries")
    return sha256(b"FLARE-SA/2/dir\0" + count + b"".join(lp(body) + lp(tbs) for body, tbs in entries)).digest()


def epoch_digest(directory: bytes, dealings: Sequence[bytes]) -> bytes:
    """Digest of what all members of an epoch have checked: everybody's keys and the public part of all dealings.

    Args:
        directory: `directory_digest`.
        dealings: the signed text of each dealing, ascending by dealer.

    Raises:
        ValueError: more than 65535 dealings, or a digest of another length.
    """
    count = _unsigned(len(dealings), 2, "the number of dealings")
    texts = b"".join(map(lp, dealings))
    return sha256(b"FLARE-SA/2/epoch\0" + lp(_digest(directory, "directory")) + count + texts).digest()


def _unsigned(value: int, size: int, what: str) -> bytes:
    if not 0 <= value < 1 << 8 * size:
        raise ValueError(f"{what} is {value}, it must be from 0 to {(1 << 8 * size) - 1}")
    return value.to_bytes(size, "big")


def _digest(value: bytes, what: str) -> bytes:
    if len(value) != DIGEST_BYTES:
        raise ValueError(f"the {what} digest has {len(value)} bytes, it must have {DIGEST_BYTES}")
    return value


def _plain(value: Any) -> Any:
    """Mappings as dicts. JSON writes the keys 1 and "1" alike, so only text is let through."""
    if isinstance(value, Mapping):
        other = [key for key in value if not isinstance(key, str)]
        if other:
            raise ValueError(f"the terms have the key {other[0]!r}, which is not text: name it in words")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
