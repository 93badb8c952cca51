"""Signatures of a site: RSA-PSS with SHA-256 (RFC 8017, salt of 32 bytes) under the key of its FLARE start-up kit.

FLARE gives every site an RSA key `client.key` (PEM, unencrypted) and a certificate `client.crt` of the project's root.
This module must never put key material into an error or a `repr`, and signs under a certificate out of date only to
hand a ledger over to the next key.
It does not check who issued the certificate: that is the business of whoever relies on the signature.
"""

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
)

SALT_BYTES = 32
MIN_BITS = 2048  # what FLARE provisions
_PADDING = PSS(MGF1(SHA256()), SALT_BYTES)


class SigningError(ValueError):
    """A key or certificate that cannot be used; the sentence names the file and says what to do."""


@dataclass(frozen=True)
class KeySigner:
    """Signs messages with a site's private key, which neither `repr` nor pickles show.

    Attributes:
        key_spki: SHA-256 hex of the public key (DER, SubjectPublicKeyInfo).
    """

    key_spki: str
    _key: RSAPrivateKey = field(repr=False, compare=False)

    @property
    def public_key(self) -> str:
        """The public key (DER, SubjectPublicKeyInfo) in hex."""
        return _der(self._key.public_key()).hex()

    def __call__(self, message: bytes) -> str:
        """The signature of a message, in hex."""
        return self._key.sign(message, _PADDING, SHA256()).hex()

    def __reduce__(self) -> NoReturn:
        raise SigningError("a signer may not be copied to a file or another process: load it there with load_signer")


@dataclass(frozen=True)
class KeyVerifier:
    """Checks signatures against the public key of a certificate.

    Attributes:
        key_spki: SHA-256 hex of the public key (DER, SubjectPublicKeyInfo).
    """

    key_spki: str
    _key: RSAPublicKey = field(repr=False, compare=False)

    def __call__(self, message: bytes, signature: str) -> bool:
        """Whether the hex signature is this key's over the message; False for text that is no hex."""
        try:
            self._key.verify(bytes.fromhex(signature), message, _PADDING, SHA256())
        except (InvalidSignature, ValueError):
            return False
        return True

    @staticmethod
    def of(public_key: str) -> "KeyVerifier":
        """The verifier of a public key (DER in hex), as a ledger holds it. Raises SigningError."""
        try:
            key = load_der_public_key(bytes.fromhex(public_key))
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, RSAPublicKey) or key.key_size < MIN_BITS:
            raise SigningError(f"a public key is not one for RSA of {MIN_BITS} bits or more")
        return KeyVerifier(_digest(key), key)


def load_signer(
    key_path: Path | str, certificate_path: Path | str, *, expired: bool = False
) -> tuple[KeySigner, KeyVerifier, str]:
    """Signer, verifier and public key digest of a start-up kit.

    Args:
        key_path: `client.key`, PEM, RSA of 2048 bits or more, unencrypted.
        certificate_path: `client.crt`, PEM, of the same key and valid now.
        expired: let the certificate be out of date, to hand a ledger over from the key of a kit that ran out.

    Returns:
        The signer, the verifier, and the SHA-256 hex of the public key (DER, SubjectPublicKeyInfo).

    Raises:
        SigningError: a file is missing or is something else, the two do not belong together, or the certificate is not
            valid yet or no more.
    """
    certificate = _certificate(Path(certificate_path))
    public = _public(certificate, Path(certificate_path))
    key = _private(Path(key_path))
    if key.public_key().public_numbers() != public.public_numbers():
        raise SigningError(f"{key_path} is not the key of {certificate_path}: take both from the same start-up kit")
    now = datetime.now(UTC)
    if not (expired or certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc):
        raise SigningError(
            f"{certificate_path} is valid from {certificate.not_valid_before_utc:%Y-%m-%d} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d} and it is {now:%Y-%m-%d}: have the site provisioned anew, or "
            "correct the clock of this machine"
        )
    digest = _digest(public)
    return KeySigner(digest, key), KeyVerifier(digest, public), digest


def verifier(certificate_path: Path | str) -> KeyVerifier:
    """A verifier for auditors; old entries stay valid, so the certificate may be out of date. Raises SigningError."""
    public = _public(_certificate(Path(certificate_path)), Path(certificate_path))
    return KeyVerifier(_digest(public), public)


def verifier_of(certificate: bytes, whose: str) -> KeyVerifier:
    """The same from PEM bytes; `whose` names them in errors. Raises SigningError."""
    try:
        parsed = x509.load_pem_x509_certificate(certificate)
    except ValueError:
        raise SigningError(f"{whose} is not a PEM certificate") from None
    public = _public(parsed, Path(whose))
    return KeyVerifier(_digest(public), public)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SigningError(f"{path} cannot be read ({error.strerror}): point to the site's start-up kit") from None


def _certificate(path: Path) -> x509.Certificate:
    data = _read(path)
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError:
        raise SigningError(f"{path} is not a PEM certificate: take client.crt of the start-up kit") from None


def _public(certificate: x509.Certificate, path: Path) -> RSAPublicKey:
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, RSAPublicKey) or key.key_size < MIN_BITS:
        raise SigningError(f"{path} is not for an RSA key of {MIN_BITS} bits or more: take client.crt of FLARE's kit")
    return key


def _private(path: Path) -> RSAPrivateKey:
    data = _read(path)
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError:
        raise SigningError(f"{path} is encrypted: give the site an unencrypted key with mode 0600") from None
    except (ValueError, UnsupportedAlgorithm):
        raise SigningError(f"{path} is not a PEM private key: take client.key of the start-up kit") from None
    if not isinstance(key, RSAPrivateKey):
        raise SigningError(f"{path} is not an RSA key: take client.key of FLARE's start-up kit")
    return key


def _digest(key: RSAPublicKey) -> str:
    return hashlib.sha256(_der(key)).hexdigest()


def _der(key: RSAPublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
