"""Who a member is: the certificate and key of its FLARE start-up kit, held against the federation's root and a roster.

A certificate's key signs one session key per job (`Session`) with RSA-PSS and SHA-256 (RFC 8017); everything else is
signed with that. FLARE lets a server have texts of its choice signed with the same key while a site registers; such a
signature is no session's: ours begins with 0xff, names the protocol, and has a salt of exactly 32 bytes.

Certificates are checked as X.509 wants it (RFC 5280), then for what FLARE writes into a site's. That alone does not
stop the holder of the root key, who can mint any: a roster's pins do (`Trust`). Errors never hold key material.
"""

import hmac
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import ExtensionPolicy, PolicyBuilder, Store, VerificationError

from fedmpt_core.common.signing import MIN_BITS, KeySigner, KeyVerifier, SigningError, certificates
from fedmpt_core.secagg.context import DIGEST_BYTES, lp
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.roster import MOST_NAME, Roster
from fedmpt_core.secagg.wire import Reader

SESSION_SECONDS = 24 * 3600  # chosen: longer than a round of any job, shorter than a stolen key is of use
LONGEST_SESSION = SESSION_SECONDS + 600
EPOCH_SECONDS = SESSION_SECONDS * 5 // 6  # chosen: how long a server goes on with the keys of one exchange
CLOCK_SKEW = 300  # seconds by which clocks of two sites may differ, and half of it from the server's
_SESSION = b"\xffFLARE-SA/2/session\0"


@dataclass(frozen=True)
class Session:
    """What a certificate's key signs: this Ed25519 key speaks for this site in this job, from and until these times.

    Attributes:
        job_id: name of the run, 1 to 256 printable bytes.
        site: common name of the certificate, likewise.
        certificate_sha256: of the certificate (DER), 32 bytes.
        signing_key: Ed25519 public key, 32 bytes.
        not_before: seconds since 1970, below 2^64.
        not_after: likewise.

    Raises:
        SecAggError: MALFORMED, a field cannot be sent.
    """

    job_id: str
    site: str
    certificate_sha256: bytes
    signing_key: bytes
    not_before: int
    not_after: int

    def __post_init__(self) -> None:
        for what, text in (("job", self.job_id), ("site", self.site)):
            if not text.isprintable() or not 1 <= len(text.encode()) <= MOST_NAME:
                _malformed(f"names a {what} that is not 1 to {MOST_NAME} printable bytes")
        if len(self.certificate_sha256) != 32 or len(self.signing_key) != 32:
            _malformed("holds a digest or a key of another length than 32")
        if not all(0 <= time < 1 << 64 for time in (self.not_before, self.not_after)):
            _malformed("has a time that is not from 0 to 2^64 - 1")

    def encode(self) -> bytes:
        """0xff and the protocol's name; job, site, certificate digest and key after their lengths; two times u64."""
        parts = (self.job_id.encode(), self.site.encode(), self.certificate_sha256, self.signing_key)
        times = self.not_before.to_bytes(8, "big") + self.not_after.to_bytes(8, "big")
        return _SESSION + b"".join(map(lp, parts)) + times

    @staticmethod
    def decode(data: bytes) -> "Session":
        """What `encode` wrote, and no other bytes. Raises SecAggError(MALFORMED)."""
        if not data.startswith(_SESSION):
            _malformed("does not begin like one of this protocol")
        r = Reader(data, _SESSION[1:5].decode())
        r.take(len(_SESSION) - 5)
        job, site, certificate, key = r.sized(MOST_NAME), r.sized(MOST_NAME), r.sized(32), r.sized(32)
        times = r.number(8), r.number(8)
        r.end()
        try:
            names = job.decode(), site.decode()
        except UnicodeDecodeError:
            _malformed("names a job or a site that is no text")
        return Session(*names, certificate, key, *times)


@dataclass(frozen=True)
class SiteIdentity:
    """A member's own certificate and key, which neither `repr` nor pickles show.

    Attributes:
        name: common name of the certificate.
        fingerprint: SHA-256 of the public key (DER, SubjectPublicKeyInfo), 32 bytes, as a roster has it.
        certificate_sha256: of the certificate (DER), 32 bytes.
        chain: PEM, the certificate first, then intermediates, never the root.
        insecure: made up for a simulation.
    """

    name: str
    fingerprint: bytes
    certificate_sha256: bytes
    chain: bytes
    insecure: bool
    _signer: KeySigner = field(repr=False, compare=False)

    @staticmethod
    def from_pem(key_pem: bytes, certificate_pem: bytes) -> "SiteIdentity":
        """Of a start-up kit's `client.key` and `client.crt`, RSA of 2048 bits or more; intermediates may follow.

        Raises SecAggError(BAD_CERT) for anything else. Issuer and dates are for others to check (`ChainCheck`).
        """
        chain = _certificates(certificate_pem, "the start-up kit")
        verifier = _verifier(chain[0], "the start-up kit")
        try:
            signer = KeySigner.from_pem(key_pem, "the key of the start-up kit")
        except SigningError as error:
            _refuse(str(error))
        if signer.key_spki != verifier.key_spki:
            _refuse("the private key is not that of the certificate: take both from the same start-up kit")
        return _identity(signer, chain, insecure=False)

    @staticmethod
    def ephemeral(name: str) -> "SiteIdentity":
        """A new key under a certificate of its own, valid two days: proves nothing, for simulations.

        Raises SecAggError(BAD_CERT) for a name that does not fit into a certificate.
        """
        try:
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        except ValueError:
            _refuse(f"{name!r} cannot be the name of a site: use 1 to 64 characters")
        key, now = generate_private_key(public_exponent=65537, key_size=MIN_BITS), datetime.now(UTC)
        builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=2))
        return _identity(KeySigner.of(key), [builder.sign(key, SHA256())], insecure=True)

    def sign(self, message: bytes) -> bytes:
        """RSA-PSS, SHA-256, salt of 32 bytes (RFC 8017)."""
        return self._signer.sign(message)

    def __reduce__(self) -> NoReturn:
        raise SecAggError(Abort.POLICY, "a site's key may not be copied or stored: load it again where it is needed")


class ChainCheck:
    """What a party without a roster, the server, can tell of an advert: name, session, signature, chain."""

    def __init__(self, root_pem: bytes | None) -> None:
        """With the federation's root certificate, else BAD_CERT; None in a simulation: certificates are self-signed."""
        self._root = None if root_pem is None else _root(root_pem)

    def certificate(self, *, name: str, chain: bytes, now: int) -> x509.Certificate:
        """The site's certificate, the first of `chain` (PEM), when it is valid `now` (seconds since 1970).

        Raises SecAggError(BAD_CERT) with the name otherwise.
        """
        leaf, *others = _certificates(chain, name)
        _check_leaf(name, leaf, now)
        if self._root is not None:
            _check_issuer(name, leaf, others, self._root, now)
            return leaf
        try:
            leaf.verify_directly_issued_by(leaf)
        except (ValueError, TypeError, InvalidSignature):
            _refuse(f"the certificate of {name} is not signed by itself, as it is in a simulation")
        return leaf

    def check(
        self,
        *,
        name: str,
        job_id: str,
        session: bytes,
        session_signature: bytes,
        signing_key: bytes,
        chain: bytes,
        now: int,
    ) -> x509.Certificate:
        """That `signing_key` speaks for `name` in this job now.

        Args:
            name: the site.
            job_id: name of the run.
            session: what `Session.encode` wrote.
            session_signature: RSA-PSS, SHA-256, salt of 32 bytes, under the certificate.
            signing_key: Ed25519 public key, 32 bytes.
            chain: PEM, the site's certificate first.
            now: seconds since 1970.

        Returns:
            The site's certificate.

        Raises:
            SecAggError: BAD_CERT, BAD_SIG or MALFORMED, with the name.
        """
        try:
            stated = Session.decode(session)
        except SecAggError as error:
            _refuse(f"{name} sent a session that cannot be read: {error}", error.code)
        if stated.site != name:
            _refuse(f"the session that {name} sent is for {stated.site}", Abort.BAD_SIG)
        if stated.job_id != job_id:
            _refuse(f"the session of {name} is for job {stated.job_id}, this is {job_id}", Abort.BAD_SIG)
        if not hmac.compare_digest(stated.signing_key, signing_key):
            _refuse(f"the session of {name} is for another key than the one it signs with", Abort.BAD_SIG)
        _check_window(name, stated, now)
        leaf = self.certificate(name=name, chain=chain, now=now)
        if not hmac.compare_digest(stated.certificate_sha256, leaf.fingerprint(SHA256())):
            _refuse(f"the session of {name} names another certificate than the one that came")
        if not _verifier(leaf, name).verify(session, session_signature):
            _refuse(f"the session of {name} is not signed with its certificate's key", Abort.BAD_SIG)
        return leaf


class Trust:
    """What a member relies on: the federation's root and its own roster.

    Attributes:
        roster: the members; None in a simulation.

    Guarantees:
        With a pinned roster, no holder of the root's, the server's or another member's key passes for a member.
    """

    def __init__(self, roster: Roster | None, root_pem: bytes | None) -> None:
        """With a roster and the root certificate; both None in a simulation, where everybody is believed.

        Raises SecAggError(ROSTER or BAD_CERT) when the two do not belong together.
        """
        if roster is None or root_pem is None:
            if roster is not None or root_pem is not None:
                _refuse("a roster of keys needs the root certificate, a simulation has neither", Abort.ROSTER)
        elif not hmac.compare_digest(root_sha256(root_pem), roster.root):
            _refuse(
                f"the roster is of the root certificate {roster.root.hex()[:16]}..., this site's is "
                f"{root_sha256(root_pem).hex()[:16]}...: collect the roster of this federation",
                Abort.ROSTER,
            )
        self.roster = roster
        self._chain = ChainCheck(root_pem)

    @property
    def digest(self) -> bytes:
        """Of the roster, 32 bytes; zeros without."""
        return self.roster.digest() if self.roster else bytes(DIGEST_BYTES)

    def check(self, *, name: str, **stated: Any) -> None:
        """`ChainCheck.check`, and that the certificate's key is the one in the roster, else ROSTER."""
        leaf = self._chain.check(name=name, **stated)
        if self.roster:
            self.roster.check_key(name, bytes.fromhex(_verifier(leaf, name).key_spki))


def certificate_of(pem: bytes) -> x509.Certificate:
    """The first certificate of a PEM file. Raises SecAggError(BAD_CERT)."""
    return _certificates(pem, "the start-up kit")[0]


def root_sha256(pem: bytes) -> bytes:
    """How a roster names a root certificate: SHA-256 of its DER, 32 bytes. Raises SecAggError(BAD_CERT)."""
    return _root(pem).fingerprint(SHA256())


def _identity(signer: KeySigner, chain: list[x509.Certificate], *, insecure: bool) -> SiteIdentity:
    leaf, *others = chain
    names = _names(leaf)
    if len(names) != 1:
        _refuse(f"the certificate of the start-up kit has {len(names)} common names, a site's has one")
    pem = b"".join(c.public_bytes(Encoding.PEM) for c in (leaf, *(c for c in others if c.issuer != c.subject)))
    return SiteIdentity(names[0], bytes.fromhex(signer.key_spki), leaf.fingerprint(SHA256()), pem, insecure, signer)


def _check_window(name: str, session: Session, now: int) -> None:
    begin, end = session.not_before, session.not_after
    if not begin <= now <= end:
        _refuse(
            f"the session of {name} is for {begin} to {end} and it is {now} (seconds since 1970): compare the clocks "
            "of both sites"
        )
    if end - begin > LONGEST_SESSION:
        _refuse(f"the session of {name} lasts {end - begin} s, at most {LONGEST_SESSION} may be")


def _check_leaf(name: str, leaf: x509.Certificate, now: int) -> None:
    if _names(leaf) != [name]:
        _refuse(f"the certificate that {name} sent is for {_names(leaf)}, not for {name} alone")
    begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if not begin <= (today := datetime.fromtimestamp(now, UTC)) <= end:
        _refuse(
            f"the certificate of {name} is valid from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} and it is "
            f"{today:%Y-%m-%d %H:%M} UTC: have the site provisioned anew, or correct the clock"
        )
    # FLARE writes the role of people, and in distributed provisioning that of sites and servers, there
    roles = [a.value for a in leaf.subject.get_attributes_for_oid(NameOID.UNSTRUCTURED_NAME)]
    if roles not in ([], ["client"]):
        _refuse(f"the certificate of {name} is not a site's, its role is {roles}")
    _verifier(leaf, name)
    extensions = {extension.oid: extension.value for extension in leaf.extensions}
    constraints = extensions.get(x509.BasicConstraints.oid)
    if isinstance(constraints, x509.BasicConstraints) and constraints.ca:
        _refuse(f"the certificate of {name} is that of an authority, not of a site")
    usage, purposes = extensions.get(x509.KeyUsage.oid), extensions.get(x509.ExtendedKeyUsage.oid)
    if isinstance(usage, x509.KeyUsage) and not usage.digital_signature:
        _refuse(f"the certificate of {name} is not for signatures")
    if isinstance(purposes, x509.ExtendedKeyUsage) and ExtendedKeyUsageOID.CLIENT_AUTH not in purposes:
        _refuse(f"the certificate of {name} is not for clients")


def _check_issuer(
    name: str, leaf: x509.Certificate, others: list[x509.Certificate], root: x509.Certificate, now: int
) -> None:
    builder = PolicyBuilder().store(Store([root])).time(datetime.fromtimestamp(now, UTC))
    # centrally provisioned certificates of sites have no key usages, which the defaults for the web ask for
    builder = builder.extension_policies(
        ca_policy=ExtensionPolicy.webpki_defaults_ca(), ee_policy=ExtensionPolicy.permit_all()
    )
    try:
        builder.build_client_verifier().verify(leaf, others)
    except (VerificationError, ValueError, UnsupportedAlgorithm):
        _refuse(f"the certificate of {name} does not come from this federation's root certificate, or that is expired")


def _certificates(pem: bytes, whose: str) -> list[x509.Certificate]:
    try:
        return certificates(pem, f"the certificate of {whose}")
    except SigningError as error:
        _refuse(str(error))


def _root(pem: bytes) -> x509.Certificate:
    roots = _certificates(pem, "the root")
    if len(roots) != 1:
        _refuse(f"the file of the root certificate holds {len(roots)}: give the one of this federation's root")
    return roots[0]


def _verifier(certificate: x509.Certificate, whose: str) -> KeyVerifier:
    try:
        return KeyVerifier.of_certificate(certificate, f"the certificate of {whose}")
    except SigningError as error:
        _refuse(str(error))


def _names(certificate: x509.Certificate) -> list[str]:
    return [str(a.value) for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]


def _refuse(why: str, code: Abort = Abort.BAD_CERT) -> NoReturn:
    raise SecAggError(code, why) from None


def _malformed(why: str) -> NoReturn:
    _refuse(f"a session {why}", Abort.MALFORMED)
