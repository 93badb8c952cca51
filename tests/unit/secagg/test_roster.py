"""Rosters and cards: what is read is what was written, in the order of the names' bytes; odd files are refused."""

import json
from dataclasses import replace
from datetime import date
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from independent import roster_digest

from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.roster import ROSTER_VERSION, KeyCard, Member, Roster

ROOT = bytes(range(32))


def member(number: int, org: str = "org") -> Member:
    return Member(number.to_bytes(32, "big"), org)


ROSTER = Roster(ROOT, {f"site-{i}": member(i) for i in (1, 2, 3)})
CARDS = [(f"{i}.json", KeyCard(f"site-{i}", "org", member(i).fingerprint, ROOT, date(2030, 12, 31))) for i in (1, 2, 3)]

names = st.lists(
    st.text(st.characters(codec="utf-8", categories=("L", "N", "P")), min_size=1, max_size=40),
    min_size=1,
    max_size=8,
    unique=True,
)


def refused(says: str, make: Any, *arguments: Any) -> None:
    with pytest.raises(SecAggError, match=says) as error:
        make(*arguments)
    assert error.value.code is Abort.ROSTER and "\n" not in str(error.value)


@given(names)
@example(["\U0001d49c", "\uffa1"])  # the other way round in UTF-16, as other languages sort
@example(["a", "Z", "é", "10", "9"])
def test_members_are_in_the_order_of_the_names_bytes(chosen: list[str]) -> None:
    roster = Roster(ROOT, {name: member(i) for i, name in enumerate(chosen)})
    assert list(roster.members) == sorted(chosen, key=str.encode)


@given(names)
def test_the_digest_is_that_of_an_independent_implementation_in_any_order(chosen: list[str]) -> None:
    pairs = [(name, member(i).fingerprint) for i, name in enumerate(chosen)]
    for order in (pairs, pairs[::-1]):
        assert Roster(ROOT, {n: Member(f, "org") for n, f in order}).digest() == roster_digest(pairs)


def test_the_digest_follows_names_and_keys() -> None:
    others = [
        replace(ROSTER, members={**ROSTER.members, "site-3": member(4)}),
        replace(ROSTER, members={**ROSTER.members, "site-4": member(4)}),
        Roster(ROOT, {f"site{i}": member(i) for i in (1, 2, 3)}),
    ]
    assert len({ROSTER.digest(), *(r.digest() for r in others)}) == 4


@given(names, st.text(st.characters(codec="utf-8", categories=("L", "N")), max_size=40))
def test_a_roster_is_read_back(chosen: list[str], org: str) -> None:
    roster = Roster(ROOT, {name: member(i, org) for i, name in enumerate(chosen)})
    read = Roster.from_json(roster.to_json())
    assert read == roster and list(read.members) == list(roster.members)


def test_the_file_is_what_the_manual_says() -> None:
    assert json.loads(ROSTER.to_json()) == {
        "version": 1,
        "root_sha256": ROOT.hex(),
        "members": {n: {"spki_sha256": m.fingerprint.hex(), "org": "org"} for n, m in ROSTER.members.items()},
    }


def changed(**values: Any) -> str:
    return json.dumps(json.loads(ROSTER.to_json()) | values)


def with_entry(entry: Any, name: str = "site-2") -> str:
    plain = json.loads(ROSTER.to_json())
    return json.dumps(plain | {"members": plain["members"] | {name: entry}})


GOOD = {"spki_sha256": "ab" * 32, "org": "org"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no JSON can be read in the roster: collect it again"),
        ("[" * 100_000, "no JSON can be read"),
        ("[]", "no JSON object is in the roster"),
        (changed(version=2), "version 2 is newer than this release reads .1.: upgrade it"),
        (changed(version=0), "the version is 0, not 1"),
        (changed(version=True), "the version is True, not 1"),
        (changed(version="1"), "the version is '1', not 1"),
        (changed(note=""), "'note' is unknown in the roster: collect it again"),
        (json.dumps({"version": 1, "members": {}}), "'root_sha256' is missing in the roster"),
        (ROSTER.to_json().replace('"site-2"', '"site-1"'), "'site-1' is there twice in the roster"),
        (ROSTER.to_json().replace('"version": 1', '"version": 1, "version": 1'), "'version' is there twice"),
        (changed(root_sha256="ab" * 31), "root_sha256 is not a SHA-256 of 64 lower-case hex digits"),
        (changed(root_sha256="AB" * 32), "root_sha256 is not a SHA-256 of 64 lower-case hex digits"),
        (changed(root_sha256=None), "root_sha256 is not a SHA-256"),
        (changed(root_sha256="ab" * 32 + "\n"), "root_sha256 is not a SHA-256"),
        (changed(members=[]), "members are not listed by name"),
        (changed(members={}), "has 0 members: 1 to 1000 are possible"),
        (changed(members={f"s{i}": {**GOOD, "spki_sha256": f"{i:064x}"} for i in range(1001)}), "has 1001 members"),
        (with_entry("ab" * 32), "entry 'site-2' must have spki_sha256 and org"),
        (with_entry({"spki_sha256": "ab" * 32}), "entry 'site-2' must have spki_sha256 and org"),
        (with_entry({**GOOD, "role": "x"}), "entry 'site-2' must have spki_sha256 and org, and nothing else"),
        (with_entry({**GOOD, "org": 1}), "entry 'site-2' must have spki_sha256 and org"),
        (with_entry({**GOOD, "spki_sha256": "xy" * 32}), "spki_sha256 of 'site-2' is not a SHA-256"),
        (with_entry({**GOOD, "spki_sha256": member(1).fingerprint.hex()}), "gives site-1 and site-2 the same key"),
        (with_entry({**GOOD, "org": "o" * 257}), "organisation of site-2 must be of at most 256"),
        (with_entry({**GOOD, "org": "\x1b[2J"}), "organisation of site-2 must be of at most 256 printable"),
        (with_entry(GOOD, ""), "the name '' must be of 1 to 256 printable bytes: rename the site"),
        (with_entry(GOOD, "é" * 129), "must be of 1 to 256 printable bytes"),
        (with_entry(GOOD, "site-\u202e1"), r"the name 'site-\\u202e1' must be of 1 to 256 printable bytes"),
        (with_entry(GOOD, "site-\x00"), "must be of 1 to 256 printable bytes"),
        (with_entry(GOOD, "\ud800"), "must be of 1 to 256 printable bytes"),
    ],
)
def test_an_odd_roster_is_refused(text: str, says: str) -> None:
    refused(says, Roster.from_json, text)


@given(st.data())
def test_a_roster_with_a_changed_character_is_refused_or_another_or_the_same_members(data: st.DataObject) -> None:
    text = ROSTER.to_json()
    place = data.draw(st.integers(0, len(text) - 1))
    other = text[:place] + data.draw(st.characters(codec="utf-8")) + text[place + 1 :]
    try:
        read = Roster.from_json(other)
    except SecAggError as error:
        assert error.code is Abort.ROSTER
    else:
        same = all(read.members[n].fingerprint == m.fingerprint for n, m in ROSTER.members.items() if n in read.members)
        assert (read.digest() == ROSTER.digest()) == (same and set(read.members) == set(ROSTER.members))


def test_the_longest_roster_and_name_are_taken() -> None:
    most = Roster(ROOT, {f"{i:0256}": member(i) for i in range(1000)})
    assert Roster.from_json(most.to_json()) == most


def test_digests_must_have_32_bytes() -> None:
    refused("has not 32 bytes", Roster, bytes(31), {"a": member(1)})
    refused("a digest of a or of the root certificate has not 32", Roster, ROOT, {"a": Member(bytes(33), "")})


def test_a_key_is_that_of_its_member_only() -> None:
    assert ROSTER.check_key("site-2", member(2).fingerprint) is None
    refused("site-9 is not in the roster: every site must add it", ROSTER.check_key, "site-9", member(2).fingerprint)
    for other in (member(1).fingerprint, member(2).fingerprint[:-1], b""):
        refused("site-2 has key .*, the roster has 0{16}...: ask it by telephone", ROSTER.check_key, "site-2", other)


# Cards


def test_a_card_is_read_back() -> None:
    for _, card in CARDS:
        assert KeyCard.from_json(card.to_json()) == card


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": 1}, "the card's name is not text: have the site write it again"),
        ({"org": None}, "the card's org is not text"),
        ({"name": "a\tb"}, "must be of 1 to 256 printable bytes"),
        ({"expires": "soon"}, "expires is 'soon', it must be a date such as 2030-12-31"),
        ({"expires": "20301231"}, "expires is '20301231', it must be a date such as 2030-12-31"),
        ({"expires": "2030-W01-1"}, "expires is '2030-W01-1', it must be a date such as 2030-12-31"),
        ({"expires": 2030}, "expires is not text"),
        ({"org": "o" * 257}, "organisation of site-1 must be of at most 256 printable bytes"),
        ({"spki_sha256": "ab"}, "the card's spki_sha256 is not a SHA-256"),
        ({"root_sha256": 0}, "the card's root_sha256 is not a SHA-256"),
        ({"key": ""}, "'key' is unknown in the card"),
        ({"version": ROSTER_VERSION + 1}, "newer than this release reads"),
    ],
)
def test_an_odd_card_is_refused(change: dict[str, Any], says: str) -> None:
    refused(says, KeyCard.from_json, json.dumps(CARDS[0][1].to_dict() | change))


def test_a_roster_is_no_card_and_a_card_no_roster() -> None:
    refused("'expires' is missing in the card: have the site write it again", KeyCard.from_json, ROSTER.to_json())
    refused("'expires' is unknown in the roster: collect it again", Roster.from_json, CARDS[0][1].to_json())


def test_cards_become_a_roster_in_any_order() -> None:
    assert Roster.collected(CARDS) == Roster.collected(CARDS[::-1]) == ROSTER


def fourth(**changes: Any) -> tuple[str, KeyCard]:
    return "4.json", replace(CARDS[0][1], **({"name": "site-4", "fingerprint": bytes(32)} | changes))


@pytest.mark.parametrize(
    ("cards", "says"),
    [
        ([], "0 cards are too few: a sum of fewer than 3 sites hides none of them"),
        (CARDS[:2], "2 cards are too few"),
        ([*CARDS, CARDS[0]], "1.json and 1.json are both cards of site-1"),
        ([*CARDS, fourth(name="site-2")], "2.json and 4.json are both cards of site-2: ask the site which is right"),
        ([*CARDS, fourth(fingerprint=member(3).fingerprint)], "3.json and 4.json hold the same key"),
        ([*CARDS, fourth(root=bytes(32))], "1.json and 4.json are of different federations"),
    ],
)
def test_cards_that_make_no_roster_are_refused(cards: list[tuple[str, KeyCard]], says: str) -> None:
    refused(says, Roster.collected, cards)
