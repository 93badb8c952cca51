"""Attacks on the protocol, A1 to A20, over its own bytes: each is refused, or the documents say that it is not."""

import struct
import time
from base64 import encodebytes
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from hashlib import sha256
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding as Form
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fedmpt_core.secagg.client as client_module
from fedmpt_core.config.job import FederationConfig, JobConfig, ModelConfig, TrainingConfig
from fedmpt_core.config.secagg import SecAggConfig, SiteSecAggConfig
from fedmpt_core.config.site import DataConfig, SiteConfig
from fedmpt_core.federation.site.admission import check_site
from fedmpt_core.federation.site.masked_updates import MaskedUpdates
from fedmpt_core.federation.terms import secure_terms
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from fedmpt_core.model.vector import LayoutError, ParameterLayout
from fedmpt_core.privacy.ledger.budget import PrivacyRefused
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.noise import ClipGroup, PrivateOptimizer
from fedmpt_core.secagg import messages as wire
from fedmpt_core.secagg.client import SecAggClient
from fedmpt_core.secagg.encoding import Encoding
from fedmpt_core.secagg.errors import Abort, SecAggError, UnexpectedMessage
from fedmpt_core.secagg.headroom import headroom
from fedmpt_core.secagg.identity import ChainCheck, Session, SiteIdentity
from fedmpt_core.secagg.keys import self_mask_key
from fedmpt_core.secagg.latch import Latch
from fedmpt_core.secagg.masking import add_all
from fedmpt_core.secagg.policy import Floors, Terms
from fedmpt_core.secagg.server import RoundLost, SecAggServer
from fedmpt_core.secagg.shamir import split
from fedmpt_core.secagg.wire import tag, u16
from tests.fakes import FakeBackbone
from tests.malicious import Authority, Insider, MaliciousServer
from tests.secagg import MODEL, OTHER_MODEL, Federation, identity, member, names, plain_sum, terms, vectors
from tests.settings import POLICY, UNPROTECTED

DOCUMENT = " ".join((Path(__file__).parents[3] / "docs" / "secure-aggregation.md").read_text(encoding="utf-8").split())
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
    mixed = other.with_(1, found.adverts[1])
    refused(Abort.ROSTER, "not hold what this site advertised", other.clients[1].confirm, mixed)


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
        (Abort.ROSTER, "the same key")
        if field == "exchange_key"
        else (Abort.BAD_SIG, "keys of site-003 are not signed")
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


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_a03_a_certificate_with_a_broken_byte_is_refused_and_nothing_else() -> None:
    """Whatever a byte of a certificate becomes, it is a refusal, so that a crafted one ends nobody's process."""
    der = x509.load_pem_x509_certificate(identity("site-000").chain).public_bytes(Form.DER)
    check, now = ChainCheck(None), int(time.time())
    odd: set[str] = set()
    for at, value in product(range(len(der) - 256), (0, 9, 250, 255)):  # the last 256 bytes are the signature
        changed = der[:at] + bytes([value]) + der[at + 1 :]
        if changed == der:
            continue
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
    return b"-----BEGIN CERTIFICATE-----\n" + encodebytes(der) + b"-----END CERTIFICATE-----\n"


# ---- A4: another model for one member ----------------------------------------------------------------------------


def test_a04_a_model_other_than_the_named_one_starts_no_round() -> None:
    server = MaliciousServer(4)
    request = server.open_round(range(4))
    refused(Abort.CTX_MISMATCH, "model that came is not the one", server.clients[0].begin, request, OTHER_MODEL)


def test_a04_a_member_with_a_model_of_its_own_is_in_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown even to a server that had every self mask: the edges to the others still hide its vector."""
    server, cohort, found = MaliciousServer(4), range(4), lists(4)
    seeds: list[bytes] = []
    commit = client_module.commit_self
    monkeypatch.setattr(client_module, "commit_self", lambda seed, ctx: seeds.append(seed) or commit(seed, ctx))
    ctx = server.collect(cohort, found, only=[0, 1, 2])
    odd = server.collect(cohort, found, only=[3], model=OTHER_MODEL)
    signatures = server.ask(ctx, cohort, [0, 1, 2])
    refused(Abort.CTX_MISMATCH, "another job, round or attempt", server.ask, ctx, cohort, [3])
    server.masked[ctx, 3] = server.masked[odd, 3]
    request = server.unmask_request(0, ctx, cohort, cohort, signatures)
    assert refused(Abort.BAD_SHARE, "sealed for another round, model", server.clients[0].unmask, request).culprit == 3
    words = np.asarray(np.sum([server.masked[ctx, i].vector for i in cohort], axis=0, dtype=np.uint32))
    add_all(words, [], [self_mask_key(s, c) for s, c in zip(seeds, [ctx, ctx, ctx, odd], strict=True)])
    assert not np.isin(words, total(found, cohort)).any()
    honest = SecAggServer.take_masked
    server.federation.begin()
    message = replace(server.masked[odd, 3]).encode()
    refused(Abort.CTX_MISMATCH, "another job, round or attempt", honest, server.federation.server, "site-003", message)


# ---- sites with a job's config -----------------------------------------------------------------------------------

LAYOUT = ParameterLayout(("contexts.condition", "gate.up"), ((2, 3), (4,)))
START = np.linspace(-1, 1, LAYOUT.size, dtype=np.float32)
JOB = JobConfig(
    "w",
    ("cat", "dog"),
    training=TrainingConfig(rounds=4),
    privacy=UNPROTECTED,
    secagg=SecAggConfig(
        insecure_identities=True, rounding="deterministic", value_range=2.0, metrics=("loss",), max_weight=1000
    ),
    federation=FederationConfig(min_sites=3, weighting="records", max_movement=2.0),
)


class Sites:
    """Three sites and their server, keys exchanged, as in a simulated job."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, job: JobConfig = JOB) -> None:
        monkeypatch.setattr(SiteIdentity, "ephemeral", staticmethod(identity))
        terms, self.encoding = secure_terms(job, "run-1", LAYOUT, "0" * 64)
        self.server = SecAggServer(terms, ChainCheck(None))
        self.sites = {
            name: MaskedUpdates(
                job,
                SiteConfig(DataConfig("scenes"), POLICY, SiteSecAggConfig(state=str(folder / name))),
                name=name,
                run_id="run-1",
                kit=None,
                layout=LAYOUT,
                initial=LAYOUT.encode(START),
                backbone_digest="0" * 64,
            )
            for name in names(3)
        }
        request = self.server.open_epoch(names(3))
        for name, site in self.sites.items():
            self.server.take_advertisement(name, site.advertise(request))
        directory = self.server.directory()
        for name, site in self.sites.items():
            self.server.take_confirm(name, site.confirm(directory))

    def open(self, state: np.ndarray, number: int = 1, attempt: int = 0) -> bytes:
        """RND1 for parameters."""
        digest = client_module.contexts.model_digest(LAYOUT.split(state))
        return self.server.open_round(number, attempt, names(3), digest)


# ---- A5: a model made to leak ------------------------------------------------------------------------------------


def moved(by: float, at: int = 4) -> np.ndarray:
    """The initial parameters with one of them changed."""
    state = START.copy()
    state[at] += by
    return state


@pytest.mark.parametrize(
    ("training_round", "by", "match"),
    [
        (1, 0.0, None),
        (2, 2.0, None),
        (3, 4.0, None),
        (1, 1e-3, "at most 0 can be"),
        (2, 2.001, "moved by 2 since round 1, at most 2 can be"),
        (3, -4.01, "at most 4 can be"),
        (2, 3e38, "at most 2 can be"),
        (0, 0.0, "not one of 1 to 4"),
        (5, 0.0, "not one of 1 to 4"),
    ],
)
def test_a05_parameters_beyond_what_updates_can_have_done_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training_round: int, by: float, match: str | None
) -> None:
    found, state = Sites(tmp_path, monkeypatch), moved(by)
    begin, request, block = found.sites["site-000"].begin, found.open(state), LAYOUT.encode(state)
    if match is None:
        assert begin(request, training_round, block) is None
    else:
        refused(Abort.POLICY, match, begin, request, training_round, block)
        refused(Abort.POLICY, match, begin, request, training_round, block)  # asking again changes nothing


def test_a05_a_bound_holds_from_round_to_round_and_not_backwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Sites(tmp_path, monkeypatch)
    begin = found.sites["site-000"].begin
    assert begin(found.open(moved(2.0)), 2, LAYOUT.encode(moved(2.0))) is None
    refused(Abort.POLICY, "round 0 came after those of round 1", begin, found.open(START, 2), 1, LAYOUT.encode(START))
    refused(Abort.POLICY, "at most 0", begin, found.open(moved(1.0), 3), 2, LAYOUT.encode(moved(1.0)))
    assert begin(found.open(moved(0.0), 4), 3, LAYOUT.encode(moved(0.0))) is None


def test_a05_parameters_of_another_layout_or_not_finite_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Sites(tmp_path, monkeypatch)
    begin, request = found.sites["site-000"].begin, found.open(START)
    more = ParameterLayout(("contexts.condition", "trap.weight"), ((2, 3), (4,)))
    infinite = LAYOUT.encode(START)[:-4] + struct.pack("<f", float("nan"))
    for block in (more.encode(START), infinite, LAYOUT.encode(START)[:-4], LAYOUT.encode(START) + bytes(4)):
        with pytest.raises(LayoutError):
            begin(request, 1, block)


# ---- A6: small sets, thresholds of the server's choice -----------------------------------------------------------


def test_a06_no_message_lowers_a_floor() -> None:
    with pytest.raises(SecAggError, match="min_cohort of at least 3"):
        Floors(2, 0)
    server = MaliciousServer(6, colluders=2, min_cohort=4)
    for cohort in ([0], [0, 1], [0, 1, 2]):
        refused(Abort.POLICY, "cannot protect its members", server.clients[0].begin, server.open_round(cohort), MODEL)
    assert server.clients[0].begin(server.open_round([0, 1, 2, 3]), MODEL) is None


def test_a06_a_site_refuses_a_job_with_lower_floors_than_its_own() -> None:
    data = DataConfig("scenes")
    assert check_site(JOB, SiteConfig(data, POLICY, SiteSecAggConfig(allow_metrics=("loss",))), has_kit=False)
    own = SiteSecAggConfig(allow_metrics=("loss",))
    for demanded in (replace(own, min_cohort=4), replace(own, colluders=2)):
        site = SiteConfig(data, POLICY, demanded)
        with pytest.raises(PrivacyRefused, match="are below this site's"):
            check_site(JOB, site, has_kit=False)


# ---- A7: replay --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "again", [(2, 0, MODEL), (1, 1, MODEL), (1, 0, OTHER_MODEL)], ids=["round", "attempt", "model"]
)
def test_a07_a_vector_counts_in_its_own_context_only(again: tuple[int, int, bytes]) -> None:
    number, attempt, model = again
    federation = Federation(4)
    one, request = federation.members["site-000"], federation.begin()
    one.begin(request, MODEL)
    old = one.mask(lists(4)[0])
    federation.server.open_round(number, attempt, names(4), model)
    refused(Abort.CTX_MISMATCH, "another job, round or attempt", federation.server.take_masked, "site-000", old)


def test_a07_a_vector_of_another_job_of_the_same_members_does_not_count() -> None:
    one, other = Federation(4), Federation(4, **{"job_id": "job-1"})  # type: ignore[arg-type]
    request = one.begin()
    one.members["site-000"].begin(request, MODEL)
    sent = one.members["site-000"].mask(lists(4)[0])
    other.begin()
    refused(Abort.CTX_MISMATCH, "another job, round or attempt", other.server.take_masked, "site-000", sent)
    refused(Abort.BAD_SIG, "did not sign the directory", other.members["site-000"].begin, request, MODEL)


@pytest.mark.parametrize("kind", ["round", "attempt", "recipient", "reflected", "swapped", "zero"])
def test_a07_a_sealed_row_opens_for_its_recipient_in_its_context_only(kind: str) -> None:
    server, cohort, found = MaliciousServer(4), range(4), lists(4)
    ctx = server.collect(cohort, found)
    now = server.collect(cohort, found, *((2, 0) if kind == "round" else (1, 1)))
    signatures = server.ask(now, cohort, cohort)
    forged = {
        "round": lambda u: server.row(ctx if u == 2 else now, cohort, u, 0),
        "attempt": lambda u: server.row(ctx if u == 2 else now, cohort, u, 0),
        "recipient": lambda u: server.row(now, cohort, u, 1 if u == 2 else 0),
        "reflected": lambda u: server.row(now, cohort, 0, 2) if u == 2 else server.row(now, cohort, u, 0),
        "swapped": lambda u: server.row(now, cohort, (0, 2, 1, 3)[u], 0),
        "zero": lambda u: bytes(33 * 4 + 16) if u == 2 else server.row(now, cohort, u, 0),
    }[kind]
    request = server.unmask_request(0, now, cohort, cohort, signatures, rows=forged)
    error = refused(Abort.BAD_SHARE, "does not open", server.clients[0].unmask, request)
    assert error.culprit == (1 if kind == "swapped" else 2)


def test_a07_adverts_confirmations_and_lists_of_an_old_epoch_do_not_count() -> None:
    federation = Federation(4)
    old = federation.directory
    confirms = federation.confirms
    request = federation.server.open_epoch(names(4))
    refused(Abort.CTX_MISMATCH, "another job, release or epoch", federation.server.take_advertisement, "site-000",
            wire.Directory.decode(old, 128).adverts[0])  # fmt: skip
    adverts = [one.advertise(request) for one in federation.members.values()]
    stale = wire.Directory((adverts[0], *wire.Directory.decode(old, 128).adverts[1:])).encode()
    refused(Abort.ROSTER, "another job, roster or epoch", federation.members["site-000"].confirm, stale)
    refused(Abort.CTX_MISMATCH, "epoch 1 came", federation.members["site-001"].advertise,
            wire.AdvertiseRequest(federation.terms.digest, 1, tuple(names(4))).encode())  # fmt: skip
    server = MaliciousServer(4)
    server.federation.exchange_keys()
    refused(Abort.BAD_SIG, "did not sign the directory", server.clients[0].begin,
            server.open_round(range(4), confirms=confirms), MODEL)  # fmt: skip
    refused(Abort.CTX_MISMATCH, "a round of epoch 1", server.clients[1].begin,
            server.open_round(range(4), epoch=1), MODEL)  # fmt: skip


# ---- A8: declared dropped, only delayed --------------------------------------------------------------------------


def test_a08_a_member_declared_dropped_keeps_its_self_mask() -> None:
    """The server has its vector and opens every edge of it, and is still refused the last mask."""
    server, cohort, signed, found = MaliciousServer(4), range(4), [0, 1, 2], lists(4)
    ctx = server.collect(cohort, found)
    opened = server.finish(ctx, cohort, signed, signed)
    assert np.array_equal(opened, total(found, signed))
    again = wire.ConsistencyRequest(ctx, (0, 1, 2, 3)).encode()
    for i in signed:
        refused(Abort.CTX_MISMATCH, "in state READY", server.clients[i].consistency, again)
    # the dropped member itself still would sign, but alone
    signatures = server.ask(ctx, [0, 1, 2, 3], [3])
    request = server.unmask_request(3, ctx, cohort, cohort, signatures)
    refused(Abort.BELOW_THRESHOLD, "1 signatures of 4", server.clients[3].unmask, request)


def test_a08_a_late_vector_is_not_added() -> None:
    federation, found = Federation(4), vectors(4, WORDS)
    late: list[bytes] = []
    request = federation.begin()
    for name, one in federation.members.items():
        one.begin(request, MODEL)
        message = one.mask(found[name])
        late.append(message) if name == "site-003" else federation.server.take_masked(name, message)
    federation.server.consistency_request()
    refused(Abort.CTX_MISMATCH, "before the round is closed", federation.server.take_masked, "site-003", late[0])


# ---- A9: two sums of one round -----------------------------------------------------------------------------------


def test_a09_after_its_signature_a_member_refuses_every_other_attempt_even_after_a_restart() -> None:
    server, cohort, found = MaliciousServer(4), range(4), lists(4)
    ctx = server.collect(cohort, found)
    server.ask(ctx, cohort, [0])
    again = server.open_round([0, 1, 2], attempt=1)
    refused(Abort.LATCHED, "cannot be repeated", server.clients[0].begin, again, MODEL)
    restarted = member("site-000", server.terms, server.clients[0].latch)
    server.clients[0] = server.federation.members["site-000"] = restarted
    server.federation.exchange_keys()
    again = server.open_round([0, 1, 2], attempt=1)
    refused(Abort.LATCHED, "cannot be repeated", restarted.begin, again, MODEL)


def test_a09_of_two_unsigned_attempts_the_older_is_gone() -> None:
    server, cohort, found = MaliciousServer(4), range(4), lists(4)
    old = server.collect(cohort, found)
    new = server.collect([0, 1, 2], found, attempt=1)
    old_words, new_words = server.masked[old, 0].vector, server.masked[new, 0].vector
    assert not np.isin(old_words - new_words, [0]).any()
    refused(Abort.CTX_MISMATCH, "another job, round or attempt", server.ask, old, cohort, [0])
    refused(Abort.CTX_MISMATCH, "attempt 0", server.clients[1].begin, server.open_round(cohort), MODEL)


@pytest.mark.parametrize("second", [[0, 1, 2], [0, 10, 11, 12]], ids=["a-part-of-the-cohort", "other-members"])
def test_a09_a_member_that_is_never_asked_to_sign_is_in_one_sum_of_the_round_only(second: list[int]) -> None:
    """Shares need a threshold of signatures, and not those of every member in the sum."""
    server, first, found = MaliciousServer(13), list(range(10)), lists(13)
    ctx = server.collect(first, found)
    assert np.array_equal(server.finish(ctx, first, first, first[3:]), total(found, first))
    with pytest.raises(SecAggError):
        ctx = server.collect(second, found, attempt=1)
        server.finish(ctx, second, second, second[1:] if len(second) > 3 else second)


def test_a09_the_document_promises_one_sum_of_a_round() -> None:
    assert "never more than one sum of one round" in DOCUMENT


# ---- A10, A11, A12: what sums reveal -----------------------------------------------------------------------------


def test_a10_two_rounds_that_differ_by_one_member_reveal_it_and_the_document_says_so() -> None:
    """Vectors that repeat, as training without noise does: masks cannot help, only noise."""
    federation, found = Federation(5), vectors(5, WORDS)
    everybody = federation.run(found, 1)
    without = federation.run(found, 2, lost={"masked": ["site-004"]})
    assert np.array_equal(everybody.words - without.words, found["site-004"])
    assert "Without differential privacy, a site that takes part in one round and not in the next shows" in DOCUMENT
    assert "the difference of sums of several rounds, say things that only noise hides" in DOCUMENT


def test_a11_a_coordinate_that_one_site_feeds_shows_in_the_sum_and_noise_covers_every_coordinate() -> None:
    federation = Federation(4)
    found = {n: np.zeros(WORDS, np.uint32) for n in names(4)}
    found["site-002"][5] = 77
    assert federation.run(found).words[5] == 77
    assert "What the sum reveals: a number that only one site moves" in DOCUMENT
    idle = nn.Parameter(torch.zeros(1000))  # no record's gradient reaches it
    noisy = PrivateOptimizer(
        torch.optim.SGD([idle], lr=1.0),
        {"idle": idle},
        [ClipGroup(("idle",), 1.0)],
        noise_multiplier=1.0,
        expected_batch_size=4.0,
        keystream=Keystream(bytes(32)),
    )
    idle.grad_sample = torch.zeros(4, 1000)  # type: ignore[attr-defined]
    noisy.step()
    assert int((idle.detach() != 0).sum()) >= 999
    assert 0.2 < float(idle.detach().std()) < 0.3


def test_a12_no_trained_layer_takes_a_picture_in() -> None:
    """SRATTA reads inputs off the first trained layer: here that sees features of a frozen tower."""
    model = FedMPT(FakeBackbone(), ("cat", "dog"), ("color", "pose"), ModelConfig(adapter_width=3, gate_width=3), 1)
    parts = {name.split(".")[0] for name in model.layout().names}
    assert parts == {"contexts", "adapters", "gate", "head"}
    adapter = dict(zip(model.layout().names, model.layout().shapes, strict=True))["adapters.down"]
    assert 16 in adapter  # the width of a patch's feature
    trained = {id(p) for p in model.trainable_parameters().values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained


# ---- A13: overflow -----------------------------------------------------------------------------------------------


@given(st.integers(3, 1000), st.integers(4, 24), st.sampled_from([-1.0, 1.0]), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a13_the_largest_sum_within_the_headroom_is_exact(sites: int, bits: int, sign: float, seed: int) -> None:
    largest = ((2**31 - 1) // sites) / 2**bits
    assert headroom(sites, largest, bits) < 2**31
    with pytest.raises(SecAggError, match="sums could run over"):
        headroom(sites, (2**31 // sites + 1) / 2**bits, bits)
    encoding = Encoding(3, max_sites=sites, value_range=largest, fraction_bits=bits, rounding="deterministic")
    one = encoding.encode(np.full(3, sign * largest)).words
    several = (one.astype(np.uint64) * sites).astype(np.uint32)
    assert np.abs(encoding.decode(several, sites).mean - sign * largest).max() <= 2.0**-bits
    beyond = encoding.encode(np.full(3, sign * largest * (1 + seed / 2**20) + sign))
    assert np.array_equal(beyond.words, one)  # cut off, not wrapped
    assert beyond.clamped == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a13_what_is_not_finite_is_not_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    found = Sites(tmp_path, monkeypatch)
    site = found.sites["site-000"]
    site.begin(found.open(START), 1, LAYOUT.encode(START))
    raw = LAYOUT.encode(START)[:-4] + struct.pack("<f", value)
    with pytest.raises(LayoutError, match="NaN or infinity"):
        site.mask(raw, 1.0, {"loss": 0.5})
    refused(Abort.OVERFLOW, "NaN or infinity", site.mask, LAYOUT.encode(START), 1.0, {"loss": value})
    refused(Abort.OVERFLOW, "share=|max_weight", site.mask, LAYOUT.encode(START), value, {"loss": 0.5})
    refused(Abort.OVERFLOW, "above secagg.max_weight=1000", site.mask, LAYOUT.encode(START), 1001, {"loss": 0.5})


# ---- A14: weak masks ---------------------------------------------------------------------------------------------


def test_a14_every_context_and_edge_has_its_own_mask_and_no_mask_is_one_number() -> None:
    server, count = MaliciousServer(4, 64), 4
    zero = [np.zeros(64, np.uint32)] * count
    seen: list[np.ndarray] = []
    for number in range(1, 6):
        for attempt, model in ((0, MODEL), (1, MODEL), (2, OTHER_MODEL)):
            ctx = server.collect(range(4), zero, number, attempt, model=model)
            seen += [server.masked[ctx, i].vector for i in range(4)]
    words = np.concatenate(seen)
    assert len(np.unique(words)) >= len(words) - 4  # 32 bits: a few thousand words hardly ever meet
    for one, other in combinations(seen, 2):
        assert not np.array_equal(one - one[0], other - other[0])


def test_a14_edges_differ_by_peer_and_round_and_agree_at_both_ends() -> None:
    federation, ctx = Federation(5), bytes(32)
    pairs = [one._exchange.pairs for one in federation.members.values()]  # type: ignore[union-attr]
    seeds: dict[bytes, tuple[int, int, int]] = {}
    for number in range(1, 6):
        for one in pairs:
            one.advance(number)
        for i, j in combinations(range(5), 2):
            seed = pairs[i].edge_seed(j, ctx)
            assert seed == pairs[j].edge_seed(i, ctx)
            assert seeds.setdefault(seed, (number, i, j)) == (number, i, j)
    assert len(seeds) == 50


def test_a14_keys_of_a_round_are_gone_when_its_sum_is_out() -> None:
    """A thief of a member's memory after a round must not take its masks off a recorded vector."""
    server, cohort = MaliciousServer(4), range(4)
    ctx = server.collect(cohort, lists(4))
    known = {server.clients[0]._exchange.pairs.edge_seed(j, ctx) for j in (1, 2, 3)}  # type: ignore[union-attr]
    server.finish(ctx, cohort, cohort, cohort)
    left = {server.clients[0]._exchange.pairs.edge_seed(j, ctx) for j in (1, 2, 3)}  # type: ignore[union-attr]
    assert not known & left


# ---- A15: members that lie ---------------------------------------------------------------------------------------


def lying(federation: Federation, who: int, **changes: Callable[[Insider, bytes], bytes]) -> Callable[..., bytes]:
    """A hook for `Federation.run` in which a member's message of a phase is changed."""
    name, cohort = names(len(federation.members))[who], range(len(federation.members))
    evil = Insider(federation.members[name], cohort, federation.terms.words)

    def change(phase: str, speaker: str, data: bytes) -> bytes:
        return changes[phase](evil, data) if speaker == name and phase in changes else data

    return change


def test_a15_a_member_that_commits_to_other_keys_than_its_peers_is_left_out() -> None:
    federation, found = Federation(5), vectors(5, WORDS)

    def everywhere(evil: Insider, data: bytes) -> bytes:
        for peer in evil.others:
            data = evil.with_edge_commitment(data, peer)
        return data

    with pytest.raises(RoundLost, match="disagree on their common key") as lost:
        federation.run(found, change=lying(federation, 2, masked=everywhere))
    assert lost.value.culprits == ("site-002",)
    assert not lost.value.signed
    with pytest.raises(RoundLost) as lost:
        federation.run(found, attempt=1, change=lying(federation, 2, masked=lambda e, d: e.with_edge_commitment(d, 4)))
    assert lost.value.culprits == ("site-002", "site-004")  # of two nobody can tell which lies
    request = federation.server.open_round(1, 2, [n for n in names(5) if n != "site-002"], MODEL)
    assert len(wire.RoundRequest.decode(request, 9).cohort) == 4


def test_a15_a_wrong_commitment_to_a_self_mask_gives_no_sum_and_the_name() -> None:
    federation = Federation(4)
    with pytest.raises(RoundLost, match="secret of member 1 does not open") as lost:
        federation.run(vectors(4, WORDS), change=lying(federation, 1, masked=lambda e, d: e.with_self_commitment(d)))
    assert lost.value.culprits == ("site-001",)
    assert lost.value.signed


def test_a15_a_row_that_does_not_open_costs_the_round_nothing_while_enough_others_answer() -> None:
    federation, found = Federation(4), vectors(4, WORDS)
    change = lying(federation, 3, masked=lambda e, d: e.with_bad_row(d, 0))
    request = federation.begin()
    for name, one in federation.members.items():
        one.begin(request, MODEL)
        federation.server.take_masked(name, change("masked", name, one.mask(found[name])))
    request = federation.server.consistency_request()
    for name, one in federation.members.items():
        federation.server.take_consistency(name, one.consistency(request))
    for name, request in federation.server.unmask_requests().items():
        one = federation.members[name]
        if name == "site-000":
            error = refused(Abort.BAD_SHARE, "from member 3 to 0 does not open", one.unmask, request)
            assert federation.server.take_abort(name, one.abort(error)) == (Abort.BAD_SHARE, "site-003")
        else:
            federation.server.take_unmask(name, one.unmask(request))
    assert np.array_equal(federation.server.finish().words, plain_sum(found, names(4)))


def test_a15_a_message_changed_after_its_signature_or_spoken_for_another_is_refused() -> None:
    federation = Federation(4)
    one, request = federation.members["site-000"], federation.begin()
    one.begin(request, MODEL)
    good, take = one.mask(lists(4)[0]), federation.server.take_masked
    refused(Abort.MALFORMED, "not the one it signed", take, "site-000", good[:-1] + bytes([good[-1] ^ 1]))
    refused(Abort.BAD_SIG, "not signed with the key", take, "site-000", good[:80] + bytes([good[80] ^ 1]) + good[81:])
    refused(Abort.ROSTER, "site-001 speaks as member 0", take, "site-001", good)
    refused(Abort.MALFORMED, "bytes, expected are", take, "site-000", good + bytes(4))
    take("site-000", good)
    refused(Abort.CTX_MISMATCH, "one vector of each member", take, "site-000", good)
    evil = Insider(one, range(4), WORDS)
    other = evil.signed(replace(evil.read(good), self_commitment=bytes(32)))
    refused(Abort.CTX_MISMATCH, "one vector of each member", take, "site-000", other)


def test_a15_a_dealer_of_one_wrong_share_does_not_get_its_honest_receiver_named() -> None:
    """Server and responders see the same bytes whether dealer or responder lies, so no honest one may stand alone."""
    federation, found = Federation(5), vectors(5, WORDS)
    result = federation.run(found, change=lying(federation, 0, masked=lambda e, d: e.with_bad_share(d, 1)))
    assert np.array_equal(result.words, plain_sum(found, names(5)))
    assert "site-000" in result.culprits or not result.culprits


def test_a15_one_member_within_the_redundancy_can_neither_lose_a_round_nor_have_another_named() -> None:
    """It deals two wrong shares, which spends the redundancy, then sends one wrong share of an honest member."""
    federation, found = Federation(10), vectors(10, WORDS)  # threshold 7, nine answer
    change = lying(
        federation,
        0,
        masked=lambda e, d: e.with_bad_share(e.with_bad_share(d, 1), 2),
        unmask=lambda e, d: e.with_bad_shares_for(d, range(9), [5]),
    )
    try:
        result = federation.run(found, change=change, lost={"masked": ["site-009"]})
    except RoundLost as lost:
        pytest.fail(f"lost, and {lost.culprits} named: {lost}")
    assert np.array_equal(result.words, plain_sum(found, names(9)))


def test_a15_a_responder_without_redundancy_does_not_get_an_honest_dealer_named_alone() -> None:
    """Three of three must answer: nobody can tell whether the dealer or a responder lied."""
    federation = Federation(3)
    with pytest.raises(RoundLost) as lost:
        federation.run(
            vectors(3, WORDS),
            change=lying(federation, 2, unmask=lambda e, d: e.with_bad_shares_for(d, range(3), [0])),
        )
    assert lost.value.culprits != ("site-000",)


# ---- A16: numbers beside the envelope ----------------------------------------------------------------------------


def test_a16_update_weight_and_loss_change_the_masked_words_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same keys and the same randomness, every byte outside the vector, its digest and signature is equal."""
    found = Sites(tmp_path, monkeypatch)
    site, request = found.sites["site-000"], found.open(START)
    monkeypatch.setattr(client_module.os, "urandom", lambda count: bytes(range(count)))
    monkeypatch.setattr(
        client_module, "split", lambda secret, threshold, count: split(secret, threshold, count, randbelow=lambda p: 5)
    )
    sent, client = [], site._client
    for update, weight, loss in ((START, 1, 0.0), (-START, 1000, 999.0), (moved(0.5), 500, -3.5)):
        client._latch, client._state, client._answers, site._pending = Latch("run-1"), "READY", {}, None
        assert site.begin(request, 1, LAYOUT.encode(START)) is None
        sent.append(site.mask(LAYOUT.encode(update), weight, {"loss": loss, "private": 3.0}))
    words = 4 * found.encoding.words
    outside = {m[:43] + m[75 : -64 - words] for m in sent}
    assert len({len(m) for m in sent}) == 1
    assert len(outside) == 1
    assert len({m[-words:] for m in sent}) == 3


def test_a16_a_refusal_is_as_long_whatever_happened() -> None:
    federation = Federation(3)
    one = federation.members["site-000"]
    errors = [SecAggError(code, "x" * code, culprit=code) for code in Abort] + [SecAggError(Abort.OVERFLOW, "")]
    assert {len(one.abort(error)) for error in errors} == {106}


# ---- A17: code without masks -------------------------------------------------------------------------------------


def test_a17_the_record_that_the_guard_reads_names_no_plain_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leaves is compared with the site's record; the plain update and the unmasked words are never in it."""
    found = Sites(tmp_path, monkeypatch)
    site = found.sites["site-000"]
    site.begin(found.open(START), 1, LAYOUT.encode(START))
    sent = site.mask(LAYOUT.encode(START), 10, {"loss": 0.5})
    latch = site._client.latch
    plain = found.encoding.encode(START, 10 / 1000, {"loss": 0.5}).words
    assert latch.has_said(sent)
    unmasked = sent[: -plain.nbytes] + plain.tobytes()
    for other in (LAYOUT.encode(START), START.tobytes(), plain.tobytes(), unmasked, b""):
        assert not latch.has_said(other)
    with pytest.raises(SecAggError):
        found.server.take_masked("site-000", unmasked)


# ---- A18: signatures made elsewhere ------------------------------------------------------------------------------


def test_a18_a_signature_that_a_server_gets_from_a_registration_is_no_session_s() -> None:
    """FLARE has a client sign its name and a nonce of the server, with a salt as long as the key allows."""
    authority, key, now = Authority(), generate_private_key(65537, 2048), int(time.time())
    who = authority.mint("site-000", key)
    session = Session("job-0", "site-000", who.certificate_sha256, bytes(32), now - 9, now + 9).encode()
    assert not session.startswith(b"site-000")
    with pytest.raises(UnicodeDecodeError):
        session.decode()

    def check(signature: bytes) -> object:
        return ChainCheck(authority.pem).check(
            name="site-000", job_id="job-0", session=session, session_signature=signature,
            signing_key=bytes(32), chain=who.chain, now=now,
        )  # fmt: skip

    assert check(who.sign(session))
    oracle = key.sign(session, PSS(MGF1(SHA256()), PSS.MAX_LENGTH), SHA256())
    refused(Abort.BAD_SIG, "not signed with its certificate's key", check, oracle)


def test_a18_no_signature_of_the_protocol_stands_for_another() -> None:
    server, cohort = MaliciousServer(4), range(4)
    ctx = server.collect(cohort, lists(4))
    one = Insider(server.clients[0], cohort, WORDS)
    masked = server.masked[ctx, 0]
    texts = {
        "confirm": wire.confirm_text(server.terms.digest, server.directory),
        "consistency": wire.consistency_text(ctx, server.directory, tuple(cohort)),
        "masked": masked.text,
        "unmasked": wire.Unmasked(ctx, 0, (), (), b"").text,
        "abort": wire.AbortMessage(ctx, 0, Abort.POLICY, 0, b"").text,
        "result": wire.result_text(ctx, tuple(cohort), bytes(32)),
        "advert": wire.Advertisement.decode(one.keys.advert).body,
    }
    for name, text in texts.items():
        for other in texts:
            if other == name:
                one.keys.verify(0, one.keys.sign(text), texts[other], other)
            else:
                refused(Abort.BAD_SIG, "did not sign", one.keys.verify, 0, one.keys.sign(text), texts[other], other)
    assert len({text[:5] for text in texts.values()}) == len(texts)


# ---- A19: the same task again ------------------------------------------------------------------------------------


def test_a19_a_task_that_comes_again_gets_the_same_bytes_and_a_changed_one_a_refusal() -> None:
    server, cohort = MaliciousServer(4), range(4)
    client, request = server.clients[0], server.open_round(cohort)
    ctx = server.collect(cohort, lists(4))
    sent = client.begin(request, MODEL)
    assert sent == client.begin(request, MODEL)
    assert sent is not None and sent.startswith(b"\xffMSK1")
    listed = wire.ConsistencyRequest(ctx, tuple(cohort)).encode()
    assert client.consistency(listed) == client.consistency(listed)
    assert client.begin(request, MODEL) == sent
    signatures = server.ask(ctx, cohort, cohort)
    asked = server.unmask_request(0, ctx, cohort, cohort, signatures)
    fewer = server.unmask_request(0, ctx, cohort, cohort, {i: signatures[i] for i in (0, 1, 2)})
    shares = client.unmask(asked)
    assert client.unmask(asked) == shares
    refused(Abort.CTX_MISMATCH, "in state READY", client.unmask, fewer)
    assert client.unmask(asked) == shares
    refused(Abort.LATCHED, "cannot be repeated", client.begin, server.open_round([0, 1, 2]), MODEL)
    assert client.consistency(listed)


def test_a19_the_same_attempt_with_other_content_is_refused_while_a_member_trains_and_after() -> None:
    server = MaliciousServer(4)
    client = server.clients[0]
    client.begin(server.open_round(range(4)), MODEL)
    refused(Abort.CTX_MISMATCH, "with other content", client.begin, server.open_round([0, 1, 2]), MODEL)
    with pytest.raises(UnexpectedMessage, match="a vector in state READY"):
        client.mask(lists(4)[0])
    client.begin(server.open_round(range(4)), MODEL)
    client.mask(lists(4)[0])
    refused(Abort.CTX_MISMATCH, "expected was one after", client.begin, server.open_round([0, 1, 2]), MODEL)


# ---- A20: other terms in the middle of a job ---------------------------------------------------------------------


def test_a20_every_number_of_the_agreement_is_in_the_job_s_digest() -> None:
    def digest(job: JobConfig, layout: ParameterLayout = LAYOUT, backbone: str = "0" * 64) -> bytes:
        return secure_terms(job, "run-1", layout, backbone)[0].digest

    changed = [
        replace(JOB, secagg=replace(JOB.secagg, **{name: value}))
        for name, value in {
            "colluders": 2, "value_range": 2.5, "fraction_bits": 19, "rounding": "stochastic", "max_sites": 99,
            "max_weight": 999, "metrics": (), "insecure_identities": False,
        }.items()
    ]  # fmt: skip
    changed += [replace(JOB, federation=replace(JOB.federation, min_sites=4))]
    changed += [replace(JOB, training=replace(JOB.training, rounds=5))]
    found = [digest(job) for job in [JOB, *changed]]
    found += [digest(JOB, ParameterLayout(LAYOUT.names, ((3, 2), (4,)))), digest(JOB, backbone="1" * 64)]
    assert len(set(found)) == len(found)


def test_a20_a_server_with_other_terms_gets_no_keys_and_no_vector() -> None:
    federation = Federation(4)
    other = replace(federation.terms, digest=bytes(32))
    liar = SecAggServer(other, ChainCheck(None))
    request = liar.open_epoch(names(4))
    one = federation.members["site-000"]
    refused(Abort.CTX_MISMATCH, "terms of the job are not this site's", one.advertise, request)
    # and with honest keys, numbers beyond the agreed ones
    server = MaliciousServer(4, rounds=3, attempts=1)
    for number, attempt in ((0, 0), (4, 0), (2**32 - 1, 0), (1, 2)):
        request = server.open_round(range(4), number, attempt)
        refused(Abort.POLICY, "beyond the job's 3 rounds and 1 further", server.clients[0].begin, request, MODEL)
    longer = Terms(**{**server.terms.__dict__, "words": WORDS + 1})
    assert longer.words != server.terms.words
    server.clients[0].begin(server.open_round(range(4)), MODEL)
    refused(Abort.OVERFLOW, "the job has 8 words", server.clients[0].mask, np.zeros(9, np.uint32))
