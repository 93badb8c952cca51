"""Attacks on the protocol, A1 to A20, over its own bytes: each is refused, or the documents say that it is not."""

import struct
import time
from base64 import encodebytes
from collections.abc import Callable, Iterable, Sequence
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
from fedmpt_core.secagg.context import epoch_digest, model_digest
from fedmpt_core.secagg.dealing import SLOTS
from fedmpt_core.secagg.encoding import Encoding
from fedmpt_core.secagg.errors import Abort, SecAggError, UnexpectedMessage
from fedmpt_core.secagg.headroom import headroom
from fedmpt_core.secagg.identity import ChainCheck, Session, SiteIdentity
from fedmpt_core.secagg.keys import self_mask_key
from fedmpt_core.secagg.latch import Latch
from fedmpt_core.secagg.masking import add_all
from fedmpt_core.secagg.policy import Floors
from fedmpt_core.secagg.roster import Roster
from fedmpt_core.secagg.server import SecAggServer
from fedmpt_core.secagg.shamir import Lagrange
from fedmpt_core.secagg.wire import u16
from tests.fakes import FakeBackbone
from tests.malicious import Authority, Insider, MaliciousServer
from tests.secagg import MODEL, OTHER_MODEL, Federation, identity, names, plain_sum, terms, vectors
from tests.settings import POLICY, UNPROTECTED

DOCUMENT = " ".join((Path(__file__).parents[3] / "docs" / "secure-aggregation.md").read_text(encoding="utf-8").split())
WORDS = 8


def lists(count: int, words: int = WORDS, seed: int = 0) -> list[np.ndarray]:
    """Vectors by place."""
    return list(vectors(count, words, seed).values())


def total(summands: Sequence[np.ndarray], chosen: Iterable[int]) -> np.ndarray:
    """Sum of some vectors."""
    return plain_sum({str(i): v for i, v in enumerate(summands)}, [str(i) for i in chosen])


def refused(code: Abort, match: str, call: Callable[..., object], *arguments: object) -> SecAggError:
    """That a call is refused for this reason."""
    with pytest.raises(SecAggError, match=match) as refusal:
        call(*arguments)
    assert refusal.value.code == code, refusal.value
    return refusal.value


# ---- A1: both keys of a mask -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "code", "match"),
    [
        ([0, 1, 2, 2, 3], Abort.MALFORMED, "twice or out of order"),
        ([0, 1, 3, 2], Abort.MALFORMED, "twice or out of order"),
        ([0, 1, 2, 3, 9], Abort.POLICY, "holds one that has dealt nothing"),
        ([0, 1, 2, 3, 5], Abort.POLICY, "holds one that has dealt nothing"),
        ([1, 2, 3, 4], Abort.POLICY, "lacks this site"),
        ([0, 1, 2, 3], Abort.BELOW_THRESHOLD, "4 members are to be summed of a directory of 6, the threshold is 5"),
        ([], Abort.POLICY, "lacks this site"),
    ],
    ids=["twice", "out-of-order", "stranger", "no-dealer", "without-the-site", "too-few", "nobody"],
)
def test_a01_for_a_list_that_is_no_honest_one_nothing_is_masked(listed: list[int], code: Abort, match: str) -> None:
    server = MaliciousServer(6, lost={"deal": ["site-005"], "confirm": ["site-005"]})
    one = server.clients[0]
    one.begin(server.open_round(), MODEL)
    request = server.mask_request([0, 1, 2, 3, 4])[: -2 * 6] + u16(len(listed)) + b"".join(map(u16, listed))
    refused(code, match, one.mask, request, lists(6)[0])
    refused(Abort.CTX_MISMATCH, "in state READY", one.mask, server.mask_request(range(5)), lists(6)[0])


@pytest.mark.parametrize("asked", [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 3, 4, 5]], ids=["fewer", "other", "more"])
def test_a01_shares_open_the_list_that_was_masked_for_and_no_other(asked: list[int]) -> None:
    server, listed = MaliciousServer(6), [0, 1, 2, 3, 4]
    ctx = server.collect(listed, lists(6))
    one = server.clients[0]
    refused(Abort.CTX_MISMATCH, "another job, round, attempt or list", one.open,
            wire.OpenRequest(server.context(asked)).encode())  # fmt: skip
    refused(Abort.CTX_MISMATCH, "in state READY", one.open, wire.OpenRequest(ctx).encode())


def test_a01_no_answer_holds_a_share_of_another_member_or_slot_or_a_key_between_two() -> None:
    server, listed = MaliciousServer(6, kinds={"site-000": Insider}), [0, 2, 3, 4, 5]
    one = server.clients[0]
    assert isinstance(one, Insider)
    held = {(slot, m): one.keys.shares(slot, [m])[0] for slot in range(SLOTS + 1) for m in range(6)}
    ctx = server.collect(listed, lists(6), turn=3)
    answer = one.open(wire.OpenRequest(ctx).encode())
    assert {at for at, share in held.items() if share in answer} == {(3, m) for m in listed}
    assert len(answer) == 39 + 33 * 5 + 64  # there is room for nothing else


# ---- A2: different lists to different members --------------------------------------------------------------------


def test_a02_two_lists_of_one_slot_open_neither_though_the_seeds_of_one_do() -> None:
    """Shares of the first list are of secrets with which members of the other have masked too; their edges stay."""
    server, summands = MaliciousServer(7), lists(7)  # threshold 5; member 0 masks and opens whatever it is asked to
    one, other = list(range(7)), list(range(6))
    first = server.collect(one, summands, only=[0, 1, 2, 3, 6])
    second = server.collect(other, summands, only=[4, 5])
    server.open(first, one, [0, 1, 2, 3, 6])
    server.open(second, other, [4, 5])
    seeds = {}
    for place in one:
        shares = server.shares[first]
        seeds[place] = Lagrange([1, 2, 3, 4, 7]).combine([shares[i][place] for i in (0, 1, 2, 3, 6)])
    for ctx, members in ((first, [0, 1, 2, 3, 6]), (second, [4, 5])):
        words = np.asarray(np.sum([server.masked[ctx, i].vector for i in members], axis=0, dtype=np.uint32))
        add_all(words, [], [self_mask_key(seeds[i], ctx) for i in members])
        assert not np.isin(words, total(summands, members)).any()
        for i in members:
            alone = server.masked[ctx, i].vector.copy()
            add_all(alone, [], [self_mask_key(seeds[i], ctx)])
            assert not np.isin(alone, summands[i]).any()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a02_a_sum_is_opened_at_the_threshold_and_not_below(count: int) -> None:
    server, summands = MaliciousServer(4), lists(4)
    ctx = server.collect(range(4), summands)
    server.open(ctx, range(4), range(count))
    assert np.array_equal(server.sum(ctx, range(4)), total(summands, range(4))) == (count >= 3)


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

    def client(self, who: SiteIdentity, roster: Roster | None = None) -> Insider:
        """A member of this roster, or of another."""
        return Insider(self.terms, who, roster or self.roster, authority().pem, None, lambda latch: None)

    def advert(self, client: SecAggClient, epoch: int = 1) -> bytes:
        """ADV1."""
        return client.advertise(wire.AdvertiseRequest(self.terms.digest, epoch, 1).encode())

    def directory(self, adverts: Sequence[bytes] | None = None) -> bytes:
        """DRC1."""
        return wire.Directory(tuple(self.adverts if adverts is None else adverts)).encode()

    def with_(self, at: int, advert: bytes) -> bytes:
        """DRC1 with one advert replaced."""
        return self.directory([*self.adverts[:at], advert, *self.adverts[at + 1 :]])

    def dealt(self) -> list[wire.Deal]:
        """Everybody's dealing of the right directory."""
        return [wire.Deal.decode(c.deal(self.directory()), members=4, threshold=3) for c in self.clients]

    def deals(self, dealt: Sequence[wire.Deal], to: int) -> bytes:
        """DLS1 for one member."""
        rows = [deal.sealed[to - (deal.member < to)] for deal in dealt if deal.member != to]
        return wire.Deals(tuple(dealt), tuple(rows[: len(dealt) - 1])).encode()


def test_a03_the_honest_directory_is_dealt_for_and_confirmed() -> None:
    setup = Setup()
    dealt = setup.dealt()
    confirms = [c.confirm(setup.deals(dealt, i)) for i, c in enumerate(setup.clients)]
    assert len(set(confirms)) == 4
    assert all(len(c) == 71 for c in confirms)


@pytest.mark.parametrize("signed", [False, True], ids=["old-signature", "signed-anew"])
def test_a03_a_substituted_exchange_key_is_refused(signed: bool) -> None:
    setup = Setup()
    liar, own = setup.clients[3], wire.Advertisement.decode(setup.adverts[3])
    forged = replace(wire.Advertisement.decode(setup.adverts[1]), exchange_key=own.exchange_key[::-1])
    raw = forged.encode()
    if signed:  # with a key of the server's own, for which there is no session of site-001
        raw = liar.signed(replace(forged, signing_key=own.signing_key))
    error = refused(
        Abort.BAD_SIG,
        "session of site-001 is for another" if signed else "member 1 did not sign the keys of site-001",
        setup.clients[0].deal,
        setup.with_(1, raw),
    )
    assert error.culprit == 1
    refused(Abort.CTX_MISMATCH, "in state NEW", setup.clients[0].deal, setup.directory())  # a new epoch is needed


def test_a03_a_certificate_minted_by_the_holder_of_the_root_key_is_refused() -> None:
    setup = Setup()
    fresh = authority().mint("site-001")
    middle = setup.client(fresh, authority().roster([fresh, *(hospital(n) for n in names(4) if n != "site-001")]))
    own = wire.Advertisement.decode(setup.advert(middle))
    refused(Abort.ROSTER, "has another job, roster or epoch", setup.clients[0].deal, setup.with_(1, own.encode()))
    setup = Setup()
    claimed = middle.signed(replace(own, roster_digest=setup.roster.digest()))
    error = refused(Abort.ROSTER, "site-001 has key .*, the roster has", setup.clients[0].deal, setup.with_(1, claimed))
    assert error.culprit == 1


def test_a03_a_member_outside_the_roster_is_refused_by_the_members_that_lack_it() -> None:
    setup = Setup()
    sybil = setup.client(hospital("site-004"), authority().roster([hospital(n) for n in names(5)]))
    own = wire.Advertisement.decode(setup.advert(sybil))
    # it says what its own roster is, and then what the others' is
    claimed = sybil.signed(replace(own, roster_digest=setup.roster.digest()))
    for raw, match in ((own.encode(), "another job, roster or epoch"), (claimed, "site-004 is not in the roster")):
        again = Setup()
        refused(Abort.ROSTER, match, again.clients[0].deal, again.directory([*again.adverts, raw]))


def test_a03_a_directory_without_the_member_s_own_words_or_with_others_is_refused() -> None:
    setup = Setup()
    refused(Abort.ROSTER, "not hold what this site advertised", setup.clients[0].deal,
            setup.directory(setup.adverts[1:]))  # fmt: skip
    other = Setup()  # the same members in another run of the exchange: all is genuine, but not this one's own entry
    mixed = other.with_(1, setup.adverts[1])
    refused(Abort.ROSTER, "not hold what this site advertised", other.clients[1].deal, mixed)


@pytest.mark.parametrize(
    ("order", "code", "match"),
    [
        ([0, 1, 1, 2, 3], Abort.ROSTER, "ascending order of distinct sites"),
        ([0, 2, 1, 3], Abort.ROSTER, "ascending order of distinct sites"),
        ([0, 1], Abort.POLICY, "2 members cannot protect each other"),
    ],
    ids=["a-site-twice", "out-of-order", "too-few"],
)
def test_a03_a_directory_lists_each_member_once_and_enough_of_them(order: list[int], code: Abort, match: str) -> None:
    setup = Setup()
    refused(code, match, setup.clients[0].deal, setup.directory([setup.adverts[i] for i in order]))


@pytest.mark.parametrize("field", ["exchange_key", "signing_key"])
def test_a03_two_members_never_have_the_same_key(field: str) -> None:
    """An insider that takes another's exchange key would stand in the same relation to everybody."""
    setup = Setup()
    advert = wire.Advertisement.decode(setup.adverts[3])
    value = getattr(wire.Advertisement.decode(setup.adverts[1]), field)
    copied = setup.clients[3].signed(replace(advert, **{field: value}))
    code, match = (
        (Abort.ROSTER, "two members of the directory have the same key")
        if field == "exchange_key"
        else (Abort.BAD_SIG, "did not sign the keys of site-003")
    )
    refused(code, match, setup.clients[0].deal, setup.with_(3, copied))


def test_a03_an_exchange_key_of_low_order_is_refused() -> None:
    setup = Setup()
    weak = setup.clients[3].signed(replace(wire.Advertisement.decode(setup.adverts[3]), exchange_key=bytes(32)))
    assert refused(Abort.ROSTER, "low order", setup.clients[0].deal, setup.with_(3, weak)).culprit == 3


def test_a03_members_that_were_shown_different_directories_do_not_start_a_round() -> None:
    """Everything in both is genuine: member 3, who works with the server, has advertised twice and deals in both."""
    setup = Setup()
    twin = setup.client(hospital("site-003"))
    other = setup.with_(3, setup.advert(twin))
    dealt = [wire.Deal.decode(setup.clients[i].deal(setup.directory()), members=4, threshold=3) for i in (0, 1, 3)]
    apart = [wire.Deal.decode(c.deal(other), members=4, threshold=3) for c in (setup.clients[2], twin)]
    for i in (0, 1):
        setup.clients[i].confirm(setup.deals(dealt, i))
    refused(Abort.BELOW_THRESHOLD, "2 of 4 members have dealt, the threshold is 3",
            setup.clients[2].confirm, setup.deals(apart, 2))  # fmt: skip
    mixed = [*dealt[:2], apart[0], dealt[2]]
    refused(Abort.CTX_MISMATCH, "the dealing of member 0 is for another directory",
            setup.clients[2].confirm, setup.deals(mixed, 2))  # fmt: skip


def test_a03_members_that_were_shown_different_dealings_do_not_start_a_round() -> None:
    """A dealer that works with the server deals twice; what each member confirms is all dealings together."""
    setup = Setup()
    dealt = setup.dealt()
    second = wire.Deal.decode(setup.clients[3].dealing(lambda place, row: row), members=4, threshold=3)
    confirms = {}
    for i, c in enumerate(setup.clients[:3]):
        chosen = dealt if i < 2 else [*dealt[:3], second]
        confirms[i] = wire.Confirm.decode(c.confirm(setup.deals(chosen, i))).signature
    epoch = epoch_digest(dealt[0].directory, [deal.text for deal in dealt])
    confirms[3] = setup.clients[3].keys.sign(wire.confirm_text(epoch))
    request = wire.RoundRequest(epoch, 1, 0, MODEL, tuple(sorted(confirms.items()))).encode()
    refused(Abort.BAD_SIG, "member 2 did not sign the directory and the dealings",
            setup.clients[0].begin, request, MODEL)  # fmt: skip
    refused(Abort.CTX_MISMATCH, "a round of another epoch", setup.clients[2].begin, request, MODEL)
    fewer = wire.RoundRequest(epoch, 1, 0, MODEL, ((0, confirms[0]), (1, confirms[1]))).encode()
    refused(Abort.BELOW_THRESHOLD, "2 of 4 members have confirmed, the threshold is 3",
            setup.clients[1].begin, fewer, MODEL)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "code", "match"),
    [
        (lambda d: d[1:], Abort.ROSTER, "lack this site's own"),
        (lambda d: d[:2], Abort.BELOW_THRESHOLD, "2 of 4 members have dealt"),
        (lambda d: [*d[:3], replace(d[3], signature=bytes(64))], Abort.BAD_SIG, "member 3 did not sign its dealing"),
        (lambda d: [*d[:3], replace(d[3], member=9)], Abort.ROSTER, "or have one of a stranger"),
        (lambda d: [*d[:2], replace(d[3], member=2)], Abort.BAD_SIG, "member 2 did not sign its dealing"),
        (lambda d: [*d[:3], replace(d[3], dealing=d[2].dealing)], Abort.BAD_SIG, "member 3 did not sign its dealing"),
        (lambda d: [*d[:3], replace(d[3], sealed=d[2].sealed)], Abort.MALFORMED, "another row than member 3 sealed"),
        (lambda d: [*d[:3], replace(d[3], sealed=d[3].sealed[::-1])], Abort.MALFORMED, "another row than member 3"),
        (lambda d: [*d[:3], replace(d[3], sealed=(wire.shown(bytes(1089)),) * 3)], Abort.MALFORMED, "another row than"),
    ],
    ids=["without-own", "too-few", "unsigned", "stranger", "for-another", "others'", "others'-row", "swapped", "shown"],
)
def test_a03_dealings_that_the_server_has_changed_are_its_own_fault(change: Any, code: Abort, match: str) -> None:
    setup = Setup()
    dealt = setup.dealt()
    error = refused(code, match, setup.clients[0].confirm, setup.deals(change(dealt), 0))
    assert error.culprit is None
    assert setup.clients[0].confirm(setup.deals(dealt, 0))  # the right ones may still come, once


def test_a03_a_dealing_of_another_epoch_does_not_count() -> None:
    server = MaliciousServer(4)
    old = dict(server.federation.deals)
    request = server.federation.server.open_epoch(1)
    for name, one in server.federation.members.items():
        server.federation.server.take_advertisement(name, one.advertise(request))
    directory = server.federation.server.directory()
    for one in server.clients:
        one.deal(directory)
    refused(Abort.CTX_MISMATCH, "for another directory", server.clients[0].confirm, old["site-000"])


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_a03_a_certificate_with_a_broken_byte_is_refused_and_nothing_else() -> None:
    """Whatever a byte of a certificate becomes, it is a refusal, so that a crafted one ends nobody's process."""
    der = x509.load_pem_x509_certificate(identity("site-000").chain).public_bytes(Form.DER)
    check, now = ChainCheck(None), int(time.time())
    odd: set[str] = set()
    for at, value in product(range(0, len(der) - 256, 3), (0, 9, 250, 255)):  # the last 256 bytes are the signature
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
    request = server.open_round()
    refused(Abort.CTX_MISMATCH, "model that came is not the one", server.clients[0].begin, request, OTHER_MODEL)


def test_a04_a_member_with_a_model_of_its_own_is_in_no_sum() -> None:
    """Though the shares of its secret come with those of the list: the edges to the others still hide its vector."""
    server, summands = MaliciousServer(4), lists(4)
    ctx = server.collect(range(4), summands, only=[0, 1, 2])
    odd = server.collect(range(4), summands, only=[3], model=OTHER_MODEL)
    server.open(ctx, range(4), [0, 1, 2])
    refused(Abort.CTX_MISMATCH, "another job, round, attempt or list", server.open, ctx, range(4), [3])
    seeds = [Lagrange([1, 2, 3]).combine([server.shares[ctx][i][place] for i in range(3)]) for place in range(4)]
    contexts = [ctx, ctx, ctx, odd]
    words = np.asarray(np.sum([server.masked[c, i].vector for i, c in enumerate(contexts)], axis=0, dtype=np.uint32))
    add_all(words, [], [self_mask_key(seed, c) for seed, c in zip(seeds, contexts, strict=True)])
    assert not np.isin(words, total(summands, range(4))).any()
    honest = server.federation.server
    honest.open_round(1, 0, MODEL)
    message = server.masked[odd, 3].encode()
    refused(Abort.CTX_MISMATCH, "another job, round or attempt", honest.take_masked, "site-003", message)


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
        request = self.server.open_epoch(1)
        for name, site in self.sites.items():
            self.server.take_advertisement(name, site.advertise(request))
        directory = self.server.directory()
        for name, site in self.sites.items():
            self.server.take_deal(name, site.deal(directory))
        for name, request in self.server.deals().items():
            self.server.take_confirm(name, self.sites[name].confirm(request))

    def open(self, state: np.ndarray = START, number: int = 1, attempt: int = 0) -> bytes:
        """RND1 for parameters."""
        return self.server.open_round(number, attempt, model_digest(LAYOUT.split(state)))

    def masked(self, update: np.ndarray, weight: float, loss: float, attempt: int = 0) -> bytes:
        """What the first site sends for its update, while the others have none to speak of."""
        request = self.open(attempt=attempt)
        for name, site in self.sites.items():
            ready = site.begin(request, 1, LAYOUT.encode(START))
            given = (update, weight, loss) if name == "site-000" else (START, 1, 0.0)
            ready = site.hold(LAYOUT.encode(given[0]), given[1], {"loss": given[2], "private": 3.0})
            self.server.take_ready(name, ready)
        return self.sites["site-000"].mask(self.server.mask_request())


# ---- A5: a model made to leak ------------------------------------------------------------------------------------


def test_a05_parameters_beyond_what_updates_can_have_done_are_refused_before_anything_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bounds themselves are in tests/unit/federation/test_states.py."""
    sites, far = Sites(tmp_path, monkeypatch), START + np.float32(1000)
    site = sites.sites["site-000"]
    for _ in range(2):  # asking again changes nothing
        refused(Abort.POLICY, "moved by", site.begin, sites.open(far), 1, LAYOUT.encode(far))
    refused(
        Abort.CTX_MISMATCH, "another round than the task", site.begin, sites.open(START, 2), 1, LAYOUT.encode(START)
    )
    with pytest.raises(UnexpectedMessage):
        site.hold(LAYOUT.encode(START), 1, {"loss": 0.5})
    assert site.begin(sites.open(START), 1, LAYOUT.encode(START)) is None


# ---- A6: small sets, thresholds of the server's choice -----------------------------------------------------------


def test_a06_no_message_lowers_a_floor() -> None:
    with pytest.raises(SecAggError, match="min_cohort of at least 3"):
        Floors(2, 0)
    server = MaliciousServer(6, colluders=2, min_cohort=4)
    for attempt, listed in enumerate(([0], [0, 1], [0, 1, 2], [0, 1, 2, 3])):
        server.clients[0].begin(server.open_round(attempt=attempt), MODEL)
        request = server.mask_request(listed, attempt=attempt)
        refused(Abort.BELOW_THRESHOLD, "the threshold is 5", server.clients[0].mask, request, lists(6)[0])
    assert server.collect(range(5), lists(6), attempt=5)


def test_a06_a_site_refuses_a_job_with_lower_floors_than_its_own() -> None:
    data = DataConfig("scenes")
    assert check_site(JOB, SiteConfig(data, POLICY, SiteSecAggConfig(allow_metrics=("loss",))), has_kit=False)
    own = SiteSecAggConfig(allow_metrics=("loss",))
    for demanded in (replace(own, min_cohort=4), replace(own, colluders=2)):
        site = SiteConfig(data, POLICY, demanded)
        with pytest.raises(PrivacyRefused, match="are below this site's"):
            check_site(JOB, site, has_kit=False)


# ---- A7: replay --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["round", "attempt", "model", "list"])
def test_a07_a_vector_counts_in_its_own_context_only(again: str) -> None:
    federation, summands = Federation(4), vectors(4, WORDS)
    server = federation.server
    request = server.open_round(1, 0, MODEL)
    for name, one in federation.members.items():
        one.begin(request, MODEL)
        server.take_ready(name, one.ready())
    old = federation.members["site-000"].mask(server.mask_request(), summands["site-000"])
    if again == "list":
        server.mask_request(["site-003"])
    else:
        numbers = {"round": (2, 0, MODEL), "attempt": (1, 1, MODEL), "model": (1, 1, OTHER_MODEL)}[again]
        server.open_round(*numbers)
    refused(Abort.CTX_MISMATCH, "another job, round or attempt", server.take_masked, "site-000", old)


def test_a07_a_vector_of_another_job_of_the_same_members_does_not_count() -> None:
    one, other = MaliciousServer(4), MaliciousServer(4, job_id="job-1")
    one.collect(range(4), lists(4))
    other.federation.server.open_round(1, 0, MODEL)
    sent = next(iter(one.masked.values())).encode()
    refused(Abort.CTX_MISMATCH, "another job, round or attempt", other.federation.server.take_masked, "site-000", sent)
    refused(Abort.CTX_MISMATCH, "a round of another epoch", other.clients[0].begin, one.open_round(2), MODEL)


def test_a07_adverts_and_confirmations_of_an_old_epoch_do_not_count() -> None:
    server = MaliciousServer(4)
    federation = server.federation
    old, digest, confirms = federation.directory, federation.digest, dict(federation.confirms)
    request = federation.server.open_epoch(1)
    refused(Abort.CTX_MISMATCH, "another job, release or epoch", federation.server.take_advertisement, "site-000",
            wire.Directory.decode(old, 128).adverts[0])  # fmt: skip
    adverts = [one.advertise(request) for one in federation.members.values()]
    stale = wire.Directory((adverts[0], *wire.Directory.decode(old, 128).adverts[1:])).encode()
    refused(Abort.ROSTER, "another job, roster or epoch", server.clients[0].deal, stale)
    refused(Abort.CTX_MISMATCH, "epoch 1 came", server.clients[1].advertise,
            wire.AdvertiseRequest(server.terms.digest, 1, 1).encode())  # fmt: skip
    federation.exchange_keys()
    refused(Abort.BAD_SIG, "did not sign the directory", server.clients[0].begin,
            server.open_round(confirms=confirms), MODEL)  # fmt: skip
    refused(Abort.CTX_MISMATCH, "a round of another epoch", server.clients[1].begin,
            server.open_round(epoch=digest, confirms=confirms), MODEL)  # fmt: skip


# ---- A8: left out of the list, only delayed ----------------------------------------------------------------------


def test_a08_the_first_list_is_not_opened_after_the_second() -> None:
    """The server has the vector that was late, and is refused what would take its masks off."""
    server, summands = MaliciousServer(4), lists(4)
    first = server.collect(range(4), summands)
    second = server.collect(range(3), summands, turn=2)
    for i in range(3):
        refused(Abort.CTX_MISMATCH, "another job, round, attempt or list", server.open, first, range(4), [i])
    server.open(first, range(4), [3])  # the late member alone still would
    with pytest.raises(SecAggError):
        server.open(second, range(3), range(3))  # a refusal has ended the round
    again = server.collect(range(3), summands, turn=3, attempt=1)
    server.open(again, range(3), range(3))
    assert np.array_equal(server.sum(again, range(3)), total(summands, range(3)))


# ---- A9: two sums of one round (tests/unit/secagg/test_one_sum.py) -----------------------------------------------


def test_a09_the_document_promises_one_sum_of_a_round_for_every_site() -> None:
    assert "Several sums of one round have no honest site in common" in DOCUMENT
    assert "a thousand random ones" in DOCUMENT


# ---- A10, A11, A12: what sums reveal -----------------------------------------------------------------------------


def test_a10_two_rounds_that_differ_by_one_member_reveal_it_and_the_document_says_so() -> None:
    """Vectors that repeat, as training without noise does: masks cannot help, only noise."""
    federation, summands = Federation(5), vectors(5, WORDS)
    everybody = federation.run(summands, 1)
    without = federation.run(summands, 2, lost={"mask": ["site-004"]})
    assert np.array_equal(everybody.words - without.words, summands["site-004"])
    assert "Without differential privacy, a site that takes part in one round and not in the next shows" in DOCUMENT
    assert "the difference of sums of several rounds, say things that only noise hides" in DOCUMENT


def test_a11_a_coordinate_that_one_site_feeds_shows_in_the_sum_and_noise_covers_every_coordinate() -> None:
    federation = Federation(4)
    summands = {n: np.zeros(WORDS, np.uint32) for n in names(4)}
    summands["site-002"][5] = 77
    assert federation.run(summands).words[5] == 77
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
    assert np.abs(encoding.decode(several, [1.0] * sites).mean - sign * largest).max() <= 2.0**-bits
    beyond = encoding.encode(np.full(3, sign * largest * (1 + seed / 2**20) + sign))
    assert np.array_equal(beyond.words, one)  # cut off, not wrapped
    assert beyond.clamped == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a13_what_is_not_finite_is_not_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    sites = Sites(tmp_path, monkeypatch)
    site, block = sites.sites["site-000"], LAYOUT.encode(START)
    site.begin(sites.open(), 1, block)
    with pytest.raises(LayoutError, match="NaN or infinity"):
        site.hold(block[:-4] + struct.pack("<f", value), 1.0, {"loss": 0.5})
    refused(Abort.OVERFLOW, "NaN or infinity", site.hold, block, 1.0, {"loss": value})
    refused(Abort.OVERFLOW, "share=|max_weight", site.hold, block, value, {"loss": 0.5})
    refused(Abort.OVERFLOW, "above secagg.max_weight=1000", site.hold, block, 1001, {"loss": 0.5})


# ---- A14: weak masks ---------------------------------------------------------------------------------------------


def test_a14_every_context_and_edge_has_its_own_mask_and_no_mask_is_one_number() -> None:
    server, count = MaliciousServer(4, 64), 4
    zero = [np.zeros(64, np.uint32)] * count
    seen: list[np.ndarray] = []
    for number in range(1, 6):
        for attempt, listed in ((0, range(4)), (1, range(4)), (2, range(3))):
            ctx = server.collect(listed, zero, attempt + 1, number, attempt)
            seen += [server.masked[ctx, i].vector for i in listed]
    words = np.concatenate(seen)
    assert len(np.unique(words)) >= len(words) - 4  # 32 bits: a few thousand words hardly ever meet
    for one, other in combinations(seen, 2):
        assert not np.array_equal(one - one[0], other - other[0])


# ---- A15: members that lie (tests/unit/secagg/test_liars.py) -----------------------------------------------------


def test_a15_a_message_changed_after_its_signature_or_spoken_for_another_is_refused() -> None:
    federation = Federation(4, kinds={"site-000": Insider})
    one, server = federation.members["site-000"], federation.server
    request = server.open_round(1, 0, MODEL)
    for name, member_ in federation.members.items():
        member_.begin(request, MODEL)
        server.take_ready(name, member_.ready())
    good, take = one.mask(server.mask_request(), lists(4)[0]), server.take_masked
    refused(Abort.MALFORMED, "not the one it signed", take, "site-000", good[:-1] + bytes([good[-1] ^ 1]))
    refused(Abort.BAD_SIG, "not signed with the key", take, "site-000", good[:80] + bytes([good[80] ^ 1]) + good[81:])
    refused(Abort.ROSTER, "site-001 speaks as member 0", take, "site-001", good)
    refused(Abort.MALFORMED, "bytes, expected are", take, "site-000", good + bytes(4))
    take("site-000", good)
    refused(Abort.CTX_MISMATCH, "one vector of each member", take, "site-000", good)


# ---- A16: numbers beside the envelope ----------------------------------------------------------------------------


def test_a16_update_weight_and_loss_change_the_masked_words_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte before the digest of the words follows from what the server has asked for."""
    sites = Sites(tmp_path, monkeypatch)
    sent = [
        sites.masked(update, weight, loss, attempt)
        for attempt, (update, weight, loss) in enumerate(
            ((START, 1, 0.0), (-START, 1000, 999.0), (START / 2, 500, -3.5))
        )
    ]
    words = sites.encoding.words
    assert {len(m) for m in sent} == {5 + 32 + 2 + 4 + 32 + 64 + 4 * words}
    assert len({m[:5] + m[37:43] for m in sent}) == 1
    for m in sent:
        masked = wire.Masked.decode(m, words)
        assert masked.digest == sha256(masked.vector.data).digest()


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
    sites = Sites(tmp_path, monkeypatch)
    sent = sites.masked(START, 10, 0.5)
    latch = Latch.from_json(next((tmp_path / "site-000").rglob("*.json")).read_text())
    plain = sites.encoding.encode(START, 10 / 1000, {"loss": 0.5}).words
    assert latch.has_said(sent)
    unmasked = sent[: -plain.nbytes] + plain.tobytes()
    for other in (LAYOUT.encode(START), START.tobytes(), plain.tobytes(), unmasked, b""):
        assert not latch.has_said(other)
    with pytest.raises(SecAggError):
        sites.server.take_masked("site-000", unmasked)


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
    server = MaliciousServer(4, kinds={"site-000": Insider})
    ctx = server.collect(range(4), lists(4))
    one = server.clients[0]
    assert isinstance(one, Insider)
    texts = {
        "advert": wire.Advertisement.decode(one.keys.advert).body,
        "dealing": server.federation.dealings[0].text,
        "confirm": wire.confirm_text(server.federation.digest),
        "show": wire.Show(ctx, 0, (), b"").text,
        "ready": wire.Ready(server.federation.digest, 1, 0, 0, b"").text,
        "masked": server.masked[ctx, 0].text,
        "opened": wire.Opened(ctx, 0, (), b"").text,
        "abort": wire.AbortMessage(ctx, 0, Abort.POLICY, 0, b"").text,
        "result": wire.result_text(ctx, (0, 1, 2, 3), bytes(32)),
    }
    for (name, text), (other, stated) in product(texts.items(), texts.items()):
        if other == name:
            one.keys.verify(0, one.keys.sign(text), stated, other)
        else:
            refused(Abort.BAD_SIG, "did not sign", one.keys.verify, 0, one.keys.sign(text), stated, other)
    assert len({text[:5] for text in texts.values()}) == len(texts)


# ---- A19: the same task again ------------------------------------------------------------------------------------


def test_a19_a_task_that_comes_again_gets_the_same_bytes_and_a_changed_one_a_refusal() -> None:
    server, summands = MaliciousServer(4), lists(4)
    client, request = server.clients[0], server.mask_request(range(4))
    assert client.begin(server.open_round(), MODEL) is None
    assert client.ready() == client.ready()
    sent = client.mask(request, summands[0])
    assert client.mask(request, summands[1]) == sent  # another vector under the same mask would show the difference
    ctx = server.collect(range(4), summands)
    asked = wire.OpenRequest(ctx).encode()
    shares = client.open(asked)
    assert client.open(asked) == shares
    refused(Abort.CTX_MISMATCH, "in state READY", client.open, wire.OpenRequest(server.context(range(3))).encode())
    assert client.open(asked) == shares
    assert client.mask(request, summands[0]) == sent
    refused(Abort.LATCHED, "used up at this site", client.begin, server.open_round(attempt=1), MODEL)


def test_a19_the_same_attempt_with_other_content_is_refused_while_a_member_trains_and_after() -> None:
    server = MaliciousServer(4)
    client, fewer = server.clients[0], {i: s for i, s in server.federation.confirms.items() if i < 3}
    client.begin(server.open_round(), MODEL)
    refused(Abort.CTX_MISMATCH, "expected was one after", client.begin, server.open_round(confirms=fewer), MODEL)
    refused(Abort.CTX_MISMATCH, "in state READY", client.mask, server.mask_request(range(4)), lists(4)[0])
    server.collect(range(4), lists(4), attempt=1)
    again = server.open_round(attempt=1, confirms=fewer)
    refused(Abort.CTX_MISMATCH, "expected was one after", client.begin, again, MODEL)


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
    digests = [digest(job) for job in [JOB, *changed]]
    digests += [digest(JOB, ParameterLayout(LAYOUT.names, ((3, 2), (4,)))), digest(JOB, backbone="1" * 64)]
    assert len(set(digests)) == len(digests)


def test_a20_a_server_with_other_terms_gets_no_keys_and_no_vector() -> None:
    server = MaliciousServer(4, rounds=3, attempts=1, first_round=2)
    other = SecAggServer(replace(server.terms, digest=bytes(32)), ChainCheck(None))
    refused(
        Abort.CTX_MISMATCH, "terms of the job are not this site's", server.clients[0].advertise, other.open_epoch(1)
    )
    # and with honest keys, numbers beyond the agreed ones
    for number, attempt in ((0, 0), (1, 0), (4, 0), (2**32 - 1, 0), (2, 2)):
        refused(Abort.POLICY, "not one of rounds 2 to 3 with 1 further attempts",
                server.clients[0].begin, server.open_round(number, attempt), MODEL)  # fmt: skip
    server.clients[0].begin(server.open_round(2), MODEL)
    refused(Abort.OVERFLOW, "the job has 8 words", server.clients[0].mask,
            server.mask_request(range(4), number=2), np.zeros(9, np.uint32))  # fmt: skip
