"""Results as a file of JSON lines, one per finished run, so that a benchmark that was broken off goes on where it was.

A line is appended in one piece and on disk before the next run starts; a last line without its end, of a process that
was killed, is dropped. One process writes at a time.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from fedmpt_core.common.files import LineFile

NAME = "runs.jsonl"
KEYS = (
    "method", "seed", "figures", "trained", "bytes_per_round", "epsilon", "cpu_ms_per_step", "pictures_per_step",
    "cpu_ms_zero_shot", "sites", "backbone", "is_stand_in", "job", "code", "seconds",
)  # fmt: skip
"""What every line has beside `run`."""


class ResultsError(ValueError):
    """The file of results cannot be used: damaged, in use, or not writable."""


class ResultsFile:
    """The results in a folder; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Names the place; nothing is opened yet."""
        self._path = folder / NAME
        self._file: LineFile | None = None
        self.results: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        """Reads what is there. Raises ResultsError."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = LineFile(self._path)
        except BlockingIOError:
            raise ResultsError(
                f"{self._path}: another benchmark writes here: wait for it, or name another place"
            ) from None
        except OSError as error:
            raise ResultsError(f"{self._path}: cannot be written ({error.strerror}): name another place") from None
        try:
            self._read(file.lines)
        except BaseException:
            file.close()
            raise
        self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        """Lets others write."""
        if self._file:
            self._file.close()
        self._file = None

    def add(self, identity: str, result: dict[str, Any]) -> None:
        """Keep a finished run; on disk when this returns. Raises ResultsError."""
        if self._file is None:
            raise ResultsError("the file of results is closed: use it as a context manager")
        try:
            self._file.append({"run": identity, **result})
        except OSError as error:
            raise ResultsError(f"{self._path}: cannot be written ({error.strerror}): make room") from None
        self.results[identity] = result

    def _read(self, lines: Sequence[bytes]) -> None:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                self.results[row.pop("run")] = {key: row[key] for key in KEYS}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ResultsError(
                    f"{self._path}: line {number} is not a result: remove it, or name another place"
                ) from None
