"""The lines of a privacy ledger, and how one follows another.

A line is canonical JSON: ASCII, sorted keys, separators `,` and `:`, integers and text alone (reals are decimal text,
so that a hash never depends on how a number is printed). Every line holds the SHA-256 of the line before it (a hash
chain, Haber and Stornetta 1991) and the site's signature over its own hash.

Bytes in, entries out: nothing here opens a file. The standard library is enough, so that an auditor can run this
without anything else: `Chain(Path(name), verify).follow(data)`.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from fedmpt_core.common.canonical import canonical, canonical_digest

# Entries are read for as long as the records exist. So within a schema no field or detail is ever removed or changes
# its meaning, and where a newer detail is missing the old thing was done. What an older release would price wrongly is
# told by another `mechanism`, which it refuses. All else is a new schema: its lines follow those of older ones, which
# stay as they are, and a release that does not know it refuses the ledger from there on.
LEDGER_SCHEMA = 2  # since 2: `hold`, `free`, `cap`, and the cap in the genesis
SIGNED_PREFIX = b"\xffFEDMPT-LEDGER/1\0"  # 0xff starts no text, so no signed text can pass for an entry
PROOF_PREFIX = b"\xffFEDMPT-LEDGER-KEY/1\0"
UNITS = ("record", "group")
ADJACENCY = "add-remove"
MAX_LINE = 1 << 20  # bytes without the newline; chosen: a genesis that carries 5,000 jobs; others are below 2 KiB

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
Verifier = Callable[[bytes, str], bool]

FIRST = "0" * 64
TIME = "%Y-%m-%dT%H:%M:%S.%fZ"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,256}")
_COUNTS = {"v", "seq", "round", "attempt"}
_TEXTS = {
    **dict.fromkeys(("prev", "hash", "reservation", "release"), _DIGEST),
    **dict.fromkeys(("kind", "site", "dataset", "job", "successor"), _NAME),
    **dict.fromkeys(("sig", "proof", "public_key"), re.compile(r"([0-9a-f]{2}){0,1024}")),
    "time": re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII),
    "delta": re.compile(r"[0-9][0-9.e-]{0,31}"),
    "unit": re.compile("|".join(UNITS)),
    "adjacency": re.compile(ADJACENCY),
    "key_spki": re.compile(r"([0-9a-f]{64})?"),
    "old": re.compile(r"([0-9][0-9.e+-]{0,31})?"),
    "new": re.compile(r"[0-9][0-9.e+-]{0,31}"),
}
_TEXTS["until"] = _TEXTS["time"]
CAPS = ("cap", "cap_alone")  # most that may be spent, and most if the masks of secure aggregation fail
_COMMON = ("v", "seq", "prev", "hash", "sig", "kind", "site", "dataset", "time")
_KINDS_1 = {
    "genesis": {*_COMMON, "delta", "unit", "adjacency", "key_spki", "public_key", "details"},
    "reserve": {*_COMMON, "job", "round", "attempt", "details"},
    "commit": {*_COMMON, "job", "round", "attempt", "reservation", "release"},
    "rotate": {*_COMMON, "key_spki", "public_key", "proof"},
    "close": {*_COMMON, "successor"},
}
_KINDS = {
    1: _KINDS_1,
    2: {
        **_KINDS_1,
        "hold": {*_COMMON, "job", "until", "details"},
        "free": {*_COMMON, "job"},
        **{kind: {*_COMMON, "old", "new"} for kind in CAPS},
    },
}


class LedgerError(ValueError):
    """The ledger cannot be trusted or written, so the site may not train; the sentence says where and what to do."""


@dataclass(frozen=True)
class LedgerHead:
    """The newest entry in short; sent with every update, so that others notice when the ledger is cut later.

    Attributes:
        seq: 0-based number of the entry.
        hash: its SHA-256, hex.
        sig: its signature, hex, or "" in an unsigned ledger.
    """

    seq: int
    hash: str
    sig: str

    def to_dict(self) -> dict[str, int | str]:
        """The three fields by name."""
        return {"seq": self.seq, "hash": self.hash, "sig": self.sig}

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> "LedgerHead":
        """What `to_dict` wrote. Raises LedgerError on a missing, additional or malformed field."""
        if set(plain) != {"seq", "hash", "sig"} or not all(_fits(name, value) for name, value in plain.items()):
            raise LedgerError("not a ledger head: it has the fields seq (a count), hash and sig (hex)")
        return LedgerHead(plain["seq"], plain["hash"], plain["sig"])


@dataclass(frozen=True)
class Entry:
    """One line of the ledger, verified; fields that its kind does not have keep their defaults.

    Attributes:
        v: schema of the line.
        seq: 0-based number of the line.
        prev: hash of the line before, 64 zeros for the genesis.
        hash: SHA-256 hex of the canonical line without `hash` and `sig`.
        sig: signature in hex, "" when unsigned.
        kind: `genesis`, `reserve`, `commit`; `hold`, which keeps room for the rounds to come of a job, the newest of a
            job in place of those before it, and `free`, which ends that; `cap`; `rotate`, after which another key
            signs; or `close`, after which nothing is charged.
        site: name of the site.
        dataset: name of the data set.
        time: UTC, ISO 8601 with microseconds.
        delta: genesis; the data set's delta as a decimal string.
        unit: genesis; what one neighbour differs in, `record` or `group`.
        adjacency: genesis; `add-remove`.
        key_spki: genesis and rotate; SHA-256 hex of the public key that signs from here on, or "".
        public_key: genesis and rotate; that key (DER, SubjectPublicKeyInfo) in hex, or "".
        proof: rotate; the new key's signature over the hash of the entry before, hex.
        successor: close; name of the data set under which these records go on.
        job: reserve, commit, hold and free; the job's name.
        round: reserve and commit; 0-based, -1 in a genesis.
        attempt: reserve and commit; 0-based, -1 in a genesis.
        details: reserve; mechanism and steps, reals as decimal strings. Hold: the same of the whole job, with what was
            charged for it. Genesis: `carried`, the charges of ledgers that this one continues, and `cap`, the most that
            may be spent, where that was stated.
        reservation: commit; hash of the `reserve` it closes.
        release: commit; SHA-256 hex of the released bytes.
        until: hold; when it ends by itself, as `time`.
        old: cap; the cap before as a decimal string, "" where none was stated. `new`: the cap from here on.
    """

    v: int
    seq: int
    prev: str
    hash: str
    sig: str
    kind: str
    site: str
    dataset: str
    time: str
    delta: str = ""
    unit: str = ""
    adjacency: str = ""
    key_spki: str = ""
    job: str = ""
    round: int = -1
    attempt: int = -1
    details: Mapping[str, Any] = field(default_factory=dict)
    reservation: str = ""
    release: str = ""
    public_key: str = ""
    proof: str = ""
    successor: str = ""
    until: str = ""
    old: str = ""
    new: str = ""


class Damage(ValueError):
    """What is wrong with a line, as the end of a sentence."""


class Chain:
    """The verified entries of a file, and how far it was read.

    `verify` is that of the key which signs the ledger's end. Where the key changed, entries before the `rotate` are
    checked with the older keys that the ledger itself holds: `verify.of(public_key)` must make verifiers of them.
    """

    def __init__(self, path: Path, verify: Verifier | None) -> None:
        self.path, self.verify = path, verify
        self.key: Verifier | None = None  # whose signature the next line must carry
        self.entries: list[Entry] = []
        self.reserves: dict[str, Entry] = {}  # by their hash, in order
        self.commits: dict[str, Entry] = {}  # by the hash of their reservation
        self.holds: dict[str, Entry] = {}  # the newest of each job that has not ended, by its job
        self.priced: list[Entry] = []  # all that decides what a job may still spend
        self.caps: dict[str, str] = {}
        self.offset, self.last, self.closed = 0, b"", False

    def follow(self, data: bytes) -> bytes:
        """Verifies and takes over bytes that start with the last verified line; returns the unfinished last line."""
        if not data.startswith(self.last):
            raise LedgerError(
                f"line {len(self.entries)} of {self.path} changed or was cut after it was verified: restore the ledger"
            )
        *lines, torn = data[len(self.last) :].split(b"\n")
        for line in lines:
            try:
                self.add(self.check(line), line)
            except Damage as damage:
                raise LedgerError(
                    f"line {len(self.entries) + 1} of {self.path} {damage}; restore the ledger from a backup, "
                    "the site may not train until then"
                ) from None
        if not self.entries:
            raise LedgerError(
                f"{self.path} has no complete first line: restore it; remove it only if it was being created"
            )
        ends, given = (getattr(key, "key_spki", "") for key in (self.key, self.verify))
        if ends != given:
            raise LedgerError(
                f"{self.path} ends with entries signed by the key {ends[:16]}, not by the key {given[:16]} that was "
                "given: `fedmpt ledger rotate` hands a ledger over to a new key"
            )
        return torn

    def check(self, line: bytes) -> Entry:
        """The next entry. Raises Damage when it does not continue the chain."""
        entry = self._parsed(line)
        self._check_place(entry)
        self._check_signature(entry)
        if entry.kind == "rotate":
            self._check_rotation(entry)
        if entry.kind == "commit":
            self._check_commit(entry)
        if entry.kind == "hold" and entry.until <= entry.time:
            raise Damage("holds until a time that was over")
        if entry.kind == "free" and entry.job not in self.holds:
            raise Damage("frees what was not held")
        if entry.kind in ("genesis", *CAPS):
            self._check_cap(entry)
        return entry

    def _parsed(self, line: bytes) -> Entry:
        plain = _decoded(line)
        if isinstance(version := plain.get("v"), int) and version > LEDGER_SCHEMA:
            raise LedgerError(
                f"line {len(self.entries) + 1} of {self.path} has schema {version}, this release reads "
                f"{LEDGER_SCHEMA}: upgrade"
            )
        kind = plain.get("kind")
        kinds = _KINDS.get(version, {}) if isinstance(version, int) else {}
        if not isinstance(kind, str) or set(plain) != kinds.get(kind):
            raise Damage("does not have the fields of its kind")
        for name, value in plain.items():
            if not _fits(name, value):
                raise Damage(f"has a malformed field {name}")
        if canonical_digest({n: v for n, v in plain.items() if n not in ("hash", "sig")}) != plain["hash"]:
            raise Damage("has a hash that is not that of its content")
        return Entry(**plain)

    def _check_place(self, entry: Entry) -> None:
        last = self.entries[-1] if self.entries else None
        prev, first = (last.hash, False) if last else (FIRST, True)
        if entry.seq != len(self.entries) or entry.prev != prev or (entry.kind == "genesis") != first:
            raise Damage("does not follow the line before it")
        if last and (entry.site, entry.dataset) != (last.site, last.dataset):
            raise Damage("is of another site or data set")
        if last and entry.time < last.time:
            raise Damage("is dated before the line before it")
        if last and entry.v < last.v:
            raise Damage("is of an older schema than the line before it")
        if self.closed and entry.kind != "rotate":
            raise Damage("follows the line that closed the ledger")

    def _check_signature(self, entry: Entry) -> None:
        first = self.entries[0] if self.entries else entry
        if self.verify and not first.sig:
            raise LedgerError(f"{self.path} is unsigned, as in a simulation, but a key was given: use it without a key")
        if bool(entry.sig) != bool(first.sig):
            raise Damage("is unsigned in a signed ledger, or signed in an unsigned one")
        if entry.public_key and hashlib.sha256(bytes.fromhex(entry.public_key)).hexdigest() != entry.key_spki:
            raise Damage("names a key by another digest than its own")
        key = self.key if self.entries else self._key_of(entry)
        if key and not key(SIGNED_PREFIX + bytes.fromhex(entry.hash), entry.sig):
            name = first.key_spki[:16] or "of no name"
            raise Damage(f"has a signature that this key did not make (the ledger's is {name})")

    def _check_commit(self, entry: Entry) -> None:
        reserved = self.reserves.get(entry.reservation)
        identity = (entry.job, entry.round, entry.attempt)
        if reserved is None or identity != (reserved.job, reserved.round, reserved.attempt):
            raise Damage("commits what was not reserved")
        if entry.reservation in self.commits:
            raise Damage("commits a reservation for the second time")

    def _check_cap(self, entry: Entry) -> None:
        before = self.caps.get(entry.kind, "")
        if entry.old != before:
            raise Damage(f"changes the cap from {entry.old or 'none'}, which was {before or 'none'}")
        for stated in (entry.new, *(entry.details.get(name, "") for name in CAPS)):
            try:
                fine = stated == "" or 0 < float(stated) < math.inf
            except (TypeError, ValueError):
                fine = False
            if not fine:
                raise Damage("states a cap that is no number above 0")

    def _key_of(self, entry: Entry) -> Verifier | None:
        """The verifier of the key that a genesis or rotate names."""
        if self.verify is None or not entry.public_key or entry.key_spki == getattr(self.verify, "key_spki", ""):
            return self.verify
        try:
            return getattr(self.verify, "of")(entry.public_key)  # noqa: B009 - only where verifiers can do that
        except (AttributeError, ValueError):
            raise Damage("names a key that cannot be used") from None

    def _check_rotation(self, entry: Entry) -> None:
        if not entry.sig or not entry.public_key:
            raise Damage("changes the key of an unsigned ledger, or to none")
        key = self._key_of(entry)
        if key and not key(PROOF_PREFIX + bytes.fromhex(entry.prev), entry.proof):
            raise Damage("changes to a key whose holder did not agree")

    def add(self, entry: Entry, line: bytes) -> None:
        """Takes over a checked entry."""
        self.entries.append(entry)
        if entry.kind in ("genesis", "rotate"):
            self.key = self._key_of(entry)
        if entry.kind in ("genesis", "reserve", "hold", "free", *CAPS):
            self.priced.append(entry)
        match entry.kind:
            case "genesis":
                self.caps = {name: str(entry.details[name]) for name in CAPS if name in entry.details}
            case "reserve":
                self.reserves[entry.hash] = entry
            case "commit":
                self.commits[entry.reservation] = entry
            case "hold":
                self.holds[entry.job] = entry
            case "free":
                del self.holds[entry.job]
            case "cap" | "cap_alone":
                self.caps[entry.kind] = entry.new
            case "close":
                self.closed = True
        self.last = line + b"\n"
        self.offset += len(self.last)


def _decoded(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise Damage(f"has {len(line)} bytes, more than {MAX_LINE}")

    def refuse(text: str) -> None:
        raise Damage("holds a real number or NaN, which are written as text")

    try:
        plain = json.loads(line, parse_float=refuse, parse_constant=refuse)
    except Damage:
        raise
    except (ValueError, RecursionError):
        raise Damage("is not one JSON object") from None
    if not isinstance(plain, dict) or canonical(plain) != line:  # also finds duplicate keys
        raise Damage("is not canonical JSON, or has a key twice")
    return plain


def _fits(name: str, value: object) -> bool:
    if name in _COUNTS:
        return type(value) is int and value >= 0
    if name == "details":
        return isinstance(value, dict)
    return isinstance(value, str) and _TEXTS[name].fullmatch(value) is not None


def plain_details(value: JSON, name: str) -> Any:
    """Details with reals as text. Raises LedgerError, calling the value by `name`, on what JSON cannot hold."""
    if isinstance(value, float) and math.isfinite(value):
        return repr(float(value))
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain_details(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_details(item, f"{name}[{i}]") for i, item in enumerate(value)]
    raise LedgerError(f"{name} is a {type(value).__name__} that a ledger cannot hold: give text or finite numbers")
