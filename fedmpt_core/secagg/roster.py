"""Whom a site trusts: the fingerprints of all members' keys, agreed on outside the network.

Certificates alone are not enough: whoever holds the federation's root key can mint one for any name. So every site
writes a `KeyCard` from its own start-up kit, the cards become one roster, people compare its digest by telephone.
Files are JSON, read strictly: whatever is unknown, missing or there twice is refused.
"""

import hmac
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, NoReturn

from fedmpt_core.common.text import alike
from fedmpt_core.secagg.context import DIGEST_BYTES, roster_digest
from fedmpt_core.secagg.errors import Abort, SecAggError

ROSTER_VERSION = 1
LEAST_CARDS, MOST_MEMBERS, MOST_NAME = 3, 1000, 256
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Member:
    """One member.

    Attributes:
        fingerprint: SHA-256 of its public key (DER, SubjectPublicKeyInfo), 32 bytes.
        org: its organisation, for people; 0 to 256 printable bytes.
    """

    fingerprint: bytes
    org: str


@dataclass(frozen=True)
class KeyCard:
    """What a site tells the others of itself.

    Attributes:
        name: common name of its certificate, 1 to 256 printable bytes.
        org: its organisation, 0 to 256 printable bytes.
        fingerprint: SHA-256 of its public key (DER, SubjectPublicKeyInfo), 32 bytes.
        root: SHA-256 of the root certificate (DER), 32 bytes.
        expires: the last day of its certificate, for people.

    Raises:
        SecAggError: ROSTER, an impossible name or organisation.
    """

    name: str
    org: str
    fingerprint: bytes
    root: bytes
    expires: date

    def __post_init__(self) -> None:
        _check_text(self.name, self.org)

    def to_dict(self) -> dict[str, Any]:
        """As a card's file has it."""
        return {
            "version": ROSTER_VERSION,
            "name": self.name,
            "org": self.org,
            "spki_sha256": self.fingerprint.hex(),
            "root_sha256": self.root.hex(),
            "expires": self.expires.isoformat(),
        }

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> "KeyCard":
        """Read a card's file. Raises SecAggError(ROSTER) that names what is wrong."""
        remedy = "have the site write it again with `fedmpt roster show`"
        values = _parsed(text, ("name", "org", "spki_sha256", "root_sha256", "expires"), f"the card: {remedy}")
        for key in ("name", "org", "expires"):
            if not isinstance(values[key], str):
                _refuse(f"the card's {key} is not text: {remedy}")
        try:
            expires = date.fromisoformat(values["expires"])
        except ValueError:
            expires = None
        if expires is None or expires.isoformat() != values["expires"]:  # Python reads other forms too
            _refuse(f"the card's expires is {values['expires']!r}, it must be a date such as 2030-12-31: {remedy}")
        fingerprint, root = (_digest(values[key], f"the card's {key}") for key in ("spki_sha256", "root_sha256"))
        return KeyCard(values["name"], values["org"], fingerprint, root, expires)


@dataclass(frozen=True)
class Roster:
    """All members that may take part.

    Attributes:
        root: SHA-256 of the root certificate (DER), 32 bytes.
        members: 1 to 1000 by name (1 to 256 printable bytes), in the order of the names' UTF-8 bytes.

    Raises:
        SecAggError: ROSTER, impossible names or digests, two members with one key, or too many or no members.
    """

    root: bytes
    members: Mapping[str, Member]

    def __post_init__(self) -> None:
        if not 1 <= len(self.members) <= MOST_MEMBERS:
            _refuse(f"the roster has {len(self.members)} members: 1 to {MOST_MEMBERS} are possible")
        owners: dict[bytes, str] = {}
        for name, member in self.members.items():
            _check_text(name, member.org)
            if {len(self.root), len(member.fingerprint)} != {DIGEST_BYTES}:
                _refuse(f"a digest of {name} or of the root certificate has not {DIGEST_BYTES} bytes")
            if (other := owners.setdefault(member.fingerprint, name)) != name:
                _refuse(f"the roster gives {other} and {name} the same key: every site must have its own kit")
        if same := alike(self.members):
            _refuse(f"the roster lists {same}: one site may be counted twice, ask the sites who they are")
        ordered = dict(sorted(self.members.items(), key=lambda item: item[0].encode()))
        object.__setattr__(self, "members", ordered)

    @staticmethod
    def from_json(text: str) -> "Roster":
        """Read a roster's file. Raises SecAggError(ROSTER) that names what is wrong."""
        remedy = "collect it again with `fedmpt roster collect`"
        values = _parsed(text, ("root_sha256", "members"), f"the roster: {remedy}")
        if not isinstance(values["members"], dict):
            _refuse(f"the roster's members are not listed by name: {remedy}")
        members = {}
        for name, entry in values["members"].items():
            if not isinstance(entry, dict) or set(entry) != {"spki_sha256", "org"} or not isinstance(entry["org"], str):
                _refuse(f"the roster's entry {name!r} must have spki_sha256 and org, and nothing else: {remedy}")
            members[name] = Member(_digest(entry["spki_sha256"], f"spki_sha256 of {name!r}"), entry["org"])
        return Roster(_digest(values["root_sha256"], "root_sha256"), members)

    def to_json(self) -> str:
        """As `from_json` reads it."""
        members = {n: {"spki_sha256": m.fingerprint.hex(), "org": m.org} for n, m in self.members.items()}
        values = {"version": ROSTER_VERSION, "root_sha256": self.root.hex(), "members": members}
        return json.dumps(values, indent=2, ensure_ascii=False)

    @staticmethod
    def collected(cards: Iterable[tuple[str, KeyCard]]) -> "Roster":
        """One roster of several sites' cards.

        Args:
            cards: each after its origin, for errors.

        Raises:
            SecAggError: ROSTER, two cards of one name or one key, cards of different roots, or fewer than 3 members,
                of whose sum each would know too much.
        """
        names: dict[str, str] = {}
        keys: dict[bytes, str] = {}
        members: dict[str, Member] = {}
        first: tuple[str, KeyCard] | None = None
        for origin, card in cards:
            first = first or (origin, card)
            if card.root != first[1].root:
                _refuse(
                    f"{first[0]} and {origin} are of different federations, their root certificates differ: collect "
                    "the cards of one"
                )
            if card.name in members:
                _refuse(f"{names[card.name]} and {origin} are both cards of {card.name}: ask the site which is right")
            if card.fingerprint in keys:
                _refuse(f"{keys[card.fingerprint]} and {origin} hold the same key: every site must have its own kit")
            names[card.name] = keys[card.fingerprint] = origin
            members[card.name] = Member(card.fingerprint, card.org)
        if first is None or len(members) < LEAST_CARDS:
            _refuse(
                f"{len(members)} cards are too few: a sum of fewer than {LEAST_CARDS} sites hides none of them, "
                f"collect those of {LEAST_CARDS} sites or more"
            )
        return Roster(first[1].root, members)

    def check_key(self, name: str, fingerprint: bytes) -> None:
        """That a key is the one of this member. Raises SecAggError(ROSTER)."""
        if name not in self.members:
            _refuse(f"{name} is not in the roster: every site must add it before it takes part")
        pinned = self.members[name].fingerprint
        if not hmac.compare_digest(fingerprint, pinned):
            _refuse(
                f"{name} has key {fingerprint.hex()[:16]}..., the roster has {pinned.hex()[:16]}...: ask it by "
                "telephone; if its key was renewed, every site must collect the roster anew; if not, somebody else "
                "made that entry"
            )

    def digest(self) -> bytes:
        """What all sites compare, 32 bytes."""
        return roster_digest((name, member.fingerprint) for name, member in self.members.items())


def _parsed(text: str, keys: tuple[str, ...], what: str) -> dict[str, Any]:
    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                _refuse(f"{key!r} is there twice in {what}")
            values[key] = value
        return values

    try:
        values = json.loads(text, object_pairs_hook=without_doubles)
    except SecAggError:
        raise
    except (ValueError, RecursionError):
        _refuse(f"no JSON can be read in {what}")
    if not isinstance(values, dict):
        _refuse(f"no JSON object is in {what}")
    version = values.get("version")
    if isinstance(version, int) and version > ROSTER_VERSION:
        _refuse(f"version {version} is newer than this release reads ({ROSTER_VERSION}): upgrade it")
    if type(version) is not int or version != ROSTER_VERSION:
        _refuse(f"the version is {version!r}, not {ROSTER_VERSION}, in {what}")
    for key in sorted({"version", *keys} ^ set(values)):
        _refuse(f"{key!r} is {'unknown' if key in values else 'missing'} in {what}")
    return values


def _digest(value: Any, what: str) -> bytes:
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        _refuse(f"{what} is not a SHA-256 of 64 lower-case hex digits: take it from the site's card")
    return bytes.fromhex(value)


def _check_text(name: str, org: str) -> None:
    # what terminals would hide or reorder must not look like another member
    if not name.isprintable() or not 1 <= len(name.encode()) <= MOST_NAME:
        _refuse(f"the name {name[:MOST_NAME]!r} must be of 1 to {MOST_NAME} printable bytes: rename the site")
    if not org.isprintable() or len(org.encode()) > MOST_NAME:
        _refuse(f"the organisation of {name} must be of at most {MOST_NAME} printable bytes: shorten it")


def _refuse(why: str) -> NoReturn:
    raise SecAggError(Abort.ROSTER, why) from None
