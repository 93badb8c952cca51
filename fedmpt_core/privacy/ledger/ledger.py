"""The privacy ledger of one data set at one site: what was promised before training, what left the site afterwards.

One append-only file of canonical JSON lines, shared by all jobs and processes of the site and kept outside any job's
folder. Every line holds the SHA-256 of the line before it (a hash chain, Haber and Stornetta 1991) and the site's
signature. A `reserve` is on disk before the first private step of a round and counts in full for ever; the `commit`
that follows names the bytes that were released. So a crash can charge too much, never too little. A `hold` keeps room
for all that a job has still to reserve, until the job ends (`free`) or the hold runs out, whoever was killed meanwhile.

A file that was cut at a line's end is still a valid chain: whoever holds a later `LedgerHead` can tell, see `contains`.

This module never writes an epsilon as truth, never edits a line, and starts no new ledger where one is missing. It
needs the standard library alone, so that an auditor can run it.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedmpt_core.common.canonical import canonical, canonical_digest
from fedmpt_core.common.files import append, sync_folder, write_whole
from fedmpt_core.privacy.ledger.chain import (
    ADJACENCY,
    FIRST,
    JSON,
    LEDGER_SCHEMA,
    PROOF_PREFIX,
    SIGNED_PREFIX,
    TIME,
    UNITS,
    Chain,
    Damage,
    Entry,
    LedgerError,
    LedgerHead,
    Verifier,
    plain_details,
)
from fedmpt_core.privacy.ledger.file import disk, fetch, opened

LOCK_TIMEOUT = 30.0  # seconds
Signer = Callable[[bytes], str]  # signature in hex; an attribute `key_spki`, where there is one, goes into the genesis
Clock = Callable[[], datetime]


class Entries(tuple[Entry, ...]):
    """Verified entries.

    Attributes:
        torn: a sentence on an unfinished last line, which is no entry; "" where there is none.
    """

    torn: str = ""


def read_ledger(path: Path | str, verify: Verifier | None = None, *, lock_timeout: float = LOCK_TIMEOUT) -> Entries:
    """Verifies a ledger without changing it, for guards and auditors.

    Args:
        path: the ledger.
        verify: checks signatures; without it only the chain is checked.
        lock_timeout: seconds to wait for a writer to finish its line, >= 0.

    Returns:
        All entries, the genesis first. An unfinished last line is told in `torn`; the rest is verified all the same.

    Raises:
        LedgerError: missing, unreadable, damaged, unsigned although `verify` is given, of a later schema, or locked.
    """
    chain = Chain(Path(path), verify)
    with opened(Path(path), lock_timeout, write=False) as file:
        data = fetch(chain, file)
    torn = chain.follow(data)
    entries = Entries(chain.entries)
    if torn:
        entries.torn = f"line {len(entries) + 1} of {path} is torn: its writer died before the line was a promise"
    return entries


def successor_of(entries: Sequence[Entry]) -> str:
    """The data set under which the records of a closed ledger go on; "" while it is open."""
    return next((entry.successor for entry in reversed(entries) if entry.kind == "close"), "")


def standing_holds(entries: Sequence[Entry], now: datetime | None = None) -> list[Entry]:
    """The newest hold of each job that had neither ended nor run out at a time; None is the present."""
    newest: dict[str, Entry] = {}
    for entry in entries:
        if entry.kind == "hold":
            newest[entry.job] = entry
        elif entry.kind == "free":
            newest.pop(entry.job, None)
    moment = _text(now or datetime.now(UTC))
    return [hold for hold in newest.values() if moment < hold.until]


@dataclass(frozen=True)
class Cap:
    """What a site stated as the most that may be spent, from an entry of its ledger on.

    Attributes:
        time: UTC of that entry, ISO 8601; `seq` is its number.
        epsilon: the cap; `before` the one that it took the place of, None where none was stated.
    """

    time: str
    seq: int
    epsilon: float
    before: float | None


def stated_caps(entries: Sequence[Entry], kind: str = "cap") -> tuple[Cap, ...]:
    """Every cap of a kind (`CAPS`) that a ledger states, the oldest first."""
    caps: list[Cap] = []
    for entry in entries:
        if stated := entry.details.get(kind, "") if entry.kind == "genesis" else entry.new * (entry.kind == kind):
            caps.append(Cap(entry.time, entry.seq, float(stated), caps[-1].epsilon if caps else None))
    return tuple(caps)


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime(TIME)


class Ledger:
    """A ledger open for writing. Any number of threads and processes may hold one on the same file.

    Guarantees:
        An entry that was returned is on disk. An append that raised left the file as it was, or with a line more, never
        with one less. Entries of other processes are verified before anything is built on them.

    Example:
        A round is charged before its first step; what it released is noted afterwards.

        >>> import hashlib
        >>> from fedmpt_core.privacy.ledger.ledger import Ledger, read_ledger
        >>> path = "ledgers/x-ray.ledger.jsonl"
        >>> ledger = Ledger.create(path, site="hospital-a", dataset="x-ray", delta=1e-5, signer=None)
        >>> steps = {"sample_rate": 0.25, "noise_multiplier": 1.2346, "steps": 8}
        >>> promise = ledger.reserve(job="demo", round=1, attempt=0, details=steps, admit=lambda entries: None)
        >>> release = ledger.commit(promise, release=hashlib.sha256(b"the noisy update").hexdigest())
        >>> [entry.kind for entry in read_ledger(path)]
        ['genesis', 'reserve', 'commit']
    """

    def __init__(
        self, path: Path, *, signer: Signer | None, verify: Verifier | None, clock: Clock | None, lock_timeout: float
    ) -> None:
        """Use `create` or `open`."""
        self._path, self._signer, self._verify, self._lock_timeout = path, signer, verify, lock_timeout
        self._clock = clock or (lambda: datetime.now(UTC))
        self._chain = Chain(path, verify)

    @staticmethod
    def create(
        path: Path | str,
        *,
        site: str,
        dataset: str,
        delta: float,
        unit: str = "record",
        signer: Signer | None,
        verify: Verifier | None = None,
        carried: Sequence[Mapping[str, JSON]] = (),
        caps: Mapping[str, float | None] | None = None,
        clock: Clock | None = None,
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> "Ledger":
        """Starts the ledger of a data set that was never trained on; the file gets mode 0600, a new folder 0700.

        Args:
            path: where it will live, outside any job's folder.
            site: name of the site.
            dataset: name of the data set. It stays when records are added, as the old ones still compose.
            delta: the one delta of the data set, in (0, 1).
            unit: what one neighbour differs in, `record` or `group`; jobs that protect another are kept apart.
            signer: signs every entry; None in a simulation.
            verify: checks what other processes append; without it this object checks their chain alone.
            carried: charges of closed ledgers that this one continues, in the genesis so that none can be lost.
            caps: most epsilon that all jobs may spend, by kind (`CAPS`), where that is stated.
            clock: the time with a time zone, for tests.
            lock_timeout: seconds to wait for other writers, >= 0.

        Raises:
            LedgerError: the file exists, an argument is out of range, or the disk refuses.
        """
        path = Path(path)
        if not 0 < delta < 1:
            raise LedgerError(f"delta={delta} must lie between 0 and 1 (both excluded)")
        if unit not in UNITS:
            raise LedgerError(f"unit={unit!r} is not one of {', '.join(UNITS)}")
        ledger = Ledger(path, signer=signer, verify=verify, clock=clock, lock_timeout=lock_timeout)
        fields = {"kind": "genesis", "delta": repr(float(delta)), "unit": unit, "adjacency": ADJACENCY}
        stated = {kind: float(cap) for kind, cap in (caps or {}).items() if cap is not None}
        fields |= {
            "site": site,
            "dataset": dataset,
            "details": plain_details({"carried": carried, **stated}, "details"),
        }
        fields |= {name: getattr(signer, name, "") for name in ("key_spki", "public_key")}
        with disk(path):
            made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            with opened(path, lock_timeout, write=True) as file, disk(path):
                ledger._append(file, fields)
                for folder in (path.parent, *(folder.parent for folder in made)):
                    sync_folder(folder)
        except BaseException:  # no promise was made yet, and half a ledger would only be in the way
            path.unlink(missing_ok=True)
            raise
        return ledger

    @staticmethod
    def open(
        path: Path | str,
        *,
        site: str,
        dataset: str,
        delta: float,
        unit: str = "record",
        signer: Signer | None,
        verify: Verifier | None,
        clock: Clock | None = None,
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> "Ledger":
        """Opens an existing ledger and verifies all of it; arguments as in `create`, `verify` goes with `signer`.

        An unfinished last line (a crash inside a write) is moved to `<name>.torn-N`: training starts only after the
        line is complete on disk, so it was no promise.

        Raises:
            LedgerError: missing, damaged, of another site, data set, delta, key or schema, signed but opened without a
                signer or the other way round, locked for too long, or unwritable.
        """
        path = Path(path)
        if (signer is None) != (verify is None):
            raise LedgerError(f"{path} was opened with only one of signer and verify: pass both, or None for both")
        ledger = Ledger(path, signer=signer, verify=verify, clock=clock, lock_timeout=lock_timeout)
        with opened(path, lock_timeout, write=True) as file:
            torn = ledger._chain.follow(fetch(ledger._chain, file))
            first = ledger._chain.entries[0]
            for name, wanted in (("site", site), ("dataset", dataset), ("delta", repr(float(delta))), ("unit", unit)):
                if getattr(first, name) != wanted:
                    raise LedgerError(
                        f"{path} is for {name}={getattr(first, name)!r}, not {wanted!r}: open the ledger that belongs "
                        "to this site and data set, or correct the site's policy"
                    )
            if first.sig and signer is None:
                raise LedgerError(f"{path} is signed but no signer was given: load the site's key, or only read it")
            ledger._set_aside(file, torn)
        return ledger

    def reserve(
        self,
        *,
        job: str,
        round: int,
        attempt: int,
        details: Mapping[str, JSON],
        admit: Callable[[Sequence[Entry]], None],
    ) -> Entry:
        """Promises the privacy cost of a round before its first private step; a repeated attempt is charged again.

        Args:
            job: name of the job.
            round: from 1.
            attempt: from 0.
            details: what the accountant needs; reals become decimal strings (`repr`), so that hashes are stable.
            admit: called with all entries so far that say what was charged, is held or may be spent, while the ledger
                is free for others: pricing takes time. It raises to refuse. Where one was added meanwhile it is called
                again.

        Raises:
            LedgerError: damage, a lock held for too long, a clock behind the last entry, or a disk that refuses.
            Exception: whatever `admit` raised; nothing was written then.
        """
        plain = plain_details(details, "details")
        fields = {"kind": "reserve", "job": job, "round": round, "attempt": attempt, "details": plain}
        return self._admitted(admit, lambda: fields)

    def hold(
        self,
        *,
        job: str,
        seconds: float,
        details: Mapping[str, JSON],
        admit: Callable[[Sequence[Entry]], None],
    ) -> Entry:
        """Keeps room for what a job has still to reserve; what it held before is replaced.

        Args:
            job: name of the job.
            seconds: how long, above 0, unless it is held anew before.
            details: what all of the job costs, as in `reserve`.
            admit: as in `reserve`.

        Raises as `reserve` does.
        """
        plain = plain_details(details, "details")

        def fields() -> dict[str, Any]:
            until = _text(self.now() + timedelta(seconds=seconds))
            return {"kind": "hold", "job": job, "until": until, "details": plain}

        return self._admitted(admit, fields)

    def free(self, job: str) -> None:
        """Ends what a job holds, if it holds anything. Raises LedgerError as `reserve` does."""
        with self._writing() as file:
            if job in self._chain.holds:
                self._append(file, {"kind": "free", "job": job})

    def state_caps(self, caps: Mapping[str, float | None]) -> None:
        """Notes the most that may be spent, by kind, where the ledger states another or none. Raises as `reserve`."""
        with self._writing() as file:
            for kind, cap in caps.items():
                new, old = "" if cap is None else repr(float(cap)), self._chain.caps.get(kind, "")
                if new and new != old:
                    self._append(file, {"kind": kind, "old": old, "new": new})

    def now(self) -> datetime:
        """The time by which this ledger dates its entries."""
        return self._clock()

    def _admitted(self, admit: Callable[[Sequence[Entry]], None], fields: Callable[[], dict[str, Any]]) -> Entry:
        admitted = 0
        while True:
            with self._writing() as file:
                priced = tuple(self._chain.priced)
                if len(priced) == admitted:
                    return self._append(file, fields())
            admit(priced)
            admitted = len(priced)

    def commit(self, reservation: Entry, *, release: str) -> Entry:
        """Records which bytes a reserved round released.

        Args:
            reservation: what `reserve` returned.
            release: SHA-256 hex of the released bytes.

        Returns:
            The new entry, or the first one if the same bytes were committed before.

        Raises:
            LedgerError: the reservation is not in this ledger, or other bytes were committed for it; else as `reserve`.
        """
        with self._writing() as file:
            named = f"the reservation of job={reservation.job} round={reservation.round} attempt={reservation.attempt}"
            known = self._chain.reserves.get(reservation.hash)
            if known != reservation:
                raise LedgerError(f"{named} is not in {self._path}: reserve before training, in this ledger")
            done = self._chain.commits.get(reservation.hash)
            if done is not None and done.release == release:
                return done
            if done is not None:
                raise LedgerError(f"{named} was committed with other bytes in {self._path}: reserve a new attempt")
            fields = {name: getattr(reservation, name) for name in ("job", "round", "attempt")}
            fields |= {"kind": "commit", "reservation": reservation.hash, "release": release}
            return self._append(file, fields)

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self._path

    def rotate(self, signer: Signer) -> None:
        """Hands the ledger, open or closed, to another key, whose holder signs too; open it anew with that one.

        Raises LedgerError as `reserve` does, also for an unsigned ledger or a key that is the ledger's already.
        """
        key = {name: getattr(signer, name, "") for name in ("key_spki", "public_key")}
        with self._writing() as file:
            if key["key_spki"] == getattr(self._signer, "key_spki", ""):
                raise LedgerError(f"{self._path} is signed by this key already: give the old kit and the new one")
            proof = signer(PROOF_PREFIX + bytes.fromhex(self._chain.entries[-1].hash))
            self._append(file, {"kind": "rotate", **key, "proof": proof})

    def close(self, successor: str) -> None:
        """Ends the ledger for ever: its records go on in the ledger of the data set `successor`. Raises LedgerError."""
        with self._writing() as file:
            self._append(file, {"kind": "close", "successor": successor})

    def head(self) -> LedgerHead:
        """The newest entry in short, whoever wrote it. Raises LedgerError as `reserve` does."""
        with self._writing():
            last = self._chain.entries[-1]
        return LedgerHead(last.seq, last.hash, last.sig)

    def entries(self) -> Entries:
        """All entries, read and verified anew. Raises LedgerError as `read_ledger` does."""
        return read_ledger(self._path, self._verify, lock_timeout=self._lock_timeout)

    def contains(self, head: LedgerHead) -> bool:
        """Whether the file, read anew, has this entry: False means that it was cut, replaced or forked."""
        entries = self.entries()
        return 0 <= head.seq < len(entries) and entries[head.seq].hash == head.hash

    @contextmanager
    def _writing(self) -> Iterator[int]:
        with opened(self._path, self._lock_timeout, write=True) as file:
            self._set_aside(file, self._chain.follow(fetch(self._chain, file)))
            yield file

    def _append(self, file: int, fields: dict[str, Any]) -> Entry:
        chain, now = self._chain, _text(self._clock())
        plain = {"v": LEDGER_SCHEMA, "seq": len(chain.entries), "prev": FIRST, "time": now, **fields}
        if chain.entries:
            last = chain.entries[-1]
            if fields["kind"] != "rotate" and (successor := successor_of(chain.entries)):
                raise LedgerError(
                    f"{self._path} is closed: its records go on as '{successor}', name that data set in the site's "
                    "policy"
                )
            plain |= {"prev": last.hash, "site": last.site, "dataset": last.dataset}
            if now < last.time:
                raise LedgerError(
                    f"the clock says {now}, before {last.time}, the time of the last entry of {self._path}: "
                    "correct the clock of this machine"
                )
        digest = canonical_digest(plain)
        sig = self._signer(SIGNED_PREFIX + bytes.fromhex(digest)) if self._signer else ""
        line = canonical({**plain, "hash": digest, "sig": sig})
        try:
            entry = chain.check(line)  # nothing is written that could not be read back
        except Damage as damage:
            raise LedgerError(f"the new line for {self._path} {damage}: correct the arguments or the key") from None
        with disk(self._path):
            append(file, line + b"\n")
        chain.add(entry, line)
        return entry

    def _set_aside(self, file: int, torn: bytes) -> None:
        if not torn:
            return
        with disk(self._path):
            numbers = itertools.count(1)
            names = (self._path.with_name(f"{self._path.name}.torn-{number}") for number in numbers)
            aside = next(name for name in names if not name.exists())  # the ledger's lock is held
            write_whole(aside, torn, replace=False)
            os.ftruncate(file, self._chain.offset)
            os.fsync(file)
