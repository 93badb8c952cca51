"""One audit: a run or several of one federation, and everything that is to be said of them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from fedmpt_core.audit.disclosure import Disclosure, Sums, check_aggregation, disclosures, sums_of
from fedmpt_core.audit.finding import Finding, in_order, worst
from fedmpt_core.audit.mechanism import check_mechanism
from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.audit.run_ledgers import check_ledgers, reused_keys
from fedmpt_core.audit.site_ledger import OwnLedger
from fedmpt_core.audit.spending import Spending, further_accountants
from fedmpt_core.common.canonical import json_value
from fedmpt_core.federation.site.policy_card import PolicyCard
from fedmpt_core.privacy.ledger.chain import Entry

AUDIT_SCHEMA = 1


@dataclass(frozen=True)
class Audit:
    """What was found of one run.

    Attributes:
        folder: the run's folder.
        run_id: name of the run; `job` of the job.
        findings: the worst first.
        spending: by site.
        sums: what the server saw of the sites' updates.
        releases: by site, what left it.
    """

    folder: str
    run_id: str
    job: str
    findings: list[Finding]
    spending: dict[str, Spending]
    sums: Sums
    releases: dict[str, list[Disclosure]]

    @property
    def passed(self) -> bool:
        """Whether nothing failed; warnings are for a person's judgement."""
        return worst(self.findings) != "fail"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not finite is None."""
        return json_value({**asdict(self), "passed": self.passed, "schema": AUDIT_SCHEMA})


def audit_run(
    run: Run, *, independent: bool = False, policy_cards: Sequence[PolicyCard] = (), self_test: bool = False
) -> Audit:
    """Audit one run; its findings are added to the run's own.

    Args:
        run: as loaded.
        independent: also recompute epsilon with an accountant that shares no code with the others.
        policy_cards: of sites, for their caps.
        self_test: also test the mechanism of this installation.
    """
    caps = {card.site: card.privacy.epsilon for card in policy_cards}
    spending = check_ledgers(run, further_accountants(independent=independent), caps)
    check_aggregation(run)
    left = disclosures(run)
    if self_test:
        run.findings += check_mechanism(run)
    sums = sums_of(run, spending)
    return Audit(str(run.folder), run.manifest.run_id, run.job.name, in_order(run.findings), spending, sums, left)


def compare(runs: Sequence[Run], ledgers: Sequence[OwnLedger] = ()) -> list[Finding]:
    """Several runs of one federation, and sites' own ledgers.

    Of a site's ledgers of one data set the shorter must begin the longer; no two sites or jobs may use one noise key.
    """
    copies: dict[tuple[str, str], list[tuple[str, Sequence[Entry]]]] = defaultdict(list)
    for run in runs:
        for site, entries in run.ledgers.items():
            copies[site, entries[0].dataset].append((f"the run {run.manifest.run_id}", entries))
    for own in ledgers:
        if own.entries:
            copies[own.entries[0].site, own.entries[0].dataset].append((str(own.place), own.entries))
    findings: list[Finding] = []
    longest: dict[str, Sequence[Entry]] = {}
    for (site, dataset), ledgers_of_site in sorted(copies.items()):
        ledgers_of_site.sort(key=lambda copy: len(copy[1]))
        for (one, short), (other, long) in combinations(ledgers_of_site, 2):
            if long[len(short) - 1] != short[-1]:  # each holds the hash of all before it
                text = f"its ledgers in {one} and in {other} do not continue each other"
                remedy = "the ledger was rewritten between them: ask the site"
                findings.append(Finding("ledger-forked", "fail", site, text, remedy))
        longest[f"{site} ({dataset})"] = ledgers_of_site[-1][1]
    if len({run.manifest.root for run in runs}) > 1:
        text = "the runs are of federations with different root certificates"
        remedy = "audit the runs of one federation together"
        findings.append(Finding("another-federation", "fail", "runs", text, remedy))
    return in_order(findings + reused_keys(longest))
