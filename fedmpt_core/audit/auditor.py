"""One audit: a run or several of one federation, and everything that is to be said of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from fedmpt_core.audit.aggregation import Release, check_aggregation, releases
from fedmpt_core.audit.finding import Finding, in_order, worst
from fedmpt_core.audit.ledgers import AGREEMENT, Accountant, Spending, check_ledgers
from fedmpt_core.audit.run import Anchors, Run, load_run
from fedmpt_core.policy_card import PolicyCard
from fedmpt_core.privacy import third_accountant
from fedmpt_core.privacy.accounting import Steps

INDEPENDENT = "FFT (this program's own)"
AUDIT_SCHEMA = 1


@dataclass(frozen=True)
class Audit:
    """What was found of one run.

    Attributes:
        folder: the run's folder.
        run_id: name of the run; `job` of the job.
        findings: the worst first.
        spending: by site.
        releases: by site, what left it.
    """

    folder: str
    run_id: str
    job: str
    findings: list[Finding]
    spending: dict[str, Spending]
    releases: dict[str, list[Release]]

    @property
    def passed(self) -> bool:
        """Whether nothing failed; warnings are for a person's judgement."""
        return worst(self.findings) != "fail"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "passed": self.passed, "schema": AUDIT_SCHEMA}


def audit(folder: Path, anchors: Anchors, *, independent: bool = False, cards: Sequence[PolicyCard] = ()) -> Audit:
    """Audit one run.

    Args:
        folder: of the run.
        anchors: what the auditor knows of the federation.
        independent: also recompute epsilon with an accountant that shares no code with the reported one.
        cards: policy cards of sites, for their caps.

    Raises:
        NoRun: the folder holds no run.
    """
    return audit_run(load_run(folder, anchors), independent=independent, cards=cards)


def audit_run(run: Run, *, independent: bool = False, cards: Sequence[PolicyCard] = ()) -> Audit:
    """The same of a run that was loaded."""
    accountants: Mapping[str, Accountant] = {INDEPENDENT: _third} if independent else {}
    spending = check_ledgers(run, accountants, {card.site: card.privacy.epsilon for card in cards})
    check_aggregation(run)
    left = releases(run)
    return Audit(str(run.folder), run.manifest.run_id, run.job.name, in_order(run.findings), spending, left)


def compare(runs: Sequence[Run]) -> list[Finding]:
    """Several runs of one federation: of a site's ledgers of one data set, the shorter must begin the longer."""
    found = []
    for site in sorted({site for run in runs for site in run.ledgers}):
        copies = sorted((run for run in runs if site in run.ledgers), key=lambda run: len(run.ledgers[site]))
        for short, long in combinations(copies, 2):
            a, b = short.ledgers[site], long.ledgers[site]
            if a[0].dataset == b[0].dataset and b[: len(a)] != a:
                names = f"{short.manifest.run_id} and {long.manifest.run_id}"
                text = f"its ledgers of the runs {names} do not continue each other"
                remedy = "the ledger was rewritten between the runs: ask the site"
                found.append(Finding("ledger-forked", "fail", site, text, remedy))
    return found


def _third(history: Sequence[Steps], delta: float) -> float:
    return third_accountant.epsilon([(s.sample_rate, s.noise_multiplier, s.count) for s in history], delta)


__all__ = ["AGREEMENT", "INDEPENDENT", "Anchors", "Audit", "audit", "audit_run", "compare"]
