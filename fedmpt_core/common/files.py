"""A file that appears whole or not at all, readable for its owner only."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` when the block ends, and leaves no trace when it raises.

    Raises:
        ValueError: the folder is missing, full or cannot be written to.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                yield file.file
                file.close()
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise ValueError(
            f"{str(path)!r} cannot be written ({error.strerror or error}): name another place, or make room"
        ) from None
