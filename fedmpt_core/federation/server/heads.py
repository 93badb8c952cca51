"""The newest ledger entry of every site that the server has seen, over all jobs.

A site hears its own with every training task, so a ledger that was cut or restored between two jobs is noticed as one
is that was cut within a job. Needs neither torch nor numpy.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedmpt_core.common.files import write_whole
from fedmpt_core.privacy.ledger.chain import LedgerError, LedgerHead

FILE = "ledger_heads.json"


class LedgerHeads:
    """A file with one entry for each site, replaced as a whole."""

    def __init__(self, folder: Path) -> None:
        """In a folder of the server's that outlives jobs; it need not exist yet."""
        self._path = folder / FILE

    def of(self, sites: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What is known of some sites, as `LedgerHead.to_dict` gives it.

        Raises:
            LedgerError: the file cannot be read or holds something else.
        """
        known = self._read()
        return {site: known[site] for site in sites if site in known}

    def note(self, budgets: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep the `head` of what sites said of their budgets. Raises LedgerError."""
        if not budgets:
            return
        known = self._read() | {
            site: LedgerHead.from_dict(budget["head"]).to_dict() for site, budget in budgets.items()
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, (json.dumps(known, indent=2, sort_keys=True) + "\n").encode())
        except OSError as error:
            raise LedgerError(f"{self._path} cannot be written ({error.strerror}): give it a writable disk") from None

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self._path.exists():
            return {}
        try:
            plain = json.loads(self._path.read_text(encoding="utf-8"))
            return {site: LedgerHead.from_dict(head).to_dict() for site, head in plain.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise LedgerError(f"{self._path} is no list of ledger heads ({error}): restore it, or remove it") from None
