"""Copies of sites' ledgers, verified: chain, signatures, and whose certificate it is."""

from datetime import UTC, datetime
from pathlib import Path

from fedmpt_core.common.signing import KeyVerifier, SigningError, verifier_of
from fedmpt_core.privacy.ledger.chain import Chain, Entry, LedgerError, Verifier
from fedmpt_core.secagg.identity import ChainCheck

MOST_BYTES = 512 << 20  # of a ledger; chosen, a hundred times the largest real one


class LedgerReader:
    """Verifies ledgers. Every run of a site brings the same ledger, longer each time: each line is verified once."""

    def __init__(self) -> None:
        """Nothing is verified yet."""
        self._known: dict[tuple[str, bytes], tuple[bytes, Chain]] = {}

    def read(self, path: Path, verify: Verifier | None) -> tuple[tuple[Entry, ...], bytes]:
        """The entries, and the unfinished last line, which is none.

        Args:
            path: the copy.
            verify: of the key that signs its end; None for the unsigned ledger of a simulation.

        Raises:
            OSError: it cannot be read; LedgerError: it cannot be trusted.
        """
        if path.stat().st_size > MOST_BYTES or not path.is_file():
            raise LedgerError(f"{path.name} is no file, or has more than {MOST_BYTES} bytes")
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        whole, torn = data[:end], data[end:]
        key = getattr(verify, "key_spki", ""), data[: data.find(b"\n")]
        known, chain = self._known.get(key, (b"", Chain(path, verify)))
        if known.startswith(whole) and whole:
            count = whole.count(b"\n")
            if all(entry.kind != "rotate" for entry in chain.entries[count:]):
                return tuple(chain.entries[:count]), torn
        if not whole.startswith(known):
            known, chain = b"", Chain(path, verify)
        chain.path = path
        chain.follow(chain.last + whole[len(known) :])
        self._known[key] = whole, chain
        return tuple(chain.entries), torn


def key_of_site(site: str, certificate: str | None, folder: Path, *, root: bytes, when: datetime) -> KeyVerifier:
    """The verifier of a site's certificate, after checking whose it is.

    Args:
        site: its name.
        certificate: the file's name in `folder`; None when there is none.
        folder: where the copy lies.
        root: the federation's root certificate, PEM.
        when: the time at which the certificate had to be valid.

    Raises:
        SigningError: there is none; SecAggError: it does not follow from the root.
    """
    if certificate is None:
        raise SigningError(f"there is no certificate of {site} beside its ledger, and the run was no simulation")
    pem = inside(folder, certificate).read_bytes()
    ChainCheck(root).certificate(name=site, chain=pem, now=int(when.timestamp()))
    return verifier_of(pem, f"the certificate of {site}")


def inside(folder: Path, name: str) -> Path:
    """A file of a folder that somebody else has filled. Raises LedgerError when the name leads out of it."""
    path = folder / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
        raise LedgerError(f"{name[:80]!r} is no file of {folder}")
    return path


def time_of(text: str) -> datetime:
    """A time in ISO 8601; UTC where it names no zone. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
