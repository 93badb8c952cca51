"""What a site promised to spend at most, whether that was changed, and whether it was kept."""

from collections.abc import Sequence
from itertools import pairwise

from fedmpt_core.audit.finding import Finding
from fedmpt_core.audit.spending import spent
from fedmpt_core.privacy.ledger.budget import history
from fedmpt_core.privacy.ledger.chain import CAPS, Entry
from fedmpt_core.privacy.ledger.ledger import Cap, stated_caps

ABOVE = "epsilon-above-the-cap"
PLAIN, ALONE = CAPS  # the kinds of caps
_WORDS = {PLAIN: "", ALONE: " if the masks fail"}
SAME_EPSILON = 1e-6  # the same accountant on the same entries


def cap_of(entries: Sequence[Entry], card: float | None, kind: str = PLAIN) -> float | None:
    """The cap that holds at a ledger's end: that of the site's policy card, or what the ledger states last."""
    stated = stated_caps(entries, kind)
    return card if card is not None else stated[-1].epsilon if stated else None


def check_caps(entries: Sequence[Entry], card: float | None, kind: str = PLAIN) -> list[Finding]:
    """Hold every reservation to the cap that the ledger stated at that time, and what the site says to what it states.

    Example: a ledger states the cap 8, charges up to 7.9, states 9, and charges up to 8.7. Every charge is within the
    cap of its time. That the cap was raised is said; and a card that promises 8 was not kept.

    Args:
        entries: of one ledger.
        card: the cap on the site's policy card or export, where the auditor has one.
        kind: of cap, `cap` or `cap_alone`.
    """
    genesis, caps, findings = entries[0], stated_caps(entries, kind), list[Finding]()
    ends = [*(cap.seq for cap in caps[1:]), len(entries)][: len(caps)]
    for cap, end in zip(caps, ends, strict=True):
        last = next((e for e in entries[end - 1 : cap.seq : -1] if e.kind == "reserve"), None)
        if last is not None:
            when = f"on {last.time[:10]}, when its ledger stated the cap {cap.epsilon:g}"
            findings += _above(entries[: last.seq + 1], cap.epsilon, when, kind)
    if changes := list(pairwise(caps)):
        steps = "; ".join(f"from {a.epsilon:g} to {b.epsilon:g} on {b.time[:10]}" for a, b in changes)
        raised = any(b.epsilon > a.epsilon for a, b in changes)
        text = f"its cap on '{genesis.dataset}'{_WORDS[kind]} was changed {steps}"
        remedy = "ask the site who decided that" if raised else ""
        findings.append(Finding("cap-changed", "warning" if raised else "note", genesis.site, text, remedy))
    differs = card is not None and bool(caps) and card != caps[-1].epsilon
    if card is not None and differs:
        findings.append(_card_differs(genesis, caps, card, _WORDS[kind]))
    lowered = changes and not differs  # to what the site says: it binds from then on
    if card is not None and not lowered and not any(f.code == ABOVE for f in findings):
        findings += _above(entries, card, f"its cap is {card:g}", kind)
    return findings


def _above(entries: Sequence[Entry], cap: float, when: str, kind: str) -> list[Finding]:
    genesis = entries[0]
    steps = [s.alone if kind == ALONE else s for s in history(entries)]
    total, _ = spent(steps, float(genesis.delta), genesis.site)
    if total <= cap * (1 + SAME_EPSILON):
        return []
    text = f"all jobs on '{genesis.dataset}' spent epsilon {total:.3f}{_WORDS[kind]}, {when}"
    remedy = "the site's policy was not kept: find out how"
    return [Finding(ABOVE, "fail", genesis.site, text, remedy)]


def _card_differs(genesis: Entry, caps: Sequence[Cap], card: float, words: str) -> Finding:
    later = next((b for a, b in pairwise(caps) if a.epsilon == card), None)
    text = (
        f"its policy card or export caps '{genesis.dataset}'{words} at {card:g}, its ledger states {caps[-1].epsilon:g}"
    )
    since = f" since {later.time[:10]}" if later else ", and never the other"
    remedy = "ask the site for a new card" if later else "ask the site: it changed the cap since, or gave another card"
    return Finding("cap-differs", "warning", genesis.site, text + since, remedy)
