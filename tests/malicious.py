"""A server and members that lie, over the bytes that the honest ones speak.

The server knows what a real one knows and may build any message from it. An insider holds a member's own keys; its
honest client does the honest part, and what it says is changed and signed again.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding as Form
from cryptography.hazmat.primitives.serialization import NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fedmpt_core.secagg import context as contexts
from fedmpt_core.secagg import messages as wire
from fedmpt_core.secagg.client import SecAggClient
from fedmpt_core.secagg.identity import SiteIdentity, root_sha256
from fedmpt_core.secagg.key_exchange import KeyExchange
from fedmpt_core.secagg.masking import add_all
from fedmpt_core.secagg.opening import Opening
from fedmpt_core.secagg.roster import Member, Roster
from fedmpt_core.secagg.shamir import SHARE_BYTES
from tests.secagg import MODEL, Federation


class MaliciousServer:
    """Keys are exchanged honestly, after that every message is its own. Members are named by roster id."""

    def __init__(self, count: int, words: int = 8, **limits: Any) -> None:
        self.federation = Federation(count, words, **limits)
        self.terms = self.federation.terms
        self.clients = list(self.federation.members.values())
        self.masked: dict[tuple[bytes, int], wire.Masked] = {}  # all that ever came, with the vectors

    @property
    def directory(self) -> bytes:
        """Digest of the directory of this epoch."""
        return contexts.directory_digest([(a.body, a.session) for a in self.federation.adverts])

    def open_round(
        self,
        cohort: Sequence[int],
        number: int = 1,
        attempt: int = 0,
        *,
        model: bytes = MODEL,
        epoch: int | None = None,
        confirms: Mapping[int, bytes] | None = None,
    ) -> bytes:
        """RND1 for any cohort, number and model."""
        confirms = self.federation.confirms if confirms is None else confirms
        pairs = tuple((i, confirms[i]) for i in cohort if i in confirms)
        at = self.federation.server.epoch if epoch is None else epoch
        return wire.RoundRequest(number, attempt, at, model, tuple(cohort), pairs).encode()

    def context(self, cohort: Sequence[int], number: int = 1, attempt: int = 0, model: bytes = MODEL) -> bytes:
        """The context that the members of such a round work out."""
        roster = self.federation.adverts[0].roster_digest
        digest = contexts.cohort_digest(self.terms.digest, roster, cohort)
        return contexts.context(self.terms.job_id, number, attempt, digest, model)

    def collect(
        self,
        cohort: Sequence[int],
        vectors: Sequence[np.ndarray],
        number: int = 1,
        attempt: int = 0,
        *,
        model: bytes = MODEL,
        only: Collection[int] | None = None,
    ) -> bytes:
        """Have members mask their vectors; all of the cohort or some. Returns the context."""
        request = self.open_round(cohort, number, attempt, model=model)
        ctx = self.context(cohort, number, attempt, model)
        for i in cohort if only is None else only:
            assert self.clients[i].begin(request, model) is None
            self.keep(cohort, self.clients[i].mask(vectors[i]))
        return ctx

    def keep(self, cohort: Sequence[int], data: bytes) -> None:
        """Note a masked vector."""
        reply = wire.Masked.decode(data, cohort=len(cohort), words=self.terms.words)
        self.masked[reply.context, reply.member] = reply

    def ask(self, ctx: bytes, survivors: Sequence[int], of: Collection[int]) -> dict[int, bytes]:
        """Signatures of some members over a list of survivors."""
        request = wire.ConsistencyRequest(ctx, tuple(survivors)).encode()
        return {i: wire.Consistent.decode(self.clients[i].consistency(request)).signature for i in of}

    def unmask_request(
        self,
        to: int,
        ctx: bytes,
        cohort: Sequence[int],
        survivors: Sequence[int],
        signatures: Mapping[int, bytes],
        *,
        rows: Callable[[int], bytes] | None = None,
    ) -> bytes:
        """UNQ1 with any list and any signatures; `rows` gives the sealed row of each other survivor."""
        take = rows or (lambda u: self.row(ctx, cohort, u, to))
        sealed = tuple(take(u) for u in survivors if u != to)
        return wire.UnmaskRequest(ctx, tuple(survivors), tuple(sorted(signatures.items())), sealed).encode()

    def row(self, ctx: bytes, cohort: Sequence[int], sender: int, to: int) -> bytes:
        """What one member has sealed for another."""
        return self.masked[ctx, sender].sealed[[m for m in cohort if m != sender].index(to)]

    def open_sum(
        self, ctx: bytes, cohort: Sequence[int], survivors: Sequence[int], shares: Mapping[int, bytes]
    ) -> np.ndarray:
        """The sum of the survivors' vectors from UNM1 by member, as the honest server opens it."""
        dropped = len(cohort) - len(survivors)
        answers = {i: wire.Unmasked.decode(d, survivors=len(survivors), dropped=dropped) for i, d in shares.items()}
        threshold = self.terms.floors.threshold(len(cohort))
        masked = {u: self.masked[ctx, u] for u in survivors}
        own, plus, minus = Opening(ctx, cohort, survivors, threshold, masked, answers).masks()
        total = np.zeros(self.terms.words, dtype="<u4")
        for one in masked.values():
            np.add(total, one.vector, out=total)
        add_all(total, minus, [*own, *plus])
        return total

    def finish(
        self, ctx: bytes, cohort: Sequence[int], survivors: Sequence[int], signers: Collection[int]
    ) -> np.ndarray:
        """Sign, unmask and open with some of the survivors."""
        signatures = self.ask(ctx, survivors, signers)
        shares = {
            i: self.clients[i].unmask(self.unmask_request(i, ctx, cohort, survivors, signatures)) for i in signers
        }
        return self.open_sum(ctx, cohort, survivors, shares)


class Insider:
    """A member that breaks the rules with its own keys."""

    def __init__(self, client: SecAggClient, cohort: Sequence[int], words: int) -> None:
        """For rounds of one cohort; keys are those of the client's epoch."""
        self.client, self.cohort, self.words = client, list(cohort), words

    @property
    def keys(self) -> KeyExchange:
        """Its own keys."""
        assert self.client._exchange is not None
        return self.client._exchange

    @property
    def others(self) -> list[int]:
        """The cohort without itself, in the order of commitments and rows."""
        return [m for m in self.cohort if m != self.keys.own]

    def signed(self, message: wire.Masked | wire.Unmasked | wire.AbortMessage) -> bytes:
        """The message under its own signature."""
        return replace(message, signature=self.keys.sign(message.text)).encode()

    def read(self, data: bytes) -> wire.Masked:
        """Its own MSK1."""
        return wire.Masked.decode(data, cohort=len(self.cohort), words=self.words)

    def with_row(self, data: bytes, to: int, change: Callable[[bytes], bytes]) -> bytes:
        """MSK1 in which the row for one member says something else, sealed as it should be."""
        reply, place = self.read(data), self.others.index(to)
        key, info = self.keys.pairs._share_key(self.keys.own, to, reply.context)
        row = AESGCM(key).decrypt(bytes(12), reply.sealed[place], info)
        sealed = list(reply.sealed)
        sealed[place] = self.keys.pairs.seal(to, reply.context, change(row))
        return self.signed(replace(reply, sealed=tuple(sealed)))

    def with_bad_share(self, data: bytes, to: int, owner_edge: int | None = None) -> bytes:
        """MSK1 that deals one member a wrong share of its self mask, or of its edge to `owner_edge`."""
        place = 0 if owner_edge is None else 1 + self.others.index(owner_edge)
        return self.with_row(data, to, lambda row: _replaced(row, place))

    def with_bad_row(self, data: bytes, to: int) -> bytes:
        """MSK1 with a row for one member that does not open."""
        reply, place = self.read(data), self.others.index(to)
        sealed = list(reply.sealed)
        sealed[place] = bytes(len(sealed[place]))
        return self.signed(replace(reply, sealed=tuple(sealed)))

    def with_edge_commitment(self, data: bytes, to: int) -> bytes:
        """MSK1 that commits to another key of one edge."""
        reply, place = self.read(data), self.others.index(to)
        edges = list(reply.edge_commitments)
        edges[place] = bytes(32)
        return self.signed(replace(reply, edge_commitments=tuple(edges)))

    def with_self_commitment(self, data: bytes) -> bytes:
        """MSK1 that commits to another self mask."""
        return self.signed(replace(self.read(data), self_commitment=bytes(32)))

    def with_wrong_edge_mask(self, data: bytes, to: int) -> bytes:
        """MSK1 masked with another key on one edge and committed to honestly: the sum would be noise."""
        reply = self.read(data)
        vector = reply.vector.copy()
        vector += np.uint32(0x9E3779B9)
        wrong = replace(reply, vector=vector, digest=contexts.sha256(vector.data).digest())
        return self.with_edge_commitment(self.signed(wrong), to)

    def with_bad_shares_for(
        self, data: bytes, survivors: Sequence[int], owners: Collection[int], *, edges: bool = False
    ) -> bytes:
        """UNM1 that lies about the shares of some owners."""
        reply = wire.Unmasked.decode(data, survivors=len(survivors), dropped=len(self.cohort) - len(survivors))
        own, between = list(reply.self_shares), [list(row) for row in reply.edge_shares]
        bit = 70 + self.keys.own  # equal errors of several may by chance lie on a polynomial with right shares
        for place, u in enumerate(survivors):
            if u in owners and edges:
                between[place] = [_replaced(share, 0, bit) for share in between[place]]
            elif u in owners:
                own[place] = _replaced(own[place], 0, bit)
        return self.signed(replace(reply, self_shares=tuple(own), edge_shares=tuple(map(tuple, between))))


class Authority:
    """Whoever holds a federation's root key: it can issue a certificate for any name."""

    def __init__(self) -> None:
        self._key = generate_private_key(public_exponent=65537, key_size=2048)
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")])
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = self._builder(self._name, self._key).add_extension(x509.BasicConstraints(True, None), critical=True)
        builder = builder.add_extension(usage, critical=True)
        identifier = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        self.pem = builder.add_extension(identifier, critical=False).sign(self._key, SHA256()).public_bytes(Form.PEM)

    def mint(self, name: str, key: RSAPrivateKey | None = None) -> SiteIdentity:
        """A key, new unless it is given, under a new certificate for a name, as in a start-up kit."""
        key = key or generate_private_key(public_exponent=65537, key_size=2048)
        builder = self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        leaf = builder.add_extension(issuer, critical=False).sign(self._key, SHA256())
        plain = key.private_bytes(Form.PEM, PrivateFormat.PKCS8, NoEncryption())
        return SiteIdentity.from_pem(plain, leaf.public_bytes(Form.PEM))

    def roster(self, identities: Sequence[SiteIdentity]) -> Roster:
        """These identities, pinned."""
        members = {one.name: Member(one.fingerprint, "org") for one in identities}
        return Roster(root_sha256(self.pem), members)

    def _builder(self, subject: x509.Name, key: RSAPrivateKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=2))
        return builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)


def _replaced(row: bytes, place: int, bit: int = 77) -> bytes:
    """Another field element at one place of a row of shares."""
    at = place * SHARE_BYTES
    value = int.from_bytes(row[at : at + SHARE_BYTES], "big") ^ 1 << bit
    return row[:at] + value.to_bytes(SHARE_BYTES, "big") + row[at + SHARE_BYTES :]
