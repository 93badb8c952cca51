"""Results as a file of JSON lines, one per finished run, so that a benchmark that was broken off goes on where it was.

A line is appended in one piece and on disk before the next run starts; a last line without its end, of a process that
was killed, is dropped. One process writes at a time.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedmpt_core.common.files import LineFile

NAME = "runs.jsonl"
KEYS = (
    "method", "seed", "figures", "trained", "bytes_per_round", "epsilon", "cpu_ms_per_step", "pictures_per_step",
    "cpu_ms_zero_shot", "sites", "backbone", "is_stand_in", "job", "code", "seconds",
)  # fmt: skip
"""What every line has beside `run`."""


class ResultsError(ValueError):
    """The file of results cannot be used: damaged, in use, or not writable."""


@contextmanager
def open_results(folder: Path) -> Iterator["ResultsFile"]:
    """The results in a folder, for as long as nobody else may write them. Raises ResultsError."""
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = LineFile(path)
    except BlockingIOError:
        raise ResultsError(f"{path}: another benchmark writes here: wait for it, or name another place") from None
    except OSError as error:
        raise ResultsError(f"{path}: cannot be written ({error.strerror}): name another place") from None
    with file:
        yield ResultsFile(path, file)


class ResultsFile:
    """Finished runs.

    Attributes:
        results: by run.
    """

    def __init__(self, path: Path, file: LineFile) -> None:
        """Reads what is there. Raises ResultsError."""
        self._path, self._file = path, file
        self.results: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(file.lines, start=1):
            try:
                row = json.loads(line)
                self.results[row.pop("run")] = {key: row[key] for key in KEYS}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ResultsError(f"{path}: line {number} is not a result: remove it, or name another place") from None

    def add(self, identity: str, result: dict[str, Any]) -> None:
        """Keep a finished run; on disk when this returns. Raises ResultsError."""
        try:
            self._file.append({"run": identity, **result})
        except OSError as error:
            raise ResultsError(f"{self._path}: cannot be written ({error.strerror}): make room") from None
        self.results[identity] = result
