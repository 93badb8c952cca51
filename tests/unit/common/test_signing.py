"""Signing with the key of a start-up kit: OpenSSL's own check agrees, and every unfit file is refused in a sentence."""

import copy
import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedmpt_core.common.signing import DocumentError, KeySigner, SignedDocument, SigningError, load_signer, verifier
from fedmpt_core.privacy.ledger.chain import LedgerError
from fedmpt_core.privacy.ledger.ledger import Ledger, read_ledger

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
MESSAGE = b"\xffFEDMPT-LEDGER/1\0" + bytes(32)


@dataclass(frozen=True)
class Kit:
    key: rsa.RSAPrivateKey
    key_path: Path
    certificate_path: Path


def certificate(key: Any, begin: datetime = NOW - DAY, end: datetime = NOW + DAY) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "site-1")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), begin, end)
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def pem(key: Any, password: bytes | None = None) -> bytes:
    # FLARE writes its keys in this format
    lock = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, lock)


def kit_in(folder: Path, key: rsa.RSAPrivateKey) -> Kit:
    (folder / "client.key").write_bytes(pem(key))
    (folder / "client.crt").write_bytes(certificate(key))
    return Kit(key, folder / "client.key", folder / "client.crt")


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture(scope="module")
def other() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture(scope="module")
def shared_kit(tmp_path_factory: pytest.TempPathFactory, key: rsa.RSAPrivateKey) -> Kit:
    return kit_in(tmp_path_factory.mktemp("kit"), key)


@pytest.fixture
def kit(tmp_path: Path, key: rsa.RSAPrivateKey) -> Kit:
    return kit_in(tmp_path, key)


def test_a_signature_is_pss_with_sha256_and_a_salt_of_32_bytes(shared_kit: Kit) -> None:
    sign, verify, spki = load_signer(shared_kit.key_path, shared_kit.certificate_path)
    signature, public = sign(MESSAGE), shared_kit.key.public_key()
    public.verify(bytes.fromhex(signature), MESSAGE, padding.PSS(padding.MGF1(SHA256()), 32), SHA256())
    for salt in (20, 31, 33):
        with pytest.raises(InvalidSignature):
            public.verify(bytes.fromhex(signature), MESSAGE, padding.PSS(padding.MGF1(SHA256()), salt), SHA256())
    assert verify(MESSAGE, signature) and sign(MESSAGE) != signature
    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert spki == hashlib.sha256(der).hexdigest() == sign.key_spki == verify.key_spki


@pytest.fixture(scope="module")
def signature(shared_kit: Kit) -> bytes:
    return bytes.fromhex(load_signer(shared_kit.key_path, shared_kit.certificate_path)[0](MESSAGE))


@given(index=st.integers(0, 255), change=st.integers(1, 255))
def test_a_changed_signature_is_refused(shared_kit: Kit, signature: bytes, index: int, change: int) -> None:
    changed = signature[:index] + bytes([signature[index] ^ change]) + signature[index + 1 :]
    assert not verifier(shared_kit.certificate_path)(MESSAGE, changed.hex())


@given(index=st.integers(0, len(MESSAGE) - 1), change=st.integers(1, 255))
def test_a_changed_message_is_refused(shared_kit: Kit, signature: bytes, index: int, change: int) -> None:
    verify = verifier(shared_kit.certificate_path)
    assert verify(MESSAGE, signature.hex()) and not verify(MESSAGE + b"\0", signature.hex())
    assert not verify(MESSAGE[:index] + bytes([MESSAGE[index] ^ change]) + MESSAGE[index + 1 :], signature.hex())


@pytest.mark.parametrize("signature", ["", "00", "no hex", "é", "00" * 256, "00" * 257])
def test_text_that_is_no_signature_is_refused(shared_kit: Kit, signature: str) -> None:
    assert not verifier(shared_kit.certificate_path)(MESSAGE, signature)


def test_another_key_s_signature_is_refused(shared_kit: Kit, other: rsa.RSAPrivateKey) -> None:
    assert not verifier(shared_kit.certificate_path)(MESSAGE, KeySigner("", other)(MESSAGE))


def test_a_newer_key_format_is_read_as_well(kit: Kit) -> None:
    kit.key_path.write_bytes(kit.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    sign, verify, _ = load_signer(kit.key_path, kit.certificate_path)
    assert verify(MESSAGE, sign(MESSAGE))


@pytest.mark.parametrize("name", ["client.key", "client.crt"])
def test_a_missing_file_is_named(kit: Kit, name: str) -> None:
    path = kit.key_path.with_name(name)
    path.unlink()
    with pytest.raises(SigningError, match=rf"{path} cannot be read \(No such file"):
        load_signer(kit.key_path, kit.certificate_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("client.key", lambda key: b"", "client.key is not a PEM private key"),
        ("client.key", lambda key: pem(key)[:-200], "client.key is not a PEM private key"),
        ("client.key", lambda key: certificate(key), "client.key is not a PEM private key"),
        ("client.key", lambda key: pem(key, b"secret"), "client.key is encrypted"),
        ("client.key", lambda key: pem(ec.generate_private_key(ec.SECP256R1())), "client.key is not an RSA key"),
        ("client.crt", lambda key: b"", "client.crt is not a PEM certificate"),
        ("client.crt", lambda key: pem(key), "client.crt is not a PEM certificate"),
        (
            "client.crt",
            lambda key: certificate(ec.generate_private_key(ec.SECP256R1())),
            "client.crt is not for an RSA key of 2048 bits",
        ),
        (
            "client.crt",
            lambda key: certificate(rsa.generate_private_key(65537, 1024)),
            "client.crt is not for an RSA key of 2048 bits",
        ),
        ("client.crt", lambda key: certificate(key, NOW - 3 * DAY, NOW - DAY), "have the site provisioned anew"),
        ("client.crt", lambda key: certificate(key, NOW + DAY, NOW + 3 * DAY), "correct the clock"),
    ],
)
def test_an_unfit_file_is_refused(
    kit: Kit, name: str, content: Callable[[rsa.RSAPrivateKey], bytes], says: str
) -> None:
    kit.key_path.with_name(name).write_bytes(content(kit.key))
    with pytest.raises(SigningError, match=says) as error:
        load_signer(kit.key_path, kit.certificate_path)
    assert not leaked(kit.key, str(error.value)) and error.value.__suppress_context__ | (
        error.value.__context__ is None
    )


def test_a_key_of_another_kit_is_refused(kit: Kit, other: rsa.RSAPrivateKey) -> None:
    kit.key_path.write_bytes(pem(other))
    with pytest.raises(SigningError, match="is not the key of") as error:
        load_signer(kit.key_path, kit.certificate_path)
    assert not leaked(other, str(error.value))


def test_old_signatures_stay_valid_after_the_certificate(kit: Kit) -> None:
    sign, _, spki = load_signer(kit.key_path, kit.certificate_path)
    kit.certificate_path.write_bytes(certificate(kit.key, NOW - 3 * DAY, NOW - DAY))
    assert verifier(kit.certificate_path)(MESSAGE, sign(MESSAGE))
    assert verifier(kit.certificate_path).key_spki == spki


def leaked(key: rsa.RSAPrivateKey, text: str) -> bool:
    """Whether a text holds a line of the key file, or one of its secret numbers."""
    numbers = key.private_numbers()
    lines = pem(key).decode().splitlines()[1:-1]
    return any(part in text for part in (*lines, str(numbers.d), str(numbers.p), f"{numbers.d:x}"))


def test_the_key_is_neither_shown_nor_copied(shared_kit: Kit) -> None:
    sign, verify, spki = load_signer(shared_kit.key_path, shared_kit.certificate_path)
    assert leaked(shared_kit.key, pem(shared_kit.key).decode())
    assert repr(sign) == f"KeySigner(key_spki='{spki}')" and repr(verify) == f"KeyVerifier(key_spki='{spki}')"
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(SigningError, match="may not be copied"):
            copied(sign)


@dataclass(frozen=True)
class Note(SignedDocument):
    NAME = "note.json"
    PREFIX = b"\xffNOTE/1\0"

    text: str
    files: dict[str, str]
    signature: str = ""


@pytest.fixture
def note(tmp_path: Path) -> Note:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "data").write_bytes(b"data")
    return Note("\u00fc", {"below/data": hashlib.sha256(b"data").hexdigest()})


def test_a_document_is_signed_as_canonical_json_after_its_prefix(note: Note) -> None:
    files = f'{{"below/data":"{note.files["below/data"]}"}}'
    assert note.signed_text() == b"\xffNOTE/1\0" + rf'{{"files":{files},"text":"\u00fc"}}'.encode()
    assert replace(note, signature="00").signed_text() == note.signed_text()
    assert Note(**json.loads(note.to_json())) == note


def test_a_document_is_its_signer_s_and_names_its_files(shared_kit: Kit, note: Note, tmp_path: Path) -> None:
    sign, verify, _ = load_signer(shared_kit.key_path, shared_kit.certificate_path)
    signed = replace(note, signature=sign(note.signed_text()))
    signed.check(tmp_path, verify)
    note.check(tmp_path, None)
    for other in (note, replace(signed, text="u"), replace(signed, signature=sign(b"NOTE"))):
        with pytest.raises(DocumentError, match=r"note\.json: was changed after it was signed"):
            other.check(tmp_path, verify)
    (tmp_path / "below" / "data").write_bytes(b"date")
    with pytest.raises(DocumentError, match="below/data: is not the file that was signed"):
        signed.check(tmp_path, verify)
    (tmp_path / "below" / "data").unlink()
    with pytest.raises(DocumentError, match=r"below/data: cannot be read \(No such file"):
        signed.check(tmp_path, verify)


@pytest.mark.parametrize("name", ["../note", "below/../../note", "/etc/passwd", "below/data\0"])
def test_a_document_names_no_file_outside_its_folder(note: Note, tmp_path: Path, name: str) -> None:
    with pytest.raises(DocumentError, match="which is outside its folder"):
        replace(note, files={name: "0" * 64}).check(tmp_path, None)


def test_a_ledger_signed_with_a_kit_verifies_with_its_certificate_alone(kit: Kit, other: rsa.RSAPrivateKey) -> None:
    sign, verify, spki = load_signer(kit.key_path, kit.certificate_path)
    place, path = {"site": "site-1", "dataset": "chest", "delta": 1e-5}, kit.key_path.with_name("ledger")
    ledger = Ledger.create(path, **place, signer=sign, verify=verify)
    entry = ledger.reserve(job="j", round=0, attempt=0, details={"steps": 1}, admit=lambda _: None)
    ledger.commit(entry, release="0" * 64)
    entries = read_ledger(path, verifier(kit.certificate_path))
    assert [e.kind for e in entries] == ["genesis", "reserve", "commit"] and entries[0].key_spki == spki
    assert Ledger.open(path, **place, signer=sign, verify=verify).contains(ledger.head())

    kit.key_path.write_bytes(pem(other))
    kit.certificate_path.write_bytes(certificate(other))
    sign, verify, _ = load_signer(kit.key_path, kit.certificate_path)
    with pytest.raises(LedgerError, match=f"signed by the key {spki[:16]}, not by the key"):
        Ledger.open(path, **place, signer=sign, verify=verify)
