"""A site's own view of its budget: what was spent on a data set, by which job, and what is left.

Everything is worked out from the ledger's raw entries. Needs no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SitePrivacyConfig
from fedmpt_core.privacy.accounting.epsilon import AccountingError, Steps, added_up, epsilon, epsilon_alone
from fedmpt_core.privacy.ledger.budget import Held, OverCap, charges, held, planned_steps, project
from fedmpt_core.privacy.ledger.chain import Entry
from fedmpt_core.privacy.ledger.ledger import Cap, Entries, stated_caps, successor_of
from fedmpt_core.privacy.mechanism.mechanism import Mechanism

MOST_REPEATS = 1000  # of a planned job; chosen, beyond it nobody counts


@dataclass(frozen=True)
class JobSpending:
    """One job on a data set.

    Attributes:
        job: its id.
        first: UTC of its first entry, "" for what was carried from a closed ledger; `last` of its last.
        rounds: rounds that were charged; `attempts`: how often, `released`: how often something left afterwards.
        steps: noisy steps charged.
        mechanisms: each kind of steps.
        epsilon: of this job alone at the data set's delta. The jobs' epsilons do not add up: mechanisms compose.
        if_masks_fail: the same if masks do not hold; more where sites share their noise.
    """

    job: str
    first: str
    last: str
    rounds: int
    attempts: int
    released: int
    steps: int
    mechanisms: tuple[Steps, ...]
    epsilon: float
    if_masks_fail: float


@dataclass(frozen=True)
class SpendingPlan:
    """What a planned job would cost.

    Attributes:
        job: name of the job.
        epsilon: of the job alone at its own delta, failed attempts included.
        total: of the data set afterwards, with what running jobs hold, at the data set's delta.
        repeats: how many such jobs in a row still fit below the cap; 0 where none does, and at most 1000 are counted.
        if_masks_fail: `total` if masks do not hold.
    """

    job: str
    epsilon: float
    total: float
    repeats: int
    if_masks_fail: float


@dataclass(frozen=True)
class Statement:
    """A data set's account.

    Attributes:
        site: name of the site; `dataset` of the data set.
        unit: what is protected; `delta` at which epsilon is stated.
        total: epsilon of all that was ever charged.
        reach: epsilon of that and of all that running jobs hold.
        cap: the policy's cap; None for a data set that is not the policy's.
        if_masks_fail: `reach` if masks do not hold, and `cap_alone` the policy's cap for that, None where it has none.
        caps: every cap that the ledger states, the oldest first.
        held: what running jobs hold.
        entries: lines of the ledger; `head`: hash of the last.
        open: reservations that nothing was released for; they count all the same.
        rotations: how often the key changed.
        successor: name under which the records go on, "" while the ledger is open.
        jobs: in the order of their first entry.
        torn: a sentence on an unfinished last line, or "".
    """

    site: str
    dataset: str
    unit: str
    delta: float
    total: float
    reach: float
    cap: float | None
    entries: int
    head: str
    open: int
    rotations: int
    successor: str
    jobs: tuple[JobSpending, ...] = field(default_factory=tuple)
    caps: tuple[Cap, ...] = ()
    held: tuple[Held, ...] = ()
    torn: str = ""
    if_masks_fail: float = 0.0
    cap_alone: float | None = None

    @property
    def left(self) -> float | None:
        """Cap less reach, at least 0; None without a cap. A job that fits below it may cost less than its epsilon."""
        return None if self.cap is None else max(0.0, self.cap - self.reach)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "left": self.left}


def statement(entries: Entries, cap: float | None, cap_alone: float | None = None) -> Statement:
    """The account of a ledger. Raises LedgerError when an entry does not say what it charges."""
    first, delta = entries[0], float(entries[0].delta)
    kinds = [e.kind for e in entries]
    by_job: dict[str, list[Steps]] = {}
    for charge in charges(entries):
        by_job.setdefault(charge.job, []).append(charge.steps)
    own: dict[str, list[Entry]] = {job: [] for job in by_job}
    for entry in entries:
        if entry.job in own:
            own[entry.job].append(entry)
    spent = [s for steps in by_job.values() for s in steps]
    holds = held(entries)
    return Statement(
        site=first.site,
        dataset=first.dataset,
        unit=first.unit,
        delta=delta,
        total=epsilon(spent, delta),
        reach=epsilon([*spent, *(h.steps for h in holds)], delta),
        cap=cap,
        entries=len(entries),
        head=entries[-1].hash,
        open=kinds.count("reserve") - kinds.count("commit"),
        rotations=kinds.count("rotate"),
        successor=successor_of(entries),
        jobs=tuple(_job(job, steps, own[job], delta) for job, steps in by_job.items()),
        caps=stated_caps(entries),
        held=tuple(holds),
        torn=entries.torn,
        if_masks_fail=epsilon_alone([*spent, *(h.steps for h in holds)], delta),
        cap_alone=cap_alone,
    )


def spending_plan(job: JobConfig, policy: SitePrivacyConfig, entries: Entries) -> SpendingPlan:
    """What a job would cost the data set.

    Raises:
        PrivacyRefused: it plans more than it declares.
        AccountingError: it cannot be priced.
    """
    try:
        projection = project(job, policy, entries, "")
    except OverCap as refused:
        return SpendingPlan(
            job.name, refused.projection.job, refused.projection.total, 0, refused.projection.total_alone
        )
    mechanism, steps = Mechanism.of(job), planned_steps(job)
    taken = [c.steps for c in (*charges(entries), *held(entries))]

    def fits(times: int) -> bool:
        try:
            after = [*taken, mechanism.steps(steps * times)]
            alone = policy.epsilon_alone
            if alone is not None and epsilon_alone(after, policy.delta) > alone:
                return False
            return epsilon(after, policy.delta) <= policy.epsilon
        except AccountingError:  # beyond what can be priced
            return False

    low, high = 1, 2
    while high <= MOST_REPEATS and fits(high):
        low, high = high, 2 * high
    high = min(high, MOST_REPEATS + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return SpendingPlan(job.name, projection.job, projection.total, low, projection.total_alone)


def _job(job: str, steps: Sequence[Steps], entries: Sequence[Entry], delta: float) -> JobSpending:
    reserved = [e for e in entries if e.kind == "reserve"]
    return JobSpending(
        job=job,
        first=entries[0].time if entries else "",
        last=entries[-1].time if entries else "",
        rounds=len({e.round for e in reserved}),
        attempts=len(reserved),
        released=sum(e.kind == "commit" for e in entries),
        steps=sum(s.count for s in steps),
        mechanisms=tuple(added_up(steps)),
        epsilon=epsilon(steps, delta),
        if_masks_fail=epsilon_alone(steps, delta),
    )


def statements(policy: SitePrivacyConfig, ledgers: Mapping[str, Entries]) -> list[Statement]:
    """The accounts of all ledgers of a site, by data set; the caps are known of the policy's own."""
    own = policy.epsilon, policy.epsilon_alone
    return [statement(entries, *(own if name == policy.dataset else (None, None))) for name, entries in ledgers.items()]
