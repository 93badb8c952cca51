"""A downloaded run, read without believing it: what can be parsed is handed on, what cannot is a finding."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NotRequired

from cryptography import x509
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from fedmpt_core.audit.finding import Finding
from fedmpt_core.audit.known_keys import KnownKeys
from fedmpt_core.audit.ledger_copy import LedgerReader, inside, key_of_site, time_of
from fedmpt_core.common.canonical import canonical_digest
from fedmpt_core.common.signing import DocumentError, KeyVerifier, SigningError
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.toml import ConfigError, job_from_dict
from fedmpt_core.federation.run.manifest import RunManifest, check_manifest, read_manifest
from fedmpt_core.federation.run.record import MANIFEST, RESULT, load_record
from fedmpt_core.privacy.ledger.chain import Entry, LedgerError
from fedmpt_core.secagg.errors import SecAggError
from fedmpt_core.secagg.identity import root_sha256
from fedmpt_core.secagg.roster import Roster


class NoRun(ValueError):
    """The folder holds no run that could be audited; the sentence says what is missing."""


@dataclass
class Run:
    """One run as it was downloaded.

    Attributes:
        folder: the run's folder.
        record: `result.json` in plain values.
        job: the agreed job in it.
        manifest: the server's signed statement.
        keys: what the auditor knows.
        ledgers: by site, the entries of its ledger's copy; only of chains that hold.
        missing: by site whose ledger is needed and not here, why.
        findings: what went wrong while reading.
    """

    folder: Path
    record: dict[str, Any]
    job: JobConfig
    manifest: RunManifest
    keys: KnownKeys = field(default_factory=KnownKeys)
    ledgers: dict[str, tuple[Entry, ...]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def sites(self) -> dict[str, dict[str, Any]]:
        """By site that took part, what it said when it joined."""
        return self.record["sites"] or {}

    @property
    def ended(self) -> datetime:
        """When the run ended, by its manifest."""
        return time_of(self.manifest.ended)

    @property
    def roster(self) -> Roster | None:
        """The roster that was in force when the run ended; None when the auditor has none."""
        return self.keys.at(self.ended)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The record's rounds, round 0 (the model before training) left out."""
        return [row for row in self.record["rounds"] if row.get("round") != 0]

    @property
    def jobs(self) -> tuple[str, ...]:
        """Names of the run, and of those that it continues, in ledgers."""
        return (self.manifest.run_id, *self.job.continued)

    def job_of(self, number: int) -> str:
        """The name in ledgers of the run that did a round: this one, or one that it continues."""
        earlier = reversed(self.job.earlier_runs)
        return next((run.job for run in earlier if number <= run.round), self.manifest.run_id)

    def say(self, code: str, where: str, text: str, remedy: str, severity: Any = "fail") -> None:
        """Add a finding."""
        self.findings.append(Finding(code, severity, where, text, remedy))


def load_run(folder: Path, keys: KnownKeys, reader: LedgerReader | None = None) -> Run:
    """Read a run.

    Args:
        folder: what `nvflare job download` or `fedmpt simulate` wrote, or its `workspace`.
        keys: what the auditor knows.
        reader: shared by several runs, so that no line of a ledger is verified twice.

    Raises:
        NoRun: there is nothing to audit.
    """
    reader = reader or LedgerReader()
    place = folder / "workspace" if (folder / "workspace" / MANIFEST).exists() else folder
    if not place.is_dir():
        raise NoRun(f"{folder}: no such folder")
    try:
        record, manifest = load_record(place), read_manifest(place)
        job = job_from_dict(record["config"], str(place / RESULT))
        _check_shape(record, manifest)
    except (ConfigError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise NoRun(f"{place}: is not a finished run of this release: {error}") from None
    run = Run(place, record, job, manifest, keys)
    _check_files(run)
    for site in sorted(run.sites):
        _read_ledger(run, site, reader)
    return run


Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class _Head(TypedDict):
    seq: Count
    hash: str
    sig: str


class _Charged(TypedDict):
    epsilon: Finite
    delta: Finite
    head: _Head


class _Sum(TypedDict, total=False):
    cohort: list[str]
    members: Count
    threshold: Count
    attempt: Count
    epoch: Count
    transcript: str
    left_out: dict[str, str]
    faults: dict[str, str]
    beyond: Count
    metrics: dict[str, float]


class _Round(TypedDict):
    round: Count
    sites: list[str]
    bytes_sent: dict[str, Count]
    privacy: dict[str, _Charged]
    secagg: _Sum


class _Resumed(TypedDict):
    job: str
    round: int


class _Joined(TypedDict):
    versions: dict[str, str]
    evaluates: bool
    backbone_digest: str
    weight: NotRequired[Annotated[int, Field(ge=1)]]


class _Record(TypedDict):
    """The parts of `result.json` that the audit reads, of the kinds that it relies on."""

    outcome: str
    sites: dict[str, _Joined] | None
    rounds: list[_Round]
    lost: dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}$")], str]
    absent: dict[str, str]
    resumed: _Resumed | None


class _Site(TypedDict, total=False):
    head: _Head | None
    ledger: dict[str, str]


class _Server(TypedDict):
    versions: dict[str, str]
    certificate: str


_RECORD, _SITES, _SERVER = TypeAdapter(_Record), TypeAdapter(dict[str, _Site]), TypeAdapter(_Server)


def _check_shape(record: Mapping[str, Any], manifest: RunManifest) -> None:
    """Raises ValueError unless the parts that the audit reads are of their kinds."""
    try:
        _RECORD.validate_python(record, strict=True)
        _SITES.validate_python(manifest.sites, strict=True)
        _SERVER.validate_python(manifest.server, strict=True)
        for moment in (manifest.started, manifest.ended):
            time_of(moment)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))[:80]}: {first['msg']}") from None


def _check_files(run: Run) -> None:
    manifest = run.manifest
    try:
        check_manifest(manifest, run.folder)
    except DocumentError as error:
        run.say("file-changed", MANIFEST, str(error), "download the run again; if it repeats, ask who changed it")
    if manifest.signature:
        _check_server(run)
    same = ("run_id", "outcome", "started", "ended", "aggregation", "identities", "resumed", "config_digest")
    differ = [name for name in same if getattr(manifest, name) != run.record.get(name)]
    if differ:
        text = f"{RESULT} and {MANIFEST} differ in {', '.join(differ)}"
        run.say("record-changed", RESULT, text, "one of the two was edited: download the run again")
    digest = canonical_digest(run.record["config"])  # as it stands: a later release may know more fields
    if digest != manifest.config_digest:
        text = f"the job in {RESULT} has the digest {digest[:16]}, the run was of {manifest.config_digest[:16]}"
        run.say("config-changed", RESULT, text, "compare the job with the one that the sites approved")


def _check_server(run: Run) -> None:
    try:
        root = run.manifest.root.encode()
        leaf = x509.load_pem_x509_certificate(run.manifest.server["certificate"].encode())
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(root))
        known = run.roster is None or root_sha256(root) == run.roster.root
    except Exception as error:
        text = f"the server's certificate does not follow from the root in the manifest ({type(error).__name__})"
        run.say("manifest-signed-by-another", MANIFEST, text, "nobody knows who signed this run: do not rely on it")
        return
    if not known:
        text = "the manifest was signed in a federation with another root certificate than the roster's"
        run.say("manifest-signed-by-another", MANIFEST, text, "somebody else signed this run: do not rely on it")
    elif run.roster is None:
        text = "whose certificates these are was not checked: no roster was given"
        run.say("no-roster", MANIFEST, text, "give --roster with the file that the sites agreed on", "warning")


def _read_ledger(run: Run, site: str, reader: LedgerReader) -> None:
    copy = run.manifest.sites.get(site, {}).get("ledger")
    if not isinstance(copy, dict) or "file" not in copy:
        run.missing[site] = str(copy.get("kept")) if isinstance(copy, dict) else "the manifest does not name it"
        return
    try:
        entries, torn = reader.read(inside(run.folder, copy["file"]), _verifier(run, site, copy))
    except OSError as error:
        run.missing[site] = f"{copy['file']} cannot be read ({error.strerror})"
        return
    except (LedgerError, SigningError, SecAggError, ValueError) as error:
        run.say("ledger-damaged", site, str(error), "ask the site for its ledger and compare")
        return
    if torn:
        run.say("ledger-damaged", site, "the last line of its ledger's copy is torn", "download the run again")
    if entries[0].site != site:
        text = f"the ledger under its name is that of {entries[0].site}"
        run.say("ledger-of-another-site", site, text, "download the run again, or ask the site for its ledger")
        return
    run.ledgers[site] = entries


def _verifier(run: Run, site: str, copy: Mapping[str, Any]) -> KeyVerifier | None:
    """Of the site's certificate; None for the unsigned ledger of a simulation."""
    if run.manifest.identities == "insecure" and "certificate" not in copy:
        return None
    root = run.manifest.root.encode()
    return key_of_site(site, copy.get("certificate"), run.folder, root=root, when=run.ended)
