"""What a job may spend at a site: its plan, the site's policy, and a reservation in the ledger before every round.

The stricter of job and site holds. A job plans its rounds and `max_failed_rounds` attempts more, since a failed
attempt is charged like any other. It is refused as a whole when that plan does not fit below the site's cap, and
round by round when more is asked of the site than was planned. Torch is not needed here: a FLARE parent process uses
it too.

A job that is admitted holds its plan in the ledger. Example: the cap is 9, 8.0 is spent, and two jobs are submitted
that would each bring it to 8.8. The first is admitted and holds that; the second would come to 9.5 and is refused
before it has cost anything. What is held shrinks with every round that is charged. It is free when the job ends, or
some time after its last round (`lasting`) where the job died; a job that slept longer is held to the cap anew.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from math import isclose
from typing import Any, get_args

from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SiteConfig, SitePrivacyConfig
from fedmpt_core.privacy.accounting.calibration import calibrate
from fedmpt_core.privacy.accounting.epsilon import Steps, added_up, epsilon, epsilon_alone
from fedmpt_core.privacy.ledger.chain import Entry, LedgerError, LedgerHead
from fedmpt_core.privacy.ledger.ledger import Ledger, read_ledger, standing_holds, stated_caps
from fedmpt_core.privacy.ledger.records import RecordLists
from fedmpt_core.privacy.ledger.site_ledger import SUFFIX
from fedmpt_core.privacy.ledger.witness import Witness
from fedmpt_core.privacy.mechanism.mechanism import DP_SGD, SHARES, Mechanism, Name

PHASES = 6  # of secure aggregation in a round
STARTING = 900.0  # chosen: seconds until a deployed job is held by the process that trains it


class PrivacyRefused(ValueError):
    """The site's policy does not allow this. The sentence is for the site's owner and stays there.

    Attributes:
        public: what the submitter of the job may read instead: public numbers of the job, none of the site.
    """

    def __init__(
        self, text: str, public: str = "this site's policy does not allow it; its log has the numbers"
    ) -> None:
        super().__init__(text)
        self.public = public


class JobRefused(PrivacyRefused):
    """One whose whole sentence holds nothing but what the job says itself, so it may travel."""

    def __init__(self, text: str) -> None:
        super().__init__(text, text)


@dataclass(frozen=True)
class Projection:
    """What a site's ledger will show when a job has run as planned.

    Attributes:
        job: epsilon of the job alone at the job's delta.
        total: epsilon of everything ever spent on the data set and this job, at the site's delta.
        cap: the site's cap.
        job_alone: epsilon of the job if the masks fail; the same as `job` where sites share no noise.
        total_alone: of everything, likewise.
        cap_alone: the site's cap for that; None where it has set none.
    """

    job: float
    total: float
    cap: float
    job_alone: float
    total_alone: float
    cap_alone: float | None


@dataclass(frozen=True)
class Charge:
    """Noisy steps that a job was charged for."""

    job: str
    steps: Steps


@dataclass(frozen=True)
class Held:
    """Noisy steps that a job holds: planned, admitted, and not charged yet; `until` is when that ends, ISO 8601."""

    job: str
    steps: Steps
    until: str


def resolved(job: JobConfig) -> JobConfig:
    """The job with its noise multiplier worked out from (epsilon, delta, sample rate, steps).

    Raises:
        ValueError: no noise keeps the plan within epsilon, or the given noise does not, or a job that continues a run
            gives none.
    """
    privacy = job.privacy
    if not privacy.private:
        return job
    plan = planned_steps(job)
    if privacy.noise_multiplier is None and job.resume:
        raise ValueError(
            f"privacy.noise_multiplier is missing: a job that continues run '{job.resume.job}' says with which noise "
            "that one trained: `fedmpt resume-job` writes it"
        )
    if privacy.noise_multiplier is None:
        noise = calibrate(privacy.epsilon, privacy.delta, privacy.sample_rate, plan)
        return replace(job, privacy=replace(privacy, noise_multiplier=noise))
    spends = epsilon([Mechanism.of(job).steps(plan)], privacy.delta)
    if spends > privacy.epsilon:
        raise ValueError(
            f"privacy.noise_multiplier={privacy.noise_multiplier} spends epsilon {spends:.3f} in {plan} steps, "
            f"privacy.epsilon={privacy.epsilon} is the most: raise one of them, or leave noise_multiplier out"
        )
    return job


def planned_steps(job: JobConfig, charged: int = 0) -> int:
    """Noisy steps that a site must still expect, failed attempts included.

    Args:
        job: the agreed job.
        charged: steps that the run which it continues has charged: attempts that were broken off are among the failed
            ones that the job allows.
    """
    rounds, failures = job.training.rounds, job.federation.max_failed_rounds
    left = rounds - job.first_round + 1
    return max(job.steps_per_round * left, job.steps_per_round * (rounds + failures) - charged)


def check_policy(job: JobConfig, policy: SitePrivacyConfig | None) -> None:
    """Compare a job with a site's policy.

    Raises:
        PrivacyRefused: the site has no policy, or the job asks for more than it allows; every problem is named.
    """
    if policy is None:
        raise JobRefused("this site has no privacy policy (a [privacy] table in its site file), so it trains nothing")
    if job.federation.min_sites < policy.min_sites:
        public = f"federation.min_sites={job.federation.min_sites} of the job is below this site's"
        raise PrivacyRefused(f"{public} min_sites={policy.min_sites}", public)
    privacy = job.privacy
    if not privacy.private:
        if not policy.allow_unprotected:
            raise JobRefused(
                "the job trains without differential privacy (privacy.mechanism = 'none'), which this site does not "
                "allow: it would need [privacy] allow_unprotected = true in the site's own file (fedmpt_site.toml; of "
                "a simulation, site.toml)"
            )
        return
    noise = privacy.noise_multiplier
    if noise is None:
        raise JobRefused("the job gives no noise multiplier: export it again with this release")
    if privacy.distributed and policy.epsilon_alone is None:
        raise JobRefused(
            "the job's sites share the noise (privacy.noise = 'distributed'), and this site has not said what may be "
            "spent if the masks fail: it would need [privacy] epsilon_alone in the site's own file"
        )
    share = Mechanism.of(job).share_multiplier
    problems = [
        # whether, what the job says, what the site allows
        (privacy.unit != policy.unit, f"privacy.unit='{privacy.unit}', this site protects each", policy.unit),
        (privacy.delta > policy.delta, f"privacy.delta={privacy.delta:g} is above this site's", f"{policy.delta:g}"),
        (
            noise < policy.min_noise_multiplier,
            f"privacy.noise_multiplier={noise} is below this site's least",
            f"of {policy.min_noise_multiplier}",
        ),
        (
            share < policy.min_share_multiplier,
            f"a site's share of the noise, {share:.4g}, is below this site's least",
            f"of {policy.min_share_multiplier}",
        ),
        (
            privacy.sample_rate > policy.max_sample_rate,
            f"privacy.sample_rate={privacy.sample_rate} is above this site's",
            policy.max_sample_rate,
        ),
        (
            job.steps_per_round > policy.max_steps,
            f"{job.steps_per_round} steps in a round are more than this site's",
            policy.max_steps,
        ),
    ]
    broken = [(public, own) for wrong, public, own in problems if wrong]
    if broken:
        raise PrivacyRefused(
            "; ".join(f"{public} {own}" for public, own in broken), "; ".join(public for public, _ in broken)
        )


def project(
    job: JobConfig, policy: SitePrivacyConfig, entries: Sequence[Entry], job_id: str, now: datetime | None = None
) -> Projection:
    """What the ledger will show after the job.

    Args:
        job: passed `check_policy`.
        policy: the site's.
        entries: the ledger so far. Rounds that this job has reserved already are part of its plan; rounds of the run
            that it continues count towards its own epsilon.
        job_id: the job's name in the ledger.
        now: when holds are looked at; None is the present.

    Raises:
        PrivacyRefused: the job's plan passes its own epsilon or the site's cap.
    """
    return project_charges(job, policy, charges(entries), held(entries, now), job_id)


def project_charges(
    job: JobConfig,
    policy: SitePrivacyConfig,
    spent: Sequence[Charge],
    holds: Sequence[Held] = (),
    job_id: str = "",
    new: Steps | None = None,
) -> Projection:
    """The same from what was charged and is held, for those who have not the ledger.

    Args:
        job: passed `check_policy`.
        policy: the site's.
        spent: what was charged.
        holds: what is held; what this job holds, or a run that it continues, is its own plan and left out.
        job_id: the job's name in the ledger.
        new: steps that the job is to be charged now.

    Raises:
        PrivacyRefused: as in `project`.
    """
    own = [c.steps for c in spent if c.job == job_id]
    continued = [c.steps for c in spent if c.job in job.continued]
    ahead = max(0, planned_steps(job, _count(continued)) - _count(own) - (new.count if new else 0))
    plan = [*([new] if new else []), Mechanism.of(job).steps(ahead)]
    others = [h for h in holds if h.job not in (job_id, *job.continued)]
    every = [c.steps for c in spent]
    of_job, of_all = [*continued, *own, *plan], [*every, *(h.steps for h in others), *plan]
    projection = Projection(
        epsilon(of_job, job.privacy.delta),
        epsilon(of_all, policy.delta),
        policy.epsilon,
        epsilon_alone(of_job, job.privacy.delta),
        epsilon_alone(of_all, policy.delta),
        policy.epsilon_alone,
    )
    if projection.job > job.privacy.epsilon:
        before = f" after the run '{job.continued[0]}' that it continues" if job.continued else ""
        raise PrivacyRefused(
            f"the job declares epsilon={job.privacy.epsilon:g} and plans {projection.job:.3f}{before} "
            f"(delta {job.privacy.delta:g})",
            f"the job plans more than the epsilon={job.privacy.epsilon:g} that it declares",
        )
    if projection.total > policy.epsilon:
        raise OverCap(policy, projection, every, others, plan)
    if policy.epsilon_alone is not None and projection.total_alone > policy.epsilon_alone:
        raise OverCap(policy, projection, every, others, plan, alone=True)
    return projection


class OverCap(PrivacyRefused):
    """A job that does not fit below a site's cap.

    Attributes:
        projection: what the ledger would show.
    """

    def __init__(
        self,
        policy: SitePrivacyConfig,
        projection: Projection,
        spent: Sequence[Steps],
        others: Sequence[Held],
        plan: Sequence[Steps],
        *,
        alone: bool = False,
    ) -> None:
        price = epsilon_alone if alone else epsilon
        cap, reached = policy.epsilon, projection.total
        if alone:
            cap, reached = policy.epsilon_alone or 0.0, projection.total_alone
        before, job = price(spent, policy.delta), price(plan, policy.delta)
        public = "privacy budget: what is left at this site does not suffice for the job"
        holding = ""
        if others:
            with_held = price([*spent, *(h.steps for h in others)], policy.delta)
            names, until = ", ".join(sorted({f"'{h.job}'" for h in others})), max(h.until for h in others)
            holding = f", {with_held:.3f} with what {names} holds until {until[:19]}Z"
            public = "privacy budget: what running jobs leave at this site does not suffice: submit it when they end"
        text = (
            f"privacy budget: with this job, data set '{policy.dataset}' would reach epsilon {reached:.3f} "
            f"{'if the masks fail ' if alone else ''}(delta {policy.delta:g}); {before:.3f} is spent{holding} and the "
            f"cap {'for that ' if alone else ''}is {cap:g}; the job plans {job:.3f} by itself"
        )
        super().__init__(text, text if policy.show_budget else public)
        self.projection = projection


def held(entries: Sequence[Entry], now: datetime | None = None) -> list[Held]:
    """What jobs hold at a time; None is the present. Raises LedgerError when an entry does not say what it holds."""
    holds = []
    for hold in standing_holds(entries, now):
        plan = _charge(hold, hold.job, hold.details).steps
        left = plan.count - _count(history(entries, hold.job))
        if left > 0:
            holds.append(Held(hold.job, replace(plan, count=left), hold.until))
    return holds


def lasting(job: JobConfig) -> float:
    """Seconds that a job may take from one charge to the next, all its timeouts used up."""
    phases = PHASES * job.secagg.phase_timeout if job.secagg.masked else 0
    return job.federation.join_timeout + 2 * job.federation.round_timeout + phases


def _count(history: Sequence[Steps]) -> int:
    return sum(steps.count for steps in history)


def history(entries: Sequence[Entry], *job_ids: str) -> list[Steps]:
    """The steps that a ledger charges; of some jobs, or of all. Raises LedgerError."""
    return [c.steps for c in charges(entries) if not job_ids or c.job in job_ids]


def charges(entries: Sequence[Entry]) -> list[Charge]:
    """What a ledger charges, each for its job: reservations, and what the genesis carries on from closed ledgers.

    Raises:
        LedgerError: an entry does not say what it charges.
    """
    charged = []
    for entry in entries:
        if entry.kind == "reserve":
            charged.append(_charge(entry, entry.job, entry.details))
        elif entry.kind == "genesis":
            try:
                charged += [
                    _charge(entry, str(carried["job"]), carried) for carried in entry.details.get("carried", ())
                ]
            except (KeyError, TypeError):
                raise LedgerError(f"the genesis of '{entry.dataset}' does not say what it carries on") from None
    return charged


def by_job(charged: Iterable[Charge | Held]) -> list[tuple[str, Steps]]:
    """The same added up: by job, one for each kind of steps."""
    jobs: dict[str, list[Steps]] = {}
    for charge in charged:
        jobs.setdefault(charge.job, []).append(charge.steps)
    return [(job, steps) for job, history in jobs.items() for steps in added_up(history)]


def said(steps: Steps) -> dict[str, Any]:
    """What an entry says of steps that it carries on, as `charges` reads it."""
    price = {"sample_rate": steps.sample_rate, "noise_multiplier": steps.noise_multiplier, "steps": steps.count}
    if steps.honest == 1:
        return price
    return price | {
        "mechanism": SHARES,
        "honest": steps.honest,
        "share_multiplier": steps.alone.noise_multiplier,
    }


def _charge(entry: Entry, job: str, details: Mapping[str, Any]) -> Charge:
    try:
        return Charge(job, _steps(details))
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerError(f"entry {entry.seq} of '{entry.dataset}' does not say what it charges ({error})") from None


def _steps(details: Mapping[str, Any]) -> Steps:
    """What an entry charges. Raises KeyError, TypeError or ValueError."""
    if (name := details.get("mechanism", DP_SGD)) not in get_args(Name):
        raise ValueError(f"mechanism {name!r} is not one that this release can price: upgrade")
    if type(details["steps"]) is not int:
        raise ValueError("steps is no whole number")
    honest = details["honest"] if name == SHARES else 1
    if type(honest) is not int:
        raise ValueError("honest is no whole number")
    steps = Steps(float(details["sample_rate"]), float(details["noise_multiplier"]), details["steps"], honest)
    if name == SHARES and not isclose(float(details["share_multiplier"]), steps.alone.noise_multiplier, rel_tol=1e-9):
        raise ValueError("share_multiplier is not noise_multiplier over the root of honest")
    return steps


class Budget:
    """One job's access to the ledger of a site's data set.

    Attributes:
        id: the job's name in the ledger.
        mechanism: what each round does and is charged for.
        projection: what the ledger will show after the job.
        records: which records the site's ledgers were charged for.
    """

    def __init__(
        self, job: JobConfig, site: SiteConfig, ledger: Ledger, job_id: str, mechanism: Mechanism | None = None
    ) -> None:
        """Checks the whole job against policy and ledger.

        Args:
            job: the agreed job.
            site: what the site has and allows.
            ledger: of the site's data set.
            job_id: the job's name in it.
            mechanism: what a round does; None is the job's.

        Raises:
            PrivacyRefused: the job may not run here.
            LedgerError: the ledger cannot be trusted.
        """
        check_policy(job, site.privacy)
        if site.privacy is None:
            raise JobRefused("this site has no privacy policy")
        self._job, self._policy, self._ledger, self.id = job, site.privacy, ledger, job_id
        entries = ledger.entries()
        self._witness = Witness(site.cache, entries[0])
        self.records = RecordLists(ledger.path.parent, entries[0].site, entries[0].dataset)
        self.mechanism = mechanism or Mechanism.of(job)
        self._own = (job_id, *job.continued)  # what counts towards the job's epsilon
        self._holding = False
        self.projection = project(job, site.privacy, entries, job_id, ledger.now())

    def hold(self, seconds: float) -> None:
        """Keep room in the ledger for all that the job may still be charged, and go on doing so with every round.

        What the job holds already is renewed when less than half of the time is left, and what the runs that it
        continues held becomes its own.

        Args:
            seconds: how long, above 0, unless a round is charged before.

        Raises:
            PrivacyRefused, LedgerError: as in `reserve`.
        """
        self._holding = True
        entries, now = self._ledger.entries(), self._ledger.now()
        ends = {h.job: datetime.fromisoformat(h.until) for h in standing_holds(entries, now)}
        self._witness.check(entries)
        if self.id not in ends or (ends[self.id] - now).total_seconds() < seconds / 2:
            continued = _count([c.steps for c in charges(entries) if c.job in self._job.continued])
            plan = {**self.mechanism.describe(), "steps": planned_steps(self._job, continued)}
            self._ledger.hold(job=self.id, seconds=seconds, details=plan, admit=self._require_room)
        for job in self._job.continued:
            if job in ends:
                self._ledger.free(job)

    def _require_room(self, entries: Sequence[Entry], new: Steps | None = None) -> None:
        # another process may have read lower caps since
        stated = [cap.epsilon for cap in stated_caps(entries)[-1:]]
        alone = [cap.epsilon for cap in stated_caps(entries, "cap_alone")[-1:]]
        caps = {"epsilon": min([self._policy.epsilon, *stated])}
        if self._policy.epsilon_alone is not None:
            caps["epsilon_alone"] = min([self._policy.epsilon_alone, *alone])
        policy = replace(self._policy, **caps)
        project_charges(self._job, policy, charges(entries), held(entries, self._ledger.now()), self.id, new)

    def reserve(self, round_number: int, attempt: int, details: Mapping[str, Any]) -> Entry:
        """Charge a round before it starts; on disk when this returns.

        Args:
            round_number: from 1.
            attempt: from 0; another attempt is charged again.
            details: what else the entry shall say beside the mechanism's description.

        Raises:
            PrivacyRefused: the round would pass the job's epsilon or the site's cap; nothing was charged.
            LedgerError: the ledger cannot be trusted or written, or lacks an entry that the site itself remembers.
        """
        if self._holding:
            self.hold(lasting(self._job))
        self._witness.check(self._ledger.entries())
        entry = {**details, **self.mechanism.describe()}
        new = _steps(entry)  # what is written is what is priced, here and by every later reader

        def admit(entries: Sequence[Entry]) -> None:
            own, delta, most = history(entries, *self._own), self._job.privacy.delta, self._job.privacy.epsilon
            if (after := epsilon([*own, new], delta)) > most:
                raise PrivacyRefused(
                    f"privacy budget: round {round_number} would raise epsilon from {epsilon(own, delta):.3f} to "
                    f"{after:.3f} (delta {delta:g}), the job's own epsilon is {most:g}",
                    f"privacy budget: round {round_number} would pass the job's own epsilon",
                )
            self._require_room(entries, new)

        reserved = self._ledger.reserve(job=self.id, round=round_number, attempt=attempt, details=entry, admit=admit)
        self._witness.note(LedgerHead(reserved.seq, reserved.hash, reserved.sig))
        return reserved

    def commit(self, reservation: Entry, release: str) -> None:
        """Note what the round released, by its SHA-256."""
        done = self._ledger.commit(reservation, release=release)
        self._witness.note(LedgerHead(done.seq, done.hash, done.sig))

    def check_head(self, head: LedgerHead) -> None:
        """That an entry which the server has seen, in this job or one before, is still there.

        Raises:
            PrivacyRefused: neither this ledger nor another one in its folder holds it.
            LedgerError: a ledger cannot be trusted.
        """
        if self._ledger.contains(head):
            return
        others = [read_ledger(path) for path in self._ledger.path.parent.glob(f"*{SUFFIX}")]
        if not any(0 <= head.seq < len(entries) and entries[head.seq].hash == head.hash for entries in others):
            raise PrivacyRefused(
                f"this site's ledger of '{self._policy.dataset}' lacks entry {head.seq} that it reported earlier: "
                "it was cut or replaced, and must be restored before the site trains again",
                f"this site's ledger lacks entry {head.seq} that it reported earlier: it was cut or replaced",
            )

    def free(self) -> None:
        """End what the job holds. Raises LedgerError."""
        self._ledger.free(self.id)

    def spent(self) -> float:
        """Epsilon of the job so far at the job's delta."""
        return epsilon(history(self._ledger.entries(), *self._own), self._job.privacy.delta)

    def head(self) -> LedgerHead:
        """The ledger's newest entry."""
        return self._ledger.head()
