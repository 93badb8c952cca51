"""A site's own ledger, without a run: an export of `fedmpt ledger export`, or the file itself."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedmpt_core.audit.finding import Finding, in_order, worst
from fedmpt_core.audit.ledger_copy import LedgerReader, key_of_site, time_of
from fedmpt_core.audit.run_evidence import KnownKeys, NoRun
from fedmpt_core.audit.run_ledgers import SAME_EPSILON, reused_keys
from fedmpt_core.audit.spending import Accountant, recompute
from fedmpt_core.common.signing import SigningError, verifier
from fedmpt_core.config.checks import json_value
from fedmpt_core.privacy.ledger.budget import charges
from fedmpt_core.privacy.ledger.chain import Entry, LedgerError, Verifier
from fedmpt_core.privacy.ledger.export import EXPORT, ExportError, LedgerExport, check_export, read_export
from fedmpt_core.privacy.ledger.ledger import Entries
from fedmpt_core.privacy.ledger.statement import Statement, statement
from fedmpt_core.secagg.errors import SecAggError
from fedmpt_core.secagg.identity import root_sha256

ASK = "ask the site for its ledger and compare"


@dataclass
class OwnLedger:
    """One ledger as a site handed it over.

    Attributes:
        place: the file or folder.
        entries: verified; empty when the chain does not hold.
        export: what the site stated with it; None for a bare file.
        findings: what went wrong while reading.
    """

    place: Path
    entries: tuple[Entry, ...] = ()
    export: LedgerExport | None = None
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class LedgerAudit:
    """What was found of one ledger.

    Attributes:
        place: the file or folder.
        findings: the worst first.
        statement: the account; None when the ledger cannot be trusted.
        accountants: epsilon of everything, by accountant, the reported one first.
    """

    place: str
    findings: list[Finding]
    statement: Statement | None
    accountants: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return worst(self.findings) != "fail"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        account = self.statement and self.statement.to_dict()
        return json_value({**asdict(self), "statement": account, "passed": self.passed})


def is_ledger(place: Path) -> bool:
    """Whether this is a ledger's file or an export, and no run."""
    return place.is_file() or (place / EXPORT).exists()


def load_ledger(place: Path, anchors: KnownKeys, reader: LedgerReader, certificate: Path | None = None) -> OwnLedger:
    """Read a ledger without believing it.

    Args:
        place: an export's folder, or a file `*.ledger.jsonl`.
        anchors: what the auditor knows.
        reader: shared with the runs that are audited beside it.
        certificate: of the site (PEM), for a bare file.

    Raises:
        NoRun: there is nothing to audit.
    """
    found = OwnLedger(place)
    try:
        if not (place / EXPORT).exists():
            verify = _pinned(verifier(certificate), anchors, certificate) if certificate else None
            _read(found, place, verify, reader)
            return found
        found.export = read_export(place)
    except (ExportError, SigningError) as error:
        raise NoRun(str(error)) from None
    said = found.export
    try:
        check_export(said, place)
    except ExportError as error:
        found.findings.append(Finding("file-changed", "fail", EXPORT, str(error), "ask the site for another export"))
    try:
        verify = None if not said.certificate else _of_export(said, place, anchors, found)
    except (SigningError, SecAggError, OSError, ValueError, TypeError) as error:
        found.findings.append(Finding("ledger-damaged", "fail", str(said.site), str(error), ASK))
        return found
    _read(found, place / said.ledger, verify, reader)
    return found


def audit_ledger(found: OwnLedger, accountants: Mapping[str, Accountant], cap: float | None = None) -> LedgerAudit:
    """Audit one ledger.

    Args:
        found: as loaded.
        accountants: further ones to ask, by name.
        cap: of the site's policy card; else what the export states.
    """
    findings, entries = list(found.findings), found.entries
    account, by_accountant = None, {}
    if entries:
        site = entries[0].site
        if cap is None and found.export:
            cap = found.export.cap
        try:
            account = statement(Entries(entries), cap)
            steps = [c.steps for c in charges(entries)]
            by_accountant, more = recompute(steps, account.delta, site, accountants)
            findings += [*more, *reused_keys({site: entries}), *_notes(entries, account)]
        except (LedgerError, ValueError) as error:
            findings.append(Finding("ledger-damaged", "fail", site, str(error), ASK))
    return LedgerAudit(str(found.place), in_order(findings), account, by_accountant)


def _read(found: OwnLedger, path: Path, verify: Verifier | None, reader: LedgerReader) -> None:
    try:
        found.entries, torn = reader.read(path, verify)
    except OSError as error:
        text = f"{path.name} cannot be read ({error.strerror})"
        found.findings.append(Finding("ledger-missing", "fail", path.name, text, ASK))
        return
    except LedgerError as error:
        found.findings.append(Finding("ledger-damaged", "fail", path.name, str(error), ASK))
        return
    site = found.entries[0].site
    if torn:
        text = "its last line is torn: its writer died before the line was a promise"
        found.findings.append(Finding("ledger-torn", "warning", site, text, "nothing, if the site is running"))
    if verify is None:
        signed = bool(found.entries[0].sig)
        text = "its signatures were not checked: no certificate was given" if signed else "it is unsigned"
        remedy = "give --certificate with the site's client.crt" if signed else "only simulations leave such ledgers"
        found.findings.append(Finding("ledger-not-verified", "warning", site, text, remedy))


def _pinned(verify: Any, anchors: KnownKeys, certificate: Path) -> Any:
    if anchors.roster and verify.key_spki not in {m.fingerprint.hex() for m in anchors.roster.members.values()}:
        raise SigningError(f"{certificate} is of a key that is not in the roster")
    return verify


def _of_export(said: LedgerExport, folder: Path, anchors: KnownKeys, found: OwnLedger) -> Verifier:
    root = (folder / said.root).read_bytes()
    if anchors.roster is not None and root_sha256(root) != anchors.roster.root:
        raise SigningError("the export is of a federation with another root certificate than the roster's")
    if anchors.roster is None:
        text = "whose certificate this is was not checked: no roster was given"
        remedy = "give --roster with the file that the sites agreed on"
        found.findings.append(Finding("no-roster", "warning", said.site, text, remedy))
    names = {"certificate": said.certificate}
    return key_of_site(said.site, names, folder, root=root, when=time_of(said.made), roster=anchors.roster)


def _notes(entries: Sequence[Entry], account: Statement) -> list[Finding]:
    site, found = account.site, []
    if account.cap is not None and account.total > account.cap * (1 + SAME_EPSILON):
        text = f"all jobs on '{account.dataset}' spent epsilon {account.total:.3f}, its cap is {account.cap:g}"
        remedy = "the site's policy was not kept: find out how"
        found.append(Finding("epsilon-above-the-cap", "fail", site, text, remedy))
    tried = Counter((e.job, e.round, e.attempt) for e in entries if e.kind == "reserve")
    if again := sum(count - 1 for count in tried.values()):
        text = f"{again} attempts are charged again under the same number: their trainer was restarted"
        found.append(Finding("round-charged-again", "note", site, text))
    if account.open:
        text = f"{account.open} reservations released nothing; they are charged all the same"
        found.append(Finding("retries-charged", "note", site, text))
    if account.rotations:
        found.append(Finding("key-rotated", "note", site, f"its key changed {account.rotations} times"))
    if account.successor:
        found.append(Finding("ledger-closed", "note", site, f"it is closed and goes on as '{account.successor}'"))
    carried = entries[0].details.get("carried", ())
    if isinstance(carried, Sequence) and carried:
        names = sorted({json.dumps(str(c.get("dataset"))) for c in carried if isinstance(c, Mapping)})
        text = f"it carries what was spent on {', '.join(names)}"
        found.append(Finding("ledger-continues", "note", site, text, "audit those ledgers too"))
    unmasked = sum(e.kind == "reserve" and e.details.get("aggregation") == "unmasked" for e in entries)
    if unmasked:
        text = f"{unmasked} rounds were charged without secure aggregation: the server saw the updates themselves"
        found.append(Finding("unmasked", "note", site, text))
    return found
