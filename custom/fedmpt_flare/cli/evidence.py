"""What an auditor brings: runs, ledgers that sites handed over, rosters. Read alike by `audit` and `report`."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedmpt_flare.cli.options import WrongUse

if TYPE_CHECKING:
    from fedmpt_core.audit.auditor import Examination
    from fedmpt_core.audit.finding import Severity
    from fedmpt_core.audit.known_keys import KnownKeys
    from fedmpt_core.audit.run_evidence import Run
    from fedmpt_core.audit.site_ledger import OwnLedger

EXIT_CODES: "dict[Severity, int]" = {"fail": 1, "unshown": 3}
"""Of a command whose worst finding it is; 0 otherwise."""


def known_keys(rosters: list[str] | None) -> "KnownKeys":
    """The rosters given as FILE, or as DATE=FILE where they hold from a day or time (UTC) on. Raises WrongUse."""
    from fedmpt_core.audit.known_keys import BEGINNING, KnownKeys
    from fedmpt_core.secagg.start_up_kit import load_roster

    dated = {}
    for text in rosters or []:
        since, path = BEGINNING, text
        day, equals, name = text.partition("=")
        if equals and not Path(text).exists():
            try:
                since, path = datetime.fromisoformat(day), name
            except ValueError:
                raise WrongUse(f"--roster {text}: {day!r} is no date: write --roster 2026-11-30=FILE") from None
            since = since if since.tzinfo else since.replace(tzinfo=UTC)
        if since in dated:
            raise WrongUse(
                f"--roster {text}: holds from the same time as another one: say from which day the later one holds, "
                "--roster 2026-11-30=FILE"
            )
        dated[since] = load_roster(Path(path))
    return KnownKeys(dated.pop(BEGINNING, None), dated)


def load_evidence(
    places: list[Path], rosters: list[str] | None, certificate: Path | None = None
) -> "tuple[list[Run], list[OwnLedger]]":
    """Every place read, without believing it: runs, and sites' ledgers. Raises NoRun."""
    from fedmpt_core.audit.ledger_copy import LedgerReader
    from fedmpt_core.audit.run_evidence import load_run
    from fedmpt_core.audit.site_ledger import is_ledger, load_ledger

    keys, reader = known_keys(rosters), LedgerReader()
    ledgers = [load_ledger(place, keys, reader, certificate) for place in places if is_ledger(place)]
    return [load_run(place, keys, reader) for place in places if not is_ledger(place)], ledgers


def verdict(examination: "Examination") -> str:
    """One sentence for people."""
    sentences = {
        "fail": "FAILED: see what is marked FAIL.",
        "unshown": "NOT SHOWN: nothing here contradicts the claim, and evidence that it rests on is missing: see what "
        "is marked 'not shown'.",
    }
    return sentences.get(examination.worst, "Passed: nothing that was checked fails.")
