"""Sites' policy cards, by site and data set, and what they say against a ledger and a job."""

from collections.abc import Mapping, Sequence
from math import isfinite

from fedmpt_core.audit.finding import Finding
from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.federation.site.admission import check_limits
from fedmpt_core.federation.site.policy_card import PolicyCard
from fedmpt_core.privacy.ledger.budget import PrivacyRefused
from fedmpt_core.privacy.ledger.chain import Entry

Cards = Mapping[tuple[str, str], PolicyCard]
"""By site and data set."""


def dataset_of(entries: Sequence[Entry]) -> tuple[str, str]:
    """Site and data set of a ledger."""
    return entries[0].site, entries[0].dataset


def by_dataset(cards: Sequence[PolicyCard]) -> tuple[Cards, list[Finding]]:
    """The cards, and a finding for each that another one of the same data set contradicts; the lower cap counts."""
    chosen: dict[tuple[str, str], PolicyCard] = {}
    findings = []
    for card in sorted(cards, key=lambda c: c.privacy.epsilon):
        first = chosen.setdefault((card.site, card.privacy.dataset), card)
        if (first.privacy, first.secagg) != (card.privacy, card.secagg):
            text = f"two of its policy cards for '{card.privacy.dataset}' differ; the lower cap is used"
            findings.append(Finding("cards-differ", "fail", card.site, text, "ask the site which one holds"))
    return chosen, findings


def check_cards(run: Run, cards: Cards) -> None:
    """Every card is of a ledger of this run, and the job is one that its site allows; adds findings to the run."""
    used = {dataset_of(entries) for entries in run.ledgers.values()}
    for (site, dataset), card in sorted(cards.items()):
        if (site, dataset) in used:
            try:
                check_limits(run.job, card.privacy, card.secagg)
            except PrivacyRefused as refused:
                remedy = "the site's policy was not kept, or changed since: ask it"
                run.say("policy-not-kept", site, f"its policy refuses this job: {refused}", remedy)
        elif site in run.ledgers and (site, run.ledgers[site][0].dataset) not in cards:
            text = f"its policy card is of the data set '{dataset}', its ledger of '{run.ledgers[site][0].dataset}'"
            run.say("card-of-another-data-set", site, f"{text}: no cap was checked", "ask the site for the right card")
        elif site not in run.ledgers:
            text = f"no ledger in this run is the one of its policy card ('{dataset}'): no cap was checked"
            run.say("card-not-used", site, text, "compare the names of site and data set", "warning")


def check_genesis(genesis: Entry, units: int | None, card: PolicyCard | None, delta: float | None) -> list[Finding]:
    """What a ledger was started with: the unit and delta of the policy, and a delta that protects anybody.

    Args:
        genesis: the ledger's first entry.
        units: declared number of units, where it is known.
        card: the site's policy for this data set, where the auditor has it.
        delta: of the job; None where the ledger is looked at alone.
    """
    stated, findings = float(genesis.delta), []

    def wrong(code: str, text: str, remedy: str) -> None:
        findings.append(Finding(code, "fail", genesis.site, text, remedy))

    units = card.privacy.units if card else units
    for what, value in (("its ledger", stated), ("the job", delta)):
        if value is not None and not (isfinite(value) and value > 0 and value * (units or 1) < 1):
            text = f"{what} counts at delta {value:g}, which is not below one over {units or 1} units"
            wrong("delta-protects-nobody", text, "such a delta lets a whole record out: no claim follows")
    if delta is not None and delta > stated:
        text = f"the job's delta {delta:g} is above the ledger's {stated:g}"
        wrong("delta-differs", text, "no site admits such a job: the job or the ledger was changed")
    if card and (stated, genesis.unit) != (card.privacy.delta, card.privacy.unit):
        text = (
            f"its ledger protects each {genesis.unit} at delta {stated:g}, its policy card each {card.privacy.unit} at "
            f"{card.privacy.delta:g}"
        )
        wrong("delta-differs", text, "the cap of the one says nothing of the other: ask the site")
    return findings
