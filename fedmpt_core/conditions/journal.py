"""The raw answers of a discovery: a file of JSON lines, appended as they come, so that a broken run goes on; and the
form in which a frozen list holds them.

The first line names the run: a digest over model, prompts, label sets and settings. A file of another run is refused,
never overwritten. A last line that is not complete was being written when the run broke: it is cut off and asked
again. It must never be edited: the frozen list holds the same answers.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from fedmpt_core.common.files import LineFile
from fedmpt_core.conditions.answers import Answer
from fedmpt_core.config.provenance import Answered, check_form

SCHEMA_VERSION = 1
MOST_PLAIN = 60_000  # characters of JSON; more are compressed
MOST_PACKED = 120_000  # characters in base64; more are left out (chosen: a list stays a file that people can diff)


class JournalError(ValueError):
    """The file of raw answers cannot be used; the sentence says why."""


class Journal(AbstractContextManager["Journal"]):
    """Answers by (stage, number); a context manager that holds the file's lock."""

    def __init__(self, path: Path, run: str) -> None:
        """Opens or starts a file.

        Args:
            path: a `.jsonl` file; its folder exists.
            run: SHA-256 hex of what is asked, and of whom.

        Raises:
            JournalError: another run's file, a damaged one, one in use, or a disk that refuses.
        """
        self._path, self._run = path, run
        self._answers: dict[tuple[str, int], Answer] = {}
        try:
            self._file = LineFile(path)
        except BlockingIOError:
            raise JournalError(f"{path}: another run is writing it: wait, or name another file") from None
        except OSError as error:
            raise JournalError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def get(self, stage: str, number: int) -> Answer | None:
        """The answer, or None when it was not given yet."""
        return self._answers.get((stage, number))

    def append(self, stage: str, numbers: Sequence[int], answers: Sequence[Answer]) -> None:
        """Keep answers; on disk when this returns. Raises JournalError when the disk refuses."""
        new = [(n, a) for n, a in zip(numbers, answers, strict=True) if (stage, n) not in self._answers]
        self._write(*({"stage": stage, "number": n, "answer": a.text, "cut": a.cut} for n, a in new))
        self._answers |= {(stage, n): a for n, a in new}

    def records(self) -> list[dict[str, Any]]:
        """All answers, by stage and number."""
        return [
            {"stage": stage, "number": number, "answer": answer.text, "cut": answer.cut}
            for (stage, number), answer in sorted(self._answers.items())
        ]

    def _read(self) -> None:
        lines, header = self._file.lines, {"schema": SCHEMA_VERSION, "run": self._run}
        if not lines and not json.dumps(header).encode().startswith(self._file.torn):
            raise JournalError(f"{self._path}: is no file of raw answers: name another")
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    if (row["schema"], row["run"]) != (SCHEMA_VERSION, self._run):
                        raise JournalError(
                            f"{self._path}: holds the answers of another run (model, classes, prompts or settings "
                            "differ): repeat that run's arguments to go on with it, name another file, or remove it"
                        )
                    continue
                key = str(row["stage"]), int(row["number"])
                self._answers[key] = Answer(str(row["answer"]), bool(row["cut"]))
            except JournalError:
                raise
            except (ValueError, KeyError, TypeError, RecursionError):
                raise JournalError(
                    f"{self._path}: line {number} is no raw answer: remove the file to ask everything again, or name "
                    "another"
                ) from None
        if not lines:
            self._write(header)

    def _write(self, *lines: dict[str, object]) -> None:
        try:
            self._file.append(*lines)
        except OSError as error:
            raise JournalError(f"{self._path}: cannot be written ({error.strerror}): the run can go on later") from None


def packed(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Raw answers for a list: plain, compressed when they are long, or their SHA-256 alone when even that is long."""
    text = json.dumps(records, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if len(text) <= MOST_PLAIN:
        return {"form": "plain", "sha256": digest, "data": list(records)}
    data = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    if len(data) <= MOST_PACKED:
        return {"form": "zlib+base64", "sha256": digest, "data": data}
    return {"form": "left out", "sha256": digest, "data": None}


def unpacked(answers: dict[str, Any]) -> list[dict[str, Any]] | None:
    """What `packed` was given, or None when it was left out. Raises ValueError for another form, or damage."""
    match answers["form"]:
        case "plain":
            records = answers["data"]
        case "zlib+base64":
            try:
                records = json.loads(zlib.decompress(base64.b64decode(answers["data"])))
            except (ValueError, TypeError, zlib.error, RecursionError):
                raise ValueError("the list's raw answers are damaged: they cannot be unpacked") from None
        case "left out":
            return None
        case form:
            raise ValueError(f"raw answers of form {form!r} are not known to this release")
    check_form(list[Answered], "the list: raw answers", records)
    return records
