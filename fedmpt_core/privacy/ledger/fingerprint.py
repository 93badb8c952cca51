"""A fingerprint of a data set that says something only to the site that holds the key.

HMAC-SHA256 (RFC 2104) over the sorted digests of the records: the same records in any order give the same value, and
without the key nobody can test whether a record is among them. It must never be computed without a key.
"""

import hashlib
import hmac
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fedmpt_core.common.files import write_whole

KEY_BYTES = 32
_PURPOSE = b"\xffFEDMPT-FINGERPRINT/1\0"


def fingerprint(record_digests: Iterable[str], key: bytes) -> str:
    """The keyed fingerprint of a data set.

    Args:
        record_digests: one digest or name per record, in any order; a repeated one counts as often as it occurs.
        key: 32 bytes of `site_key`.

    Returns:
        64 hex digits.

    Raises:
        ValueError: a key of another length.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"the fingerprint key has {len(key)} bytes, it must have {KEY_BYTES}: use site_key")
    mac = hmac.new(key, _PURPOSE, hashlib.sha256)
    for digest in sorted(digest.encode() for digest in record_digests):
        mac.update(len(digest).to_bytes(8, "big") + digest)
    return mac.hexdigest()


def site_key(path: Path | str) -> bytes:
    """The site's fingerprint key, 32 bytes; drawn and stored with mode 0600 the first time, read back later.

    Raises:
        ValueError: the file has another length, others than its owner may read it, or it cannot be written.
        OSError: it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        with suppress(FileExistsError):  # the first of two that draw one wins
            write_whole(path, os.urandom(KEY_BYTES), replace=False)
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path} may be read by others than its owner: give it mode 0600 and see who read it")
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise ValueError(f"{path} has {len(key)} bytes, a site key has {KEY_BYTES}: restore it from a backup")
    return key
