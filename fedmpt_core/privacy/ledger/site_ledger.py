"""Where a site's policy keeps the ledger of its data set, and the key that signs it. Needs no torch."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmpt_core.config.site import SiteConfig, SitePrivacyConfig
from fedmpt_core.privacy.ledger.chain import LedgerError
from fedmpt_core.privacy.ledger.ledger import Entries, Ledger, read_ledger

SUFFIX = ".ledger.jsonl"
LIST = ".records"  # beside a ledger: which records it was charged for


def ledger_path(policy: SitePrivacyConfig) -> Path:
    """The ledger of the policy's data set. Raises LedgerError when the policy names no folder."""
    if not policy.ledger:
        raise LedgerError("privacy.ledger is empty: name the folder of the site's ledgers in its site file")
    return Path(policy.ledger) / f"{policy.dataset}{SUFFIX}"


def open_ledger(policy: SitePrivacyConfig, name: str, kit: Path | None) -> Ledger:
    """The existing ledger of a site's data set, signed with its kit's key where there is one.

    A cap that is not the one which the ledger states is noted in it, before anything is asked under the new one.

    Raises:
        LedgerError: it is missing, cannot be trusted, or it or its folder cannot be written to.
    """
    signer, verify = signing(kit)
    ledger = Ledger.open(ledger_path(policy), **_identity(policy, name), signer=signer, verify=verify)
    if not os.access(ledger.path.parent, os.W_OK):  # lists of records go there
        raise LedgerError(f"{ledger.path.parent} cannot be written to: correct its owner or rights, or the disk")
    ledger.state_caps(caps_of(policy))
    return ledger


def caps_of(policy: SitePrivacyConfig) -> dict[str, float | None]:
    """A policy's caps, by the kind of entry that states them."""
    return {"cap": policy.epsilon, "cap_alone": policy.epsilon_alone}


def create_ledger(
    policy: SitePrivacyConfig,
    name: str,
    kit: Path | None,
    *,
    carried: Sequence[Mapping[str, Any]] = (),
    caps: Mapping[str, float | None] | None = None,
) -> Ledger:
    """Start the ledger of a data set that no job has used yet; `caps` are those stated before, None the policy's.

    Raises LedgerError when there is one, or was.
    """
    signer, verify = signing(kit)
    if (used := ledger_path(policy).with_name(f"{policy.dataset}{LIST}")).exists():
        raise LedgerError(f"{used} lists records that were trained on as '{policy.dataset}': restore the ledger")
    identity = _identity(policy, name)
    stated = {kind: cap for kind, cap in (caps or {}).items() if cap is not None}
    caps = caps_of(policy) | stated
    return Ledger.create(ledger_path(policy), **identity, signer=signer, verify=verify, carried=carried, caps=caps)


def with_ledger(site: SiteConfig, name: str, folder: Path) -> SiteConfig:
    """A simulated site with an unsigned ledger in `folder`, unless it names one or has no policy.

    A ledger that is there already goes on.
    """
    if site.privacy is None or site.privacy.ledger:
        return site
    policy = dataclasses.replace(site.privacy, ledger=str(folder))
    if not ledger_path(policy).exists():
        create_ledger(policy, name, None)
    return dataclasses.replace(site, privacy=policy)


def _identity(policy: SitePrivacyConfig, name: str) -> dict[str, Any]:
    return {"site": name, "dataset": policy.dataset, "delta": policy.delta, "unit": policy.unit}


def read_site_ledger(policy: SitePrivacyConfig, kit: Path | None) -> Entries:
    """All entries, chain and signatures verified, without writing. Raises LedgerError or SigningError."""
    return read_ledger(ledger_path(policy), _verifier(kit))


def read_site_ledgers(policy: SitePrivacyConfig, kit: Path | None) -> dict[str, Entries]:
    """The ledgers of all data sets in the policy's folder, verified, by data set. Raises as `read_site_ledger`."""
    verify = _verifier(kit)
    return {path.name.removesuffix(SUFFIX): read_ledger(path, verify) for path in ledger_paths(policy)}


def ledger_paths(policy: SitePrivacyConfig) -> list[Path]:
    """The ledgers in the policy's folder. Raises LedgerError when there is none."""
    paths = sorted(ledger_path(policy).parent.glob(f"*{SUFFIX}"))
    if not paths:
        raise LedgerError(f"{policy.ledger} holds no ledger: start one with `fedmpt ledger create`, or restore it")
    return paths


def ledger_copy(policy: SitePrivacyConfig, kit: Path | None) -> tuple[bytes, bytes]:
    """A ledger's bytes, verified, and the PEM certificate of the key that signs it ("" in a simulation).

    Raises:
        LedgerError: the ledger cannot be trusted; SigningError: the certificate cannot be used.
    """
    path = ledger_path(policy)
    verified = read_ledger(path, _verifier(kit))
    lines = path.read_bytes().splitlines(keepends=True)[: len(verified)]  # what others append meanwhile is left out
    return b"".join(lines), (kit / "client.crt").read_bytes() if kit else b""


def signing(kit: Path | None) -> tuple[Any, Any]:
    """Signer and verifier of a start-up kit, or two None. Raises SigningError."""
    if kit is None:
        return None, None
    from fedmpt_core.common.signing import load_signer  # X.509, which an unsigned ledger does without

    signer, verify, _ = load_signer(kit / "client.key", kit / "client.crt")
    return signer, verify


def _verifier(kit: Path | None) -> Any:
    if kit is None:
        return None
    from fedmpt_core.common.signing import verifier  # as above

    return verifier(kit / "client.crt")
