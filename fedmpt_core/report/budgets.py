"""What was spent on each data set by all jobs together: the data protection officer's question, on one page.

A run's report speaks of one job. A budget belongs to a data set, and lasts: so here every ledger at hand counts, and of
each data set the longest. Nothing is decided that the audit has not decided.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedmpt_core.audit.auditor import Examination
from fedmpt_core.audit.caps import cap_of
from fedmpt_core.audit.cards import by_dataset, dataset_of
from fedmpt_core.audit.finding import Finding, in_order
from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.audit.site_ledger import OwnLedger
from fedmpt_core.common.canonical import json_value
from fedmpt_core.common.release import PROGRAM
from fedmpt_core.common.text import shown
from fedmpt_core.federation.site.policy_card import PolicyCard
from fedmpt_core.privacy.ledger.chain import Entry
from fedmpt_core.privacy.ledger.ledger import Entries
from fedmpt_core.privacy.ledger.statement import Statement, statement
from fedmpt_core.report.claim import MOST_REASONS, how_strongly
from fedmpt_core.report.content import Fact, Status
from fedmpt_core.report.plain import count, name


@dataclass(frozen=True)
class DataSetAccount:
    """One site's data set.

    Attributes:
        account: all that was ever charged to it, until the last entry of the longest ledger at hand.
        until: time of that entry, ISO 8601.
        source: where that ledger is.
        strength: what the total means, in words.
        jobs: by id of a run at hand, the name of its job.
    """

    account: Statement
    until: str
    source: str
    strength: Fact
    jobs: dict[str, str]


@dataclass(frozen=True)
class BudgetReport:
    """The page.

    Attributes:
        made: UTC, ISO 8601; `release` of this program.
        status: `fails`, `unshown`, `judge` or `stands`, as of a claim; `headline` in a sentence, `reasons` why.
        accounts: by site and data set.
        findings: of all audits, the worst first.
    """

    made: str
    release: str
    status: Status
    headline: str
    reasons: tuple[str, ...]
    accounts: tuple[DataSetAccount, ...]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not finite is None."""
        return json_value(asdict(self))


def budget_report(
    examined: Examination, runs: Sequence[Run], ledgers: Sequence[OwnLedger], cards: Sequence[PolicyCard], made: str
) -> BudgetReport:
    """The page of several runs and ledgers.

    Args:
        examined: the audit of them all.
        runs: as audited.
        ledgers: likewise.
        cards: policy cards of sites, for their caps.
        made: when, UTC, ISO 8601.
    """
    longest: dict[tuple[str, str], tuple[Sequence[Entry], str]] = {}
    held = [(entries, f"the run {run.manifest.run_id}") for run in runs for entries in run.ledgers.values()]
    sound = [own for own, audit in zip(ledgers, examined.ledgers, strict=True) if audit.passed and audit.statement]
    for entries, place in [*held, *((own.entries, str(own.place)) for own in sound)]:
        if len(entries) >= len(longest.get(dataset_of(entries), ((), ""))[0]):
            longest[dataset_of(entries)] = entries, place
    caps = {dataset_of(own.entries): own.export.cap for own in sound if own.export}
    caps |= {dataset: card.privacy.epsilon for dataset, card in by_dataset(cards)[0].items()}
    jobs = {run.manifest.run_id: run.job.name for run in runs}
    accounts = [
        _account(entries, place, caps.get(dataset), jobs) for dataset, (entries, place) in sorted(longest.items())
    ]
    findings = tuple(in_order(examined.findings))
    status, headline = _verdict(examined, accounts)
    worst = [f for f in findings if f.severity == examined.worst != "note"]
    reasons = [f"{name(f.where)}: {shown(f.text)}" for f in worst[:MOST_REASONS]]
    if len(worst) > MOST_REASONS:
        reasons.append(f"and {len(worst) - MOST_REASONS} more, under Findings of the audit")
    return BudgetReport(made, PROGRAM, status, headline, tuple(reasons), tuple(accounts), findings)


def _account(entries: Sequence[Entry], source: str, cap: float | None, jobs: dict[str, str]) -> DataSetAccount:
    account = statement(Entries(entries), cap_of(entries, cap))
    here = {job.job: jobs[job.job] for job in account.jobs if job.job in jobs}
    strength = Fact("How strongly", *how_strongly(account.total, account.delta, account.unit, None))
    return DataSetAccount(account, entries[-1].time, source, strength, here)


def _verdict(examined: Examination, accounts: Sequence[DataSetAccount]) -> tuple[Status, str]:
    sets = count(len(accounts), "data set")
    sentences: dict[str, tuple[Status, str]] = {
        "fail": ("fails", "The numbers do not stand: the audit found something against them."),
        "unshown": ("unshown", f"What was spent is shown for {sets}, and not all of it: evidence is missing."),
        "warning": ("judge", f"What was spent is shown for {sets}, with warnings for a person to judge."),
        "note": ("stands", f"What was spent is shown for {sets}, and the audit found nothing against it."),
    }
    return sentences[examined.worst] if accounts else ("nothing", "No ledger is here: nothing is known of any budget.")
