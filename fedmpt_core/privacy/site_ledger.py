"""Where a site's policy keeps the ledger of its data set, and the key that signs it. Needs no torch."""

from pathlib import Path
from typing import Any

from fedmpt_core.privacy.ledger import Entries, Ledger, LedgerError, read_ledger
from fedmpt_core.privacy.signing import load_signer, verifier
from fedmpt_core.site_config import SitePrivacyConfig


def ledger_path(policy: SitePrivacyConfig) -> Path:
    """The ledger of the policy's data set. Raises LedgerError when the policy names no folder."""
    if not policy.ledger:
        raise LedgerError("privacy.ledger is empty: name the folder of the site's ledgers in its site file")
    return Path(policy.ledger) / f"{policy.dataset}.ledger.jsonl"


def open_ledger(policy: SitePrivacyConfig, name: str, kit: Path | None) -> Ledger:
    """The existing ledger of a site's data set, signed with its kit's key where there is one. Raises LedgerError."""
    signer, verify = signing(kit)
    return Ledger.open(ledger_path(policy), **_identity(policy, name), signer=signer, verify=verify)


def create_ledger(policy: SitePrivacyConfig, name: str, kit: Path | None) -> Ledger:
    """Start the ledger of a data set that no job has used yet. Raises LedgerError when there is one."""
    signer, verify = signing(kit)
    return Ledger.create(ledger_path(policy), **_identity(policy, name), signer=signer, verify=verify)


def _identity(policy: SitePrivacyConfig, name: str) -> dict[str, Any]:
    return {"site": name, "dataset": policy.dataset, "delta": policy.delta, "unit": policy.unit}


def read_site_ledger(policy: SitePrivacyConfig, kit: Path | None) -> Entries:
    """All entries, chain and signatures verified, without writing. Raises LedgerError or SigningError."""
    return read_ledger(ledger_path(policy), verifier(kit / "client.crt") if kit else None)


def ledger_copy(policy: SitePrivacyConfig, kit: Path | None) -> tuple[bytes, bytes]:
    """A ledger's bytes, verified, and the PEM certificate of the key that signs it ("" in a simulation).

    Raises:
        LedgerError: the ledger cannot be trusted; SigningError: the certificate cannot be used.
    """
    path, certificate = ledger_path(policy), kit / "client.crt" if kit else None
    verified = read_ledger(path, verifier(certificate) if certificate else None)
    lines = path.read_bytes().splitlines(keepends=True)[: len(verified)]  # what others append meanwhile is left out
    return b"".join(lines), certificate.read_bytes() if certificate else b""


def signing(kit: Path | None) -> tuple[Any, Any]:
    """Signer and verifier of a start-up kit, or two None. Raises SigningError."""
    if kit is None:
        return None, None
    signer, verify, _ = load_signer(kit / "client.key", kit / "client.crt")
    return signer, verify
