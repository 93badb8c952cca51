"""A certificate and key as FLARE's start-up kits hold them, without FLARE."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


def write_kit(
    folder: Path,
    name: str,
    *,
    who: str = "client",
    key: rsa.RSAPrivateKey | None = None,
    days: tuple[int, int] = (-1, 1),
) -> rsa.RSAPrivateKey:
    """`client.key`, new unless it is given, and `client.crt`, or a server's; self-signed, valid between two days."""
    key = key or rsa.generate_private_key(65537, 2048)
    whose = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    ends = [now + timedelta(days=day) for day in days]
    builder = x509.CertificateBuilder(whose, whose, key.public_key(), x509.random_serial_number(), *ends)
    lock = NoEncryption()
    folder.mkdir(exist_ok=True)
    (folder / f"{who}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, lock))
    (folder / f"{who}.crt").write_bytes(builder.sign(key, SHA256()).public_bytes(Encoding.PEM))
    return key
