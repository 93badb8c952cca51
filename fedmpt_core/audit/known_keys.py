"""Whether a ledger is its site's own: the rosters that the sites agreed on, and what hands a ledger from key to key.

A site whose kit is renewed gets a new key, and every site a new roster. The ledger goes on: the old key signs an entry
that names the new one, whose holder signs too. So a ledger that ends before the change and a roster from after it (or
the other way round) belong together where a ledger at hand has that entry. All that is compared here was verified: the
chain, every signature in it, and the agreement of every new key's holder to all before it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fedmpt_core.audit.finding import Finding
from fedmpt_core.privacy.ledger.chain import Entry
from fedmpt_core.secagg.roster import Roster

BEGINNING = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class KnownKeys:
    """What the auditor knows of the federation from elsewhere.

    Attributes:
        roster: of the members' keys and the root, agreed on by telephone; None when the auditor has none. It is the one
            from the beginning where there are later ones.
        later: rosters that replaced it, by the time from which each holds.
    """

    roster: Roster | None = None
    later: Mapping[datetime, Roster] = field(default_factory=dict)

    def at(self, moment: datetime) -> Roster | None:
        """The roster in force at a time; the oldest that is known before all of them."""
        dated = {BEGINNING: self.roster, **self.later} if self.roster else dict(self.later)
        in_force = [since for since in dated if since <= moment]
        return dated[max(in_force, default=min(dated))] if dated else None


def check_key(
    site: str, entries: Sequence[Entry], roster: Roster | None, beside: Iterable[Sequence[Entry]]
) -> list[Finding]:
    """That a verified ledger is of the key that the roster has for its site, or leads to it or from it.

    Args:
        site: its name.
        entries: of the ledger.
        roster: in force when the ledger was handed over; None checks nothing.
        beside: verified ledgers of all sites at hand, for the longest that begins with these entries.
    """
    if roster is None:
        return []
    if site not in roster.members:
        text = "it is not in the roster that was in force"
        return [Finding("key-not-in-the-roster", "fail", site, text, "ask who it is, and whether it was revoked")]
    whole = max((entries, *(other for other in beside if _begins(other, entries))), key=len)
    changes = [entry for entry in whole if entry.kind in ("genesis", "rotate")]
    history = [entry.key_spki for entry in changes]
    owners = {member.fingerprint.hex(): name for name, member in roster.members.items()}
    if strangers := sorted({owners.get(key, site) for key in history} - {site}):
        text = f"its ledger was handed to the key of {', '.join(strangers)[:200]}"
        return [Finding("key-not-in-the-roster", "fail", site, text, "no site signs for another: ask both")]
    pinned, end = roster.members[site].fingerprint.hex(), _end(entries)
    if pinned not in history:
        text = f"its ledger is signed by the key {end[:16]}, the roster has {pinned[:16]}: no ledger at hand links them"
        remedy = (
            "if its key was renewed, give the roster of that time (`--roster DATE=FILE`) or the site's newest export, "
            "which has the change; if not, somebody else signed: ask the site by telephone"
        )
        return [Finding("key-not-in-the-roster", "fail", site, text, remedy)]
    if end == pinned:
        return []
    days = ", ".join(entry.time[:10] for entry in changes[1:])
    text = f"its ledger is signed by the key {end[:16]}, the roster has {pinned[:16]}; its key was changed on {days}"
    return [Finding("key-rotated", "note", site, text)]


def _begins(whole: Sequence[Entry], entries: Sequence[Entry]) -> bool:
    """Whether a ledger begins with these entries: each holds the hash of all before it."""
    return len(whole) > len(entries) and whole[len(entries) - 1] == entries[-1]


def _end(entries: Sequence[Entry]) -> str:
    return next(entry.key_spki for entry in reversed(entries) if entry.kind in ("genesis", "rotate"))
