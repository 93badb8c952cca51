"""Results as a file of JSON lines, one per finished run, so that a benchmark that was broken off goes on where it was.

A line is appended in one piece and on disk before the next run starts; a last line without its end, of a process that
was killed, is dropped when the file is opened. One process writes at a time.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any, Self

NAME = "runs.jsonl"
KEYS = (
    "method", "seed", "figures", "trained", "bytes_per_round", "epsilon", "cpu_ms_per_step", "pictures_per_step",
    "cpu_ms_zero_shot", "sites", "backbone", "is_stand_in", "job", "code", "seconds",
)  # fmt: skip
"""What every line has beside `run`."""


class BookError(ValueError):
    """The file of results cannot be used: damaged, in use, or not writable."""


class ResultsFile:
    """The results in a folder; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Names the place; nothing is opened yet."""
        self._path = folder / NAME
        self._stream: IO[str] | None = None
        self.results: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        """Reads what is there. Raises BookError."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            stream = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise BookError(f"{self._path}: cannot be written ({error.strerror}): name another place") from None
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.close()
            raise BookError(
                f"{self._path}: another benchmark writes here: wait for it, or name another place"
            ) from None
        self._stream = stream
        try:
            self._read(stream)
        except BaseException:
            stream.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Lets others write."""
        if self._stream:
            self._stream.close()
        self._stream = None

    def add(self, identity: str, result: dict[str, Any]) -> None:
        """Keep a finished run; on disk when this returns. Raises BookError."""
        if self._stream is None:
            raise BookError("the book is closed: use it as a context manager")
        line = json.dumps({"run": identity, **result}, allow_nan=False) + "\n"
        try:
            self._stream.write(line)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise BookError(f"{self._path}: cannot be written ({error.strerror}): make room") from None
        self.results[identity] = result

    def _read(self, stream: IO[str]) -> None:
        stream.seek(0)
        text = stream.read()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            stream.truncate(len(whole.encode()))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                self.results[row.pop("run")] = {key: row[key] for key in KEYS}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BookError(
                    f"{self._path}: line {number} is not a result: remove it, or name another place"
                ) from None
        stream.seek(0, os.SEEK_END)
