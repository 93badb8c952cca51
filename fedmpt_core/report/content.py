"""What a privacy report says, as frozen plain values; HTML, JSON and the model card are three ways to show it.

Numbers of the audit stand here as the audit has them (`Report.spending`, `sums`, `findings`, `releases`); what the
report works out itself stands beside them, under names of its own.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fedmpt_core.audit.disclosure import Disclosure, Sums
from fedmpt_core.audit.finding import Finding
from fedmpt_core.audit.spending import Spending
from fedmpt_core.common.canonical import json_value

REPORT_SCHEMA = 1

Status = Literal["stands", "judge", "rehearsal", "nothing", "none", "unshown", "fails"]
Answered = Literal["answered", "partly", "outside"]


@dataclass(frozen=True)
class Fact:
    """A name, its value in words, and what it means."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """The claim in plain words.

    Attributes:
        status: `stands`; `judge`: it stands as far as was checked, and a person must look at the reasons; `rehearsal`:
            a simulation, so nobody is bound by it; `nothing`: nothing was trained; `none`: no claim is made; `unshown`:
            what it rests on is missing, and nothing contradicts it; `fails`: something does.
        headline: one sentence.
        reasons: why it is not simply `stands`.
        facts: who is protected, against whom, how strongly, for how long.
        not_covered: what the claim says nothing about.
        epsilon: of all jobs on the data set, at the site that has spent most; None where there is no such number.
        delta: the largest of the sites'.
        site: the site that has spent most; `where`: the same in words.
        guess: see `Profile.guess`, of that site.
    """

    status: Status
    headline: str
    reasons: tuple[str, ...]
    facts: tuple[Fact, ...]
    not_covered: tuple[str, ...]
    epsilon: float | None = None
    delta: float | None = None
    site: str = ""
    where: str = ""
    guess: float | None = None


@dataclass(frozen=True)
class SiteAccount:
    """A site's account of its data set.

    Attributes:
        site: its name.
        before: epsilon of the data set's other jobs at its delta; None where no accountant answers.
        added: what this run added to it; epsilons do not add up, so this is less than epsilon of the run alone.
        left: cap less what is spent, at least 0; None without a policy card.
    """

    site: str
    before: float | None
    added: float | None
    left: float | None


@dataclass(frozen=True)
class Profile:
    """Delta at every epsilon, of everything ever charged to one data set.

    Attributes:
        sites: whose; they were charged the same.
        epsilons: at least 0, rising; `deltas` at them, upper bounds.
        mu: the same in one number: the Gaussian mechanism of sensitivity 1 and noise 1 / mu tells at least as much,
            at every epsilon shown where delta is at least 1e-10. None where there is no such number up to 100.
        guess: most of 100 fair guesses whether a given unit was used that anybody can get right, in percent.
        named: most of the used units that anybody can name while accusing 1 % of the others wrongly, in percent.
        replace_one: epsilon at the data set's delta when a unit is replaced instead of added or removed; None where it
            was not worked out.
    """

    sites: tuple[str, ...]
    epsilons: tuple[float, ...]
    deltas: tuple[float, ...]
    mu: float | None
    guess: float
    named: float
    replace_one: float | None = None

    def at(self, epsilon: float) -> float | None:
        """Delta at one of the epsilons."""
        return dict(zip(self.epsilons, self.deltas, strict=True)).get(epsilon)


@dataclass(frozen=True)
class Label:
    """One label's average precision in percent, None where it was not scored.

    Attributes:
        name: the label.
        share: share of the test pictures that show it, None where the record has it not.
        start: of the untouched towers with a plain prompt (zero-shot); `final` of the trained model.
    """

    name: str
    share: float | None
    start: float | None
    final: float | None

    @property
    def gain(self) -> float | None:
        """`final` less `start`."""
        return None if self.start is None or self.final is None else self.final - self.start


@dataclass(frozen=True)
class Utility:
    """What the model can do, on the test pictures of the sites that evaluate.

    Attributes:
        sites: whose pictures.
        round: the last one that was evaluated; None where there are no figures, and `none_since` says why.
        figures: (name, zero-shot, final) in percent.
        curve: (round, mAP).
        labels: the rarest first where shares are known, else by gain.
        worse: labels below zero-shot.
        rare: mean gain of the rarer half of the labels, `common` of the other; None without shares.
    """

    sites: tuple[str, ...] = ()
    round: int | None = None
    none_since: str = ""
    figures: tuple[tuple[str, float | None, float | None], ...] = ()
    curve: tuple[tuple[int, float], ...] = ()
    labels: tuple[Label, ...] = ()
    worse: int = 0
    rare: float | None = None
    common: float | None = None


@dataclass(frozen=True)
class GateWeight:
    """Mean weight of a condition over test pictures, in [0, 1]: `start` before training, `final` after it."""

    condition: str
    start: float | None
    final: float | None


@dataclass(frozen=True)
class RoundSpan:
    """Neighbouring rounds whose sums were formed alike: `cohort` sites began, `survivors` are in the sum."""

    first: int
    last: int
    cohort: int
    survivors: int
    threshold: int
    retried: int


@dataclass(frozen=True)
class SiteFacts:
    """What a site said of itself, and what of its ledger is here."""

    site: str
    device: str
    versions: str
    ledger: str
    head: str
    evaluates: bool


@dataclass(frozen=True)
class CheckItem:
    """One line of the checklist: the question, in words, where it is answered, and how far."""

    layer: str
    question: str
    answered: Answered
    where: str
    anchor: str


@dataclass(frozen=True)
class ModelCardSection:
    """A section of the model card: paragraphs, then a list."""

    heading: str
    paragraphs: tuple[str, ...] = ()
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
        made: UTC, ISO 8601; `release` of this program.
        run_id: name of the run; `job` of the job.
        passed: whether the audit found nothing that fails or is missing.
        findings: of the audit, as are `spending`, `sums` and `releases`.
        notes: paragraphs by section.
    """

    made: str
    release: str
    run_id: str
    job: str
    outcome: str
    ended: str
    claim: Claim
    passed: bool
    findings: tuple[Finding, ...]
    spending: dict[str, Spending]
    sums: Sums
    releases: dict[str, tuple[Disclosure, ...]]
    budgets: tuple[SiteAccount, ...]
    profiles: tuple[Profile, ...]
    mechanism: tuple[Fact, ...]
    accountants: tuple[Fact, ...]
    spans: tuple[RoundSpan, ...]
    utility: Utility
    gate: tuple[GateWeight, ...]
    manifest: tuple[Fact, ...]
    sites: tuple[SiteFacts, ...]
    files: dict[str, str]
    checklist: tuple[CheckItem, ...]
    model_card: tuple[ModelCardSection, ...]
    notes: dict[str, tuple[str, ...]]
    schema: int = REPORT_SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not finite is None."""
        return json_value(asdict(self))
