"""Files: how one appears whole, who may write one now, how a line is added to it, and its digest.

Standard library alone (fcntl, so not Windows), so that an auditor can run the ledger that stands on this.
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO


class WriteError(ValueError):
    """A file cannot be written; the sentence names it and the cause.

    Attributes:
        strerror: the cause, as the operating system says it.
    """

    def __init__(self, path: Path, error: OSError) -> None:
        self.strerror = error.strerror or str(error)
        super().__init__(f"{str(path)!r} cannot be written ({self.strerror}): name another place, or make room")


class ReplacedError(OSError):
    """A file is no plain file, or another one took its place while its lock was waited for."""


@contextmanager
def whole_file(
    path: Path, *, mode: int | None = 0o600, durable: bool = True, replace: bool = True
) -> Iterator[BinaryIO]:
    """A new file that appears at `path` when the block ends, and leaves no trace when it raises.

    Args:
        path: its folder exists.
        mode: permissions; None for those of the file that is replaced, and of a new one what the umask leaves of 0666.
        durable: on disk when the block has ended; False for what nobody misses after a power failure.
        replace: whether it may take the place of another.

    Raises:
        FileExistsError: the file exists and `replace` is False; it stays as it is.
        WriteError: the folder is missing, full or cannot be written to; what was there stays as it is.
    """
    draft = path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(draft, flags, 0o666 if mode is None else 0o600), "wb") as file:
            try:
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                elif path.exists():
                    os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
                if replace:
                    draft.replace(path)
                else:
                    path.hardlink_to(draft)  # unlike a rename it replaces nothing
            finally:
                draft.unlink(missing_ok=True)
        if durable:
            sync_folder(path.parent)
    except FileExistsError as error:
        if replace:
            raise WriteError(path, error) from None
        raise
    except OSError as error:
        raise WriteError(path, error) from None


def write_whole(
    path: Path, data: bytes, *, mode: int | None = 0o600, durable: bool = True, replace: bool = True
) -> None:
    """Makes a file of these bytes; arguments and errors as in `whole_file`."""
    with whole_file(path, mode=mode, durable=durable, replace=replace) as file:
        file.write(data)


def require_place(folder: Path) -> None:
    """That a folder can be made, or written to where it is; tried without leaving anything, before any work is spent.

    Raises WriteError.
    """
    try:
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise WriteError(folder, error) from None


def sync_folder(folder: Path) -> None:
    """So that a name in it outlives a crash. Raises OSError."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_digest(path: Path) -> str:
    """The same of a file that many ask for: read once while its time and size stay as they are."""
    facts = path.stat()
    return _known_digest(path, facts.st_mtime_ns, facts.st_size)


@lru_cache
def _known_digest(path: Path, changed: int, size: int) -> str:
    return file_digest(path)


@contextmanager
def locked(path: Path, *, write: bool, create: bool = False, timeout: float = 0.0) -> Iterator[int]:
    """The descriptor of a file, with all other writers shut out; threads have locks of their own and wait as well.

    Args:
        path: the file.
        write: to append, with readers shut out too; False: to read, beside other readers.
        create: start an empty file where there is none.
        timeout: seconds to wait for others, >= 0.

    Raises:
        BlockingIOError: others hold it for longer.
        ReplacedError: it is no plain file, or no longer the one that was opened.
        OSError: it cannot be opened.
    """
    flags, lock = (os.O_RDWR | os.O_APPEND, fcntl.LOCK_EX) if write else (os.O_RDONLY, fcntl.LOCK_SH)
    flags |= os.O_CLOEXEC | os.O_NONBLOCK | (os.O_CREAT if create else 0)  # a pipe in its place must not make us wait
    file = os.open(path, flags, 0o666)
    try:
        deadline, pause = time.monotonic() + timeout, 0.001
        while not _try_lock(file, lock):
            if time.monotonic() >= deadline:
                raise BlockingIOError(errno.EAGAIN, "locked by another process", str(path))
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or not os.path.samestat(status, path.stat()):
            raise ReplacedError(errno.ESTALE, "was replaced, or is not a plain file", str(path))
        yield file
    finally:
        os.close(file)


def _try_lock(file: int, lock: int) -> bool:
    try:
        fcntl.flock(file, lock | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def append(file: int, data: bytes) -> None:
    """Adds bytes to a file that `locked` gave to write; on disk when this returns.

    Raises OSError, and leaves the file as it was, or with all of the bytes where the disk refuses even that.
    """
    end = os.lseek(file, 0, os.SEEK_END)
    try:
        while data:
            data = data[os.write(file, data) :]
        os.fsync(file)
    except OSError:
        with suppress(OSError):
            os.ftruncate(file, end)
        raise


class LineFile(AbstractContextManager["LineFile"]):
    """A file of JSON lines that one process at a time holds and adds to; a context manager.

    Attributes:
        lines: the complete ones when it was opened, without their ends.
        torn: what followed them, of a process that was killed while it wrote; the next `append` cuts it off.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, or starts it.

        Raises:
            BlockingIOError: another process holds it.
            OSError: it cannot be opened, or is no plain file.
        """
        with ExitStack() as stack:
            self._file = stack.enter_context(locked(path, write=True, create=True))
            with os.fdopen(os.dup(self._file), "rb") as stream:
                *self.lines, self.torn = stream.read().split(b"\n")
            self._held = stack.pop_all()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Lets others have it."""
        self._held.close()
        self._file = -1  # the number may soon be another file's

    def append(self, *values: Any) -> None:
        """Adds one line for each value; on disk when this returns. Raises OSError, and adds none then."""
        if self.torn:
            os.ftruncate(self._file, os.fstat(self._file).st_size - len(self.torn))
            self.torn = b""
        append(self._file, b"".join(json.dumps(value, allow_nan=False).encode() + b"\n" for value in values))
