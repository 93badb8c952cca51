"""Appending to a privacy ledger of 10,000 signed entries: a reservation and its commit, RSA-2048, synced to disk.

Wall time, as most of an append may be the disk's; the median, as the disk is shared. An append must not read the chain
anew: opening does, and is shown for comparison.
"""

import statistics
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fedmpt_core.common.signing import KeySigner, KeyVerifier, load_signer
from fedmpt_core.privacy.ledger.ledger import Ledger
from tests.bench.measure import Row

ENTRIES, TIMED, BOUND = 10_000, 200, 5e-3
PLACE = {"site": "site-1", "dataset": "chest", "delta": 1e-5}
DETAILS = {
    "mechanism": "poisson-subsampled-gaussian",
    "sample_rate": 0.064,
    "noise_multiplier": 1.1,
    "steps": 8,
    "max_grad_norm": 1.0,
    "engine": "exact",
    "rng": "AES-256-CTR",
    "rng_key_id": "0" * 64,
    "groups": {"ctx": ["contexts.condition", "contexts.shared"]},
    "config": "0" * 64,
}


def run() -> list[Row]:
    """Fill a ledger, then time appends at its end and a fresh opening."""
    with tempfile.TemporaryDirectory() as folder:
        signer, verify = _kit(Path(folder))
        path = Path(folder) / "ledger"
        ledger = Ledger.create(path, **PLACE, signer=signer, verify=verify)
        for i in range(ENTRIES // 2):
            _round(ledger, i)
        reserves, commits = zip(*(_round(ledger, ENTRIES + i) for i in range(TIMED)), strict=True)
        start = time.perf_counter()
        Ledger.open(path, **PLACE, signer=signer, verify=verify)
        opening = time.perf_counter() - start
    return [
        _row("reservation", reserves),
        _row("commit", commits),
        Row(f"opening and verifying {ENTRIES} signed entries (s)", f"{opening:.2f}", "–", "–", "–", None),
    ]


def _row(what: str, seconds: tuple[float, ...]) -> Row:
    median, late = statistics.median(seconds), statistics.quantiles(seconds, n=20)[-1]
    return Row(
        f"privacy ledger, one {what} after {ENTRIES} signed entries (median ms; other: 95 of 100 are faster)",
        f"{1e3 * median:.2f}",
        f"{1e3 * late:.2f}",
        "–",
        f"<= {1e3 * BOUND:.0f} ms",
        median <= BOUND,
    )


def _round(ledger: Ledger, number: int) -> tuple[float, float]:
    start = time.perf_counter()
    reservation = ledger.reserve(job="bench", round=number, attempt=0, details=DETAILS, admit=lambda _: None)
    middle = time.perf_counter()
    ledger.commit(reservation, release="0" * 64)
    return middle - start, time.perf_counter() - middle


def _kit(folder: Path) -> tuple[KeySigner, KeyVerifier]:
    key, now = rsa.generate_private_key(65537, 2048), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "site-1")])
    span = now - timedelta(days=1), now + timedelta(days=1)
    certificate = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), *span)
    (folder / "client.crt").write_bytes(certificate.sign(key, SHA256()).public_bytes(Encoding.PEM))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    (folder / "client.key").write_bytes(pem)
    signer, verify, _ = load_signer(folder / "client.key", folder / "client.crt")
    return signer, verify
