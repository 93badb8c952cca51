"""Attacks on the protocol, A1 to A20, over its own bytes: each is refused, or the documents say that it is not."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding as Form
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fedmpt_core.secagg.client as client_module
from fedmpt_core.admission import check_site
from fedmpt_core.config import FederationConfig, JobConfig, ModelConfig, TrainingConfig
from fedmpt_core.layout import LayoutError, ParameterLayout
from fedmpt_core.model import FedMPT
from fedmpt_core.privacy.budget import PrivacyRefused
from fedmpt_core.privacy.keystream import Keystream
from fedmpt_core.privacy.noise import ClipGroup, PrivateOptimizer
from fedmpt_core.secagg import messages as wire
from fedmpt_core.secagg.client import SecAggClient
from fedmpt_core.secagg.encoding import Encoding, headroom
from fedmpt_core.secagg.errors import Abort, SecAggError, UnexpectedMessage
from fedmpt_core.secagg.identity import ChainCheck, Session, SiteIdentity
from fedmpt_core.secagg.keys import self_mask_key
from fedmpt_core.secagg.latch import Latch
from fedmpt_core.secagg.masking import add_all
from fedmpt_core.secagg.policy import Floors, Terms
from fedmpt_core.secagg.server import RoundLost, SecAggServer
from fedmpt_core.secagg.shamir import split
from fedmpt_core.secagg.wire import tag, u16
from fedmpt_core.secagg_config import SecAggConfig, SiteSecAggConfig
from fedmpt_core.secure_site import SecureSite
from fedmpt_core.secure_terms import secure_terms
from fedmpt_core.site_config import DataConfig, SiteConfig
from tests.fakes import FakeBackbone
from tests.malicious import Authority, Insider, MaliciousServer
from tests.secagg import MODEL, OTHER_MODEL, Federation, identity, member, names, plain_sum, terms, vectors
from tests.settings import POLICY, UNPROTECTED

DOCUMENT = " ".join((Path(__file__).parents[2] / "docs" / "secure-aggregation.md").read_text(encoding="utf-8").split())
WORDS = 8


def lists(count: int, words: int = WORDS, seed: int = 0) -> list[np.ndarray]:
    """Vectors by id."""
    return list(vectors(count, words, seed).values())


def total(found: Sequence[np.ndarray], chosen: Sequence[int]) -> np.ndarray:
    """Sum of some vectors."""
    return plain_sum({str(i): v for i, v in enumerate(found)}, [str(i) for i in chosen])


def refused(code: Abort, match: str, call: Callable[..., object], *arguments: object) -> SecAggError:
    """That a call is refused for this reason."""
    with pytest.raises(SecAggError, match=match) as found:
        call(*arguments)
    assert found.value.code == code, found.value
    return found.value


# ---- A1: both keys of a mask -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "code", "match"),
    [
        ([0, 1, 2, 2, 3], Abort.MALFORMED, "twice or out of order"),
        ([0, 1, 3, 2], Abort.MALFORMED, "twice or out of order"),
        ([0, 1, 2, 3, 9], Abort.POLICY, "outside the cohort"),
        ([0, 1, 2, 3, 6], Abort.POLICY, "outside the cohort"),
        ([1, 2, 3, 4], Abort.POLICY, "lack this site"),
        ([0, 1, 2], Abort.BELOW_THRESHOLD, "3 survivors of 5 members, the threshold is 4"),
        ([], Abort.POLICY, "lack this site"),
    ],
    ids=["twice", "out-of-order", "stranger", "member-outside-the-cohort", "without-the-site", "too-few", "nobody"],
)
def test_a01_a_list_of_survivors_that_is_no_honest_one_is_not_signed(ids: list[int], code: Abort, match: str) -> None:
    server, cohort = MaliciousServer(7), range(5)  # members 5 and 6 are in the directory only
    ctx = server.collect(cohort, lists(7))
    request = tag("CSY1") + ctx + u16(len(ids)) + b"".join(map(u16, ids))
    refused(code, match, server.clients[0].consistency, request)
    right = wire.ConsistencyRequest(ctx, tuple(cohort)).encode()
    refused(Abort.CTX_MISMATCH, "in state READY", server.clients[0].consistency, right)


@pytest.mark.parametrize("listed", [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 3, 4, 5]], ids=["fewer", "other", "more"])
def test_a01_shares_open_the_list_that_was_signed_and_no_other(listed: list[int]) -> None:
    server, cohort, signed = MaliciousServer(6), range(6), [0, 1, 2, 3, 4]
    ctx = server.collect(cohort, lists(6))
    signatures = server.ask(ctx, signed, signed)
    request = server.unmask_request(0, ctx, cohort, listed, {i: s for i, s in signatures.items() if i in listed})
    refused(Abort.LATCHED, "not those that this site has signed", server.clients[0].unmask, request)
    right = server.unmask_request(0, ctx, cohort, signed, signatures)
    refused(Abort.CTX_MISMATCH, "in state READY", server.clients[0].unmask, right)


def test_a01_an_unmask_request_has_no_room_for_a_second_list() -> None:
    """Where both kinds of share are asked for by two lists, they may overlap; here the one list gives both."""
    server, cohort, signed = MaliciousServer(5), range(5), [0, 1, 2, 3]
    ctx = server.collect(cohort, lists(5))
    request = server.unmask_request(0, ctx, cohort, signed, server.ask(ctx, signed, signed))
    second = u16(2) + u16(3) + u16(4)
    refused(Abort.MALFORMED, "bytes of sealed rows", server.clients[0].unmask, request + second)


def test_a01_no_answer_holds_a_key_between_survivors_or_a_self_mask_of_one_that_dropped_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, cohort, signed = MaliciousServer(6), range(6), [0, 2, 3, 4, 5]
    dealt: list[list[bytes]] = []  # by member: its self mask, then its edges to the others ascending
    monkeypatch.setattr(client_module, "split", lambda *given: dealt.append(split(*given)) or dealt[-1])
    ctx = server.collect(cohort, lists(6))
    signatures = server.ask(ctx, signed, signed)
    for i in signed:
        answer = server.clients[i].unmask(server.unmask_request(i, ctx, cohort, signed, signatures))
        for owner in cohort:
            others = [m for m in cohort if m != owner]
            for what, shares in enumerate(dealt[6 * owner : 6 * owner + 6]):
                wanted = owner in signed and (what == 0 or others[what - 1] not in signed)
                assert (shares[i] in answer) == wanted, (i, owner, what)


# ---- A2: different survivors to different members ----------------------------------------------------------------


def test_a02_two_lists_get_too_few_signatures_even_with_a_colluder_that_signs_both() -> None:
    server, cohort = MaliciousServer(7), range(7)  # threshold 5, one colluder
    ctx = server.collect(cohort, lists(7))
    one, other = list(range(7)), list(range(6))
    evil = Insider(server.clients[0], cohort, WORDS)
    first, second = server.ask(ctx, one, [1, 2, 3, 6]), server.ask(ctx, other, [4, 5])
    first[0] = evil.keys.sign(wire.consistency_text(ctx, server.directory, tuple(one)))
    second[0] = evil.keys.sign(wire.consistency_text(ctx, server.directory, tuple(other)))
    # the honest list reaches the threshold and may be opened, the other cannot any more
    assert (len(first), len(second)) == (5, 3)
    shares = server.clients[1].unmask(server.unmask_request(1, ctx, cohort, one, first))
    assert len(shares) == 39 + 33 * 7 + 64
    error = refused(
        Abort.BELOW_THRESHOLD,
        "3 signatures of 7 members, the threshold is 5",
        server.clients[4].unmask,
        server.unmask_request(4, ctx, cohort, other, second),
    )
    assert error.culprit is None
    mixed = {i: first.get(i, second.get(i, b"")) for i in (0, 1, 2, 3, 5)}
    refused(
        Abort.BAD_SIG,
        "did not sign the survivors",
        server.clients[5].unmask,
        server.unmask_request(5, ctx, cohort, other, mixed),
    )


def test_a02_signatures_of_another_round_do_not_count() -> None:
    server, cohort = MaliciousServer(4), range(4)
    ctx = server.collect(cohort, lists(4))
    old = server.ask(ctx, cohort, cohort)
    later = server.collect(cohort, lists(4), number=2)
    server.ask(later, cohort, [0])
    request = server.unmask_request(0, later, cohort, cohort, old)
    assert refused(Abort.BAD_SIG, "member 0 did not sign", server.clients[0].unmask, request).culprit == 0


@pytest.mark.parametrize(
    ("count", "code", "match"),
    [(2, Abort.BELOW_THRESHOLD, "2 signatures of 4"), (3, None, ""), (4, None, "")],
    ids=["one-too-few", "exactly-enough", "all"],
)
def test_a02_shares_leave_at_the_threshold_and_not_below(count: int, code: Abort | None, match: str) -> None:
    server, cohort = MaliciousServer(4), range(4)
    ctx = server.collect(cohort, lists(4))
    signatures = server.ask(ctx, cohort, range(4))
    request = server.unmask_request(0, ctx, cohort, cohort, {i: signatures[i] for i in range(count)})
    if code:
        refused(code, match, server.clients[0].unmask, request)
    else:
        assert server.clients[0].unmask(request)


def test_a02_one_member_s_signature_counts_once_and_a_dropped_one_s_not() -> None:
    server, cohort, signed = MaliciousServer(4), range(4), [0, 1, 2]
    ctx = server.collect(cohort, lists(4))
    signatures = server.ask(ctx, signed, signed)
    dropped = Insider(server.clients[3], cohort, WORDS)
    text = wire.consistency_text(ctx, server.directory, tuple(signed))
    outside = {0: signatures[0], 1: signatures[1], 3: dropped.keys.sign(text)}
    request = server.unmask_request(0, ctx, cohort, signed, outside)
    refused(Abort.POLICY, "by a member outside the survivors", server.clients[0].unmask, request)
    honest = server.unmask_request(1, ctx, cohort, signed, signatures)
    at = 5 + 32 + 2 + 2 * 3 + 2
    doubled = honest[: at + 66] + honest[at : at + 66] + honest[at + 132 :]
    refused(Abort.MALFORMED, "twice or out of order", server.clients[1].unmask, doubled)


# ---- A3: keys in the middle --------------------------------------------------------------------------------------


@cache
def hospital(name: str) -> SiteIdentity:
    """A start-up kit under one root."""
    return authority().mint(name)


@cache
def authority() -> Authority:
    """The federation's root."""
    return Authority()


class Setup:
    """Four members with rosters; the keys' exchange, of which every message may be changed."""

    def __init__(self, count: int = 4) -> None:
        self.terms = terms(WORDS)
        self.roster = authority().roster([hospital(n) for n in names(count)])
        self.clients = [self.client(hospital(n)) for n in names(count)]
        self.adverts = [self.advert(c) for c in self.clients]

    def client(self, who: SiteIdentity, epoch: int = 0, **changes: Any) -> SecAggClient:
        """A member of this roster, or of another."""
        roster = changes.get("roster", self.roster)
        return SecAggClient(changes.get("terms", self.terms), who, roster, authority().pem, None, lambda latch: None)

    def advert(self, client: SecAggClient, epoch: int = 1) -> bytes:
        """ADV1."""
        return client.advertise(wire.AdvertiseRequest(self.terms.digest, epoch).encode())

    def directory(self, adverts: Sequence[bytes] | None = None) -> bytes:
        """DRC1."""
        return wire.Directory(tuple(self.adverts if adverts is None else adverts)).encode()

    def with_(self, at: int, advert: bytes) -> bytes:
        """DRC1 with one advert replaced."""
        return self.directory([*self.adverts[:at], advert, *self.adverts[at + 1 :]])


def test_a03_the_honest_directory_is_confirmed() -> None:
    found = Setup()
    confirms = [c.confirm(found.directory()) for c in found.clients]
    assert len(set(confirms)) == 4
    assert all(len(c) == 71 for c in confirms)


@pytest.mark.parametrize("signed", [False, True], ids=["old-signature", "signed-anew"])
def test_a03_a_substituted_exchange_key_is_refused(signed: bool) -> None:
    found = Setup()
    own = wire.Advertisement.decode(found.adverts[3])
    forged = replace(wire.Advertisement.decode(found.adverts[1]), exchange_key=own.exchange_key[::-1])
    if signed:  # with a key of the server's own, for which there is no session of site-001
        liar = Insider(found.clients[3], range(4), WORDS)
        forged = replace(forged, signing_key=own.signing_key)
        forged = replace(forged, signature=liar.keys.sign(forged.body))
    error = refused(
        Abort.BAD_SIG,
        "session of site-001 is for another" if signed else "keys of site-001 are not signed",
        found.clients[0].confirm,
        found.with_(1, forged.encode()),
    )
    assert error.culprit == 1
    refused(Abort.CTX_MISMATCH, "in state NEW", found.clients[0].confirm, found.directory())  # a new epoch is needed


def test_a03_a_certificate_minted_by_the_holder_of_the_root_key_is_refused() -> None:
    found = Setup()
    middle = found.client(authority().mint("site-001"), roster=authority().roster([*map(hospital, names(4))]))
    error = refused(
        Abort.ROSTER,
        "site-001 has key .*, this site's roster has",
        found.clients[0].confirm,
        found.with_(1, found.advert(middle)),
    )
    assert error.culprit == 1


def test_a03_a_member_outside_the_roster_is_refused_by_the_members_that_lack_it() -> None:
    found = Setup()
    larger = authority().roster([hospital(n) for n in names(5)])
    sybil = found.client(hospital("site-004"), roster=larger)
    mine = found.advert(sybil)
    # it says what its own roster is, and then what the others' is
    for claimed in (mine, _claiming(sybil, mine, found.roster.digest())):
        again = Setup()
        refused(
            Abort.ROSTER, "member 4 is not in the roster", again.clients[0].confirm,
            again.directory([*again.adverts, claimed]),
        )  # fmt: skip


def _claiming(client: SecAggClient, advert: bytes, roster: bytes) -> bytes:
    changed = replace(wire.Advertisement.decode(advert), roster_digest=roster)
    return replace(changed, signature=Insider(client, range(5), WORDS).keys.sign(changed.body)).encode()


def test_a03_a_directory_without_the_member_s_own_words_or_with_others_is_refused() -> None:
    found = Setup()
    refused(Abort.ROSTER, "not hold what this site advertised", found.clients[0].confirm,
            found.directory(found.adverts[1:]))  # fmt: skip
    other = Setup()  # the same members in another run of the exchange: all is genuine, but not this one's own entry
    refused(Abort.ROSTER, "not hold what this site advertised", other.clients[1].confirm, other.with_(1, found.adverts[1]))


@pytest.mark.parametrize(
    ("order", "code", "match"),
    [
        ([0, 1, 1, 2, 3], Abort.ROSTER, "distinct members"),
        ([0, 2, 1, 3], Abort.ROSTER, "ascending order"),
        ([0, 1], Abort.POLICY, "2 members, min_cohort=3"),
    ],
    ids=["an-id-twice", "out-of-order", "too-few"],
)
def test_a03_a_directory_lists_each_member_once_and_enough_of_them(order: list[int], code: Abort, match: str) -> None:
    found = Setup()
    refused(code, match, found.clients[0].confirm, found.directory([found.adverts[i] for i in order]))


@pytest.mark.parametrize("field", ["exchange_key", "signing_key"])
def test_a03_two_members_never_have_the_same_key(field: str) -> None:
    """An insider that takes another's exchange key would stand in the same relation to everybody."""
    found = Setup()
    liar = Insider(found.clients[3], range(4), WORDS)
    advert = wire.Advertisement.decode(found.adverts[3])
    copied = replace(advert, **{field: getattr(wire.Advertisement.decode(found.adverts[1]), field)})
    copied = replace(copied, signature=liar.keys.sign(copied.body))
    code, match = (
        (Abort.ROSTER, "the same key") if field == "exchange_key" else (Abort.BAD_SIG, "keys of site-003 are not signed")
    )
    refused(code, match, found.clients[0].confirm, found.with_(3, copied.encode()))


def test_a03_an_exchange_key_of_low_order_is_refused() -> None:
    found = Setup()
    liar = Insider(found.clients[3], range(4), WORDS)
    weak = replace(wire.Advertisement.decode(found.adverts[3]), exchange_key=bytes(32))
    weak = replace(weak, signature=liar.keys.sign(weak.body))
    error = refused(Abort.ROSTER, "low order", found.clients[0].confirm, found.with_(3, weak.encode()))
    assert error.culprit == 3


def test_a03_members_that_were_shown_different_directories_do_not_start_a_round() -> None:
    """Everything in both is genuine: member 3 has advertised twice, before and after a restart."""
    found = Setup()
    twin = found.client(hospital("site-003"))
    other = found.with_(3, found.advert(twin))
    confirms = {i: found.clients[i].confirm(found.directory()) for i in (0, 1)}
    confirms |= {2: found.clients[2].confirm(other), 3: twin.confirm(other)}
    said = tuple((i, wire.Confirm.decode(c).signature) for i, c in confirms.items())
    request = wire.RoundRequest(1, 0, 1, MODEL, (0, 1, 2, 3), said).encode()
    assert refused(Abort.BAD_SIG, "member 2 did not sign the directory", found.clients[0].begin, request, MODEL)
    assert refused(Abort.BAD_SIG, "member 0 did not sign the directory", found.clients[2].begin, request, MODEL)
    silent = wire.RoundRequest(1, 0, 1, MODEL, (0, 1, 2, 3), said[:2]).encode()
    assert refused(Abort.BAD_SIG, "member 2 has not confirmed", found.clients[1].begin, silent, MODEL)


def test_a03_a_certificate_with_a_broken_byte_is_refused_and_nothing_else() -> None:
    """Whatever a byte of a certificate becomes, it is a refusal, so that a crafted one ends nobody's process."""
    der = x509.load_pem_x509_certificate(identity("site-000").chain).public_bytes(Form.DER)
    check, now = ChainCheck(None), 1_800_000_000
    odd: set[str] = set()
    generator = np.random.default_rng(3)
    for at in range(len(der) - 256):  # the last 256 are the signature
        changed = der[:at] + bytes([generator.integers(256)]) + der[at + 1 :]
        session = Session("job-0", "site-000", sha256(changed).digest(), bytes(32), now - 9, now + 9).encode()
        try:
            check.check(
                name="site-000", job_id="job-0", session=session, session_signature=bytes(256),
                signing_key=bytes(32), chain=_pem(changed), now=now,
            )  # fmt: skip
        except SecAggError:
            continue
        except Exception as error:
            odd.add(f"{type(error).__name__} at byte {at}")
    assert not odd


def _pem(der: bytes) -> bytes:
    from base64 import encodebytes

    return b"-----BEGIN CERTIFICATE-----\n" + encodebytes(der) + b"-----END CERTIFICATE-----\n"
