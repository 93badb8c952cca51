"""The run manifest: who took part in a run, with what, in which sums, and the digests of all that the run left.

The server signs it with the key of its start-up kit when the run ends, so that whoever downloads the run can tell a
file that was changed later. It proves what this server said, not that the server was honest: sites' ledgers carry
signatures of their own. numpy and torch are not needed.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedmpt_core.common.files import file_digest
from fedmpt_core.common.signing import SigningError, load_signer, verifier_of
from fedmpt_core.config.checks import STRICT
from fedmpt_core.config.toml import build
from fedmpt_core.federation.run.record import MANIFEST, RESULT, RunRecord

MANIFEST_SCHEMA = 1
_PREFIX = b"\xffFEDMPT-MANIFEST/1\0"  # 0xff starts no text, so no signed text can pass for a manifest
_SECAGG = ("cohort", "threshold", "number", "attempt", "epoch", "transcript", "corrected")


class RunManifestError(ValueError):
    """The manifest, or a file that it names, is missing or is not what was signed; the sentence says which."""


@dataclass(frozen=True)
class RunManifest:
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
        versions: Mapping[str, str],
        ledgers: Mapping[str, Mapping[str, str]],
        files: list[str],
        kit: Path | None,
    ) -> "RunManifest":
        """The signed manifest of a run that has ended.

        Args:
            record: the run's record, as written.
            folder: the run's folder.
            versions: packages of the server.
            ledgers: by site, `file` and `certificate` of its ledger's copy, or `kept` with the reason.
            files: names in `folder` that exist and are complete.
            kit: the server's start-up kit; None in a simulation.

        Raises:
            SigningError: the server's key cannot be used.
        """
        heads = {site: said["head"] for row in record.rounds for site, said in row["privacy"].items()}
        sites = {
            site: {**said, "head": heads.get(site), "ledger": dict(ledgers.get(site, {"kept": "not asked for"}))}
            for site, said in (record.sites or {}).items()
        }
        rounds = [round_facts(row) for row in record.rounds]
        certificate, root = (_text(kit / name) for name in ("server.crt", "rootCA.pem")) if kit else ("", "")
        found = RunManifest(
            run_id=record.run_id,
            job=str(record.config["name"]),
            config_digest=record.config_digest,
            outcome=record.outcome,
            started=record.started,
            ended=record.ended,
            aggregation=record.aggregation,
            identities=record.identities,
            resumed=record.resumed,
            server={"versions": dict(versions), "certificate": certificate},
            root=root,
            sites=sites,
            rounds=rounds,
            files={name: file_digest(folder / name) for name in sorted(files)},
        )
        if kit is None:
            return found
        sign, _, _ = load_signer(kit / "server.key", kit / "server.crt")
        return replace(found, signature=sign(found.signed_text()))

    def signed_text(self) -> bytes:
        """What the signature is over: canonical JSON of everything but it."""
        plain = {name: value for name, value in asdict(self).items() if name != "signature"}
        return _PREFIX + json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    def to_json(self) -> str:
        """What `read_manifest` reads."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"


def round_facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of a round of `result.json`."""
    masks = row["secagg"]
    return {"round": row["round"], "survivors": row["sites"], **{name: masks.get(name) for name in _SECAGG if masks}}


def read_manifest(folder: Path) -> RunManifest:
    """The manifest of a downloaded run, as it stands.

    Raises:
        RunManifestError: it is missing, is something else, or is of a later schema.
    """
    path = folder / MANIFEST
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        schema = plain.get("schema") if isinstance(plain, dict) else None
        if schema != MANIFEST_SCHEMA:
            raise RunManifestError(f"{path}: schema={schema!r}: this release reads schema {MANIFEST_SCHEMA}")
        return build(RunManifest, plain, str(path))
    except FileNotFoundError:
        raise RunManifestError(
            f"{path}: no such file: the run has not ended yet, or this is no folder of a run"
        ) from None
    except RunManifestError:
        raise
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunManifestError(f"{path}: is not a run manifest: {error}") from None


def check_manifest(found: RunManifest, folder: Path) -> None:
    """That the signature is the server's and every file is the one that it names.

    Who the server is, its certificate's chain and the root's fingerprint, is left to whoever knows the federation.

    Raises:
        RunManifestError: the first problem.
    """
    if found.signature:
        try:
            verify = verifier_of(found.server["certificate"].encode(), "the certificate in the manifest")
        except (SigningError, KeyError, AttributeError) as error:
            raise RunManifestError(f"{folder / MANIFEST}: the server's certificate cannot be used: {error}") from None
        if not verify(found.signed_text(), found.signature):
            raise RunManifestError(f"{folder / MANIFEST}: was changed after the server signed it")
    elif found.identities != "insecure":
        raise RunManifestError(f"{folder / MANIFEST}: carries no signature, and the run was no simulation")
    if RESULT not in found.files:
        raise RunManifestError(f"{folder / MANIFEST}: does not name the digest of {RESULT}")
    for name, digest in found.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise RunManifestError(f"{folder / MANIFEST}: names {name!r}, which is outside the run's folder")
        try:
            same = file_digest(folder / name) == digest
        except OSError as error:
            raise RunManifestError(
                f"{folder / name}: cannot be read ({error.strerror}): download the run again"
            ) from None
        if not same:
            raise RunManifestError(f"{folder / name}: is not the file that the server signed")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
