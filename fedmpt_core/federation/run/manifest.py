"""The run manifest: who took part in a run, with what, in which sums, and the digests of all that the run left.

The server signs it with the key of its start-up kit when the run ends, so that whoever downloads the run can tell a
file that was changed later. It proves what this server said, not that the server was honest: sites' ledgers carry
signatures of their own. numpy and torch are not needed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedmpt_core.common.files import file_digest
from fedmpt_core.common.release import package_versions
from fedmpt_core.common.signing import DocumentError, SignedDocument, SigningError, load_signer, verifier_of
from fedmpt_core.config.checks import STRICT
from fedmpt_core.config.toml import build
from fedmpt_core.federation.run.record import MANIFEST, MODEL, RESULT, START, RunRecord, sum_file

MANIFEST_SCHEMA = 1
_OF_RECORD = ("run_id", "config_digest", "outcome", "started", "ended", "aggregation", "identities", "resumed")
_SECAGG = ("cohort", "members", "threshold", "attempt", "epoch", "transcript", "left_out", "faults", "beyond")


@dataclass(frozen=True)
class RunManifest(SignedDocument):
    """What the server states of a run.

    Attributes:
        run_id: FLARE's job id; of a simulation, the name that it made up.
        job: name of the job; `config_digest` its SHA-256.
        outcome: as in `result.json`.
        started: UTC, ISO 8601; `ended` likewise.
        aggregation: `masked` or `unmasked`; `identities` as in `result.json`.
        resumed: the run that was continued and its last round, or None.
        server: package versions of the server, and its `certificate` (PEM; "" in a simulation).
        root: the federation's root certificate (PEM; "" in a simulation).
        sites: by site, what it said when it joined, the newest `head` of its ledger that the server has seen, and
            `ledger`: the copy's file, or `kept` and why there is none.
        rounds: by round, the sites in the sum (`survivors`); for masked sums also cohort, threshold, attempt and
            transcript.
        files: SHA-256 by file, all in the run's folder.
        signature: of the server over everything else, hex; "" in a simulation, which has no keys.
        schema: version of this record.
    """

    NAME = MANIFEST
    PREFIX = b"\xffFEDMPT-MANIFEST/1\0"

    run_id: str
    job: str
    config_digest: str
    outcome: str
    started: str
    ended: str
    aggregation: str
    identities: str
    resumed: dict[str, Any] | None
    server: dict[str, Any]
    root: str
    sites: dict[str, dict[str, Any]]
    rounds: list[dict[str, Any]]
    files: dict[str, str]
    signature: str = field(default="")
    schema: int = MANIFEST_SCHEMA

    __pydantic_config__ = STRICT

    @staticmethod
    def of(
        record: RunRecord,
        folder: Path,
        *,
        ledgers: Mapping[str, Mapping[str, str]],
        kit: Path | None,
    ) -> "RunManifest":
        """The signed manifest of a run that has ended.

        Args:
            record: the run's record, as written.
            folder: the run's folder; what is in it is complete.
            ledgers: by site, `file` and `certificate` of its ledger's copy, or `kept` with the reason.
            kit: the server's start-up kit; None in a simulation.

        Raises:
            SigningError: the server's key cannot be used.
        """
        heads = {site: spent["head"] for row in record.rounds for site, spent in row["privacy"].items()}
        sites = {
            site: {**facts, "head": heads.get(site), "ledger": dict(ledgers.get(site, {"kept": "not asked for"}))}
            for site, facts in (record.sites or {}).items()
        }
        rounds = [round_facts(row) for row in record.rounds]
        certificate, root = ((kit / n).read_text("utf-8") for n in ("server.crt", "rootCA.pem")) if kit else ("", "")
        copies = [name for kept in ledgers.values() for key, name in kept.items() if key != "kept"]
        files = {RESULT, MODEL, START, *copies, *(sum_file(row["round"]) for row in record.rounds)}
        manifest = RunManifest(
            **{name: getattr(record, name) for name in _OF_RECORD},
            job=str(record.config["name"]),
            server={"versions": package_versions(), "certificate": certificate},
            root=root,
            sites=sites,
            rounds=rounds,
            files={n: file_digest(folder / n) for n in sorted(files) if (folder / n).exists()},
        )
        if kit is None:
            return manifest
        sign, _, _ = load_signer(kit / "server.key", kit / "server.crt")
        return replace(manifest, signature=sign(manifest.signed_text()))


def round_facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of a round of `result.json`."""
    masks = row["secagg"]
    return {"round": row["round"], "survivors": row["sites"], **{name: masks.get(name) for name in _SECAGG if masks}}


def read_manifest(folder: Path) -> RunManifest:
    """The manifest of a downloaded run, as it stands.

    Raises:
        DocumentError: it is missing, is something else, or is of a later schema.
    """
    path = folder / MANIFEST
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        schema = plain.get("schema") if isinstance(plain, dict) else None
        if schema != MANIFEST_SCHEMA:
            raise DocumentError(f"{path}: schema={schema!r}: this release reads schema {MANIFEST_SCHEMA}")
        return build(RunManifest, plain, str(path))
    except FileNotFoundError:
        raise DocumentError(f"{path}: no such file: the run has not ended yet, or this is no folder of a run") from None
    except DocumentError:
        raise
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DocumentError(f"{path}: is not a run manifest: {error}") from None


def check_manifest(manifest: RunManifest, folder: Path) -> None:
    """That the signature is the server's and every file is the one that it names.

    Who the server is, its certificate's chain and the root's fingerprint, is left to whoever knows the federation.

    Raises:
        DocumentError: the first problem.
    """
    verify = None
    if manifest.signature:
        try:
            verify = verifier_of(manifest.server["certificate"].encode(), "the certificate in the manifest")
        except (SigningError, KeyError, AttributeError) as error:
            raise DocumentError(f"{folder / MANIFEST}: the server's certificate cannot be used: {error}") from None
    elif manifest.identities != "insecure":
        raise DocumentError(f"{folder / MANIFEST}: carries no signature, and the run was no simulation")
    if RESULT not in manifest.files:
        raise DocumentError(f"{folder / MANIFEST}: does not name the digest of {RESULT}")
    manifest.check(folder, verify)
