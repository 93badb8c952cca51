"""A site's own ledger, without a run: an export of `fedmpt ledger export`, or the file itself."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fedmpt_core.audit.caps import cap_of, check_caps
from fedmpt_core.audit.cards import check_genesis
from fedmpt_core.audit.finding import Finding, in_order, worst
from fedmpt_core.audit.known_keys import KnownKeys, check_key
from fedmpt_core.audit.ledger_copy import LedgerReader, key_of_site, time_of
from fedmpt_core.audit.reservations import declared_units
from fedmpt_core.audit.run_evidence import NoRun, Run
from fedmpt_core.audit.run_ledgers import reused_keys
from fedmpt_core.audit.spending import Accountant, recompute
from fedmpt_core.common.canonical import json_value
from fedmpt_core.common.signing import DocumentError, SigningError, verifier
from fedmpt_core.federation.site.policy_card import PolicyCard
from fedmpt_core.privacy.ledger.budget import charges
from fedmpt_core.privacy.ledger.chain import Entry, LedgerError, Verifier
from fedmpt_core.privacy.ledger.export import EXPORT, STATEMENT, LedgerExport, check_export, read_export
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
        keys: what the auditor knows.
        entries: whose chain holds; empty when it does not.
        signed: whether every signature was verified too.
        export: what the site stated with it; None for a bare file.
        root: the federation's root certificate (PEM) that came with it, or "".
        findings: what went wrong while reading.
    """

    place: Path
    keys: KnownKeys = field(default_factory=KnownKeys)
    entries: tuple[Entry, ...] = ()
    signed: bool = False
    export: LedgerExport | None = None
    root: str = ""
    findings: list[Finding] = field(default_factory=list)

    @property
    def moment(self) -> datetime:
        """When it was handed over, as far as it says."""
        return time_of(self.export.made if self.export else self.entries[-1].time)


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
        return worst(self.findings) not in ("fail", "unshown")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        account = self.statement and self.statement.to_dict()
        return json_value({**asdict(self), "statement": account, "passed": self.passed})


def is_ledger(place: Path) -> bool:
    """Whether this is a ledger's file or an export, and no run."""
    return place.is_file() or (place / EXPORT).exists()


def load_ledger(place: Path, keys: KnownKeys, reader: LedgerReader, certificate: Path | None = None) -> OwnLedger:
    """Read a ledger without believing it.

    Args:
        place: an export's folder, or a file `*.ledger.jsonl`.
        keys: what the auditor knows.
        reader: shared with the runs that are audited beside it.
        certificate: of the site (PEM), for a bare file.

    Raises:
        NoRun: there is nothing to audit.
    """
    ledger = OwnLedger(place, keys)
    try:
        if not (place / EXPORT).exists():
            _read(ledger, place, verifier(certificate) if certificate else None, reader)
            return ledger
        ledger.export = read_export(place)
    except (DocumentError, SigningError) as error:
        raise NoRun(str(error)) from None
    export = ledger.export
    try:
        check_export(export, place)
    except DocumentError as error:
        ledger.findings.append(Finding("file-changed", "fail", EXPORT, str(error), "ask the site for another export"))
    try:
        verify = None if not export.certificate else _of_export(export, place, ledger)
    except (SigningError, SecAggError, OSError, ValueError, TypeError) as error:
        ledger.findings.append(Finding("ledger-damaged", "fail", str(export.site), str(error), ASK))
        return ledger
    _read(ledger, place / export.ledger, verify, reader)
    if ledger.entries:
        ledger.findings += _stated(ledger.entries, export, place)
    return ledger


def audit_ledger(
    ledger: OwnLedger,
    accountants: Mapping[str, Accountant],
    card: PolicyCard | None = None,
    beside: Iterable[Sequence[Entry]] = (),
) -> LedgerAudit:
    """Audit one ledger.

    Args:
        ledger: as loaded.
        accountants: further ones to ask, by name.
        card: the site's policy for this data set; without one the cap is what the export states.
        beside: verified ledgers at hand, which may show how its key changed.
    """
    findings, entries = list(ledger.findings), ledger.entries
    account, by_accountant = None, {}
    if entries:
        site = entries[0].site
        findings += check_key(site, entries, ledger.keys.at(ledger.moment), beside) if ledger.signed else []
        export = ledger.export
        promised = card.privacy.epsilon if card else export.cap if export else None
        units = next((declared_units(e.details) for e in reversed(entries) if e.kind == "reserve"), None)
        findings += check_genesis(entries[0], export.units if export else units, card, None)
        try:
            account = statement(Entries(entries), cap_of(entries, promised))
            steps = [c.steps for c in charges(entries)]
            by_accountant, more = recompute(steps, account.delta, site, accountants)
            findings += [*more, *reused_keys({site: entries}), *check_caps(entries, promised)]
            findings += _notes(entries, account)
        except (LedgerError, ValueError) as error:
            findings.append(Finding("ledger-damaged", "fail", site, str(error), ASK))
    return LedgerAudit(str(ledger.place), in_order(findings), account, by_accountant)


def _read(ledger: OwnLedger, path: Path, verify: Verifier | None, reader: LedgerReader) -> None:
    try:
        ledger.entries, torn = reader.read(path, verify)
        ledger.signed = verify is not None
    except OSError as error:
        text = f"{path.name} cannot be read ({error.strerror})"
        ledger.findings.append(Finding("ledger-missing", "fail", path.name, text, ASK))
        return
    except LedgerError as error:
        ledger.findings.append(Finding("ledger-damaged", "fail", path.name, str(error), ASK))
        return
    site = ledger.entries[0].site
    if torn:
        text = "its last line is torn: its writer died before the line was a promise"
        ledger.findings.append(Finding("ledger-torn", "warning", site, text, "nothing, if the site is running"))
    if verify is None:
        signed = bool(ledger.entries[0].sig)
        text = "its signatures were not checked: no certificate was given" if signed else "it is unsigned"
        remedy = "give --certificate with the site's client.crt" if signed else "only simulations leave such ledgers"
        ledger.findings.append(Finding("ledger-not-verified", "warning", site, text, remedy))


def _stated(entries: Sequence[Entry], export: LedgerExport, folder: Path) -> list[Finding]:
    """What the site stated of its ledger against the ledger."""
    first = entries[0]
    stated: dict[str, Any] = {n: getattr(export, n) for n in ("site", "dataset", "unit", "delta")}
    real: dict[str, Any] = {"site": first.site, "dataset": first.dataset, "unit": first.unit}
    real |= {"delta": float(first.delta), "entries": len(entries), "head": entries[-1].hash}
    try:
        account = json.loads((folder / STATEMENT).read_text(encoding="utf-8"))
        stated |= {name: account[name] for name in ("entries", "head")}
    except (OSError, ValueError, KeyError, TypeError):
        return [Finding("export-differs", "fail", first.site, f"{STATEMENT} is missing or damaged", ASK)]
    differ = [name for name, value in stated.items() if value != real[name]]
    texts = [f"{n}={str(stated[n])[:40]}, its ledger has {str(real[n])[:40]}" for n in differ]
    text = f"its export states {'; '.join(texts)}"
    return [Finding("export-differs", "fail", first.site, text, ASK)] if differ else []


def _of_export(export: LedgerExport, folder: Path, ledger: OwnLedger) -> Verifier:
    root = (folder / export.root).read_bytes()
    ledger.root, roster, when = root.decode(), ledger.keys.at(time_of(export.made)), time_of(export.made)
    if roster is not None and root_sha256(root) != roster.root:
        raise SigningError("the export is of a federation with another root certificate than the roster's")
    if roster is None:
        text = "whose certificate this is was not checked: no roster was given"
        remedy = "give --roster with the file that the sites agreed on"
        ledger.findings.append(Finding("no-roster", "warning", export.site, text, remedy))
    return key_of_site(export.site, export.certificate, folder, root=root, when=when)


def use_own_ledgers(run: Run, ledgers: Sequence[OwnLedger]) -> None:
    """Where a run has no copy of a ledger, the export that its site handed over takes its place.

    It must have been made after the run ended: an older one may lack what the run charged last. What stays missing is
    said: nothing contradicts such a site, and nothing shows what it spent.

    Args:
        run: as loaded; its ledgers, what is missing and its findings are changed.
        ledgers: what sites handed over.
    """
    unsigned = run.manifest.identities == "insecure"  # a simulation's ledgers are
    for site, why in sorted(run.missing.items() if run.job.privacy.private else ()):
        own = [o for o in ledgers if o.entries and o.entries[0].site == site and worst(o.findings) != "fail"]
        here = [o for o in own if (o.signed or unsigned) and o.export and o.moment >= run.ended.replace(microsecond=0)]
        in_a_sum = any(site in row["sites"] for row in run.rounds)
        tells = [o for o in here if not in_a_sum or any(e.job in run.jobs for e in o.entries)]
        if tells:
            chosen = max(tells, key=lambda o: (any(e.job in run.jobs for e in o.entries), len(o.entries)))
            run.ledgers[site] = chosen.entries
            del run.missing[site]
            text = f"there is no copy of its ledger in the run ({why}): its own export, {chosen.place}, is used"
            run.say("ledger-from-export", site, text, "", "note")
            continue
        text = f"there is no copy of its ledger: {why}"
        if here:
            text += f"; {here[0].place} speaks of no round of this run, and the record has it in sums"
        elif own:
            text += f"; {own[0].place} is no signed export that was made after the run ended, at {run.manifest.ended}"
        remedy = "ask the site for `fedmpt ledger export`, and give that folder beside this run"
        run.say("ledger-missing", site, text, remedy, "unshown")


def _notes(entries: Sequence[Entry], account: Statement) -> list[Finding]:
    site, findings = account.site, []
    tried = Counter((e.job, e.round, e.attempt) for e in entries if e.kind == "reserve")
    if again := sum(count - 1 for count in tried.values()):
        text = f"{again} attempts are charged again under the same number: their trainer was restarted"
        findings.append(Finding("round-charged-again", "note", site, text))
    if account.open:
        text = f"{account.open} reservations released nothing; they are charged all the same"
        findings.append(Finding("retries-charged", "note", site, text))
    if account.rotations:
        findings.append(Finding("key-rotated", "note", site, f"its key changed {account.rotations} times"))
    if account.successor:
        findings.append(Finding("ledger-closed", "note", site, f"it is closed and goes on as '{account.successor}'"))
    carried = entries[0].details.get("carried", ())
    if isinstance(carried, Sequence) and carried:
        names = sorted({json.dumps(str(c.get("dataset"))) for c in carried if isinstance(c, Mapping)})
        text = f"it carries what was spent on {', '.join(names)}"
        findings.append(Finding("ledger-continues", "note", site, text, "audit those ledgers too"))
    unmasked = sum(e.kind == "reserve" and e.details.get("aggregation") == "unmasked" for e in entries)
    if unmasked:
        text = f"{unmasked} rounds were charged without secure aggregation: the server saw the updates themselves"
        findings.append(Finding("unmasked", "note", site, text))
    return findings
