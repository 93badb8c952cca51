"""Signatures of a party: RSA-PSS with SHA-256 (RFC 8017, salt of 32 bytes) under the key of its FLARE start-up kit.

FLARE gives every site an RSA key `client.key` (PEM, unencrypted) and a certificate `client.crt` of the project's root.
Ledgers, manifests, exports and the sessions of secure aggregation are signed with it, each after a prefix of its own.
This module must never put key material into an error or a `repr`, and signs under a certificate out of date only to
hand a ledger over to the next key.
It does not check who issued the certificate: that is the business of whoever relies on the signature.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, NoReturn

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

from fedmpt_core.common.canonical import canonical
from fedmpt_core.common.files import file_digest

SALT_BYTES, MIN_BITS = 32, 2048  # what FLARE provisions
_PADDING = PSS(MGF1(SHA256()), SALT_BYTES)


class SigningError(ValueError):
    """A key or certificate that cannot be used; the sentence names the file and says what to do."""


@dataclass(frozen=True)
class KeySigner:
    """Signs messages with a party's private key, which neither `repr` nor pickles show.

    Attributes:
        key_spki: SHA-256 hex of the public key (DER, SubjectPublicKeyInfo).
    """

    key_spki: str
    _key: RSAPrivateKey = field(repr=False, compare=False)

    @staticmethod
    def of(key: RSAPrivateKey) -> "KeySigner":
        """The signer of a key."""
        return KeySigner(_digest(key.public_key()), key)

    @staticmethod
    def from_pem(pem: bytes, whose: str) -> "KeySigner":
        """The signer of an unencrypted RSA key in PEM; `whose` names it in errors. Raises SigningError."""
        try:
            key = load_pem_private_key(pem, password=None)
        except TypeError:
            raise SigningError(f"{whose} is encrypted: give the site an unencrypted key with mode 0600") from None
        except (ValueError, UnsupportedAlgorithm):
            raise SigningError(f"{whose} is not a PEM private key: take client.key of FLARE's start-up kit") from None
        if not isinstance(key, RSAPrivateKey):
            raise SigningError(f"{whose} is not an RSA key: take client.key of FLARE's start-up kit")
        return KeySigner.of(key)

    @property
    def public_key(self) -> str:
        """The public key (DER, SubjectPublicKeyInfo) in hex."""
        return _der(self._key.public_key()).hex()

    def sign(self, message: bytes) -> bytes:
        """The signature of a message."""
        return self._key.sign(message, _PADDING, SHA256())

    def __call__(self, message: bytes) -> str:
        """The same in hex."""
        return self.sign(message).hex()

    def __reduce__(self) -> NoReturn:
        raise SigningError("a signer may not be copied to a file or another process: load it there with load_signer")


@dataclass(frozen=True)
class KeyVerifier:
    """Checks signatures against a public key.

    Attributes:
        key_spki: SHA-256 hex of the public key (DER, SubjectPublicKeyInfo).
    """

    key_spki: str
    _key: RSAPublicKey = field(repr=False, compare=False)

    @staticmethod
    def of(public_key: str) -> "KeyVerifier":
        """The verifier of a public key (DER in hex), as a ledger holds it. Raises SigningError."""
        return KeyVerifier._of(lambda: load_der_public_key(bytes.fromhex(public_key)), "a public key")

    @staticmethod
    def of_certificate(certificate: x509.Certificate, whose: str) -> "KeyVerifier":
        """The verifier of a certificate's key; `whose` names the certificate in errors. Raises SigningError."""
        return KeyVerifier._of(certificate.public_key, whose)

    @staticmethod
    def _of(read: Callable[[], object], whose: str) -> "KeyVerifier":
        try:
            key = read()
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, RSAPublicKey) or key.key_size < MIN_BITS:
            raise SigningError(f"{whose} is not for an RSA key of {MIN_BITS} bits or more, as FLARE makes them")
        return KeyVerifier(_digest(key), key)

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Whether the signature is this key's over the message."""
        try:
            self._key.verify(signature, message, _PADDING, SHA256())
        except InvalidSignature:
            return False
        return True

    def __call__(self, message: bytes, signature: str) -> bool:
        """The same for a signature in hex; False for text that is no hex."""
        try:
            return self.verify(message, bytes.fromhex(signature))
        except ValueError:
            return False


def certificates(pem: bytes, whose: str) -> list[x509.Certificate]:
    """The certificates in PEM bytes, at least one; `whose` names them in errors. Raises SigningError."""
    try:
        chain = x509.load_pem_x509_certificates(pem)
        for c in chain:  # the parts are parsed only when asked for
            _ = c.extensions, c.subject, c.issuer, c.not_valid_before_utc, c.not_valid_after_utc
    except Exception:  # for what others made up it raises six kinds of errors, KeyError among them
        raise SigningError(
            f"{whose} is not a PEM certificate that can be read: FLARE writes one into every start-up kit"
        ) from None
    return chain


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
    certificate = certificates(_read(Path(certificate_path)), str(certificate_path))[0]
    verify = KeyVerifier.of_certificate(certificate, str(certificate_path))
    sign = KeySigner.from_pem(_read(Path(key_path)), str(key_path))
    if sign.key_spki != verify.key_spki:
        raise SigningError(f"{key_path} is not the key of {certificate_path}: take both from the same start-up kit")
    now = datetime.now(UTC)
    if not (expired or certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc):
        raise SigningError(
            f"{certificate_path} is valid from {certificate.not_valid_before_utc:%Y-%m-%d} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d} and it is {now:%Y-%m-%d}: have the site provisioned anew, or "
            "correct the clock of this machine"
        )
    return sign, verify, verify.key_spki


def verifier(certificate_path: Path | str) -> KeyVerifier:
    """A verifier for auditors; old entries stay valid, so the certificate may be out of date. Raises SigningError."""
    return verifier_of(_read(Path(certificate_path)), str(certificate_path))


def verifier_of(certificate: bytes, whose: str) -> KeyVerifier:
    """The same from PEM bytes; `whose` names them in errors. Raises SigningError."""
    return KeyVerifier.of_certificate(certificates(certificate, whose)[0], whose)


class DocumentError(ValueError):
    """A signed document, or a file that it names, is missing or is not what was signed; the sentence says which."""


class SignedDocument:
    """What a party states, in a file: a dataclass of plain values, one of which is a signature over all the others.

    Attributes:
        NAME: of the file.
        PREFIX: stands before what is signed. It begins with 0xff, as no text does, so no signed text can pass for it.
        files: SHA-256 by name of the files that belong to it, relative to its folder.
        signature: hex; "" where there are no keys.
    """

    NAME: ClassVar[str]
    PREFIX: ClassVar[bytes]
    files: dict[str, str]
    signature: str

    def signed_text(self) -> bytes:
        """What the signature is over: canonical JSON of everything but it."""
        return self.PREFIX + canonical({name: value for name, value in vars(self).items() if name != "signature"})

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(vars(self), indent=2, allow_nan=False) + "\n"

    def check(self, folder: Path, verify: Callable[[bytes, str], bool] | None) -> None:
        """That it is signed by the key of `verify`, where there is one, and every file is the one that it names.

        Raises:
            DocumentError: the first problem.
        """
        if verify and not verify(self.signed_text(), self.signature):
            raise DocumentError(f"{folder / self.NAME}: was changed after it was signed")
        for name, digest in self.files.items():
            path = folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
                raise DocumentError(f"{folder / self.NAME}: names {name!r}, which is outside its folder")
            try:
                same = file_digest(path) == digest
            except OSError as error:
                raise DocumentError(f"{path}: cannot be read ({error.strerror}): fetch the folder again") from None
            if not same:
                raise DocumentError(f"{path}: is not the file that was signed")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SigningError(f"{path} cannot be read ({error.strerror}): point to the site's start-up kit") from None


def _digest(key: RSAPublicKey) -> str:
    return hashlib.sha256(_der(key)).hexdigest()


def _der(key: RSAPublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
