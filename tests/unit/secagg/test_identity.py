"""Who a member is: sessions byte for byte, a start-up kit's key, and every certificate that must not pass for a site's.

Certificates are made here as FLARE makes them; `test_kit` holds real ones against the same checks.
"""

import copy
import hashlib
import pickle
import struct
from base64 import b64encode
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.identity import SESSION_SECONDS, ChainCheck, Session, SiteIdentity, Trust
from fedmpt_core.secagg.roster import Member, Roster

NOW = int(datetime.now(UTC).timestamp())
TODAY, DAY = datetime.fromtimestamp(NOW, UTC), timedelta(days=1)
VOICE, OTHER_VOICE = bytes(range(32)), bytes(range(1, 33))
JOB = "job-1"
SITES = ("site-1", "site-2", "site-3")


@cache
def rsa_key(name: str, bits: int = 2048) -> rsa.RSAPrivateKey:
    """One per name; making them is slow."""
    return rsa.generate_private_key(65537, bits)


def pem(key: Any, password: bytes | None = None) -> bytes:
    lock = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, lock)


def subject(*names: str, role: str | None = None) -> x509.Name:
    found = [x509.NameAttribute(NameOID.COMMON_NAME, n) for n in names]
    found += [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "org")]
    return x509.Name(found + ([x509.NameAttribute(NameOID.UNSTRUCTURED_NAME, role)] if role else []))


def usage(*, signature: bool) -> x509.KeyUsage:
    return x509.KeyUsage(signature, False, True, False, False, False, False, False, False)


@dataclass(frozen=True)
class Issuer:
    """Whoever can sign certificates."""

    name: x509.Name
    key: Any

    def certificate(
        self,
        key: Any,
        name: x509.Name,
        *extensions: x509.ExtensionType,
        begin: datetime = TODAY - DAY,
        end: datetime = TODAY + 10 * DAY,
        ca: bool = False,
    ) -> x509.Certificate:
        builder = x509.CertificateBuilder(self.name, name, key.public_key(), x509.random_serial_number(), begin, end)
        found: list[x509.ExtensionType] = [
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
            *extensions,
        ]
        if ca:
            signs = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
            found += [x509.BasicConstraints(True, None), signs]
        for extension in found:
            builder = builder.add_extension(extension, isinstance(extension, x509.BasicConstraints | x509.KeyUsage))
        return builder.sign(self.key, SHA256())

    def own(self, **dates: datetime) -> x509.Certificate:
        return self.certificate(self.key, self.name, ca=True, **dates)


ROOT_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedmpt")])


@cache
def root() -> Issuer:
    return Issuer(ROOT_NAME, rsa_key("root"))


def text(*certificates: x509.Certificate) -> bytes:
    return b"".join(c.public_bytes(Encoding.PEM) for c in certificates)


@cache
def root_pem() -> bytes:
    return text(root().own(end=TODAY + 30 * DAY))


def spki(key: Any) -> bytes:
    return hashlib.sha256(key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def der_sha256(certificate: x509.Certificate) -> bytes:
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()


@cache
def good(name: str) -> x509.Certificate:
    """As `nvflare provision` makes a site's: no key usage, no role."""
    return root().certificate(rsa_key(name), subject(name))


@cache
def roster() -> Roster:
    members = {n: Member(spki(rsa_key(n)), "org") for n in SITES}
    return Roster(der_sha256(x509.load_pem_x509_certificate(root_pem())), members)


def trust() -> Trust:
    return Trust(roster(), root_pem())


def session_bytes(job: str, site: str, certificate: bytes, voice: bytes, begin: int, end: int) -> bytes:
    """The layout again, from its description alone."""
    found = b"\xff" + b"FLARE-SA/2/session" + b"\0"
    for part in (job.encode(), site.encode(), certificate, voice):
        found += struct.pack(">I", len(part)) + part
    return found + struct.pack(">QQ", begin, end)


def advert(
    key: Any,
    *chain: x509.Certificate,
    name: str = "site-1",
    salt: int = 32,
    signer: Any = None,
    voice: bytes = VOICE,
    now: int = NOW,
    **said: Any,
) -> dict[str, Any]:
    """What a member would send, and what it is checked against."""
    plain = {"job": JOB, "site": name, "certificate": der_sha256(chain[0]), "voice": VOICE}
    plain |= {"begin": NOW - 300, "end": NOW + SESSION_SECONDS} | said
    session = session_bytes(**plain)
    signature = (signer or key).sign(session, PSS(MGF1(SHA256()), salt), SHA256())
    return {
        "name": name,
        "job_id": JOB,
        "session": session,
        "session_signature": signature,
        "signing_key": voice,
        "chain": text(*chain),
        "now": now,
    }


def mine(**changes: Any) -> dict[str, Any]:
    """The advert of site-1, right unless changed."""
    return advert(rsa_key("site-1"), good("site-1"), **changes)


def leaks(message: str) -> bool:
    """Whether a text holds a line of a key file or one of its secret numbers."""
    for name in (*SITES, "root"):
        numbers = rsa_key(name).private_numbers()
        secrets = [*pem(rsa_key(name)).decode().splitlines()[1:-1], str(numbers.d), str(numbers.p), f"{numbers.d:x}"]
        if any(secret in message for secret in secrets):
            return True
    return False


def refused(who: Trust | ChainCheck, sent: dict[str, Any], code: Abort, says: str) -> SecAggError:
    with pytest.raises(SecAggError, match=says) as error:
        who.check(**sent)
    assert error.value.code is code
    assert sent["name"] in str(error.value) and not leaks(str(error.value))
    return error.value


# Sessions


def test_a_session_has_the_layout_of_its_description() -> None:
    session = Session(JOB, "site-1", bytes(32), VOICE, 5, 1 << 63)
    assert session.encode() == session_bytes(JOB, "site-1", bytes(32), VOICE, 5, 1 << 63)
    assert len(session.encode()) == 127
    assert session.encode().hex().startswith("ff464c4152452d53412f322f73657373696f6e00000000056a6f622d31")


names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P")), min_size=1, max_size=60)
moments = st.integers(0, 2**64 - 1)
digests = st.binary(min_size=32, max_size=32)


@given(names, names, digests, digests, moments, moments)
def test_a_session_is_read_back_and_no_byte_can_be_added_or_left_out(
    job: str, site: str, certificate: bytes, voice: bytes, begin: int, end: int
) -> None:
    session = Session(job, site, certificate, voice, begin, end)
    data = session.encode()
    assert Session.decode(data) == session
    for broken in (data[:-1], data + b"\0", data[1:], b"\0" + data[1:], data[: len(data) // 2], b""):
        with pytest.raises(SecAggError) as error:
            Session.decode(broken)
        assert error.value.code is Abort.MALFORMED


@given(st.binary(max_size=200), st.booleans())
def test_bytes_of_all_kinds_are_a_session_or_malformed(data: bytes, prefixed: bool) -> None:
    data = (b"\xffFLARE-SA/2/session\0" if prefixed else b"") + data
    try:
        assert Session.decode(data).encode() == data
    except SecAggError as error:
        assert error.code is Abort.MALFORMED


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"job_id": ""}, "names a job"),
        ({"job_id": "j" * 257}, "names a job"),
        ({"site": "site\n1"}, "names a site"),
        ({"site": "\ud800"}, "names a site"),
        ({"certificate_sha256": bytes(31)}, "another length than 32"),
        ({"signing_key": bytes(33)}, "another length than 32"),
        ({"not_before": -1}, "not from 0 to"),
        ({"not_after": 1 << 64}, "not from 0 to"),
    ],
)
def test_what_cannot_be_sent_is_no_session(change: dict[str, Any], says: str) -> None:
    session = Session(JOB, "site-1", bytes(32), VOICE, 0, 1)
    with pytest.raises(SecAggError, match=says) as error:
        replace(session, **change)
    assert error.value.code is Abort.MALFORMED


# A site's own key


def test_an_identity_says_what_its_certificate_says() -> None:
    key, leaf = rsa_key("site-1"), good("site-1")
    identity = SiteIdentity.from_pem(pem(key), text(leaf))
    assert (identity.name, identity.insecure) == ("site-1", False)
    assert identity.fingerprint == spki(key) and identity.certificate_sha256 == der_sha256(leaf)
    assert identity.chain == text(leaf)


def test_intermediates_travel_and_the_root_does_not() -> None:
    between = Issuer(subject("between"), rsa_key("between"))
    middle = root().certificate(between.key, between.name, ca=True)
    leaf = between.certificate(rsa_key("site-1"), subject("site-1"))
    own_root = x509.load_pem_x509_certificate(root_pem())
    identity = SiteIdentity.from_pem(pem(rsa_key("site-1")), text(leaf, middle, own_root))
    assert identity.chain == text(leaf, middle)
    trust().check(**advert(rsa_key("site-1"), leaf, middle))
    refused(trust(), advert(rsa_key("site-1"), leaf), Abort.BAD_CERT, "does not come from this federation's root")


def test_a_signature_is_pss_with_sha256_and_a_salt_of_32_bytes() -> None:
    key = rsa_key("site-1")
    signature = SiteIdentity.from_pem(pem(key), text(good("site-1"))).sign(b"text")
    key.public_key().verify(signature, b"text", PSS(MGF1(SHA256()), 32), SHA256())
    for salt in (0, 31, 33, 222):
        with pytest.raises(InvalidSignature):
            key.public_key().verify(signature, b"text", PSS(MGF1(SHA256()), salt), SHA256())


@pytest.mark.parametrize(
    ("key", "certificate", "says"),
    [
        (lambda: pem(rsa_key("site-2")), lambda: text(good("site-1")), "take both from the same start-up kit"),
        (lambda: pem(rsa_key("site-1"), b"secret"), lambda: text(good("site-1")), "is encrypted: .* mode 0600"),
        (lambda: b"", lambda: text(good("site-1")), "is not a PEM private key: take client.key"),
        (lambda: pem(rsa_key("site-1"))[:-300], lambda: text(good("site-1")), "is not a PEM private key"),
        (lambda: pem(ec_key()), lambda: text(good("site-1")), "is not an RSA key: take client.key"),
        (lambda: pem(rsa_key("site-1")), lambda: b"", "is not a PEM certificate that can be read"),
        (lambda: pem(rsa_key("site-1")), lambda: pem(rsa_key("site-1")), "is not a PEM certificate that can be read"),
        (lambda: pem(ec_key()), lambda: text(root().certificate(ec_key(), subject("site-1"))), "RSA key of 2048 bits"),
        (
            lambda: pem(rsa_key("small", 1024)),
            lambda: text(root().certificate(rsa_key("small", 1024), subject("site-1"))),
            "RSA key of 2048 bits",
        ),
        (
            lambda: pem(rsa_key("site-1")),
            lambda: text(root().certificate(rsa_key("site-1"), subject("site-1", "site-2"))),
            "has 2 common names",
        ),
        (
            lambda: pem(rsa_key("site-1")),
            lambda: text(root().certificate(rsa_key("site-1"), subject())),
            "has 0 common names",
        ),
    ],
)
def test_an_unfit_key_or_certificate_is_refused(key: Any, certificate: Any, says: str) -> None:
    with pytest.raises(SecAggError, match=says) as error:
        SiteIdentity.from_pem(key(), certificate())
    assert error.value.code is Abort.BAD_CERT and not leaks(str(error.value))


@cache
def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def test_the_key_is_neither_shown_nor_copied() -> None:
    assert leaks(pem(rsa_key("site-1")).decode())  # the check itself can fail
    identity = SiteIdentity.from_pem(pem(rsa_key("site-1")), text(good("site-1")))
    assert not leaks(repr(identity)) and "_key" not in repr(identity)
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(SecAggError, match="may not be copied or stored") as error:
            copied(identity)
        assert not leaks(str(error.value))


def test_an_ephemeral_identity_is_new_each_time_and_lasts_two_days() -> None:
    one, other = SiteIdentity.ephemeral("site-1"), SiteIdentity.ephemeral("site-1")
    assert one.insecure and one.name == "site-1" and one.fingerprint != other.fingerprint
    leaf = x509.load_pem_x509_certificate(one.chain)
    leaf.verify_directly_issued_by(leaf)
    assert leaf.not_valid_after_utc - datetime.now(UTC) <= 2 * DAY
    for impossible in ("", "s" * 65):
        with pytest.raises(SecAggError, match="1 to 64 characters"):
            SiteIdentity.ephemeral(impossible)


# What a member accepts


def test_a_member_is_accepted_up_to_both_ends_of_its_session() -> None:
    trust().check(**mine())
    trust().check(**mine(now=NOW - 300))
    trust().check(**mine(now=NOW + SESSION_SECONDS))
    trust().check(**mine(begin=NOW - 600))
    assert ChainCheck(root_pem()).check(**mine()) == good("site-1")


def test_a_certificate_of_distributed_provisioning_is_accepted() -> None:
    extended = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    more = [x509.BasicConstraints(False, None), usage(signature=True), x509.ExtendedKeyUsage(extended)]
    leaf = root().certificate(rsa_key("site-1"), subject("site-1", role="client"), *more)
    trust().check(**advert(rsa_key("site-1"), leaf))


def issued(name: x509.Name, *extensions: x509.ExtensionType, key: str = "site-1", **options: Any) -> dict[str, Any]:
    """An advert whose certificate the root issued, but not as it should be."""
    return advert(rsa_key(key), root().certificate(rsa_key(key), name, *extensions, **options))


def from_leaf() -> dict[str, Any]:
    leaf = Issuer(good("site-2").subject, rsa_key("site-2")).certificate(rsa_key("site-1"), subject("site-1"))
    return advert(rsa_key("site-1"), leaf, good("site-2"))


def from_rogue() -> dict[str, Any]:
    rogue = Issuer(ROOT_NAME, rsa_key("rogue"))
    return advert(rsa_key("site-1"), rogue.certificate(rsa_key("site-1"), subject("site-1")), rogue.own())


def small() -> dict[str, Any]:
    key = rsa_key("small", 1024)
    return advert(key, root().certificate(key, subject("site-1")))


def elliptic() -> dict[str, Any]:
    leaf = root().certificate(ec_key(), subject("site-1"))
    return advert(None, leaf, signer=rsa_key("site-1"))


BAD_CERT = {
    "the server's": (lambda: issued(subject("server"), key="server"), r"is for \['server'\], not for site-1 alone"),
    "another site's": (lambda: advert(rsa_key("site-2"), good("site-2")), r"is for \['site-2'\], not for site-1 alone"),
    "two names": (lambda: issued(subject("site-1", "site-2")), "not for site-1 alone"),
    "the same name twice": (lambda: issued(subject("site-1", "site-1")), "not for site-1 alone"),
    "no name": (lambda: issued(subject()), r"is for \[\], not for site-1 alone"),
    "a person's": (lambda: issued(subject("site-1", role="project_admin")), r"its role is \['project_admin'\]"),
    "a server's role": (lambda: issued(subject("site-1", role="server")), r"its role is \['server'\]"),
    "an authority's": (lambda: issued(subject("site-1"), ca=True), "is that of an authority"),
    "not for signatures": (lambda: issued(subject("site-1"), usage(signature=False)), "is not for signatures"),
    "not for clients": (
        lambda: issued(subject("site-1"), x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])),
        "is not for clients",
    ),
    "expired": (
        lambda: issued(subject("site-1"), begin=TODAY - 3 * DAY, end=TODAY - DAY),
        r"is valid from .* to .* and it is .*: have the site provisioned anew, or correct the clock",
    ),
    "not yet valid": (lambda: issued(subject("site-1"), begin=TODAY + DAY, end=TODAY + 3 * DAY), "correct the clock"),
    "a rogue root of the same name": (from_rogue, "does not come from this federation's root"),
    "issued by a site": (from_leaf, "does not come from this federation's root"),
    "self-signed": (
        lambda: advert(
            rsa_key("site-1"),
            Issuer(subject("site-1"), rsa_key("site-1")).certificate(rsa_key("site-1"), subject("site-1")),
        ),
        "does not come from this federation's root",
    ),
    "a small key": (small, "is not for an RSA key of 2048 bits"),
    "an elliptic key": (elliptic, "is not for an RSA key of 2048 bits"),
    "no PEM": (
        lambda: mine() | {"chain": b"-----BEGIN CERTIFICATE-----\n"},
        "is not a PEM certificate that can be read",
    ),
    "nothing": (lambda: mine() | {"chain": b""}, "is not a PEM certificate that can be read"),
    "a session of another certificate": (lambda: mine(certificate=bytes(32)), "names another certificate"),
    "a session not begun": (lambda: mine(now=NOW - 301), "compare the clocks of both sites"),
    "a session that is over": (lambda: mine(now=NOW + SESSION_SECONDS + 1), "compare the clocks of both sites"),
    "a session turned round": (lambda: mine(begin=NOW + 9, end=NOW - 9), "compare the clocks of both sites"),
    "a session too long": (lambda: mine(begin=NOW - 601), "lasts 87001 s, at most 87000 may be"),
    "a session for ever": (lambda: mine(begin=0, end=2**64 - 1), "at most 87000 may be"),
}


@pytest.mark.parametrize("case", BAD_CERT)
def test_a_certificate_or_window_that_must_not_pass_is_refused_by_all(case: str) -> None:
    make, says = BAD_CERT[case]
    for who in (trust(), ChainCheck(root_pem())):
        refused(who, make(), Abort.BAD_CERT, says)


def maximal() -> dict[str, Any]:
    """The best a server could get out of FLARE's registration: the same key, the same text, the salt of FLARE."""
    sent = mine(salt=PSS.MAX_LENGTH)
    # broken twin: a check that takes any salt lets it pass
    public = rsa_key("site-1").public_key()
    public.verify(sent["session_signature"], sent["session"], PSS(MGF1(SHA256()), PSS.AUTO), SHA256())
    return sent


BAD_SIG = {
    "signed by another site": (lambda: mine(signer=rsa_key("site-2")), "is not signed with its certificate's key"),
    "signed by the root": (lambda: mine(signer=rsa_key("root")), "is not signed with its certificate's key"),
    "FLARE's salt": (maximal, "is not signed with its certificate's key"),
    "a short salt": (lambda: mine(salt=31), "is not signed with its certificate's key"),
    "no salt": (lambda: mine(salt=0), "is not signed with its certificate's key"),
    "no signature": (lambda: mine() | {"session_signature": b""}, "is not signed with its certificate's key"),
    "a session changed later": (
        lambda: mine() | {"session_signature": mine(end=NOW + 5)["session_signature"]},
        "is not signed with its certificate's key",
    ),
    "a substituted key": (lambda: mine(voice=OTHER_VOICE), "is for another key than the one it signs with"),
    "another job": (lambda: mine(job="job-2"), "is for job job-2, this is job-1"),
    "another site": (lambda: mine(site="site-2"), "that site-1 sent is for site-2"),
}


@pytest.mark.parametrize("case", BAD_SIG)
def test_a_session_of_somebody_or_something_else_is_refused_by_all(case: str) -> None:
    make, says = BAD_SIG[case]
    for who in (trust(), ChainCheck(root_pem())):
        refused(who, make(), Abort.BAD_SIG, says)


def test_a_text_that_begins_with_a_name_is_no_session() -> None:
    key = rsa_key("site-1")
    named = b"site-1" + mine()["session"]
    sent = mine() | {"session": named, "session_signature": key.sign(named, PSS(MGF1(SHA256()), 32), SHA256())}
    for who in (trust(), ChainCheck(root_pem())):
        refused(who, sent, Abort.MALFORMED, "site-1 sent a session that cannot be read: .* does not begin like one")


@pytest.mark.parametrize("key", ["minted", "site-2"])
def test_only_the_roster_tells_a_minted_certificate_from_the_site_s(key: str) -> None:
    sent = issued(subject("site-1"), key=key)
    ChainCheck(root_pem()).check(**sent)  # certificates alone let it pass
    error = refused(trust(), sent, Abort.ROSTER, "ask it by telephone; if its key was renewed")
    assert spki(rsa_key("site-1")).hex()[:16] in str(error) and spki(rsa_key(key)).hex()[:16] in str(error)


def test_a_stranger_with_a_good_certificate_is_refused() -> None:
    sent = advert(rsa_key("server"), root().certificate(rsa_key("server"), subject("server")), name="server")
    ChainCheck(root_pem()).check(**sent)
    with pytest.raises(SecAggError, match="server is not in the roster") as error:
        trust().check(**sent)
    assert error.value.code is Abort.ROSTER


def test_an_expired_root_ends_all_trust() -> None:
    old = text(root().own(begin=TODAY - 3 * DAY, end=TODAY - DAY))
    refused(ChainCheck(old), mine(), Abort.BAD_CERT, "or that is expired")


def test_the_root_too_is_judged_at_the_time_of_the_check() -> None:
    leaf, later = root().certificate(rsa_key("site-1"), subject("site-1"), end=TODAY + 90 * DAY), NOW + 40 * 24 * 3600
    sent = advert(rsa_key("site-1"), leaf, now=later, begin=later, end=later)
    refused(trust(), sent, Abort.BAD_CERT, "or that is expired")
    longer = root().own(end=TODAY + 60 * DAY)
    ChainCheck(text(longer)).check(**sent)


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@given(st.data())
def test_no_changed_byte_of_what_the_root_signed_passes(data: st.DataObject) -> None:
    der = bytearray(good("site-1").public_bytes(Encoding.DER))
    # behind it, the count of unused bits of the signature has no meaning and nobody's check reads it
    place = data.draw(st.integers(0, len(good("site-1").tbs_certificate_bytes) + 3))
    der[place] ^= data.draw(st.integers(1, 255))
    refused_der(bytes(der))


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_a_name_of_a_kind_that_the_parser_does_not_know_is_an_error_like_others() -> None:
    der = good("site-1").public_bytes(Encoding.DER)
    utf8 = b"\x0c\x06site-1"
    assert der.count(utf8) == 1
    for kind in range(256):
        if kind != 0x0C:
            refused_der(der.replace(utf8, bytes([kind]) + utf8[1:]))


def refused_der(der: bytes) -> None:
    chain = b"-----BEGIN CERTIFICATE-----\n" + b64encode(der) + b"\n-----END CERTIFICATE-----\n"
    with pytest.raises(SecAggError, match="site-1") as error:
        ChainCheck(root_pem()).certificate(name="site-1", chain=chain, now=NOW)
    assert error.value.code is Abort.BAD_CERT


# What trust is made of


def test_roster_and_root_belong_together() -> None:
    other = text(Issuer(ROOT_NAME, rsa_key("rogue")).own())
    cases = [
        (roster(), None, Abort.ROSTER, "needs the root certificate"),
        (None, root_pem(), Abort.ROSTER, "a simulation has neither"),
        (roster(), other, Abort.ROSTER, "collect the roster of this federation"),
        (roster(), b"", Abort.BAD_CERT, "is not a PEM certificate"),
        (roster(), root_pem() + other, Abort.BAD_CERT, "holds 2: give the one"),
    ]
    for chosen, root_certificate, code, says in cases:
        with pytest.raises(SecAggError, match=says) as error:
            Trust(chosen, root_certificate)
        assert error.value.code is code


def test_an_empty_root_file_is_not_taken_for_a_simulation() -> None:
    with pytest.raises(SecAggError, match="the certificate of the root is not a PEM certificate"):
        ChainCheck(b"")


# Simulations


@cache
def made_up() -> SiteIdentity:
    return SiteIdentity.ephemeral("site-1")


def rehearsed(identity: SiteIdentity, **changes: Any) -> dict[str, Any]:
    leaf = x509.load_pem_x509_certificate(identity.chain)
    return advert(identity, leaf, **changes) | {"chain": identity.chain}


@dataclass(frozen=True)
class Signer:
    """An identity as `advert` signs: with the identity's own padding."""

    identity: SiteIdentity

    def sign(self, message: bytes, *_: object) -> bytes:
        return self.identity.sign(message)


def test_a_simulation_takes_self_signed_certificates_and_holds_them_to_the_rest() -> None:
    who = (Trust(None, None), ChainCheck(None))
    speaks, later = Signer(made_up()), NOW + 3 * SESSION_SECONDS
    for one in who:
        one.check(**rehearsed(made_up(), signer=speaks))
        refused(one, mine(), Abort.BAD_CERT, "is not signed by itself")
        refused(one, rehearsed(made_up(), signer=speaks, name="site-2"), Abort.BAD_CERT, "not for site-2 alone")
        refused(one, rehearsed(made_up(), signer=speaks, voice=OTHER_VOICE), Abort.BAD_SIG, "for another key")
        refused(one, rehearsed(made_up(), signer=rsa_key("site-1")), Abort.BAD_SIG, "is not signed with")
        stale = rehearsed(made_up(), signer=speaks, now=later, begin=later, end=later + 9)
        refused(one, stale, Abort.BAD_CERT, "correct the clock")
    refused(trust(), rehearsed(made_up(), signer=speaks), Abort.BAD_CERT, "does not come from this federation's root")
