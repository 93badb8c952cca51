"""One site that lies, in every phase: it is named or simply left out, no honest site is named, and the sum is exact.

The conversation goes on as the workflow's does: whoever is at fault is left out, and the others begin again.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from fedmpt_core.secagg import messages as wire
from fedmpt_core.secagg.client import SecAggClient
from fedmpt_core.secagg.dealing import ROW_BYTES
from fedmpt_core.secagg.errors import Abort, SecAggError, UnexpectedMessage
from fedmpt_core.secagg.identity import EPOCH_SECONDS, SESSION_SECONDS, ChainCheck, Session, SiteIdentity
from fedmpt_core.secagg.server import RoundLost, SecAggServer, Sum
from fedmpt_core.secagg.shamir import SHARE_BYTES, random_element
from tests.malicious import Authority, Conversation, Insider, Lie
from tests.secagg import MODEL, Federation, identity, member, names, plain_sum, terms, vectors

WORDS, FEW = 8, 4
LIAR = "site-001"


@cache
def authority() -> Authority:
    """The federation's root."""
    return Authority()


@cache
def hospital(name: str) -> SiteIdentity:
    """A start-up kit under it."""
    return authority().mint(name)


def rehearsed(count: int, **limits: Any) -> tuple[dict[str, SecAggClient], SecAggServer]:
    """Members with ephemeral identities, one of them an insider."""
    agreed = terms(WORDS, **limits)
    members = {n: member(n, agreed, kind=Insider if n == LIAR else SecAggClient) for n in names(count)}
    return members, SecAggServer(agreed, ChainCheck(None))


def pinned(count: int, liar: SiteIdentity) -> tuple[dict[str, SecAggClient], SecAggServer]:
    """Members with rosters, one of them with another key than the others' rosters have for it."""
    agreed, old = terms(WORDS), [hospital(n) for n in names(count)]
    members: dict[str, SecAggClient] = {}
    for one in old:
        mine, kind = (liar, Insider) if one.name == LIAR else (one, SecAggClient)
        roster = authority().roster([liar if liar.name == other.name == one.name else other for other in old])
        members[one.name] = kind(agreed, mine, roster, authority().pem, None, lambda latch: None)
    return members, SecAggServer(agreed, ChainCheck(authority().pem))


def outcome(conversation: Conversation, count: int) -> Sum:
    """The first sum; it is exact, all honest sites are in it, and none is named."""
    found = vectors(count, WORDS)
    total = conversation.run(found)
    assert set(names(count)) - {LIAR} <= set(total.cohort)
    assert np.array_equal(total.words, plain_sum(found, total.cohort))
    assert set(conversation.left_out) <= {LIAR}
    assert set(conversation.unused) <= {LIAR}
    return total


def silent(evil: Insider, data: bytes) -> bytes:
    """Nothing comes."""
    return b""


def garbage(evil: Insider, data: bytes) -> bytes:
    """As long as it should be, with the right beginning."""
    return data[:5] + np.random.default_rng(0).bytes(len(data) - 5)


# ---- keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 5])
def test_a_renewed_key_that_no_roster_has_is_named_by_all_and_left_out(count: int) -> None:
    members, server = pinned(count, authority().mint(LIAR))

    def same_roster(evil: Insider, data: bytes) -> bytes:
        """It says that its roster is the others', or the server would tell by the digests."""
        theirs = wire.Advertisement.decode(members["site-000"].advertise(request))
        return evil.signed(replace(wire.Advertisement.decode(data), roster_digest=theirs.roster_digest))

    request = wire.AdvertiseRequest(server.terms.digest, 1, 1).encode()
    conversation = Conversation(members, server, advertise=same_roster)
    total = outcome(conversation, count)
    assert total.cohort == tuple(n for n in names(count) if n != LIAR)
    assert conversation.left_out[LIAR] == f"{count - 1} sites do not know its key or refuse its advert"


def test_another_roster_than_that_of_the_others_is_named() -> None:
    conversation = Conversation(*pinned(FEW, authority().mint(LIAR)))
    assert outcome(conversation, FEW).cohort == tuple(n for n in names(FEW) if n != LIAR)
    assert "its roster is not that of the other sites" in conversation.left_out[LIAR]


def another_name(evil: Insider, data: bytes) -> bytes:
    """Its own keys, for which another's session and certificate stand."""
    return evil.signed(replace(wire.Advertisement.decode(data), **_credentials("site-002")))


def _credentials(name: str) -> dict[str, bytes]:
    other = wire.Advertisement.decode(member(name, terms(WORDS)).advertise(_first_epoch()))
    return {key: value for key, value in other.credentials.items() if key != "signing_key"}


def _first_epoch() -> bytes:
    return wire.AdvertiseRequest(terms(WORDS).digest, 1, 1).encode()


def low_order(evil: Insider, data: bytes) -> bytes:
    """The point 0, which makes secrets that everyone knows."""
    return evil.signed(replace(wire.Advertisement.decode(data), exchange_key=bytes(32)))


@pytest.mark.parametrize("lie", [another_name, low_order, garbage, silent], ids=lambda lie: lie.__name__)
def test_an_advert_that_is_none_costs_who_sends_it_its_place(lie: Lie) -> None:
    conversation = Conversation(*rehearsed(FEW), advertise=lie)
    assert outcome(conversation, FEW).cohort == tuple(n for n in names(FEW) if n != LIAR)
    assert not conversation.left_out


def test_another_site_s_key_is_refused_to_who_copies_it() -> None:
    members, server = rehearsed(FEW)
    seen: list[wire.Advertisement] = []

    class Watched(SecAggServer):
        """What it takes of the first site, the insider sees."""

        def take_advertisement(self, site: str, data: bytes) -> None:
            super().take_advertisement(site, data)
            seen.append(wire.Advertisement.decode(data))

    def copied(evil: Insider, data: bytes) -> bytes:
        return evil.signed(replace(wire.Advertisement.decode(data), exchange_key=seen[-1].exchange_key))

    conversation = Conversation(members, Watched(server.terms, ChainCheck(None)), advertise=copied)
    assert outcome(conversation, FEW).cohort == tuple(n for n in names(FEW) if n != LIAR)
    assert "advertises a key of another site" in conversation.unused[LIAR]


def its_signing_key(evil: Insider, data: bytes) -> bytes:
    """One key for both: every other site refuses a directory in which a key is there twice, and cannot say whose."""
    advert = wire.Advertisement.decode(data)
    return evil.signed(replace(advert, exchange_key=advert.signing_key))


def session(since: int, until: int) -> Lie:
    """A session of its own times, in seconds from now."""

    def lie(evil: Insider, data: bytes) -> bytes:
        now, advert = int(time.time()), wire.Advertisement.decode(data)
        text = replace(Session.decode(advert.session), not_before=now + since, not_after=now + until).encode()
        return evil.signed(replace(advert, session=text, session_signature=identity(evil.name).sign(text)))

    return lie


@pytest.mark.parametrize(
    "lie",
    [its_signing_key, session(-2, SESSION_SECONDS), session(-300, 60), session(-300, EPOCH_SECONDS - 1)],
    ids=["one-key-twice", "begins-now", "ends-soon", "ends-with-the-epoch"],
)
@pytest.mark.parametrize("clock", [-100, 100])
def test_an_advert_that_honest_sites_would_judge_differently_is_refused_before_they_see_it(
    lie: Lie, clock: int
) -> None:
    """Some honest sites would refuse it, by their clocks or all of them, and be blamed or lose the round for it."""
    members, server = rehearsed(5)
    members["site-003"] = member("site-003", server.terms, clock=lambda: time.time() + clock)
    conversation = Conversation(members, server, advertise=lie)
    assert outcome(conversation, 5).cohort == tuple(n for n in names(5) if n != LIAR)
    assert list(conversation.unused) == [LIAR]
    assert not conversation.left_out


@pytest.mark.parametrize("code", [Abort.ROSTER, Abort.BAD_CERT, Abort.BAD_SIG])
@pytest.mark.parametrize("count", [3, 5])
def test_a_false_complaint_about_an_honest_advert_names_who_makes_it(count: int, code: Abort) -> None:
    """Whatever it complains of, all others accept the advert."""
    conversation = Conversation(*rehearsed(count), deal=lambda evil, data: evil.complaint(2, code))
    if count == 3:
        with pytest.raises(RoundLost):
            conversation.run(vectors(count, WORDS))
    else:
        assert outcome(conversation, count).cohort == tuple(n for n in names(count) if n != LIAR)
    assert conversation.left_out == {LIAR: "it alone refuses the advert of site-002"}


# ---- shares ------------------------------------------------------------------------------------------------------


def random_row(row: bytes) -> bytes:
    """Numbers of the field that lie on no polynomial with the others."""
    return b"".join(random_element() for _ in range(len(row) // SHARE_BYTES))


def other_rows(change: Callable[[bytes], bytes], *places: int) -> Lie:
    """Commits to shares that do not fit, for some members, and seals them."""
    return lambda evil, data: evil.dealing(lambda place, row: change(row) if place in places else row)


def one_share(row: bytes) -> bytes:
    """One share is another number, as if of another polynomial."""
    at = 7 * SHARE_BYTES
    return row[: at - 1] + bytes([row[at - 1] ^ 1]) + row[at:]


@pytest.mark.parametrize("places", [(3,), (0, 2, 3)], ids=["one", "all"])
@pytest.mark.parametrize("change", [one_share, random_row], ids=lambda change: change.__name__)
@pytest.mark.parametrize("count", [4, 5])
def test_shares_that_do_not_fit_name_their_dealer(
    count: int, change: Callable[[bytes], bytes], places: tuple[int, ...]
) -> None:
    conversation = Conversation(*rehearsed(count), deal=other_rows(change, *places))
    assert outcome(conversation, count).cohort == tuple(n for n in names(count) if n != LIAR)
    assert conversation.left_out == {LIAR: "the shares that it dealt do not fit, or it did not show them"}


def sealed_garbage(*places: int) -> Lie:
    """Right commitments, over which bytes are sealed that do not open."""

    def lie(evil: Insider, data: bytes) -> bytes:
        for place in places:
            data = evil.with_sealed(data, place, bytes(wire.SEALED_BYTES))
        return data

    return lie


def unsealed(*places: int) -> Lie:
    """In place of a sealed row the very bytes that are shown later, so that its victim would complain of them twice."""

    def lie(evil: Insider, data: bytes) -> bytes:
        for place in places:
            data = evil.with_sealed(data, place, wire.shown(evil.keys._dealt[place]))
        return data

    return lie


@pytest.mark.parametrize("lie", [sealed_garbage, unsealed], ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("places", [(3,), (0, 2, 3)], ids=["one", "all"])
@pytest.mark.parametrize("count", [4, 5])
def test_a_garbage_row_that_is_then_shown_right_frames_nobody(
    count: int, places: tuple[int, ...], lie: Callable[..., Lie]
) -> None:
    """The row that its dealer shows is the one that it committed to: whoever complained goes on with it."""
    conversation = Conversation(*rehearsed(count), deal=lie(*places))
    assert outcome(conversation, count).cohort == tuple(names(count))
    assert not conversation.left_out


@pytest.mark.parametrize(
    "show",
    [
        silent,
        garbage,
        lambda evil, data: evil.signed(
            replace(wire.Show.decode(data, 1), rows=(one_share(wire.Show.decode(data, 1).rows[0]),))
        ),
        lambda evil, data: evil.signed(replace(wire.Show.decode(data, 1), directory=bytes(32))),
        lambda evil, data: evil.signed(replace(wire.Show.decode(data, 1), member=0)),
        lambda evil, data: replace(wire.Show.decode(data, 1), signature=bytes(64)).encode(),
    ],
    ids=["silent", "garbage", "another-row", "another-directory", "another-dealer", "unsigned"],
)
def test_a_garbage_row_that_is_not_shown_right_names_its_dealer(show: Lie) -> None:
    conversation = Conversation(*rehearsed(FEW), deal=sealed_garbage(3), show=show)
    assert outcome(conversation, FEW).cohort == tuple(n for n in names(FEW) if n != LIAR)
    assert conversation.left_out == {LIAR: "the shares that it dealt do not fit, or it did not show them"}


def false_leaves(evil: Insider, data: bytes) -> bytes:
    """Commitments to single shares of which one is not the row's."""
    deal = evil.read_deal(data)
    line = bytes(32) + deal.leaves[2][32:]
    return evil.signed(replace(deal, leaves=(*deal.leaves[:2], line, *deal.leaves[3:])))


def another_directory(evil: Insider, data: bytes) -> bytes:
    """A dealing of the same secrets for a directory that nobody has."""
    return evil.signed(replace(evil.read_deal(data), directory=bytes(32)))


def another_dealer(evil: Insider, data: bytes) -> bytes:
    """It speaks as the site before it."""
    return evil.signed(replace(evil.read_deal(data), member=0))


@pytest.mark.parametrize(
    "lie", [false_leaves, another_directory, another_dealer, garbage, silent], ids=lambda lie: lie.__name__
)
def test_a_dealing_that_is_none_costs_who_sends_it_its_place(lie: Lie) -> None:
    conversation = Conversation(*rehearsed(FEW), deal=lie)
    assert outcome(conversation, FEW).cohort == tuple(n for n in names(FEW) if n != LIAR)
    assert not conversation.left_out


@pytest.mark.parametrize(
    ("again", "why"),
    [
        (lambda evil, data: evil.complaint(2), "shares of site-002 that it saw to be right"),
        (silent, ""),
    ],
    ids=["insists", "silent"],
)
def test_a_false_complaint_about_an_honest_dealer_frames_nobody(again: Lie, why: str) -> None:
    lies = [lambda evil, data: evil.complaint(2), again]
    conversation = Conversation(*rehearsed(FEW), confirm=lies)
    total = outcome(conversation, FEW)
    assert total.cohort == tuple(n for n in names(FEW) if n != LIAR)
    assert list(conversation.left_out) == ([LIAR] if why else [])
    assert conversation.left_out.get(LIAR, "").endswith(why)


def test_who_was_silent_is_not_blamed_for_rows_that_it_never_dealt() -> None:
    members, server = rehearsed(5)

    class Slow(SecAggServer):
        """Takes no dealing of a site whose answer comes too late."""

        def take_deal(self, site: str, data: bytes) -> None:
            if site == "site-003" and self.epoch == 1:
                raise UnexpectedMessage("a late dealing", "one in time")
            super().take_deal(site, data)

    server = Slow(server.terms, ChainCheck(None))
    conversation = Conversation(members, server, confirm=[lambda evil, data: evil.complaint(3)])
    total = conversation.run(vectors(5, WORDS))
    assert not conversation.left_out
    assert set(total.cohort) >= {"site-000", "site-002", "site-004"}


def test_who_complains_of_one_after_the_other_keeps_nobody_busy_for_long() -> None:
    conversation = Conversation(
        *rehearsed(5), confirm=[lambda evil, data, i=i: evil.complaint(i) for i in (0, 2, 3, 4, 0)]
    )
    assert outcome(conversation, 5).cohort == tuple(n for n in names(5) if n != LIAR)
    assert list(conversation.left_out) == [LIAR]


def test_a_complaint_shows_the_row_of_who_complains_and_no_other() -> None:
    members, server = rehearsed(4)
    rows: list[wire.Show] = []

    def watched(evil: Insider, data: bytes) -> bytes:
        return evil.complaint(2)

    class Watched(SecAggServer):
        """Keeps what is shown to it."""

        def judge(self, shown: Any) -> dict[str, str]:
            rows.extend(wire.Show.decode(data, 1) for data in shown.values())
            return super().judge(shown)

    conversation = Conversation(members, Watched(server.terms, ChainCheck(None)), confirm=watched)
    outcome(conversation, 4)
    evil = members[LIAR]
    assert isinstance(evil, Insider)
    assert {(show.member, len(show.rows)) for show in rows} == {(2, 1)}
    assert len(rows[0].rows[0]) == ROW_BYTES


def test_a_dealer_shows_a_row_to_who_has_signed_a_complaint_about_it_and_only_before_rounds() -> None:
    federation = Federation(4, kinds={LIAR: Insider})
    evil, dealer = federation.members[LIAR], federation.members["site-002"]
    assert isinstance(evil, Insider)
    right = evil.complaint(2)
    shown = wire.Show.decode(dealer.show(wire.ShowRequest((right,)).encode()), 1)
    assert evil.keys.shares(1, [2])[0] in shown.rows[0]  # which it knows already
    complaint = wire.AbortMessage.decode(right)
    for code, refused in (
        (Abort.BAD_SIG, (replace(complaint, signature=bytes(64)).encode(),)),
        (Abort.BAD_SIG, (evil.signed(replace(complaint, member=0)),)),
        (Abort.ROSTER, (evil.signed(replace(complaint, member=9)),)),
        (Abort.CTX_MISMATCH, (evil.complaint(3),)),
        (Abort.CTX_MISMATCH, (evil.complaint(2, Abort.ROSTER),)),
        (Abort.CTX_MISMATCH, (evil.complaint(2, context=bytes(32)),)),
        (Abort.CTX_MISMATCH, (right, right)),
    ):
        with pytest.raises(SecAggError) as error:
            dealer.show(wire.ShowRequest(refused).encode())
        assert error.value.code == code
    dealer.begin(federation.server.open_round(1, 0, MODEL), MODEL)
    with pytest.raises(UnexpectedMessage):
        dealer.show(wire.ShowRequest((right,)).encode())


# ---- rounds ------------------------------------------------------------------------------------------------------


def another_round(evil: Insider, data: bytes) -> bytes:
    """Ready for a round that is not open."""
    return evil.signed(replace(wire.Ready.decode(data), round=2))


@pytest.mark.parametrize("lie", [another_round, garbage, silent], ids=lambda lie: lie.__name__)
def test_who_is_not_ready_is_not_in_the_sum(lie: Lie) -> None:
    conversation = Conversation(*rehearsed(FEW), train=lie)
    assert outcome(conversation, FEW).cohort == tuple(n for n in names(FEW) if n != LIAR)
    assert not conversation.left_out


def other_bytes(evil: Insider, data: bytes) -> bytes:
    """Its signature is over another vector."""
    return data[:-4] + bytes(b ^ 1 for b in data[-4:])


def too_long(evil: Insider, data: bytes) -> bytes:
    """A word more than the job has."""
    return data + bytes(4)


def another_list(evil: Insider, data: bytes) -> bytes:
    """Bound to another context, as a vector of an old list is."""
    return evil.signed(replace(wire.Masked.decode(data, WORDS), context=bytes(32)))


@pytest.mark.parametrize("lie", [other_bytes, too_long, another_list, garbage, silent], ids=lambda lie: lie.__name__)
def test_ready_without_a_vector_costs_the_others_a_second_list_and_no_training(lie: Lie) -> None:
    conversation = Conversation(*rehearsed(FEW), mask=lie)
    total = outcome(conversation, FEW)
    assert total.cohort == tuple(n for n in names(FEW) if n != LIAR)
    assert not conversation.left_out
    assert conversation.server.epoch == 1


def wrong_share(evil: Insider, data: bytes) -> bytes:
    """Of one owner only, one bit."""
    opened = wire.Opened.decode(data, (len(data) - 103) // SHARE_BYTES)
    first = opened.shares[0][:-1] + bytes([opened.shares[0][-1] ^ 1])
    return evil.signed(replace(opened, shares=(first, *opened.shares[1:])))


def no_numbers(evil: Insider, data: bytes) -> bytes:
    """Shares above the prime."""
    opened = wire.Opened.decode(data, (len(data) - 103) // SHARE_BYTES)
    return evil.signed(replace(opened, shares=(b"\xff" * SHARE_BYTES,) * len(opened.shares)))


@pytest.mark.parametrize("lie", [wrong_share, no_numbers], ids=lambda lie: lie.__name__)
def test_wrong_shares_are_told_from_right_ones_and_name_who_sends_them(lie: Lie) -> None:
    conversation = Conversation(*rehearsed(FEW), open=lie)
    total = outcome(conversation, FEW)
    assert total.cohort == tuple(names(FEW))
    assert total.culprits == {LIAR: "it sent other shares than were dealt to it"}


@pytest.mark.parametrize("lie", [garbage, silent], ids=lambda lie: lie.__name__)
def test_no_shares_cost_nothing_while_enough_others_send_theirs(lie: Lie) -> None:
    conversation = Conversation(*rehearsed(FEW), open=lie)
    assert outcome(conversation, FEW).cohort == tuple(names(FEW))
    assert not conversation.left_out


def test_wrong_shares_where_all_must_send_theirs_lose_the_round_to_who_is_named() -> None:
    conversation = Conversation(*rehearsed(3), open=wrong_share)
    with pytest.raises(RoundLost):
        conversation.run(vectors(3, WORDS))
    assert conversation.left_out == {LIAR: "it sent other shares than were dealt to it"}


def test_who_has_dealt_nothing_is_in_no_list_even_when_it_signs_what_the_others_do() -> None:
    """It can know that from a second liar; the others would refuse every list with it."""
    federation = Federation(5, lost={"deal": [LIAR]}, kinds={LIAR: Insider})
    evil = federation.members[LIAR]
    assert isinstance(evil, Insider)
    evil.deal(federation.directory)
    confirm = wire.Confirm(evil.keys.own, evil.keys.sign(wire.confirm_text(federation.digest))).encode()
    with pytest.raises(UnexpectedMessage, match="one of a member that has dealt"):
        federation.server.take_confirm(LIAR, confirm)
    assert LIAR not in federation.server.members
