"""The file below a privacy ledger: one lock for all writers, errors of the file system as sentences."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedmpt_core.common.files import ReplacedError, WriteError, locked
from fedmpt_core.privacy.ledger.chain import Chain, LedgerError


def fetch(chain: Chain, file: int) -> bytes:
    """The last verified line and all that follows it. Raises LedgerError."""
    with disk(chain.path), os.fdopen(os.dup(file), "rb") as stream:
        stream.seek(chain.offset - len(chain.last))
        return stream.read()


@contextmanager
def opened(path: Path, timeout: float, *, write: bool) -> Iterator[int]:
    """The file, with all other writers shut out, which are waited for `timeout` seconds. Raises LedgerError."""
    with ExitStack() as stack:
        with disk(path):
            try:
                file = stack.enter_context(locked(path, write=write, timeout=timeout))
            except BlockingIOError:
                raise LedgerError(
                    f"{path} is locked by another process for over {timeout} s: let it end, then retry"
                ) from None
        yield file


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Errors of the file system as sentences."""
    try:
        yield
    except FileNotFoundError:
        raise LedgerError(f"{path} is missing: restore it from a backup, a new one never starts on its own") from None
    except FileExistsError as error:
        raise LedgerError(f"{error.filename} exists: open it, a ledger is never started twice") from None
    except ReplacedError:
        raise LedgerError(f"{path} was replaced, or is not a plain file: see who changed it, then retry") from None
    except (OSError, WriteError) as error:
        raise LedgerError(
            f"{path} cannot be used ({error.strerror}): give it a writable disk with free space"
        ) from None
