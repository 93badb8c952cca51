"""A server and members that lie, over the bytes that the honest ones speak.

The server knows what a real one knows and may build any message from it. An insider holds a member's own keys; its
honest half does the honest part, and what it says is changed and signed again.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

import independent
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding as Form
from cryptography.hazmat.primitives.serialization import NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fedmpt_core.secagg import messages as wire
from fedmpt_core.secagg.client import SecAggClient
from fedmpt_core.secagg.context import context
from fedmpt_core.secagg.dealing import LISTS, SLOTS, Dealing
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.identity import SiteIdentity, root_sha256
from fedmpt_core.secagg.key_exchange import KeyExchange
from fedmpt_core.secagg.keys import self_mask_key
from fedmpt_core.secagg.masking import add_all
from fedmpt_core.secagg.policy import Terms
from fedmpt_core.secagg.roster import Member, Roster
from fedmpt_core.secagg.server import RoundLost, SecAggServer, Sum
from fedmpt_core.secagg.shamir import SHARE_BYTES, Lagrange, polynomial, random_element, value
from fedmpt_core.secagg.wire import kind_of, u16
from tests.secagg import MODEL, Federation

Lie = Callable[["Insider", bytes], bytes]


class MaliciousServer:
    """Keys and secrets are exchanged honestly, after that every message is its own. Members are named by place."""

    def __init__(self, count: int, words: int = 8, **limits: Any) -> None:
        self.federation = Federation(count, words, **limits)
        self.masked: dict[tuple[bytes, int], wire.Masked] = {}  # all that ever came, with the vectors
        self.shares: dict[bytes, dict[int, tuple[bytes, ...]]] = {}  # all that ever came, by context and member

    @property
    def terms(self) -> Terms:
        """The run's."""
        return self.federation.terms

    @property
    def clients(self) -> list[SecAggClient]:
        """In the order of the newest directory."""
        return [self.federation.members[n] for n in self.federation.names]

    def open_round(
        self,
        number: int = 1,
        attempt: int = 0,
        *,
        model: bytes = MODEL,
        epoch: bytes | None = None,
        confirms: Mapping[int, bytes] | None = None,
    ) -> bytes:
        """RND1 for any number and model."""
        confirms = self.federation.confirms if confirms is None else confirms
        at = self.federation.digest if epoch is None else epoch
        return wire.RoundRequest(at, number, attempt, model, tuple(sorted(confirms.items()))).encode()

    def mask_request(self, cohort: Sequence[int], turn: int = 1, number: int = 1, attempt: int = 0) -> bytes:
        """MRQ1 for any list and slot: a round has its first, its second, ..."""
        slot = self._slot(number, turn)
        return wire.MaskRequest(self.federation.digest, number, attempt, slot, tuple(cohort)).encode()

    def context(
        self, cohort: Sequence[int], turn: int = 1, number: int = 1, attempt: int = 0, model: bytes = MODEL
    ) -> bytes:
        """What the members of such a list work out."""
        bound = {"epoch": self.federation.digest, "cohort": cohort, "model": model}
        return context(self.terms.job_id, number, attempt, self._slot(number, turn), **bound)

    def _slot(self, number: int, turn: int) -> int:
        return LISTS * (number - self.federation.first) + turn

    def collect(
        self,
        cohort: Sequence[int],
        vectors: Sequence[np.ndarray],
        turn: int = 1,
        number: int = 1,
        attempt: int = 0,
        *,
        model: bytes = MODEL,
        only: Collection[int] | None = None,
    ) -> bytes:
        """Have members begin a round and mask their vectors; all of a list or some. Returns the context."""
        begin = self.open_round(number, attempt, model=model)
        request = self.mask_request(cohort, turn, number, attempt)
        for i in cohort if only is None else only:
            self.clients[i].begin(begin, model)
            reply = wire.Masked.decode(self.clients[i].mask(request, vectors[i]), self.terms.words)
            self.masked[reply.context, reply.member] = reply
        return self.context(cohort, turn, number, attempt, model)

    def open(self, ctx: bytes, cohort: Sequence[int], of: Collection[int]) -> None:
        """Take some members' shares."""
        for i in of:
            reply = self.clients[i].open(wire.OpenRequest(ctx).encode())
            self.shares.setdefault(ctx, {})[i] = wire.Opened.decode(reply, len(cohort)).shares

    def sum(self, ctx: bytes, cohort: Sequence[int]) -> np.ndarray:
        """What the vectors and shares that came say, as the honest server opens it."""
        given = self.shares[ctx]
        chosen = sorted(given)[: self.terms.floors.threshold(len(self.federation.names))]
        lagrange = Lagrange([i + 1 for i in chosen])
        seeds = [lagrange.combine([given[i][place] for i in chosen]) for place in range(len(cohort))]
        total = np.zeros(self.terms.words, dtype="<u4")
        for i in cohort:
            np.add(total, self.masked[ctx, i].vector, out=total)
        add_all(total, [], [self_mask_key(seed, ctx) for seed in seeds])
        return total


class Insider(SecAggClient):
    """A member that breaks the rules with its own keys."""

    @property
    def keys(self) -> KeyExchange:
        """Its own, of this epoch."""
        assert self._exchange is not None
        return self._exchange

    def signed(self, message: Any) -> bytes:
        """The message under its own signature."""
        text = message.body if isinstance(message, wire.Advertisement) else message.text
        return replace(message, signature=self.keys.sign(text)).encode()

    def complaint(self, culprit: int, code: Abort = Abort.BAD_SHARE, context: bytes | None = None) -> bytes:
        """ABR1 that blames a member, whether it is at fault or not."""
        at = self.keys.directory if context is None else context
        return self.signed(wire.AbortMessage(at, self.keys.own, code, culprit, bytes(64)))

    def dealing(self, change: Callable[[int, bytes], bytes]) -> bytes:
        """DEA1 of fresh secrets in which `change` has made some rows others; all else fits, as far as it can."""
        keys, count = self.keys, len(self.keys.names)
        label = keys.directory + u16(keys.own)
        secrets = [polynomial(random_element(), keys.threshold) for _ in range(SLOTS + 1)]
        right = [b"".join(value(f, x).to_bytes(SHARE_BYTES, "big") for f in secrets) for x in range(1, count + 1)]
        rows = [change(place, row) for place, row in enumerate(right)]
        leaves = [independent.share_leaves(label, place, row) for place, row in enumerate(rows)]
        commitments = tuple(map(independent.commit_row, leaves))
        mixed = independent.combination(secrets, independent.challenge(label, commitments))
        dealing = Dealing(label, commitments, tuple(c.to_bytes(SHARE_BYTES, "big") for c in mixed))
        sealed = tuple(keys.pairs.seal(m, row) for m, row in enumerate(rows) if m != keys.own)
        seals = tuple(sha256(one).digest() for one in sealed)
        lines = tuple(map(b"".join, leaves))
        return self.signed(wire.Deal(keys.own, keys.directory, dealing, seals, bytes(64), sealed, lines))

    def read_deal(self, data: bytes) -> wire.Deal:
        """Its own DEA1."""
        return wire.Deal.decode(data, members=len(self.keys.names), threshold=self.keys.threshold)

    def with_sealed(self, data: bytes, to: int, row: bytes) -> bytes:
        """DEA1 in which other bytes are sealed for one member than it commits to."""
        deal, place = self.read_deal(data), to - (self.keys.own < to)
        sealed = (*deal.sealed[:place], row, *deal.sealed[place + 1 :])
        return self.signed(replace(deal, sealed=sealed, seals=tuple(sha256(one).digest() for one in sealed)))


class Conversation:
    """A server and its members as the workflow lets them talk: whoever is at fault is left out, the others go on.

    Attributes:
        left_out: by name, why.
        unused: by name, why an answer was not taken.
    """

    def __init__(self, members: Mapping[str, SecAggClient], server: SecAggServer, **lies: Lie | Sequence[Lie]) -> None:
        """`lies` change an insider's answers of a phase: always the same way, or each time another, then no more."""
        self.members, self.server = members, server
        self._lies = {phase: [lie] * 99 if callable(lie) else list(lie) for phase, lie in lies.items()}
        self._stale = True
        self.left_out: dict[str, str] = {}
        self.unused: dict[str, str] = {}

    def run(self, vectors: Mapping[str, np.ndarray], number: int = 1) -> Sum:
        """The sum of this round, or of the first after it that has one. Raises RoundLost after five attempts."""
        attempt, error = 0, RoundLost("")
        for _ in range(5):
            try:
                while self._stale or not self.server.serves(number):
                    self._exchange_keys(number)
                total = self._train(vectors, number, attempt)
            except RoundLost as lost:
                self.left_out |= lost.culprits
                self._stale, error = True, lost
                number, attempt = (number + 1, 0) if lost.used_up else (number, attempt + 1)
            else:
                self.left_out |= total.culprits
                return total
        raise error

    def _exchange_keys(self, number: int) -> None:
        server = self.server
        request = server.open_epoch(number)
        asked = {n: request for n in self.members if n not in self.left_out}
        known = self._ask("advertise", asked, SecAggClient.advertise, server.take_advertisement)
        directory = server.directory()
        self._ask("deal", dict.fromkeys(known, directory), SecAggClient.deal, server.take_deal)
        self._ask("confirm", server.deals(), SecAggClient.confirm, server.take_confirm)
        while complaints := server.show_requests():
            shown: dict[str, bytes] = {}
            self._ask("show", complaints, SecAggClient.show, shown.__setitem__)
            if faults := server.judge(shown):
                raise RoundLost("; ".join(faults.values()), culprits=faults)
            self._ask("confirm", server.shown_deals(), SecAggClient.confirm, server.take_confirm)
        self._stale = False

    def _train(self, vectors: Mapping[str, np.ndarray], number: int, attempt: int) -> Sum:
        server = self.server

        def ready(member: SecAggClient, request: bytes) -> bytes:
            member.begin(request, MODEL)
            return member.ready()

        def masked(member: SecAggClient, request: bytes) -> bytes:
            return member.mask(request, vectors[member.name])

        begin = server.open_round(number, attempt, MODEL)
        self._ask("train", dict.fromkeys(server.members, begin), ready, server.take_ready)
        gone: list[str] = []
        while True:
            request = server.mask_request(gone)
            self._ask("mask", dict.fromkeys(server.cohort, request), masked, server.take_masked)
            if not (gone := server.missing):
                break
        request = server.open_request()
        self._ask("open", dict.fromkeys(server.cohort, request), SecAggClient.open, server.take_opened)
        return server.finish()

    def _ask(
        self,
        phase: str,
        requests: Mapping[str, bytes],
        answer: Callable[[SecAggClient, bytes], bytes],
        take: Callable[[str, bytes], None],
    ) -> list[str]:
        """Every answer in turn: a message of the phase, a refusal with a complaint, or nothing."""
        taken = []
        for name, request in requests.items():
            member = self.members[name]
            try:
                data = answer(member, request)
            except SecAggError as error:
                data = member.abort(error)
            if isinstance(member, Insider) and self._lies.get(phase):
                data = self._lies[phase].pop(0)(member, data)
            try:
                if kind_of(data) == "ABR1":
                    self.server.take_abort(name, data)
                elif data:
                    take(name, data)
                    taken.append(name)
            except SecAggError as error:
                self.unused[name] = str(error)
        return taken


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
