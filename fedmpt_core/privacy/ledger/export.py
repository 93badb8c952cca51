"""What a site hands to an authority: its ledger, the certificates that verify it, its account, all signed by the site.

The folder holds nothing of a record. It is checked offline by `fedmpt audit`.
"""

import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from fedmpt_core.common.files import file_digest, write_whole
from fedmpt_core.common.release import PROGRAM
from fedmpt_core.common.signing import DocumentError, SignedDocument, SigningError, load_signer, verifier
from fedmpt_core.config.checks import STRICT
from fedmpt_core.config.site import SitePrivacyConfig
from fedmpt_core.config.toml import ConfigError, build
from fedmpt_core.privacy.ledger.ledger import Entries, read_ledger
from fedmpt_core.privacy.ledger.site_ledger import ledger_copy
from fedmpt_core.privacy.ledger.statement import statement

EXPORT, STATEMENT = "export.json", "statement.json"
EXPORT_SCHEMA = 1


@dataclass(frozen=True)
class LedgerExport(SignedDocument):
    """What a site states of its ledger.

    Attributes:
        site: its name; `dataset` of the data set.
        unit: what is protected; `units` their declared number.
        cap: most epsilon that all jobs may spend at `delta`.
        made: UTC, ISO 8601; by the release `code`.
        ledger: name of the ledger's copy in the folder.
        certificate: name of the site's certificate, "" in a simulation; `root` of the federation's.
        files: SHA-256 by file.
        signature: of the site over everything else, hex; "" in a simulation.
        schema: version of this record.
    """

    NAME = EXPORT
    PREFIX = b"\xffFEDMPT-LEDGER-EXPORT/1\0"

    site: str
    dataset: str
    unit: str
    units: int
    cap: float
    delta: float
    made: str
    code: str
    ledger: str
    certificate: str
    root: str
    files: dict[str, str] = field(default_factory=dict)
    signature: str = ""
    schema: int = EXPORT_SCHEMA

    __pydantic_config__ = STRICT


def export_ledger(policy: SitePrivacyConfig, name: str, kit: Path | None, out: Path) -> LedgerExport:
    """Write an export into a new folder.

    Args:
        policy: the site's.
        name: of the site.
        kit: its `startup` folder; None in a simulation.
        out: the folder; must not exist, or be empty.

    Raises:
        DocumentError: the folder is in use; LedgerError, SigningError: as in `ledger_copy`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DocumentError(f"{out} is not an empty folder: name a new one")
    ledger, certificate = ledger_copy(policy, kit)
    out.mkdir(parents=True, exist_ok=True)
    files = {f"{policy.dataset}.ledger.jsonl": ledger}
    if kit:
        files |= {f"{name}.crt": certificate, "rootCA.pem": (kit / "rootCA.pem").read_bytes()}
    for file, data in files.items():
        write_whole(out / file, data, mode=None)
    names = list(files)
    entries = read_ledger(out / names[0], verifier(kit / "client.crt") if kit else None)
    account = statement(Entries(entries), policy.epsilon, policy.epsilon_alone).to_dict()
    write_whole(out / STATEMENT, (json.dumps(account, indent=2, allow_nan=False) + "\n").encode(), mode=None)
    export = LedgerExport(
        site=name,
        dataset=policy.dataset,
        unit=policy.unit,
        units=policy.units,
        cap=policy.epsilon,
        delta=policy.delta,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        code=PROGRAM,
        ledger=names[0],
        certificate=names[1] if kit else "",
        root=names[2] if kit else "",
        files={file: file_digest(out / file) for file in sorted([*names, STATEMENT])},
    )
    if kit:
        sign, _, _ = load_signer(kit / "client.key", kit / "client.crt")
        export = replace(export, signature=sign(export.signed_text()))
    write_whole(out / EXPORT, export.to_json().encode(), mode=None)
    return export


def read_export(folder: Path) -> LedgerExport:
    """An export as it stands. Raises DocumentError when it is missing, is something else, or is of a later schema."""
    path = folder / EXPORT
    try:
        export = build(LedgerExport, json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ConfigError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DocumentError(f"{path}: is not a ledger's export: {error}") from None
    if export.schema != EXPORT_SCHEMA:
        raise DocumentError(f"{path}: schema={export.schema}: this release reads schema {EXPORT_SCHEMA}")
    for name in (*export.files, export.ledger, export.certificate, export.root):
        if Path(name).name != name:
            raise DocumentError(f"{path}: names {name!r}, which is outside the export's folder")
    return export


def check_export(export: LedgerExport, folder: Path) -> None:
    """That the signature is the site's and every file is the one that it names. Raises DocumentError."""
    try:
        export.check(folder, verifier(folder / export.certificate) if export.certificate else None)
    except SigningError as error:
        raise DocumentError(str(error)) from None
    if {export.ledger, *filter(None, (export.certificate, export.root))} - set(export.files):
        raise DocumentError(f"{folder / EXPORT}: does not name the digest of every file that it uses")
