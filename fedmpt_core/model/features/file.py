"""One picture's patch features as a file: its place, its bytes, how it is verified and how it appears.

    folder / SPACE / first two digits / PICTURE.features       SPACE: digest of backbone and preprocessing
    128 bytes: magic, version, P, D, bytes per number, digest of the whole key, SHA-256 of the payload, zeros
    payload:   P * D little-endian float16, row by row

A file appears whole or not at all, readable for its owner only. Must never return content of which a single
byte differs from what was written, or that was written for another picture, backbone or preprocessing.
"""

import contextlib
import hashlib
import os
import re
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmpt_core.common.files import WriteError, whole_file

MAGIC = b"FMPTFEAT"
VERSION = 1
HEADER = struct.Struct("<8sIIII32s32s40x")
SUFFIX = ".features"
ABANDONED_SECONDS = 3600
"""Age from which an unfinished file is taken for one of a process that died; writing one takes milliseconds."""

_OWN = re.compile(r"/[0-9a-f]{32}/[0-9a-f]{2}/([0-9a-f]{64}\.features|[^/]+\.partial)$")


class FeatureCacheError(ValueError):
    """The cache folder cannot be used: it cannot be created, read, written or kept below its bound."""


@dataclass(frozen=True)
class FeatureSpace:
    """Where the features of one backbone with one preprocessing are kept, and what a file of theirs looks like.

    Attributes:
        folder: where the files are; created by the first `write`, inside a folder that is there.
        key: digest of backbone and preprocessing.
        shape: (P, D).
    """

    folder: Path
    key: str
    shape: tuple[int, int]

    @property
    def file_bytes(self) -> int:
        """Size of every file."""
        return HEADER.size + 2 * self.shape[0] * self.shape[1]

    def path(self, digest: str) -> Path:
        """Place of the features of the picture with this digest (SHA-256 hex)."""
        return self.folder / digest[:2] / f"{digest}{SUFFIX}"

    def header(self, digest: str, payload: bytes | memoryview) -> bytes:
        """The only header that is right for this picture and payload."""
        key = hashlib.sha256(f"{self.key}:{digest}".encode()).digest()
        return HEADER.pack(MAGIC, VERSION, *self.shape, 2, key, hashlib.sha256(payload).digest())

    def read(self, digest: str) -> np.ndarray | None:
        """(P, D) float16 once every byte has been verified and the use noted; None for a missing or damaged file.

        Raises:
            FeatureCacheError: the file is there and may not be read.
        """
        path = self.path(digest)
        try:
            if path.stat().st_size != self.file_bytes:
                return None
            content = memoryview(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise FeatureCacheError(cannot("read", self.folder, error)) from None
        payload = content[HEADER.size :]
        if content[: HEADER.size] != self.header(digest, payload):
            return None
        # A folder that may only be read serves what it holds, without noting the use.
        with contextlib.suppress(OSError):
            os.utime(path)
        return np.frombuffer(payload, "<f2").reshape(self.shape)

    def write(self, digest: str, features: np.ndarray) -> None:
        """Put the file of (P, D) float16 features in place, over a damaged one if need be.

        Raises:
            FeatureCacheError: no permission, no space, or something that is no file in its place.
        """
        path = self.path(digest)
        payload = np.ascontiguousarray(features, "<f2").tobytes()
        try:
            for folder in (self.folder, path.parent):
                folder.mkdir(mode=0o700, exist_ok=True)
            with whole_file(path, durable=False) as file:  # what a power failure tears, the digest finds
                file.write(self.header(digest, payload))
                file.write(payload)
        except (OSError, WriteError) as error:
            raise FeatureCacheError(cannot("written to", self.folder, error)) from None


def stored_files(cache: Path) -> Iterator[tuple[int, Path, int]]:
    """(last use in ns, path, bytes) of every feature file; unfinished files of dead processes are deleted."""
    for path in cache.glob("*/*/*"):
        if not _OWN.search(path.as_posix()):
            continue
        try:
            status = path.stat()
            if path.suffix == SUFFIX:
                yield status.st_mtime_ns, path, status.st_size
            elif time.time() - status.st_mtime > ABANDONED_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue  # another process deleted or finished it


def cannot(what: str, folder: Path, error: OSError | WriteError) -> str:
    """What to tell a person when the folder cannot be `what`."""
    return (
        f"the feature cache {str(folder)!r} cannot be {what} ({error.strerror or error}): "
        "check who owns it and the space left, or choose another folder"
    )
