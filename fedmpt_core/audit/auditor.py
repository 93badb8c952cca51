"""One audit: a run or several of one federation, and everything that is to be said of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from fedmpt_core.audit.disclosure import Release, Sums, check_aggregation, releases, sums_of
from fedmpt_core.audit.finding import Finding, in_order, worst
from fedmpt_core.audit.mechanism import check_mechanism
from fedmpt_core.audit.run_evidence import KnownKeys, Run, load_run
from fedmpt_core.audit.run_ledgers import check_ledgers, reused_keys
from fedmpt_core.audit.site_ledger import OwnLedger
from fedmpt_core.audit.spending import AGREEMENT, INDEPENDENT, REPORTED, SECOND, Spending, accountants_of
from fedmpt_core.config.checks import json_value
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
    releases: dict[str, list[Release]]

    @property
    def passed(self) -> bool:
        """Whether nothing failed; warnings are for a person's judgement."""
        return worst(self.findings) != "fail"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not finite is None."""
        return json_value({**asdict(self), "passed": self.passed, "schema": AUDIT_SCHEMA})


def audit(folder: Path, anchors: KnownKeys, *, independent: bool = False, cards: Sequence[PolicyCard] = ()) -> Audit:
    """Audit one run.

    Args:
        folder: of the run.
        anchors: what the auditor knows of the federation.
        independent: also recompute epsilon with an accountant that shares no code with the others.
        cards: policy cards of sites, for their caps.

    Raises:
        NoRun: the folder holds no run.
    """
    return audit_run(load_run(folder, anchors), independent=independent, cards=cards)


def audit_run(
    run: Run, *, independent: bool = False, cards: Sequence[PolicyCard] = (), self_test: bool = False
) -> Audit:
    """The same of a run that was loaded; `self_test` also tests the mechanism of this installation."""
    caps = {card.site: card.privacy.epsilon for card in cards}
    spending = check_ledgers(run, accountants_of(independent=independent), caps)
    check_aggregation(run)
    left = releases(run)
    if self_test:
        run.findings += check_mechanism(run)
    sums = sums_of(run, spending)
    return Audit(str(run.folder), run.manifest.run_id, run.job.name, in_order(run.findings), spending, sums, left)


def compare(runs: Sequence[Run], ledgers: Sequence[OwnLedger] = ()) -> list[Finding]:
    """Several runs of one federation, and sites' own ledgers.

    Of a site's ledgers of one data set the shorter must begin the longer; no two sites or jobs may use one noise key.
    """
    copies: dict[tuple[str, str], list[tuple[str, Sequence[Entry]]]] = {}
    for run in runs:
        for site, entries in run.ledgers.items():
            copies.setdefault((site, entries[0].dataset), []).append((f"the run {run.manifest.run_id}", entries))
    for own in ledgers:
        if own.entries:
            key = own.entries[0].site, own.entries[0].dataset
            copies.setdefault(key, []).append((str(own.place), own.entries))
    found: list[Finding] = []
    for (site, _), some in sorted(copies.items()):
        some.sort(key=lambda copy: len(copy[1]))
        for (one, a), (other, b) in combinations(some, 2):
            if b[len(a) - 1] != a[-1]:  # each holds the hash of all before it
                text = f"its ledgers in {one} and in {other} do not continue each other"
                remedy = "the ledger was rewritten between them: ask the site"
                found.append(Finding("ledger-forked", "fail", site, text, remedy))
    if len({run.manifest.root for run in runs}) > 1:
        text = "the runs are of federations with different root certificates"
        found.append(Finding("another-federation", "fail", "runs", text, "audit the runs of one federation together"))
    longest: Mapping[str, Sequence[Entry]] = {
        f"{site} ({dataset})": some[-1][1] for (site, dataset), some in copies.items()
    }
    return in_order(found + reused_keys(longest))


__all__ = [
    "AGREEMENT",
    "INDEPENDENT",
    "REPORTED",
    "SECOND",
    "Audit",
    "KnownKeys",
    "audit",
    "audit_run",
    "compare",
]
