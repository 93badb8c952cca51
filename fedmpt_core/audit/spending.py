"""B: what was really spent, worked out from raw entries by accountants that share no code."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec

from fedmpt_core.audit.finding import Finding
from fedmpt_core.privacy.accounting import epsilon as accounting
from fedmpt_core.privacy.accounting import independent
from fedmpt_core.privacy.accounting.epsilon import AGREEMENT, AccountingError, Steps
from fedmpt_core.privacy.ledger.ledger import Cap

REPORTED, SECOND = "PLD (dp-accounting)", "PRV (Opacus)"
INDEPENDENT = "FFT (this program's own)"

Accountant = Callable[[Sequence[Steps], float], float]


@dataclass(frozen=True)
class Spending:
    """What one site spent.

    Attributes:
        dataset: name of its data set.
        unit: `record` or `group`.
        job: epsilon of the run at the job's delta; infinite where no accountant can answer.
        total: epsilon of all jobs on the data set until the run ended, at the data set's delta.
        delta: of the data set; `job_delta` of the job.
        jobs: number of jobs in the ledger.
        open: reservations of any job that nothing was released for; they count all the same.
        cap: the site's: of its policy card where the auditor has it, else what its ledger states last, else None.
        caps: every cap that its ledger states, the oldest first.
        job_alone: `job` if the masks fail, more where sites share their noise; `total_alone` and `cap_alone` likewise.
        accountants: epsilon of the run by accountant, the reported one first.
        by_round: epsilon of the job after its rounds, evenly thinned to about 64 of them.
        charged: (sample rate, noise multiplier, steps) of the run, `charged_before` of the data set's other jobs.
    """

    dataset: str
    unit: str
    job: float
    total: float
    delta: float
    job_delta: float
    jobs: int
    open: int
    cap: float | None
    caps: tuple[Cap, ...] = ()
    accountants: dict[str, float] = field(default_factory=dict)
    by_round: dict[int, float] = field(default_factory=dict)
    charged: tuple[tuple[float, float, int], ...] = ()
    charged_before: tuple[tuple[float, float, int], ...] = ()
    job_alone: float = 0.0
    total_alone: float = 0.0
    cap_alone: float | None = None


def further_accountants(*, independent: bool) -> dict[str, Accountant]:
    """The accountants beside the reported one: Opacus' where it is installed, else or when asked for our own."""
    installed: dict[str, Accountant] = {SECOND: accounting.prv} if find_spec("opacus") else {}
    return installed | ({INDEPENDENT: _independent} if independent or not installed else {})


def recompute(
    history: Sequence[Steps], delta: float, where: str, accountants: Mapping[str, Accountant]
) -> tuple[dict[str, float], list[Finding]]:
    """Epsilon of a history by every accountant, and what is wrong between them."""
    reported, findings = spent(history, delta, where)
    epsilons = {REPORTED: reported}
    for name, accountant in accountants.items():
        try:
            epsilons[name] = accountant(history, delta)
        except AccountingError as error:
            text = f"{name} cannot answer: {error}"
            findings.append(Finding("accountant-silent", "warning", where, text, "add --independent"))
            continue
        if not abs(epsilons[name] - reported) <= AGREEMENT:
            text = f"{name} finds epsilon {epsilons[name]:.3f}, {REPORTED} {reported:.3f}: more than {AGREEMENT} apart"
            remedy = "do not rely on either before somebody has explained it"
            findings.append(Finding("accountants-disagree", "fail", where, text, remedy))
    return epsilons, findings


def spent(history: Sequence[Steps], delta: float, where: str) -> tuple[float, list[Finding]]:
    """The reported epsilon; infinite, with a finding, where it cannot be worked out."""
    try:
        return accounting.epsilon(history, delta), []
    except (AccountingError, ValueError) as error:
        remedy = "nothing is known of what was spent: treat the site's updates as unprotected"
        return float("inf"), [Finding("epsilon-unknown", "fail", where, str(error), remedy)]


def merged(history: Sequence[Steps]) -> tuple[tuple[float, float, int], ...]:
    """(sample rate, noise multiplier, steps) of each mechanism."""
    sums: dict[tuple[float, float], int] = {}
    for s in history:
        sums[s.sample_rate, s.noise_multiplier] = sums.get((s.sample_rate, s.noise_multiplier), 0) + s.count
    return tuple((*kind, count) for kind, count in sums.items())


def _independent(history: Sequence[Steps], delta: float) -> float:
    return _independent_once(merged(history), delta)


_independent_once = lru_cache(maxsize=1024)(independent.epsilon)  # sites of one run are charged alike
