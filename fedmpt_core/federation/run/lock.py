"""A run's folder, for one run at a time: two in one folder would mix their ledgers, checkpoints and records."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedmpt_core.common.files import locked

LOCK = ".lock"  # stays in the folder; what counts is who holds it


class FolderTaken(ValueError):
    """Another run goes on in a folder; the sentence says what to do."""


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """Keep other runs out of a folder until the block has ended, and every process that inherited the descriptor.

    Args:
        folder: exists and can be written to.

    Yields:
        The lock's descriptor.

    Raises:
        FolderTaken: another run goes on in it.
        OSError: the lock cannot be opened.
    """
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(locked(folder / LOCK, write=True, create=True))
        except BlockingIOError:
            raise FolderTaken(
                f"{folder}: another run goes on in it, or winds down after it was stopped: wait until it has ended, or "
                "name another folder with --out"
            ) from None
        yield lock


def require_free(folder: Path) -> None:
    """That no run goes on in a folder, which need not exist. Raises FolderTaken."""
    if (folder / LOCK).exists():
        with held(folder):
            pass
