"""A downloaded run, read without believing it: what can be parsed is handed on, what cannot is a finding."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509

from fedmpt_core.audit.finding import Finding
from fedmpt_core.config import JobConfig
from fedmpt_core.config_file import ConfigError, job_from_dict
from fedmpt_core.privacy.chain import Chain, Entry, LedgerError
from fedmpt_core.privacy.signing import SigningError, verifier_of
from fedmpt_core.result import load_record
from fedmpt_core.run_manifest import MANIFEST, ManifestError, RunManifest, check_manifest, read_manifest
from fedmpt_core.secagg.errors import SecAggError
from fedmpt_core.secagg.identity import ChainCheck, root_sha256
from fedmpt_core.secagg.roster import Roster

RESULT = "result.json"
MOST_BYTES = 512 << 20  # of a ledger; chosen, a hundred times the largest real one


class NoRun(ValueError):
    """The folder holds no run that could be audited; the sentence says what is missing."""


@dataclass(frozen=True)
class Anchors:
    """What the auditor knows of the federation from elsewhere.

    Attributes:
        roster: of the members' keys and the root, agreed on by telephone; None when the auditor has none.
    """

    roster: Roster | None = None


@dataclass
class Run:
    """One run as it was downloaded.

    Attributes:
        folder: the run's folder.
        record: `result.json` in plain values.
        job: the agreed job in it.
        manifest: the server's signed statement.
        ledgers: by site, the entries of its ledger's copy; only of chains that hold.
        findings: what went wrong while reading.
    """

    folder: Path
    record: dict[str, Any]
    job: JobConfig
    manifest: RunManifest
    ledgers: dict[str, tuple[Entry, ...]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The record's rounds, round 0 (the model before training) left out."""
        return [row for row in self.record["rounds"] if row.get("round") != 0]

    def say(self, code: str, where: str, text: str, remedy: str, severity: Any = "fail") -> None:
        """Add a finding."""
        self.findings.append(Finding(code, severity, where, text, remedy))


def load_run(folder: Path, anchors: Anchors) -> Run:
    """Read a run.

    Args:
        folder: what `nvflare job download` or `fedmpt simulate` wrote, or its `workspace`.
        anchors: what the auditor knows.

    Raises:
        NoRun: there is nothing to audit.
    """
    place = folder / "workspace" if (folder / "workspace" / MANIFEST).exists() else folder
    if not place.is_dir():
        raise NoRun(f"{folder}: no such folder")
    try:
        record, manifest = load_record(place), read_manifest(place)
        job = job_from_dict(record["config"], str(place / RESULT))
        _check_shape(record)
    except (ManifestError, ConfigError, ValueError, KeyError, TypeError) as error:
        raise NoRun(f"{place}: is not a finished run of this release: {error}") from None
    run = Run(place, record, job, manifest)
    _check_files(run, anchors)
    for site in sorted(record["sites"] or {}):
        _read_ledger(run, site, anchors)
    return run


def _check_shape(record: Mapping[str, Any]) -> None:
    """Raises ValueError or KeyError unless the parts that the audit reads are of their kinds."""
    rounds = record["rounds"]
    kinds = {"round": int, "sites": list, "privacy": dict, "secagg": dict}
    if not isinstance(rounds, list) or not all(isinstance(row, dict) for row in rounds):
        raise ValueError("its rounds are no list of tables")
    for row in rounds:
        for name, kind in kinds.items():
            if type(row[name]) is not kind:
                raise ValueError(f"{name} of a round is no {kind.__name__}")
    if not isinstance(record["sites"] or {}, dict):
        raise ValueError("its sites are no table")


def _check_files(run: Run, anchors: Anchors) -> None:
    manifest = run.manifest
    try:
        check_manifest(manifest, run.folder)
    except ManifestError as error:
        run.say("file-changed", MANIFEST, str(error), "download the run again; if it repeats, ask who changed it")
    if manifest.signature:
        _check_server(run, anchors)
    same = ("run_id", "outcome", "started", "ended", "aggregation", "identities", "resumed", "config_digest")
    differ = [name for name in same if getattr(manifest, name) != run.record.get(name)]
    if differ:
        text = f"{RESULT} and {MANIFEST} differ in {', '.join(differ)}"
        run.say("record-changed", RESULT, text, "one of the two was edited: download the run again")
    if run.job.digest() != manifest.config_digest:
        text = (
            f"the job in {RESULT} has the digest {run.job.digest()[:16]}, the run was of {manifest.config_digest[:16]}"
        )
        run.say("config-changed", RESULT, text, "compare the job with the one that the sites approved")


def _check_server(run: Run, anchors: Anchors) -> None:
    try:
        root = run.manifest.root.encode()
        leaf = x509.load_pem_x509_certificate(run.manifest.server["certificate"].encode())
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(root))
        known = anchors.roster is None or root_sha256(root) == anchors.roster.root
    except Exception as error:
        text = f"the server's certificate does not follow from the root in the manifest ({type(error).__name__})"
        run.say("manifest-signed-by-another", MANIFEST, text, "nobody knows who signed this run: do not rely on it")
        return
    if not known:
        text = "the manifest was signed in a federation with another root certificate than the roster's"
        run.say("manifest-signed-by-another", MANIFEST, text, "somebody else signed this run: do not rely on it")
    elif anchors.roster is None:
        text = "whose certificates these are was not checked: no roster was given"
        run.say("no-roster", MANIFEST, text, "give --roster with the file that the sites agreed on", "warning")


def _read_ledger(run: Run, site: str, anchors: Anchors) -> None:
    said = run.manifest.sites.get(site, {}).get("ledger")
    if not isinstance(said, dict) or "file" not in said:
        kept = said.get("kept") if isinstance(said, dict) else "the manifest does not name it"
        if run.job.privacy.private:
            text = f"there is no copy of its ledger: {kept}"
            run.say("ledger-missing", site, text, "ask the site for its ledger, and audit it beside this run", "fail")
        return
    path = run.folder / str(said["file"])
    try:
        if path.stat().st_size > MOST_BYTES:
            raise LedgerError(f"{path.name} has more than {MOST_BYTES} bytes")
        chain = Chain(path, _verifier(run, site, said, anchors))
        torn = chain.follow(path.read_bytes())
    except OSError as error:
        text = f"the copy of its ledger, {said['file']}, cannot be read ({error.strerror})"
        run.say("ledger-missing", site, text, "download the run again, or ask the site for its ledger")
        return
    except (LedgerError, SigningError, SecAggError) as error:
        run.say("ledger-damaged", site, str(error), "ask the site for its ledger and compare")
        return
    if torn:
        run.say("ledger-damaged", site, "the last line of its ledger's copy is torn", "download the run again")
    first = chain.entries[0]
    if first.site != site:
        text = f"the ledger under its name is that of {first.site}"
        run.say("ledger-of-another-site", site, text, "download the run again, or ask the site for its ledger")
        return
    run.ledgers[site] = tuple(chain.entries)


def _verifier(run: Run, site: str, said: Mapping[str, Any], anchors: Anchors) -> Any:
    """Of the site's certificate, after checking whose it is; None for the unsigned ledger of a simulation."""
    if run.manifest.identities == "insecure" and "certificate" not in said:
        return None
    if "certificate" not in said:
        raise SigningError(f"there is no certificate of {site} beside its ledger, and the run was no simulation")
    pem = (run.folder / str(said["certificate"])).read_bytes()
    now = int(datetime.fromisoformat(run.manifest.ended).timestamp())
    leaf = ChainCheck(run.manifest.root.encode()).certificate(name=site, chain=pem, now=now)
    verify = verifier_of(pem, f"the certificate of {site}")
    if anchors.roster is not None:
        member = anchors.roster.members.get(site)
        if member is None:
            raise SigningError(f"{site} is not in the roster")
        if member.fingerprint.hex() != verify.key_spki:
            raise SigningError(
                f"the key of {site} is not the one in the roster: its ledger was signed by somebody else"
            )
    del leaf
    return verify


def plain(value: Any) -> str:
    """JSON of a value for a sentence, cut to a line."""
    return json.dumps(value, default=str)[:120]
