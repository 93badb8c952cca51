"""Which records the ledgers of a site have been charged for, so that no record gets a fresh budget under another name.

Beside each `DATASET.ledger.jsonl` lies `DATASET.records`: a sorted list with a mark for every record that was ever
trained on under that name. A mark is an HMAC-SHA256 (RFC 2104) of the picture's digest under the site's own key, so the
list says nothing without the key; neither ever leaves the site. What does leave, a ledger's entries, holds a
fingerprint that is made anew for each job (`job_key`).
"""

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedmpt_core.common.files import locked, write_whole
from fedmpt_core.privacy.ledger.chain import Entry, LedgerError
from fedmpt_core.privacy.ledger.file import disk
from fedmpt_core.privacy.ledger.fingerprint import fingerprint, site_key
from fedmpt_core.privacy.ledger.ledger import LOCK_TIMEOUT, Entries, read_ledger, successor_of
from fedmpt_core.privacy.ledger.site_ledger import LIST, SUFFIX

KEY = "fingerprint.key"
LOCK = "records.lock"
_MARK = re.compile(r"[0-9a-f]{32}")
_RECORD = b"\xffFEDMPT-RECORD/1\0"
_JOB = b"\xffFEDMPT-JOB/1\0"


def job_key(key: bytes, job: str) -> bytes:
    """The key of one job's fingerprints: without the site's key nobody can tell two jobs' record sets apart or alike.

    Args:
        key: 32 bytes of `site_key`.
        job: the job's name in the ledger.
    """
    return hmac.digest(key, _JOB + job.encode(), hashlib.sha256)


class RecordLists:
    """The lists of one site's ledger folder.

    Example: a site trained on 5,000 pictures as `x-ray`, and starts a ledger `x-ray-2` for 100 of them and 50 new ones.
    The first job on it is refused: "100 of 150 training records of 'x-ray-2' were trained on as 'x-ray'".
    """

    def __init__(self, folder: Path, site: str, dataset: str) -> None:
        """Those of a folder of ledgers, from the side of one site and data set."""
        self._folder, self._site, self._dataset = folder, site, dataset

    def fingerprint(self, digests: Iterable[str], job: str) -> str:
        """The fingerprint of the records that a job's entries hold."""
        return fingerprint(digests, job_key(self._key(), job))

    def check(self, digests: Sequence[str]) -> None:
        """That no record was trained on under another name.

        Args:
            digests: SHA-256 of the training pictures, in any order.

        Raises:
            LedgerError: some were, as ledgers of the same site tell that do not go on as this data set; or a list or
                ledger cannot be read. For the site's own eyes: it holds a count of records.
        """
        marks, shared = self._marks(digests), {}
        for name, entries in self._others():
            count = len(marks & self._read(name)) or (len(marks) if self._same(digests, entries) else 0)
            if count:
                shared[name] = count
        if shared:
            name = min(shared)
            others = f" (and of {', '.join(sorted(shared)[1:])})" if len(shared) > 1 else ""
            raise LedgerError(
                f"{shared[name]} of {len(marks)} training records of '{self._dataset}' were trained on as '{name}'"
                f"{others}: a new name is no new budget. Use the name '{name}' (privacy.dataset in the site's file), "
                f"which may grow; or merge them, `fedmpt ledger migrate --from {name}`; or take these records out"
            )

    def claim(self, digests: Sequence[str]) -> None:
        """`check`, then add the records to the data set's list; on disk when this returns. Raises LedgerError."""
        lock = self._folder / LOCK
        with disk(lock):
            try:
                with locked(lock, write=True, create=True, timeout=LOCK_TIMEOUT):
                    self.check(digests)
                    known = self._read(self._dataset)
                    if more := self._marks(digests) - known:
                        text = "".join(f"{mark}\n" for mark in sorted(known | more))
                        write_whole(self._folder / f"{self._dataset}{LIST}", text.encode())
            except BlockingIOError:
                raise LedgerError(f"{lock} is locked by another process: let it end, then retry") from None

    def _key(self) -> bytes:
        """The site's; drawn for the first data set, and never again: under another key all marks would be unknown."""
        path = self._folder / KEY
        if not path.exists() and any(map(_names_records, self._folder.glob(f"*{SUFFIX}"))):
            raise LedgerError(
                f"{path} is missing, and without it nobody can tell which records were trained on: restore it from the "
                "backup that the ledgers are in"
            )
        return site_key(path)

    def _marks(self, digests: Iterable[str]) -> set[str]:
        key = self._key()
        return {hmac.digest(key, _RECORD + digest.encode(), hashlib.sha256).hex()[:32] for digest in digests}

    def _read(self, dataset: str) -> set[str]:
        path = self._folder / f"{dataset}{LIST}"
        if not path.exists():
            return set()
        with disk(path):
            marks = path.read_bytes().decode("ascii", "replace").splitlines()
        if not all(map(_MARK.fullmatch, marks)):
            raise LedgerError(f"{path} is damaged: restore it from the backup that the ledger is in")
        return set(marks)

    def _others(self) -> list[tuple[str, Entries]]:
        """The site's other ledgers in the folder, but for those whose records go on in this one."""
        ledgers = [read_ledger(path) for path in sorted(self._folder.glob(f"*{SUFFIX}"))]
        own = {entries[0].dataset: entries for entries in ledgers if entries[0].site == self._site}
        return [(name, entries) for name, entries in own.items() if not self._goes_on_here(name, own)]

    def _goes_on_here(self, name: str, read: dict[str, Entries]) -> bool:
        passed: set[str] = set()
        while name in read and name not in {*passed, self._dataset}:
            passed.add(name)
            name = successor_of(read[name])
        return name == self._dataset

    def _same(self, digests: Sequence[str], entries: Sequence[Entry]) -> bool:
        """Whether a ledger was charged for exactly these records: all that can be told where its list is missing."""
        key, own = self._key(), dict[str, str]()
        for entry in entries:
            noted = entry.details.get("records") if entry.kind == "reserve" else None
            if noted and entry.job not in own:
                own[entry.job] = fingerprint(digests, job_key(key, entry.job))
            if noted and noted in (own[entry.job], own.setdefault("", fingerprint(digests, key))):
                return True
        return False


def _names_records(path: Path) -> bool:
    """Whether records were charged for in a ledger, or are listed beside it."""
    listed = path.with_name(path.name.removesuffix(SUFFIX) + LIST).exists()
    return listed or any(entry.kind == "reserve" and entry.details.get("records") for entry in read_ledger(path))
