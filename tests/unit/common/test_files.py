"""Files appear whole or not at all, one process writes at a time, and an appended line is on disk or not there."""

import errno
import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from fedmpt_core.common.files import (
    LineFile,
    ReplacedError,
    WriteError,
    append,
    file_digest,
    locked,
    whole_file,
    write_whole,
)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def refuse(code: int) -> Any:
    def call(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


# a file appears whole


def test_nobody_sees_a_file_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"half")
        file.flush()
        assert path.read_bytes() == b"old"
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_breaks_off_leaves_no_trace(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), whole_file(path) as file:
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("given", "before", "after"),
    [(0o600, 0o644, 0o600), (0o644, 0o600, 0o644), (0o644, None, 0o644), (None, 0o640, 0o640), (None, None, 0o644)],
)
def test_permissions_are_given_kept_or_usual(tmp_path: Path, given: int | None, before: int | None, after: int) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.touch()
        path.chmod(before)
    with umask(0o022):
        write_whole(path, b"", mode=given)
    assert mode(path) == after


def test_a_secret_is_never_readable_for_others(tmp_path: Path) -> None:
    with umask(0), whole_file(tmp_path / "file"):
        assert [mode(p) for p in tmp_path.iterdir()] == [0o600]


def test_a_file_that_may_not_be_replaced_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"first", replace=False)
    with pytest.raises(FileExistsError):
        write_whole(path, b"second", replace=False)
    assert path.read_bytes() == b"first" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("place", ["nowhere/file", ".", "file/below"])
def test_a_place_that_takes_no_file_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot be written \(.*\): name another place, or make room"):
        write_whole(tmp_path / place, b"")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "fchmod"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse(errno.ENOSPC))
        with pytest.raises(WriteError, match="No space left on device") as caught:
            write_whole(path, b"new")
    assert caught.value.strerror == os.strerror(errno.ENOSPC)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_bytes_are_on_disk_before_their_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the order of the calls can show what a power cut would leave."""
    path, sync, calls = tmp_path / "file", os.fsync, []

    def noted(file: int) -> None:
        calls.append(("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file", path.exists()))
        sync(file)

    monkeypatch.setattr(os, "fsync", noted)
    write_whole(path, b"data")
    assert calls == [("file", False), ("folder", True)]
    calls.clear()
    write_whole(path, b"data", durable=False)
    assert not calls


def test_a_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file") == sha256(data).hexdigest()


# one lock


def test_a_writer_shuts_all_others_out_and_readers_only_writers(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with locked(path, write=True, create=True):
        for write in (True, False):
            with pytest.raises(BlockingIOError), locked(path, write=write):
                pass
    with locked(path, write=False), locked(path, write=False), pytest.raises(BlockingIOError), locked(path, write=True):
        pass


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    path, took = tmp_path / "file", []

    def wait() -> None:
        with locked(path, write=True, timeout=60):
            took.append("waiter")

    waiter = threading.Thread(target=wait)
    with locked(path, write=True, create=True):
        waiter.start()
        took.append("holder")
    waiter.join()
    assert took == ["holder", "waiter"]


def test_what_is_no_plain_file_is_not_locked(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ReplacedError), locked(tmp_path / "pipe", write=True):
        pass
    with pytest.raises(FileNotFoundError), locked(tmp_path / "none", write=True):
        pass
    assert names(tmp_path) == ["pipe"]


# one appended line


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_what_cannot_be_appended_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path, write = tmp_path / "file", os.write
    path.write_bytes(b"line\n")

    def half(file: int, data: bytes) -> int:
        if len(data) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:7])

    with locked(path, write=True) as file, monkeypatch.context() as patch:
        patch.setattr(os, call, half if call == "write" else refuse(errno.EIO))
        with pytest.raises(OSError, match=r"No space|Input/output"):
            append(file, b"another line\n")
        assert path.read_bytes() == b"line\n"
        patch.undo()
        append(file, b"another line\n")
    assert path.read_bytes() == b"line\nanother line\n"


def test_lines_come_back(tmp_path: Path) -> None:
    path, rows = tmp_path / "file", [{"a": 1}, ["ü", None], "two\nlines"]
    with LineFile(path) as file:
        assert file.lines == []
        file.append(*rows[:2])
        file.append(rows[2])
        file.append()
    with LineFile(path) as file:
        assert [json.loads(line) for line in file.lines] == rows
    assert path.read_bytes().count(b"\n") == 3


def test_a_torn_line_stays_until_another_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b'1\n{"half')
    with LineFile(path) as file:
        assert (file.lines, file.torn) == ([b"1"], b'{"half')
    assert path.read_bytes() == b'1\n{"half'
    with LineFile(path) as file:
        file.append(2)
        file.append(3)
    assert path.read_bytes() == b"1\n2\n3\n"


def test_what_json_lacks_is_not_written(tmp_path: Path) -> None:
    with LineFile(tmp_path / "file") as file, pytest.raises(ValueError, match="not JSON compliant"):
        file.append({"epsilon": 1.0}, {"epsilon": float("nan")})
    assert (tmp_path / "file").read_bytes() == b""


def test_one_holds_a_file_of_lines_and_a_closed_one_adds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with LineFile(path) as file:
        with pytest.raises(BlockingIOError):
            LineFile(path)
        file.append(1)
    with (tmp_path / "other").open("wb"), pytest.raises(OSError, match="Bad file descriptor"):
        file.append(2)
    assert path.read_bytes() == b"1\n" and (tmp_path / "other").read_bytes() == b""
