"""A file that appears complete or not at all, and replaces none."""

import os
import tempfile
from pathlib import Path


def write_new(data: bytes, path: Path) -> None:
    """Write bytes beside `path`, sync, and link them into place.

    Raises:
        FileExistsError: the file exists; it stays as it is.
        OSError: the disk refuses; nothing is left behind.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        draft = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            draft.chmod(0o644)
            path.hardlink_to(draft)  # unlike a rename it replaces nothing
        finally:
            draft.unlink()
