"""What becomes of a site's ledger when its key changes (`rotate`) or the name of its data set does (`migrate`).

A key is handed over by an entry that the old key signs and the new key's holder agrees to, so whoever knows the new
key can follow the ledger back to its first line. A data set that is renamed, merged with others or given another
delta goes on in a new ledger, whose genesis carries every charge of the old ones; those are closed first, so that no
job can be charged where it no longer counts. Whatever is interrupted can be done again; nothing is ever charged less.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmpt_core.common.signing import load_signer
from fedmpt_core.config.site import SitePrivacyConfig
from fedmpt_core.privacy.ledger.budget import by_job, charges, said
from fedmpt_core.privacy.ledger.chain import CAPS, LedgerError
from fedmpt_core.privacy.ledger.ledger import Entries, Ledger, read_ledger, stated_caps, successor_of
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, ledger_path, ledger_paths, signing


def rotate(policy: SitePrivacyConfig, name: str, old_kit: Path, kit: Path) -> list[Path]:
    """Hand all ledgers of a site, closed ones too, from the key of one start-up kit to that of another.

    Args:
        policy: the site's.
        name: of the site.
        old_kit: `startup` folder whose key signs the ledgers now; its certificate may have run out.
        kit: `startup` folder whose key signs from now on.

    Returns:
        The ledgers that changed hands; those that the new key signs already are left alone.

    Raises:
        LedgerError: a ledger cannot be trusted, or is signed by neither key; SigningError: a kit cannot be used.
    """
    old, verify, _ = load_signer(old_kit / "client.key", old_kit / "client.crt", expired=True)
    new, verify_new, _ = load_signer(kit / "client.key", kit / "client.crt")
    if old.key_spki == new.key_spki:
        raise LedgerError(f"{old_kit} and {kit} hold the same key: there is nothing to hand over")
    waiting = []
    for path in ledger_paths(policy):
        try:
            read_ledger(path, verify_new)
        except LedgerError:
            waiting.append(_open(path, name, read_ledger(path, verify), old, verify))
    for ledger in waiting:  # all of them can be opened
        ledger.rotate(new)
    return [ledger.path for ledger in waiting]


def migrate(policy: SitePrivacyConfig, name: str, kit: Path | None, sources: Sequence[str]) -> int:
    """Start the ledger of the policy's data set with the charges of others, which are closed.

    Args:
        policy: the site's, which names the new data set.
        name: of the site.
        kit: its `startup` folder; None in a simulation.
        sources: data sets whose records are in the new one; their ledgers lie in the same folder.

    Returns:
        How many charges are carried.

    Raises:
        LedgerError: a ledger cannot be trusted, protects another unit, or was closed for another data set.
    """
    if not sources or policy.dataset in sources or len(set(sources)) != len(sources):
        raise LedgerError(f"name the data sets that become '{policy.dataset}', each once and by their old names")
    if ledger_path(policy).exists():
        raise LedgerError(f"{ledger_path(policy)} exists: records can only be carried to a ledger that is new")
    signer, verify = signing(kit)
    paths = [ledger_path(replace(policy, dataset=source)) for source in sources]
    ledgers = [_checked(path, policy, verify) for path in paths]
    for path, entries in zip(paths, ledgers, strict=True):
        if not successor_of(entries):
            _open(path, name, entries, signer, verify).close(policy.dataset)
    carried = [carry for path in paths for carry in _carried(read_ledger(path, verify))]
    caps: dict[str, float | None] = {}
    for kind in CAPS:
        stated = [every[-1].epsilon for entries in ledgers if (every := stated_caps(entries, kind))]
        caps[kind] = min(stated, default=None)
    create_ledger(policy, name, kit, carried=carried, caps=caps)  # a new name is no new promise
    return len(carried)


def _checked(path: Path, policy: SitePrivacyConfig, verify: Any) -> Entries:
    entries = read_ledger(path, verify)
    first, successor = entries[0], successor_of(entries)
    if first.unit != policy.unit:
        raise LedgerError(
            f"{path} protects each {first.unit}, the policy each {policy.unit}: what was spent of one says nothing of "
            "the other, so these records cannot be used under the new unit"
        )
    if successor not in ("", policy.dataset):
        raise LedgerError(f"{path} is closed and goes on as '{successor}', not as '{policy.dataset}'")
    return entries


def _carried(entries: Entries) -> list[dict[str, Any]]:
    """The charges of a ledger, added up by job and mechanism."""
    origin = {"dataset": entries[-1].dataset, "head": entries[-1].hash}
    return [{"job": job, **said(steps), **origin} for job, steps in by_job(charges(entries))]


def _open(path: Path, name: str, entries: Entries, signer: Any, verify: Any) -> Ledger:
    first = entries[0]
    return Ledger.open(
        path, site=name, dataset=first.dataset, delta=float(first.delta), unit=first.unit, signer=signer, verify=verify
    )
