"""A second witness of a site's ledgers: the newest entry of each, noted outside the ledgers' folder.

A ledger that is cut at a line's end, or restored from an old backup, is still a valid chain. The server remembers the
head that it saw last; this is the site's own memory, in its feature cache's folder, which no backup of the ledgers
brings back to the same day. Where it was cleared away, the server's is left.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from fedmpt_core.common.files import write_whole
from fedmpt_core.privacy.ledger.chain import Entry, LedgerError, LedgerHead
from fedmpt_core.privacy.ledger.file import disk

FOLDER = "ledger-heads"


class Witness:
    """What a site remembers of one ledger, which it knows by the hash of its first entry."""

    def __init__(self, cache: Path, genesis: Entry) -> None:
        """Below a cache folder, which need not exist yet."""
        self._path, self._dataset = cache / FOLDER / f"{genesis.hash}.json", genesis.dataset

    def check(self, entries: Sequence[Entry]) -> None:
        """That the ledger still holds the newest entry that was noted, and that another can be noted.

        Raises:
            LedgerError: it does not, or the note cannot be read or written.
        """
        place = next(folder for folder in self._path.parents if folder.exists())
        if not os.access(place, os.W_OK):
            raise LedgerError(f"{place} cannot be written to (cache_dir): correct its owner or rights, or the disk")
        if not self._path.exists():
            return
        try:
            head = LedgerHead.from_dict(json.loads(self._path.read_text(encoding="ascii")))
        except (OSError, ValueError, TypeError) as error:
            raise LedgerError(
                f"{self._path} cannot be read ({error}): compare the ledger with its newest copy (`fedmpt ledger "
                "show`), then remove this file"
            ) from None
        if head.seq >= len(entries) or entries[head.seq].hash != head.hash:
            raise LedgerError(
                f"the ledger of '{self._dataset}' ends at entry {len(entries) - 1} or is another one, but its entry "
                f"{head.seq} was written ({self._path}): it was cut, or restored from an old backup. Put the newest "
                "copy back, from a backup or as privacy/SITE.ledger.jsonl from what `nvflare job download` brings of "
                "the last job, and see with `fedmpt ledger show SITE.TOML --name SITE` that it is whole"
            )

    def note(self, head: LedgerHead) -> None:
        """Remember a newer entry; on disk when this returns. Raises LedgerError."""
        with disk(self._path):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(head.to_dict()).encode())
