"""The file of raw answers: nothing is lost, nothing of others is touched."""

import errno
import json
import os
from pathlib import Path

import pytest

from fedmpt_core.conditions.answers import Answer
from fedmpt_core.conditions.journal import MOST_PACKED, Journal, JournalError, packed, unpacked

RUN = "a" * 64
ANSWERS = [Answer('A dog.\nTwo "cats" \U0001f408', cut=False), Answer("", cut=True)]


def test_answers_come_back(tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl"
    with Journal(path, RUN) as journal:
        journal.append("one", [0, 1], ANSWERS)
        journal.append("two", [0], ANSWERS[1:])
    with Journal(path, RUN) as journal:
        assert [journal.get("one", 0), journal.get("one", 1), journal.get("two", 0)] == [*ANSWERS, ANSWERS[1]]
        assert journal.get("two", 1) is None
        assert len(journal.records()) == 3


@pytest.mark.parametrize("cut", range(1, 56, 9))
def test_a_torn_last_line_is_asked_again_and_nothing_else(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "raw.jsonl"
    with Journal(path, RUN) as journal:
        journal.append("one", [0], ANSWERS[:1])
        whole = path.read_bytes()
        journal.append("one", [1], ANSWERS[1:])
    both = path.read_bytes()
    path.write_bytes(both[: len(whole) + cut])
    with Journal(path, RUN) as journal:
        assert journal.get("one", 0) == ANSWERS[0]
        assert journal.get("one", 1) is None
        journal.append("one", [1], ANSWERS[1:])
    assert path.read_bytes() == both
    with Journal(path, RUN) as journal:
        assert journal.get("one", 1) == ANSWERS[1]


def test_a_torn_first_line_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl"
    Journal(path, RUN).__exit__(None, None, None)
    whole = path.read_bytes()
    for size in (0, 1, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        with Journal(path, RUN):
            assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"my own notes, without a newline", "is no file of raw answers"),
        (b"my own notes\nand more", "line 1 is no raw answer"),
        (b'{"schema": 2, "run": "' + RUN.encode() + b'"}\n', "of another run"),
        (b'{"schema": 1, "run": "' + b"b" * 64 + b'"}\n{"torn', "of another run"),
        (b'{"schema": 1, "run": "' + RUN.encode() + b'"}\n{"stage": "one"}\n', "line 2 is no raw answer"),
        (b'{"schema": 1, "run": "' + RUN.encode() + b'"}\n[1]\n', "line 2 is no raw answer"),
    ],
)
def test_another_file_is_refused_and_left_alone(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "raw.jsonl"
    path.write_bytes(content)
    with pytest.raises(JournalError, match=says):
        Journal(path, RUN)
    assert path.read_bytes() == content


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl"
    with Journal(path, RUN), pytest.raises(JournalError, match="another run is writing it"):
        Journal(path, RUN)
    Journal(path, RUN).__exit__(None, None, None)


def test_a_disk_that_refuses_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(JournalError, match="cannot be written"):
        Journal(tmp_path, RUN)
    with Journal(tmp_path / "raw.jsonl", RUN) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(JournalError, match=r"No space left on device\): the run can go on later"):
                journal.append("one", [0], ANSWERS[:1])
        assert journal.get("one", 0) is None
        journal.append("one", [0], ANSWERS[:1])
    with Journal(tmp_path / "raw.jsonl", RUN) as journal:
        assert journal.get("one", 0) == ANSWERS[0]


def test_short_answers_stay_plain_and_long_ones_are_packed() -> None:
    short = [{"stage": "one", "number": 0, "answer": "A dog.", "cut": False}]
    long = [{"stage": "one", "number": n, "answer": "A dog lies here. " * 20, "cut": False} for n in range(1000)]
    noise = [{"stage": "one", "number": n, "answer": os.urandom(400).hex(), "cut": False} for n in range(1000)]
    assert packed(short)["form"] == "plain"
    assert packed(long)["form"] == "zlib+base64"
    assert packed(noise) | {"sha256": ""} == {"form": "left out", "sha256": "", "data": None}
    assert unpacked(packed(short)) == short
    assert unpacked(packed(long)) == long
    assert unpacked(packed(noise)) is None
    assert len(json.dumps(packed(long))) < MOST_PACKED + 200
    with pytest.raises(ValueError, match="form 'rot13'"):
        unpacked({"form": "rot13"})


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({"form": "zlib+base64", "data": "!"}, "are damaged"),
        ({"form": "zlib+base64", "data": "AAAA"}, "are damaged"),
        ({"form": "zlib+base64", "data": None}, "are damaged"),
        ({"form": "plain", "data": None}, "raw answers: input should be a valid array"),
        ({"form": "plain", "data": [{"stage": "score", "number": 0, "cut": False}]}, "0.answer: field required"),
    ],
)
def test_damaged_answers_of_a_list_are_a_sentence(answers: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        unpacked(answers)
