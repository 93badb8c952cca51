"""The ledger: what is damaged is found at its line, what was promised survives every crash, nothing is written in vain.

Run as a program it is one of the processes that the tests start: `test_ledger.py append|hold|steps|kill ...`.
"""

import errno
import fcntl
import hashlib
import hmac
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta, timezone
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpt_core.privacy.ledger.chain import LEDGER_SCHEMA, Entry, LedgerError, LedgerHead
from fedmpt_core.privacy.ledger.fingerprint import fingerprint, site_key
from fedmpt_core.privacy.ledger.ledger import Ledger, read_ledger

ROOT = Path(__file__).parents[3]
PLACE: dict[str, Any] = {"site": "hospital-a", "dataset": "chest", "delta": 1e-5}
DETAILS = {
    "sample_rate": 0.064,
    "noise_multiplier": 1.1,
    "steps": 8,
    "max_grad_norm": 1.0,
    "groups": {"ctx": [12, 3.5]},
}
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PREFIX = b"\xffFEDMPT-LEDGER/1\0"


class Key:
    """Stands for RSA: fast, and a signature is as hard to guess."""

    def __init__(self, secret: bytes = b"a") -> None:
        self.secret, self.key_spki = secret, hashlib.sha256(secret).hexdigest()

    def __call__(self, message: bytes) -> str:
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()

    def verify(self, message: bytes, signature: str) -> bool:
        return self(message) == signature


KEY = Key()


def admit_all(_: Sequence[Entry]) -> None:
    pass


def ticking() -> Callable[[], datetime]:
    ticks = count()
    return lambda: START + timedelta(microseconds=next(ticks))


def reserve(ledger: Ledger, round: int = 0, attempt: int = 0, job: str = "job") -> Entry:
    return ledger.reserve(job=job, round=round, attempt=attempt, details=DETAILS, admit=admit_all)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def filled(path: Path, key: Key | None = KEY, rounds: int = 3) -> Ledger:
    ledger = Ledger.create(path, **PLACE, signer=key, verify=key and key.verify, clock=ticking())
    for i in range(rounds):
        ledger.commit(reserve(ledger, i), release=digest(str(i)))
    return ledger


def opened(path: Path, key: Key | None = KEY, **other: Any) -> Ledger:
    return Ledger.open(path, **{**PLACE, "signer": key, "verify": key and key.verify, **other})


def sealed(plain: dict[str, Any], key: Key | None) -> bytes:
    """The format written a second time: one line for these fields, hashed and signed anew."""
    plain = {name: value for name, value in plain.items() if name not in ("hash", "sig")}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    plain["hash"] = hashlib.sha256(text.encode()).hexdigest()
    plain["sig"] = key(PREFIX + bytes.fromhex(plain["hash"])) if key else ""
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()


def forged(data: bytes, line: int, key: Key | None, **changes: Any) -> bytes:
    """The ledger with fields of a line (0-based) changed and everything after it hashed and signed anew."""
    plains, lines = [json.loads(text) for text in data.splitlines()], []
    plains[line] |= changes
    renamed: dict[str, str] = {}
    for i, plain in enumerate(plains):
        old = plain["hash"]
        if i > line and "prev" in plain:
            plain["prev"] = json.loads(lines[-1])["hash"]
        if "reservation" in plain:
            plain["reservation"] = renamed.get(plain["reservation"], plain["reservation"])
        lines.append(sealed(plain, key) if i >= line else data.splitlines()[i])
        renamed[old] = json.loads(lines[-1])["hash"]
    return b"\n".join(lines) + b"\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledgers" / "chest.jsonl"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ledger")


@pytest.fixture(scope="module")
def signed(scratch: Path) -> bytes:
    filled(scratch / "signed")
    return (scratch / "signed").read_bytes()


# format


def test_lines_are_what_the_format_says(path: Path) -> None:
    ledger, previous = filled(path), "0" * 64
    for number, line in enumerate(path.read_bytes().splitlines()):
        plain = json.loads(line)
        assert sealed(plain, KEY) == line
        assert (plain["v"], plain["seq"], plain["prev"]) == (LEDGER_SCHEMA, number, previous)
        previous = plain["hash"]
    genesis, first, done = [json.loads(line) for line in path.read_bytes().splitlines()[:3]]
    assert genesis.items() >= {"delta": "1e-05", "unit": "record", "adjacency": "add-remove"}.items()
    assert genesis["key_spki"] == KEY.key_spki and genesis["time"] == "2026-01-02T03:04:05.000000Z"
    assert first["details"] == {
        "sample_rate": "0.064",
        "noise_multiplier": "1.1",
        "steps": 8,
        "max_grad_norm": "1.0",
        "groups": {"ctx": [12, "3.5"]},
    }
    assert (done["reservation"], done["release"]) == (first["hash"], digest("0"))
    assert ledger.head() == LedgerHead(6, previous, KEY(PREFIX + bytes.fromhex(previous)))


def test_file_and_folder_are_the_owner_s_alone_and_nothing_else_is_left(path: Path) -> None:
    ledger = filled(path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert read_ledger(path, KEY.verify) == ledger.entries() == opened(path).entries()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before and names(path.parent) == [path.name]


def test_it_needs_the_standard_library_alone() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import fedmpt_core.privacy.ledger.ledger;"
        "print({m.split('.')[0] for m in sys.modules} - sys.stdlib_module_names - {'__main__'})"
    )
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "{'fedmpt_core'}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_text(item) for item in value]
    return repr(value) if isinstance(value, float) else value


@given(details=st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_details_survive_and_reals_are_exact_text(scratch: Path, details: dict[str, Any]) -> None:
    path = scratch / "details"
    path.unlink(missing_ok=True)
    ledger = Ledger.create(path, **PLACE, signer=None)
    entry = ledger.reserve(job="j", round=0, attempt=0, details=details, admit=admit_all)
    assert entry.details == as_text(details)
    assert read_ledger(path)[1] == entry


def test_numpy_reals_are_written_as_numbers(path: Path) -> None:
    ledger = filled(path)
    details = {"noise_multiplier": np.float64(1.1)}
    assert ledger.reserve(job="j", round=9, attempt=0, details=details, admit=admit_all).details == {
        "noise_multiplier": "1.1"
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"details": {"a": float("nan")}}, r"details\.a is a float"),
        ({"details": {"a": [1, float("inf")]}}, r"details\.a\[1\] is a float"),
        ({"details": {"a": {1: 2}}}, r"details\.a is a dict"),
        ({"details": {"a": np.float32(1)}}, r"details\.a is a float32"),
        ({"details": {"a": "x" * 1_100_000}}, "more than 1048576"),
        ({"job": ""}, "malformed field job"),
        ({"job": "a\nb"}, "malformed field job"),
        ({"round": -1}, "malformed field round"),
        ({"attempt": True}, "malformed field attempt"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(path: Path, change: dict[str, Any], says: str) -> None:
    ledger = filled(path)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=says):
        ledger.reserve(**{"job": "j", "round": 9, "attempt": 0, "details": {}, "admit": admit_all, **change})
    assert path.read_bytes() == before


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, float("nan")])
def test_delta_must_be_a_probability(path: Path, delta: float) -> None:
    with pytest.raises(LedgerError, match="delta="):
        Ledger.create(path, **{**PLACE, "delta": delta}, signer=None)
    assert not path.exists()


def test_a_malformed_name_leaves_no_file(path: Path) -> None:
    with pytest.raises(LedgerError, match="malformed field site"):
        Ledger.create(path, **{**PLACE, "site": ""}, signer=None)
    assert not path.exists()


# damage


def as_genesis(plain: dict[str, Any]) -> dict[str, Any]:
    own = {"delta": "1e-05", "unit": "record", "adjacency": "add-remove", "key_spki": "", "kind": "genesis"}
    own |= {"public_key": "", "details": {"carried": []}}
    return {name: plain[name] for name in COMMON} | own


COMMON = ("v", "seq", "prev", "site", "dataset", "time")


def as_hold(plain: dict[str, Any]) -> dict[str, Any]:
    return {name: plain[name] for name in (*COMMON, "job", "details")} | {"kind": "hold", "until": plain["time"]}


def as_free(plain: dict[str, Any]) -> dict[str, Any]:
    return {name: plain[name] for name in (*COMMON, "job")} | {"kind": "free"}


def as_cap(plain: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {name: plain[name] for name in COMMON} | {"kind": "cap", "old": old, "new": new}


def test_a_ledger_begins_with_its_genesis(path: Path) -> None:
    filled(path, None, 1)
    reserved = {**json.loads(path.read_bytes().splitlines()[1]), "seq": 0, "prev": "0" * 64}
    path.write_bytes(sealed(reserved, None) + b"\n")
    with pytest.raises(LedgerError, match=r"^line 1 of .* does not follow"):
        read_ledger(path)


@given(st.data())
def test_a_changed_byte_is_found_at_its_line(scratch: Path, signed: bytes, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(signed) - 1))
    byte = signed[index] ^ data.draw(st.integers(1, 255))
    path, line = scratch / "tampered", signed[:index].count(b"\n") + 1
    path.write_bytes(signed[:index] + bytes([byte]) + signed[index + 1 :])
    if index == len(signed) - 1:  # without its newline the last line is unfinished
        entries = read_ledger(path, KEY.verify)
        assert f"line {line} of" in entries.torn and entries == read_ledger(scratch / "signed")[:-1]
        return
    with pytest.raises(LedgerError, match=rf"^line {line} of {path} "):
        read_ledger(path, KEY.verify)


@given(st.data(), st.sampled_from(["delete", "swap", "duplicate"]))
def test_lines_out_of_place_are_found(scratch: Path, signed: bytes, data: st.DataObject, what: str) -> None:
    lines = signed.splitlines(keepends=True)
    first = data.draw(st.integers(0, len(lines) - 2))
    second = data.draw(st.integers(first + 1, len(lines) - 1))
    found = first + 1
    if what == "delete":
        del lines[first]
    elif what == "swap":
        lines[first], lines[second] = lines[second], lines[first]
    else:
        lines.insert(second, lines[first])
        found = second + 1
    path = scratch / "moved"
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match=rf"^line {found} of "):
        read_ledger(path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (lambda text: text.replace(b'"v":2}', b'"v":2,"v":2}'), "has a key twice"),
        (lambda text: text.replace(b'"v":2}', b'"v": 2}'), "not canonical"),
        (lambda text: text + b" ", "not canonical"),
        (lambda text: text + b"{}", "not one JSON object"),
        (lambda text: b"\xef\xbb\xbf" + text, "not canonical|not one JSON"),
        (lambda text: b"[" * 60_000, "not one JSON object"),
        (lambda text: b"[]", "not canonical"),
        (lambda text: b"", "not one JSON object"),
        (lambda text: b"1" * 5_000, "not one JSON object"),
        (lambda text: b" " * 1_100_000, "1100000 bytes, more than 1048576"),
        (lambda text: text.replace(b'"steps":8', b'"steps":NaN'), "real number or NaN"),
        (lambda text: text.replace(b'"steps":8', b'"steps":8.0'), "real number or NaN"),
        (lambda text: sealed({**json.loads(text), "more": 1}, None), "fields of its kind"),
        (lambda text: sealed({**json.loads(text), "kind": "release"}, None), "fields of its kind"),
        (lambda text: sealed({**json.loads(text), "kind": []}, None), "fields of its kind"),
        (lambda text: sealed({**json.loads(text), "v": 0}, None), "fields of its kind"),
        (lambda text: sealed({**json.loads(text), "v": True}, None), "malformed field v"),
        (lambda text: sealed({**json.loads(text), "v": 1}, None), "of an older schema than the line before it"),
        (lambda text: sealed({**as_hold(json.loads(text)), "v": 1}, None), "fields of its kind"),
        (lambda text: sealed(as_hold(json.loads(text)), None), "holds until a time that was over"),
        (lambda text: sealed({**as_hold(json.loads(text)), "until": "tomorrow"}, None), "malformed field until"),
        (lambda text: sealed(as_cap(json.loads(text), "7.0", "9.0"), None), "the cap from 7.0, which was none"),
        (lambda text: sealed(as_cap(json.loads(text), "", "0.0"), None), "no number above 0"),
        (lambda text: sealed(as_cap(json.loads(text), "", "1e999"), None), "no number above 0"),
        (lambda text: sealed(as_cap(json.loads(text), "", "nan"), None), "malformed field new"),
        (lambda text: sealed(as_free(json.loads(text)), None), "frees what was not held"),
        (lambda text: sealed({**json.loads(text), "time": "2026-01-02T03:04:05Z"}, None), "malformed field time"),
        (lambda text: sealed({**json.loads(text), "details": 1}, None), "malformed field details"),
        (lambda text: sealed({**json.loads(text), "site": "other"}, None), "another site or data set"),
        (lambda text: sealed({**json.loads(text), "time": "2025-01-02T03:04:05.000000Z"}, None), "dated before"),
        (lambda text: sealed({**json.loads(text), "seq": 7}, None), "does not follow"),
        (lambda text: sealed({**json.loads(text), "prev": "0" * 64}, None), "does not follow"),
        (lambda text: sealed(json.loads(text), KEY), "signed in an unsigned one"),
        (lambda text: sealed(as_genesis(json.loads(text)), None), "does not follow"),
    ],
)
def test_a_line_of_another_form_is_refused(path: Path, line: Callable[[bytes], bytes], says: str) -> None:
    filled(path, None, 1)
    genesis, reserved, _ = path.read_bytes().splitlines()
    path.write_bytes(genesis + b"\n" + line(reserved) + b"\n")
    with pytest.raises(LedgerError, match=says) as error:
        read_ledger(path)
    assert str(error.value).startswith(f"line 2 of {path} ")


def test_whoever_lacks_the_key_can_hash_a_false_history_but_not_sign_it(path: Path) -> None:
    filled(path)
    data = path.read_bytes()
    path.write_bytes(forged(data, 3, Key(b"thief"), details={"steps": 1}))
    assert read_ledger(path)[3].details == {"steps": 1}
    with pytest.raises(LedgerError, match=r"line 4 of .* a signature that this key did not make"):
        read_ledger(path, KEY.verify)


@pytest.mark.parametrize(
    ("line", "changes", "says"),
    [
        (4, {"reservation": "1" * 64}, "line 5 of .* commits what was not reserved"),
        (4, {"round": 2}, "line 5 of .* commits what was not reserved"),
        (4, {"job": "other"}, "line 5 of .* commits what was not reserved"),
    ],
)
def test_a_commit_belongs_to_its_reservation(path: Path, line: int, changes: dict[str, Any], says: str) -> None:
    filled(path)
    path.write_bytes(forged(path.read_bytes(), line, KEY, **changes))
    with pytest.raises(LedgerError, match=says):
        read_ledger(path, KEY.verify)


def test_a_second_commit_in_the_file_is_damage(path: Path) -> None:
    entries = filled(path).entries()
    again = {**json.loads(path.read_bytes().splitlines()[-1]), "seq": 7, "prev": entries[-1].hash}
    with path.open("ab") as file:
        file.write(sealed(again, KEY) + b"\n")
    with pytest.raises(LedgerError, match=r"line 8 of .* for the second time"):
        read_ledger(path, KEY.verify)


def test_a_cut_tail_and_a_fork_are_valid_chains_that_lack_the_head(path: Path) -> None:
    ledger = filled(path)
    head, data = ledger.head(), path.read_bytes()
    assert ledger.contains(head) and opened(path).contains(head)
    path.write_bytes(b"".join(data.splitlines(keepends=True)[:-1]))
    cut = opened(path)
    assert not cut.contains(head) and not ledger.contains(head)
    for _ in range(2):
        reserve(cut, 7)
    assert cut.entries()[head.seq].hash != head.hash and not cut.contains(head)
    assert cut.contains(cut.head()) and not cut.contains(LedgerHead(-1, cut.head().hash, ""))


def test_heads_travel_as_plain_fields(path: Path) -> None:
    head = filled(path).head()
    assert LedgerHead.from_dict(json.loads(json.dumps(head.to_dict()))) == head
    for change in ({"seq": "1"}, {"seq": -1}, {"seq": True}, {"hash": "x"}, {"sig": None}, {"more": 1}):
        with pytest.raises(LedgerError, match="not a ledger head"):
            LedgerHead.from_dict({**head.to_dict(), **change})
    with pytest.raises(LedgerError, match="not a ledger head"):
        LedgerHead.from_dict({})


# opening


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"site": "hospital-b"}, "site='hospital-a', not 'hospital-b'"),
        ({"dataset": "brain"}, "dataset='chest', not 'brain'"),
        ({"unit": "group"}, "unit='record', not 'group'"),
        ({"delta": 1e-6}, "delta='1e-05', not '1e-06'"),
        ({"signer": None, "verify": None}, "is signed but no signer was given"),
        ({"signer": None}, "only one of signer and verify"),
        ({"verify": None}, "only one of signer and verify"),
        ({"signer": Key(b"b"), "verify": Key(b"b").verify}, f"line 1 of .*the ledger's is {KEY.key_spki[:16]}"),
    ],
)
def test_a_ledger_opens_only_for_what_it_was_made(path: Path, change: dict[str, Any], says: str) -> None:
    filled(path)
    with path.open("ab") as file:
        file.write(b"torn")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=says):
        opened(path, **change)
    assert path.read_bytes() == before and names(path.parent) == [path.name]


def test_an_unsigned_ledger_refuses_a_key(path: Path) -> None:
    ledger = filled(path, None)
    assert {entry.sig for entry in ledger.entries()} == {""} and ledger.entries()[0].key_spki == ""
    with pytest.raises(LedgerError, match="is unsigned"):
        opened(path, KEY)
    with pytest.raises(LedgerError, match="is unsigned"):
        read_ledger(path, KEY.verify)


def test_a_key_that_does_not_fit_the_verifier_writes_nothing(path: Path) -> None:
    filled(path)
    before = path.read_bytes()
    ledger = opened(path, signer=Key(b"b"))
    with pytest.raises(LedgerError, match="this key did not make"):
        reserve(ledger)
    assert path.read_bytes() == before


def test_a_ledger_is_never_started_twice_nor_silently(path: Path) -> None:
    for call in (lambda: opened(path), lambda: read_ledger(path)):
        with pytest.raises(LedgerError, match="is missing: restore it"):
            call()
        assert not path.exists()
    ledger = filled(path)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="exists: open it"):
        filled(path)
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(LedgerError, match="is missing"):
        reserve(ledger)
    assert not path.exists()


@pytest.mark.parametrize("data", [b"", b'{"adjacency"'])
def test_an_empty_file_is_no_ledger(path: Path, data: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(data)
    for call in (lambda: opened(path), lambda: read_ledger(path)):
        with pytest.raises(LedgerError, match="no complete first line"):
            call()
    assert path.read_bytes() == data


def test_a_pipe_or_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LedgerError, match="not a plain file"):
        opened(tmp_path / "pipe")
    with pytest.raises(LedgerError, match="cannot be used"):
        opened(tmp_path)


def test_a_later_schema_asks_for_an_upgrade_and_leaves_the_file(path: Path) -> None:
    filled(path)
    later = {**json.loads(path.read_bytes().splitlines()[-1]), "v": 3, "kind": "anchor"}
    path.write_bytes(path.read_bytes() + sealed(later, KEY) + b"\n" + b"torn")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"line 8 of .* has schema 3, this release reads 2: upgrade"):
        opened(path)
    assert path.read_bytes() == before and names(path.parent) == [path.name]


@pytest.mark.parametrize("kept", [1, 100, -1])
def test_a_torn_last_line_is_kept_aside_and_the_ledger_goes_on(path: Path, kept: int) -> None:
    ledger = filled(path)
    whole = path.read_bytes()
    reserve(ledger, 3)
    torn = path.read_bytes()[len(whole) : len(path.read_bytes()) if kept < 0 else len(whole) + kept].rstrip(b"\n")
    for number in (1, 2):
        path.write_bytes(whole + torn)
        entries = read_ledger(path, KEY.verify)
        assert entries == read_ledger(path)[:7] and f"line 8 of {path} is torn" in entries.torn
        assert path.read_bytes() == whole + torn
        again = opened(path)
        aside = path.with_name(f"{path.name}.torn-{number}")
        assert path.read_bytes() == whole and aside.read_bytes() == torn
        assert stat.S_IMODE(aside.stat().st_mode) == 0o600
        assert read_ledger(path).torn == ""
        assert reserve(again, 3).seq == 7


def test_a_torn_line_in_the_middle_is_damage(path: Path) -> None:
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], lines[3][:50] + b"\n", *lines[4:]]))
    with pytest.raises(LedgerError, match="line 4 of"):
        opened(path)


def test_a_ledger_in_use_notices_what_happens_to_its_file(path: Path) -> None:
    ledger = filled(path)
    data = path.read_bytes()
    shorter, other = b"".join(data.splitlines(keepends=True)[:-1]), forged(data, 6, KEY, release=digest("other"))
    for changed in (shorter, data[:-1], b"", other):
        path.write_bytes(changed)
        with pytest.raises(LedgerError, match=r"line 7 of .* changed or was cut"):
            reserve(ledger)
        with pytest.raises(LedgerError, match=r"line 7 of .* changed or was cut"):
            ledger.head()
        assert path.read_bytes() == changed
    path.write_bytes(data)
    assert reserve(ledger).seq == 7


def test_lines_of_others_are_verified_before_anything_follows_them(path: Path) -> None:
    ledger = filled(path)
    last = json.loads(path.read_bytes().splitlines()[-1])
    foreign = {**json.loads(path.read_bytes().splitlines()[-2]), "seq": 7, "prev": last["hash"], "time": last["time"]}
    path.write_bytes(path.read_bytes() + sealed(foreign, Key(b"thief")) + b"\n")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"line 8 of .* this key did not make"):
        reserve(ledger)
    assert path.read_bytes() == before


# reserve and commit


def test_every_attempt_is_charged_and_admission_sees_all_of_them(path: Path) -> None:
    ledger, seen = filled(path, rounds=0), []
    for _ in range(3):
        ledger.reserve(
            job="j",
            round=1,
            attempt=0,
            details=DETAILS,
            admit=lambda past: seen.append([(e.kind, e.job, e.details.get("steps")) for e in past]),
        )
    assert seen == [[("genesis", "", None), *[("reserve", "j", 8)] * n] for n in range(3)]
    assert [entry.kind for entry in ledger.entries()] == ["genesis"] + ["reserve"] * 3


def test_admission_keeps_nobody_waiting_and_is_asked_again_about_what_came_between(path: Path) -> None:
    filled(path, rounds=0)
    ledger, other = opened(path), opened(path, lock_timeout=0.0)
    reserve(other, job="other")
    seen: list[list[str]] = []

    def admit(past: Sequence[Entry]) -> None:
        seen.append([entry.job for entry in past])
        if len(seen) == 1:
            reserve(other, job="in between")

    assert ledger.reserve(job="j", round=0, attempt=0, details=DETAILS, admit=admit).seq == 3
    assert seen == [["", "other"], ["", "other", "in between"]]


def test_a_refusal_leaves_the_file_as_it_was(path: Path) -> None:
    class OverBudget(Exception):
        pass

    def refuse(_: Sequence[Entry]) -> None:
        raise OverBudget

    ledger = filled(path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    with pytest.raises(OverBudget):
        ledger.reserve(job="j", round=9, attempt=0, details=DETAILS, admit=refuse)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert reserve(ledger).seq == 7


def test_a_round_is_committed_once(path: Path, tmp_path: Path) -> None:
    ledger = filled(path, rounds=0)
    reservation = reserve(ledger)
    done = ledger.commit(reservation, release=digest("a"))
    before = path.read_bytes()
    assert ledger.commit(reservation, release=digest("a")) == opened(path).commit(reservation, release=digest("a"))
    assert ledger.commit(reservation, release=digest("a")) == done
    with pytest.raises(LedgerError, match="round=0 attempt=0 was committed with other bytes"):
        ledger.commit(reservation, release=digest("b"))
    for stranger in (done, ledger.entries()[0], reserve(filled(tmp_path / "other", rounds=0), job="other")):
        with pytest.raises(LedgerError, match="is not in"):
            ledger.commit(stranger, release=digest("a"))
    assert path.read_bytes() == before
    open_one = reserve(ledger)
    before = path.read_bytes()
    for bad in ("", "a" * 63, "A" * 64):
        with pytest.raises(LedgerError, match="malformed field release"):
            ledger.commit(open_one, release=bad)
    assert path.read_bytes() == before


def test_a_clock_that_runs_backwards_stops_the_site(path: Path) -> None:
    now = [START]
    ledger = Ledger.create(path, **PLACE, signer=KEY, verify=KEY.verify, clock=lambda: now[0])
    assert reserve(ledger).time == "2026-01-02T03:04:05.000000Z"  # the same instant is allowed
    before = path.read_bytes()
    now[0] -= timedelta(microseconds=1)
    with pytest.raises(LedgerError, match=r"03:04:04\.999999Z, before 2026-01-02T03:04:05\.000000Z"):
        reserve(ledger)
    assert path.read_bytes() == before
    now[0] = (START + timedelta(hours=1)).astimezone(timezone(timedelta(hours=-5)))
    assert reserve(ledger).time == "2026-01-02T04:04:05.000000Z"


# the disk


def full(number: int = errno.ENOSPC) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize("after", [0, 1, 200])
def test_a_full_disk_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    ledger = filled(path)
    before, write, left = path.read_bytes(), os.write, [after]

    def limited(file: int, data: bytes) -> int:
        if not left[0]:
            raise full()
        done = write(file, data[: left[0]])
        left[0] -= done
        return done

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", limited)
        with pytest.raises(LedgerError, match="No space left"):
            reserve(ledger)
    assert path.read_bytes() == before
    assert reserve(ledger).seq == 7 and len(opened(path).entries()) == 8


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_device_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, write = filled(path), os.write
    before = path.read_bytes()
    with Path("/dev/full").open("wb", buffering=0) as device, monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(device.fileno(), data))
        with pytest.raises(LedgerError, match="No space left"):
            reserve(ledger)
    assert path.read_bytes() == before


def test_a_failed_sync_takes_the_line_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(file: int) -> None:
        raise full(errno.EIO)

    ledger = filled(path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(LedgerError, match="Input/output error"):
            reserve(ledger)
    assert path.read_bytes() == before
    assert reserve(ledger).seq == 7


def test_half_a_line_that_cannot_be_taken_back_is_set_aside_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, write, calls = filled(path), os.write, count()

    def once(file: int, data: bytes) -> int:
        if next(calls):
            raise full()
        return write(file, data[:40])

    def stuck(*_: object) -> None:
        raise full(errno.EROFS)

    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", once)
        patch.setattr(os, "ftruncate", stuck)
        with pytest.raises(LedgerError, match="No space left"):
            reserve(ledger)
    assert len(path.read_bytes()) == len(before) + 40
    assert reserve(ledger).seq == 7
    assert path.with_name(f"{path.name}.torn-1").stat().st_size == 40


def test_a_torn_line_is_not_lost_when_the_disk_is_full(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise full()

    filled(path)
    path.write_bytes(path.read_bytes() + b"torn")
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(LedgerError, match="No space left"):
            opened(path)
    assert path.read_bytes() == before and names(path.parent) == [path.name]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_ledger_that_could_not_be_started_leaves_no_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def failing(*_: object) -> int:
        raise full()

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(LedgerError, match="No space left"):
            filled(path)
    assert not path.exists()
    assert len(filled(path).entries()) == 7


def test_a_read_only_disk_stops_training_but_not_the_audit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, plain_open = filled(path), os.open

    def read_only(name: Path, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise full(errno.EROFS)
        return plain_open(name, flags, *rest, **named)

    monkeypatch.setattr(os, "open", read_only)
    for call in (lambda: reserve(ledger), lambda: opened(path), lambda: filled(path.with_name("new"))):
        with pytest.raises(LedgerError, match="Read-only file system"):
            call()
    assert len(read_ledger(path, KEY.verify)) == 7


def test_a_promise_is_on_disk_before_it_is_given(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill -9 spares the page cache, so only the order of the calls can show what a power cut would leave."""
    calls: list[tuple[str, bool]] = []
    for name in ("write", "fsync"):
        real = getattr(os, name)

        def noted(file: int, *rest: Any, name: str = name, real: Callable[..., Any] = real) -> Any:
            calls.append((name, stat.S_ISDIR(os.fstat(file).st_mode)))
            return real(file, *rest)

        monkeypatch.setattr(os, name, noted)
    ledger = Ledger.create(path, **PLACE, signer=None)
    assert calls == [("write", False), ("fsync", False), ("fsync", True), ("fsync", True)]  # the new folder, its parent
    calls.clear()
    entry = reserve(ledger)
    assert calls == [("write", False), ("fsync", False)]
    calls.clear()
    ledger.commit(entry, release=digest("a"))
    assert calls == [("write", False), ("fsync", False)]


# other threads and processes


def process(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def said(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()


def told(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()


def report(*arguments: object) -> dict[str, Any]:
    with process(*arguments) as worker:
        text = worker.communicate()[0]
    assert worker.returncode == 0
    return json.loads(text)


def test_a_lock_held_elsewhere_is_waited_for_and_then_named(path: Path) -> None:
    filled(path)
    before = path.read_bytes()
    with process("hold", path) as holder:
        assert said(holder) == "held"
        for call in (
            lambda: opened(path, lock_timeout=0.01),
            lambda: read_ledger(path, lock_timeout=0.0),
        ):
            with pytest.raises(LedgerError, match="locked by another process"):
                call()
        assert path.read_bytes() == before
        told(holder)
    assert holder.returncode == 0
    assert reserve(opened(path, lock_timeout=0.0)).seq == 7


def test_a_lock_that_is_given_back_in_time_is_taken(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, pauses = filled(path), []
    with path.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            fcntl.flock(holder, fcntl.LOCK_UN)

        monkeypatch.setattr(time, "sleep", sleep)
        assert reserve(ledger).seq == 7
    assert len(pauses) == 1


def test_a_file_replaced_while_waiting_for_it_is_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, copy = filled(path), path.with_name("copy")
    shutil.copy(path, copy)
    before = path.read_bytes()
    with path.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)

        def sleep(_: float) -> None:
            copy.replace(path)
            fcntl.flock(holder, fcntl.LOCK_UN)

        monkeypatch.setattr(time, "sleep", sleep)
        with pytest.raises(LedgerError, match="was replaced"):
            reserve(ledger)
        assert holder.read() == before == path.read_bytes()


def test_two_processes_append_to_one_chain(path: Path) -> None:
    filled(path, None, 0)
    workers = [process("append", path, job, 100, 1000) for job in ("a", "b")]
    assert [said(worker) for worker in workers] == ["ready"] * 2
    for worker in workers:
        told(worker)
    admitted = [json.loads(worker.communicate()[0]) for worker in workers]
    entries = opened(path, None).entries()
    assert admitted == [100, 100] and len(entries) == 201
    for job in ("a", "b"):
        assert [entry.round for entry in entries if entry.job == job] == list(range(100))


def test_the_budget_cannot_be_passed_from_two_sides(path: Path) -> None:
    filled(path, None, 0)
    workers = [process("append", path, job, 60, 75) for job in ("a", "b")]
    assert [said(worker) for worker in workers] == ["ready"] * 2
    for worker in workers:
        told(worker)
    admitted = [json.loads(worker.communicate()[0]) for worker in workers]
    assert sum(admitted) == 75 and len(opened(path, None).entries()) == 76


def test_threads_share_one_ledger(path: Path) -> None:
    ledger = filled(path, rounds=0)
    threads = [threading.Thread(target=lambda: [reserve(ledger, i) for i in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.round for entry in ledger.entries()[1:]) == sorted([*range(20)] * 4)


def test_a_kill_at_any_line_loses_no_promise(tmp_path: Path) -> None:
    """The process kills itself at its first, second, ... line inside the ledger, every write being cut in two."""
    result = report("steps", tmp_path, "right")
    assert result["violations"] == []
    assert result["kills"] > 100 and result["torn"] > 0 and result["open"] > 0 and result["released"] > 0


@pytest.mark.parametrize("twin", ["release-before-commit", "train-before-reserve"])
def test_the_kill_test_finds_a_wrong_order(tmp_path: Path, twin: str) -> None:
    assert report("steps", tmp_path, twin)["violations"]


def test_two_hundred_kills_lose_no_promise(tmp_path: Path) -> None:
    result = report("kill", tmp_path, 200)
    assert result["violations"] == []
    assert result["kills"] == 200 and result["released"] > 0 and result["open"] > 0


# fingerprint


@given(st.lists(st.text(max_size=8), max_size=6), st.randoms())
def test_a_fingerprint_depends_on_the_records_and_the_key_alone(records: list[str], rng: random.Random) -> None:
    shuffled = records[:]
    rng.shuffle(shuffled)
    value = fingerprint(iter(records), b"k" * 32)
    assert fingerprint(shuffled, b"k" * 32) == value and len(value) == 64
    assert len({value, fingerprint(records, b"l" * 32), fingerprint([*records, "x"], b"k" * 32)}) == 3
    assert fingerprint(["".join(records), ""], b"k" * 32) != value or sorted(records) == ["", "".join(records)]


def test_a_fingerprint_needs_a_key_of_full_length() -> None:
    with pytest.raises(ValueError, match="has 31 bytes, it must have 32"):
        fingerprint([], b"k" * 31)


def test_the_site_key_is_drawn_once_and_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = site_key(path)
    assert len(key) == 32 and site_key(path) == key != site_key(tmp_path / "other")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and names(tmp_path) == ["key", "other"]
    path.chmod(0o640)
    with pytest.raises(ValueError, match="may be read by others"):
        site_key(path)
    path.chmod(0o600)
    path.write_bytes(key[:5])
    with pytest.raises(ValueError, match="has 5 bytes"):
        site_key(path)


def test_two_processes_that_draw_a_site_key_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, draw = tmp_path / "key", os.urandom
    first: list[bytes] = []

    def late(size: int) -> bytes:
        monkeypatch.setattr(os, "urandom", draw)
        first.append(site_key(path))  # another process is quicker
        return draw(size)

    monkeypatch.setattr(os, "urandom", late)
    assert site_key(path) == first[0] and names(tmp_path) == ["key"]


# the other processes


class _Full(Exception):
    pass


def _append(path: Path, job: str, number: int, cap: int) -> int:
    """Reserves `number` rounds unless the ledger holds `cap` reservations; returns how many were admitted."""

    def admit(past: Sequence[Entry]) -> None:
        if len(past) > cap:
            raise _Full

    ledger, admitted = opened(path, None), 0
    print("ready", flush=True)
    sys.stdin.readline()
    for i in range(number):
        try:
            ledger.reserve(job=job, round=i, attempt=0, details=DETAILS, admit=admit)
            admitted += 1
        except _Full:
            pass
    return admitted


def _hold(path: Path) -> None:
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        print("held", flush=True)
        sys.stdin.readline()


def _round(folder: Path, ledger: Ledger, number: int, order: str) -> None:
    """One round as a site runs it, or with a step out of order; `trained` and `released` show what really happened."""

    def note(name: str) -> None:
        with (folder / name).open("ab", buffering=0) as file:
            file.write(f"{number}\n".encode())

    if order == "train-before-reserve":
        note("trained")
    reservation = reserve(ledger, number)
    if order != "train-before-reserve":
        note("trained")
    if order == "release-before-commit":
        note("released")
    ledger.commit(reservation, release=digest(str(number)))
    if order != "release-before-commit":
        note("released")


def _checked(folder: Path) -> dict[str, Any]:
    """Opens the ledger after a crash, as the next process does, and compares it with what really happened."""
    torn = len(list(folder.glob("ledger.torn-*"))) + bool(read_ledger(folder / "ledger").torn)
    entries = opened(folder / "ledger", None).entries()
    reserved = {entry.hash: entry for entry in entries if entry.kind == "reserve"}
    committed = {reserved[entry.reservation].round for entry in entries if entry.kind == "commit"}
    rounds = {entry.round for entry in reserved.values()}
    happened = {
        name: (folder / name).read_text().split() if (folder / name).exists() else []
        for name in ("trained", "released")
    }
    violations = [f"round {r} trained without a reservation" for r in happened["trained"] if int(r) not in rounds]
    violations += [f"round {r} released without a commit" for r in happened["released"] if int(r) not in committed]
    charged = sum(entry.details["steps"] for entry in reserved.values())
    if charged < 8 * len(happened["trained"]):
        violations.append(f"{charged} steps charged for {happened['trained']}")
    return {
        "violations": violations,
        "torn": torn,
        "open": len(rounds - committed),
        "released": len(happened["released"]),
    }


def _added(total: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        total[name] = total[name] + value if name in total else value


def _trap(number: int) -> None:
    """Kills this process at its `number`-th line inside ledger and files, and halves every write to the ledger."""
    inside, seen, write = tuple(str(ROOT / "fedmpt_core" / room) for room in ("privacy", "common")), count(1), os.write

    def line(frame: Any, event: str, _: object) -> Any:
        if event == "line" and next(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return line

    def half(file: int, data: bytes) -> int:
        return write(file, data[: (len(data) + 1) // 2] if len(data) > 200 else data)

    setattr(os, "write", half)  # noqa: B010
    sys.settrace(lambda frame, event, arg: line if frame.f_code.co_filename.startswith(inside) else None)


def _steps(root: Path, order: str) -> dict[str, Any]:
    total: dict[str, Any] = {"kills": 0}
    for number in count(1):
        folder = root / str(number)
        folder.mkdir()
        filled(folder / "ledger", None, 0)
        child = os.fork()
        if not child:
            ledger = opened(folder / "ledger", None)
            _trap(number)
            _round(folder, ledger, 0, order)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                total["violations"] = [*total.get("violations", []), f"the process of step {number} failed"]
            _added(total, _checked(folder))
            return total
        total["kills"] += 1
        _added(total, _checked(folder))
    raise AssertionError


def _kill(root: Path, kills: int) -> dict[str, Any]:
    total: dict[str, Any] = {"kills": 0}
    rng = random.Random(7)
    for number in range(kills):
        folder = root / str(number // 20)  # a ledger survives twenty kills
        if not folder.exists():
            folder.mkdir()
            filled(folder / "ledger", None, 0)
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            os.close(ours)
            try:
                ledger = opened(folder / "ledger", None)
                for i in count():
                    os.write(theirs, b".")
                    _round(folder, ledger, 1000 * number + i, "right")
            finally:
                os._exit(1)
        os.close(theirs)
        for _ in range(rng.randrange(1, 6)):
            os.read(ours, 1)
        until = time.perf_counter() + rng.uniform(0, 0.004)
        while time.perf_counter() < until:
            pass
        os.kill(child, signal.SIGKILL)
        total["kills"] += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        os.close(ours)
        if number % 20 == 19 or number == kills - 1:
            _added(total, _checked(folder))
    return total


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["append", name, job, number, cap]:
            print(json.dumps(_append(Path(name), job, int(number), int(cap))))
        case ["hold", name]:
            _hold(Path(name))
        case ["steps", folder, order]:
            print(json.dumps(_steps(Path(folder), order)))
        case ["kill", folder, kills]:
            print(json.dumps(_kill(Path(folder), int(kills))))
        case other:
            raise SystemExit(f"unknown task {other}")
