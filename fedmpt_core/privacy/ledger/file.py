"""The file below a privacy ledger: one lock for all writers, writes that are on disk when they return, errors of the
file system as sentences. Standard library alone (fcntl, so not Windows).
"""

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedmpt_core.privacy.ledger.chain import Chain, LedgerError


def fetch(chain: Chain, file: int) -> bytes:
    """The last verified line and all that follows it."""
    with disk(chain.path), os.fdopen(os.dup(file), "rb") as stream:
        stream.seek(chain.offset - len(chain.last))
        return stream.read()


@contextmanager
def locked(path: Path, timeout: float, *, write: bool) -> Iterator[int]:
    """The file, with all other writers shut out; every call has a lock of its own, so threads wait for each other."""
    flags, lock = (os.O_RDWR | os.O_APPEND, fcntl.LOCK_EX) if write else (os.O_RDONLY, fcntl.LOCK_SH)
    with disk(path):
        file = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe in its place must not make us wait
    try:
        with disk(path):
            deadline, pause = time.monotonic() + timeout, 0.001
            while not _try_lock(file, lock):
                if time.monotonic() >= deadline:
                    raise LedgerError(
                        f"{path} is locked by another process for over {timeout} s: let it end, then retry"
                    )
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or not os.path.samestat(found, path.stat()):
                raise LedgerError(f"{path} was replaced, or is not a plain file: see who changed it, then retry")
        yield file
    finally:
        os.close(file)


def _try_lock(file: int, lock: int) -> bool:
    try:
        fcntl.flock(file, lock | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Errors of the file system as sentences."""
    try:
        yield
    except FileNotFoundError:
        raise LedgerError(f"{path} is missing: restore it from a backup, a new one never starts on its own") from None
    except FileExistsError as error:
        raise LedgerError(f"{error.filename} exists: open it, a ledger is never started twice") from None
    except OSError as error:
        raise LedgerError(
            f"{path} cannot be used ({error.strerror}): give it a writable disk with free space"
        ) from None


def write(file: int, data: bytes) -> None:
    """All of it, synced to disk."""
    while data:
        data = data[os.write(file, data) :]
    os.fsync(file)


def sync_folder(folder: Path) -> None:
    """So that a name in it outlives a crash."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
