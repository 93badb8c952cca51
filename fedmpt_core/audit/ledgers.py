"""A: do the sites' ledgers bear out what the server recorded; B: what was really spent."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose
from typing import Any

from fedmpt_core.audit.run import Run
from fedmpt_core.privacy.accounting import Steps, epsilon
from fedmpt_core.privacy.budget import charges
from fedmpt_core.privacy.chain import Entry

CLOSE = 1e-6  # the same accountant on the same entries
AGREEMENT = 0.02  # between accountants


@dataclass(frozen=True)
class Spending:
    """What one site spent, worked out from raw entries.

    Attributes:
        dataset: name of its data set.
        unit: `record` or `group`.
        job: epsilon of the run at the job's delta.
        total: epsilon of all jobs on the data set until the run ended, at the data set's delta.
        delta: of the data set.
        jobs: number of jobs in the ledger.
        cap: the site's cap, where the auditor was given its policy card; else None.
        accountants: epsilon of the run by accountant.
        by_round: epsilon of the job after each of its rounds.
    """

    dataset: str
    unit: str
    job: float
    total: float
    delta: float
    jobs: int
    cap: float | None
    accountants: dict[str, float] = field(default_factory=dict)
    by_round: dict[int, float] = field(default_factory=dict)


Accountant = Callable[[Sequence[Steps], float], float]


def check_ledgers(
    run: Run, accountants: Mapping[str, Accountant], caps: Mapping[str, float] | None = None
) -> dict[str, Spending]:
    """Compare every ledger with the record; adds findings to the run.

    Args:
        run: as loaded.
        accountants: further ones to ask, by name.
        caps: by site, the cap in its policy.

    Returns:
        By site, what it spent.
    """
    found = {}
    if not run.job.privacy.private:
        return found
    for site, entries in run.ledgers.items():
        _check_heads(run, site, entries)
        _check_mechanism(run, site, entries)
        _check_rounds(run, site, entries)
        found[site] = _spending(run, site, entries, accountants, (caps or {}).get(site))
    return found


def own_jobs(run: Run) -> tuple[str, ...]:
    """Names of the run, and of the run that it continues, in ledgers."""
    resumed = run.record.get("resumed")
    return (run.manifest.run_id, str(resumed["job"])) if resumed else (run.manifest.run_id,)


def _check_heads(run: Run, site: str, entries: Sequence[Entry]) -> None:
    """Every head that the server has seen must be an entry still: else the ledger was cut, restored or forked."""
    seen = [(row["round"], row["privacy"][site]["head"]) for row in run.rounds if site in row["privacy"]]
    last = run.manifest.sites.get(site, {}).get("head")
    seen += [("the manifest", last)] if last else []
    for when, head in seen:
        if head["seq"] >= len(entries):
            text = f"its ledger ends at entry {len(entries) - 1}, the server saw entry {head['seq']} ({when})"
            run.say("ledger-cut", site, text, "its end was cut, or an old copy restored: ask the site for its ledger")
            return
        entry = entries[head["seq"]]
        if (entry.hash, entry.sig) != (head["hash"], head["sig"]):
            text = f"entry {head['seq']} of its ledger is not the one that the server saw ({when})"
            run.say("ledger-forked", site, text, "the ledger was rewritten: ask the site for its ledger and compare")
            return


def _check_mechanism(run: Run, site: str, entries: Sequence[Entry]) -> None:
    job, genesis = run.job, entries[0]
    agreed = {
        "sample_rate": job.privacy.sample_rate,
        "noise_multiplier": job.privacy.noise_multiplier,
        "steps": job.steps_per_round,
        "unit": job.privacy.unit,
        "engine": job.privacy.engine,
        "aggregation": run.manifest.aggregation,
        "identities": run.manifest.identities,
    }
    for entry in entries:
        if entry.kind != "reserve" or entry.job != run.manifest.run_id:
            continue
        for name, value in agreed.items():
            charged = entry.details.get(name)
            same = isclose(float(charged), value) if isinstance(value, float) and charged else charged == value
            if not same:
                text = f"round {entry.round} was charged with {name}={charged}, the job says {value}"
                run.say("mechanism-differs", site, text, "the job or the entry was changed after the run")
                return
        if entry.details.get("config") != run.manifest.config_digest:
            digest = run.manifest.config_digest[:16]
            text = f"round {entry.round} was charged for another job than {digest}, the manifest's"
            run.say("config-changed", site, text, "compare the job with the one that the sites approved")
            return
    if genesis.unit != job.privacy.unit:
        text = f"its ledger protects each {genesis.unit}, the job each {job.privacy.unit}"
        run.say("mechanism-differs", site, text, "the two numbers cannot be compared: the claim does not hold")


def _check_rounds(run: Run, site: str, entries: Sequence[Entry]) -> None:
    """Each round that the site is in must have been charged and released, and nothing charged twice unseen."""
    jobs = own_jobs(run)
    released = {e.round for e in entries if e.kind == "commit" and e.job in jobs}
    for row in run.rounds:
        if site in row["sites"] and row["round"] not in released:
            text = f"it is in the sum of round {row['round']}, and its ledger releases nothing in that round"
            run.say("round-missing", site, text, "an entry was removed, or the site was added to the round")
    tried = Counter((e.job, e.round, e.attempt) for e in entries if e.kind == "reserve" and e.job in jobs)
    again = sorted({number for (_, number, _), count in tried.items() if count > 1})
    if again:
        text = f"rounds {again} are charged again under the same attempt: their trainer was restarted"
        run.say("round-charged-again", site, text, "", "note")
    rounds = Counter(e.round for e in entries if e.kind == "reserve" and e.job in jobs)
    retried = {number: count - 1 for number, count in sorted(rounds.items()) if count > 1}
    if retried:
        text = f"further attempts were charged in rounds {', '.join(map(str, retried))}"
        run.say("retries-charged", site, text, "", "note")
    strange = sorted(set(rounds) - set(range(1, run.job.training.rounds + 1)))
    if strange:
        text = f"it was charged for rounds {strange} of a job of {run.job.training.rounds}"
        run.say("round-beyond-the-job", site, text, "the server asked for more than was agreed")


def _spending(
    run: Run, site: str, entries: Sequence[Entry], accountants: Mapping[str, Accountant], cap: float | None
) -> Spending:
    jobs, delta = own_jobs(run), run.job.privacy.delta
    spent = charges(entries)
    own = [c.steps for c in spent if c.job in jobs]
    job, total = epsilon(own, delta), epsilon([c.steps for c in spent], float(entries[0].delta))
    others = {name: accountant(own, delta) for name, accountant in accountants.items()}
    for name, value in others.items():
        if abs(value - job) > AGREEMENT:
            text = f"{name} finds epsilon {value:.3f}, the reported accountant {job:.3f}: more than {AGREEMENT} apart"
            run.say("accountants-disagree", site, text, "do not rely on either before somebody has explained it")
    if job > run.job.privacy.epsilon * (1 + CLOSE):
        text = f"the run spent epsilon {job:.3f}, the job declares {run.job.privacy.epsilon:g} (delta {delta:g})"
        run.say("epsilon-above-the-job", site, text, "the claim of the job does not hold: the larger number does")
    if cap is not None and total > cap * (1 + CLOSE):
        text = f"all jobs on '{entries[0].dataset}' spent epsilon {total:.3f}, its cap is {cap:g}"
        run.say("epsilon-above-the-cap", site, text, "the site's policy was not kept: find out how")
    by_round = _by_round(run, entries, delta)
    for row in run.rounds:
        said: Any = row["privacy"].get(site)
        here = by_round.get(row["round"])
        if said and here is not None and not isclose(said["epsilon"], here, rel_tol=CLOSE):
            text = f"after round {row['round']} the record says epsilon {said['epsilon']:.4f}, its ledger {here:.4f}"
            run.say("epsilon-differs", site, text, "the record or the ledger was changed")
            break
    genesis = entries[0]
    every = len({c.job for c in spent})
    return Spending(genesis.dataset, genesis.unit, job, total, float(genesis.delta), every, cap, others, by_round)


def _by_round(run: Run, entries: Sequence[Entry], delta: float) -> dict[int, float]:
    """Epsilon of the job at each release: what was charged until the commit, open reservations included."""
    jobs, charged, found = own_jobs(run), [], {}
    for entry in entries:
        if entry.job not in jobs:
            continue
        if entry.kind == "reserve":
            charged += [c.steps for c in charges([entry])]
        else:
            found[entry.round] = epsilon(charged, delta)
    return found
