"""One audit: a run or several of one federation, and everything that is to be said of them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from fedmpt_core.audit.cards import by_dataset, dataset_of
from fedmpt_core.audit.disclosure import Disclosure, Sums, disclosures, sums_of
from fedmpt_core.audit.fields import check_fields, servers_word
from fedmpt_core.audit.finding import Finding, Severity, in_order, worst
from fedmpt_core.audit.known_keys import check_key
from fedmpt_core.audit.ledger_copy import time_of
from fedmpt_core.audit.mechanism import check_mechanism
from fedmpt_core.audit.membership import check_membership
from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.audit.run_ledgers import check_ledgers, reused_keys
from fedmpt_core.audit.site_ledger import LedgerAudit, OwnLedger, audit_ledger, use_own_ledgers
from fedmpt_core.audit.spending import Spending, further_accountants
from fedmpt_core.audit.statements import check_statements
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
        servers_word: what rests on the server's word alone, in words.
    """

    folder: str
    run_id: str
    job: str
    findings: list[Finding]
    spending: dict[str, Spending]
    sums: Sums
    releases: dict[str, list[Disclosure]]
    servers_word: list[str]

    @property
    def passed(self) -> bool:
        """Whether nothing fails and nothing that was needed is missing; warnings are for a person's judgement."""
        return worst(self.findings) not in ("fail", "unshown")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not finite is None."""
        return json_value({**asdict(self), "passed": self.passed, "schema": AUDIT_SCHEMA})


@dataclass(frozen=True)
class Examination:
    """Runs and ledgers of one federation, each audited with the others at hand, and held against each other.

    Attributes:
        audits: of the runs; `ledgers` of what sites handed over.
        between: findings of several of them together.
    """

    audits: list[Audit]
    ledgers: list[LedgerAudit]
    between: list[Finding]

    @property
    def findings(self) -> list[Finding]:
        """All of them, the worst first."""
        return in_order([*self.between, *(f for one in (*self.audits, *self.ledgers) for f in one.findings)])

    @property
    def worst(self) -> Severity:
        """The worst severity of all findings."""
        return worst(self.findings)

    @property
    def passed(self) -> bool:
        """As of one audit."""
        return self.worst not in ("fail", "unshown")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "passed": self.passed,
            "worst": self.worst,
            "runs": [one.to_dict() for one in self.audits],
            "ledgers": [one.to_dict() for one in self.ledgers],
            "between": [f.to_dict() for f in self.between],
        }


def examine(
    runs: Sequence[Run],
    ledgers: Sequence[OwnLedger],
    *,
    independent: bool = False,
    policy_cards: Sequence[PolicyCard] = (),
    self_test: bool = False,
) -> Examination:
    """Audit all of them; arguments as of `audit_run`."""
    options: dict[str, Any] = {"independent": independent, "policy_cards": policy_cards, "self_test": self_test}
    verified = verified_ledgers(runs, ledgers)
    audits = [audit_run(run, runs=runs, ledgers=ledgers, **options) for run in runs]
    cards, differing = by_dataset(policy_cards)
    asked = further_accountants(independent=independent)
    own = [
        audit_ledger(one, asked, cards.get(dataset_of(one.entries)) if one.entries else None, verified)
        for one in ledgers
    ]
    return Examination(audits, own, in_order([*compare(runs, ledgers), *(() if runs else differing)]))


def audit_run(
    run: Run,
    *,
    independent: bool = False,
    policy_cards: Sequence[PolicyCard] = (),
    self_test: bool = False,
    runs: Sequence[Run] = (),
    ledgers: Sequence[OwnLedger] = (),
) -> Audit:
    """Audit one run; its findings are added to the run's own.

    Args:
        run: as loaded.
        independent: also recompute epsilon with an accountant that shares no code with the others.
        policy_cards: of sites, for their caps.
        self_test: also test the mechanism of this installation.
        runs: others at hand, whose ledgers may show how a site's key changed.
        ledgers: of sites that handed them over: the same, and in place of copies that the run lacks.
    """
    use_own_ledgers(run, ledgers)
    _check_keys(run, verified_ledgers([run, *runs], ledgers))
    cards, differing = by_dataset(policy_cards)
    run.findings += differing
    spending = check_ledgers(run, further_accountants(independent=independent), cards)
    check_fields(run)
    check_statements(run)
    check_membership(run)
    left = disclosures(run)
    if self_test:
        run.findings += check_mechanism(run)
    sums = sums_of(run, spending)
    return Audit(
        str(run.folder),
        run.manifest.run_id,
        run.job.name,
        in_order(run.findings),
        spending,
        sums,
        left,
        servers_word(run),
    )


def verified_ledgers(runs: Sequence[Run], ledgers: Sequence[OwnLedger]) -> list[Sequence[Entry]]:
    """All ledgers at hand whose signatures were verified."""
    signed = [run for run in runs if run.manifest.identities != "insecure"]
    handed_over = [own.entries for own in ledgers if own.signed and own.entries]
    return [*(entries for run in signed for entries in run.ledgers.values()), *handed_over]


def _check_keys(run: Run, beside: Sequence[Sequence[Entry]]) -> None:
    """Every ledger is of the key that its site had by the roster; what is not is left aside."""
    if run.manifest.identities == "insecure":
        return  # with a roster a run without signatures fails as a whole
    for site, entries in sorted(run.ledgers.items()):
        moment = max(run.ended, time_of(entries[-1].time))
        findings = check_key(site, entries, run.keys.at(moment), beside)
        run.findings += findings
        if worst(findings) == "fail":
            del run.ledgers[site]


def compare(runs: Sequence[Run], ledgers: Sequence[OwnLedger] = ()) -> list[Finding]:
    """Several runs of one federation, and sites' own ledgers.

    Of a site's ledgers of one data set the shorter must begin the longer; no two sites or jobs may use one noise key.
    """
    copies: dict[tuple[str, str], list[tuple[str, Sequence[Entry]]]] = defaultdict(list)
    for run in runs:
        for entries in run.ledgers.values():
            copies[dataset_of(entries)].append((f"the run {run.manifest.run_id}", entries))
    for own in ledgers:
        if own.entries:
            copies[dataset_of(own.entries)].append((str(own.place), own.entries))
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
    if runs:
        findings += [finding for own in ledgers for finding in _own_against_runs(own, runs)]
    findings += [finding for run in runs for earlier in runs for finding in _continued(run, earlier)]
    if len({run.manifest.root for run in runs} | {own.root for own in ledgers if own.root}) > 1:
        text = "the runs and exports are of federations with different root certificates"
        remedy = "audit the runs of one federation together"
        findings.append(Finding("another-federation", "fail", "runs", text, remedy))
    return in_order(findings + reused_keys(longest))


def _own_against_runs(own: OwnLedger, runs: Sequence[Run]) -> list[Finding]:
    """A ledger that its site hands over reaches at least as far as the copies that it gave away before."""
    if not own.entries:
        return []
    first, findings, known = own.entries[0], [], False
    for run in runs:
        copy = run.ledgers.get(first.site, ())
        if not copy or copy[0].dataset != first.dataset:
            continue
        known = True
        if len(copy) > len(own.entries) and (
            not own.export or time_of(own.export.made) >= time_of(copy[-1].time).replace(microsecond=0)
        ):
            text = (
                f"{own.place} ends at entry {len(own.entries) - 1}, the run {run.manifest.run_id} has {len(copy) - 1}"
            )
            remedy = "its end was cut, or an old copy restored: ask the site for its ledger"
            findings.append(Finding("ledger-cut", "fail", first.site, text, remedy))
    if not known:
        text = f"no run has a copy of its ledger of '{first.dataset}' in {own.place}: nothing was compared"
        findings.append(Finding("ledger-of-no-run", "warning", first.site, text, "give the runs that it took part in"))
    return findings


def _continued(run: Run, earlier: Run) -> list[Finding]:
    """The rounds of a run that another one continues are the same in both records."""
    resume = next((before for before in run.job.earlier_runs if before.job == earlier.manifest.run_id), None)
    if resume is None:
        return []
    ours, theirs = ([row for row in one.record["rounds"] if row["round"] <= resume.round] for one in (run, earlier))
    if ours == theirs:
        return []
    differ = [str(a["round"]) for a, b in zip(ours, theirs, strict=False) if a != b]
    text = f"it continues {resume.job}, and of its rounds {', '.join(differ[:10]) or 'some'} differ from that run's own"
    return [Finding("record-changed", "fail", run.manifest.run_id, text, "one of the two records was edited")]
