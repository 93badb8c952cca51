"""The record's rounds against the ledgers', both ways: what it has was released, and what was released it has."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from fedmpt_core.audit.membership import asked_of
from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.federation.run.record import ABORTED
from fedmpt_core.federation.terms import floors_of
from fedmpt_core.privacy.ledger.chain import Entry
from fedmpt_core.secagg.errors import SecAggError

Attempts = dict[tuple[str, int], set[int]]
"""By job and round, the attempts that a ledger has."""

ASK = "ask the site and the server what became of it"


def check_rounds(run: Run, sites: Sequence[str]) -> None:
    """Adds findings to the run.

    Args:
        run: as loaded.
        sites: whose ledgers can be relied on.
    """
    charged = {site: _attempts(run.ledgers[site], "reserve") for site in sites}
    released = {site: _attempts(run.ledgers[site], "commit") for site in sites}
    missing: dict[str, list[int]] = defaultdict(list)
    for row in run.rounds:
        key = run.job_of(row["round"]), row["round"]
        attempts = {site: released[site].get(key, set()) for site in sites}
        for site in row["sites"]:
            if site in attempts and not attempts[site]:
                missing[site].append(row["round"])
        _check_attempt(run, row, attempts, {site: charged[site].get(key, set()) for site in sites})
    for site, numbers in missing.items():
        text = f"it is in the sum of rounds {_few(numbers)}, and its ledger releases nothing there"
        run.say("round-missing", site, text, "an entry was removed, or the site was added to the round")
    for site in sites:
        _check_order(run, site)
        _check_charged(run, site, charged[site])
    _check_failures(run, charged)
    _check_beyond(run, released)


def _attempts(entries: Sequence[Entry], kind: str) -> Attempts:
    attempts: Attempts = defaultdict(set)
    for entry in entries:
        if entry.kind == kind:
            attempts[entry.job, entry.round].add(entry.attempt)
    return attempts


def _check_attempt(
    run: Run, row: Mapping[str, Any], released: Mapping[str, set[int]], charged: Mapping[str, set[int]]
) -> None:
    """The sum is of one attempt, the last: all in it have released there, and whoever else has was asked."""
    number, where = row["round"], f"round {row['round']}"
    last = max((max(released[s]) for s in row["sites"] if released.get(s)), default=None)
    if last is None:
        return
    for site in sorted(released):
        if site in row["sites"]:
            if released[site] and last not in released[site]:
                text = f"in {where} its ledger releases attempt {max(released[site])}, others in the sum {last}"
                run.say("attempts-differ", site, text, "a site was added to the round, or an entry was removed")
        elif last in released[site] and run.job.secagg.masked and site not in asked_of(row):
            text = f"in {where} its ledger releases an update in the attempt that gave the sum, the record denies it"
            run.say("round-denied", site, text, "the site was removed from the round in the record")
        elif last in released[site]:
            text = f"in {where} its ledger releases an update that is in no sum: late, or the record hides it"
            run.say("update-not-in-sum", site, text, ASK, "warning")
        if any(attempt > last for attempt in charged[site]):
            text = f"it was charged for attempt {max(charged[site])} of {where}, after attempt {last} gave the sum"
            run.say("round-denied", site, text, f"{ASK}: nobody is asked again for round {number}")


def _check_order(run: Run, site: str) -> None:
    """Rounds are charged in order, and attempts within them."""
    for job in run.jobs:
        at = [(e.round, e.attempt) for e in run.ledgers[site] if e.kind == "reserve" and e.job == job]
        if at != sorted(at):
            text = f"its ledger charges the rounds of '{job}' in another order than 1, 2, 3"
            run.say("rounds-out-of-order", site, text, ASK)


def _check_charged(run: Run, site: str, charged: Attempts) -> None:
    """Nothing was charged twice unseen, or beyond the job."""
    own = [e for e in run.ledgers[site] if e.kind == "reserve" and e.job in run.jobs]
    tried = Counter((e.job, e.round, e.attempt) for e in own)
    if again := sorted({number for (_, number, _), count in tried.items() if count > 1}):
        text = f"rounds {_few(again)} are charged again under the same attempt: their trainer was restarted"
        run.say("round-charged-again", site, text, "", "note")
    rounds = Counter(e.round for e in own)
    if retried := sorted(number for number, count in rounds.items() if count > 1):
        run.say("retries-charged", site, f"further attempts were charged in rounds {_few(retried)}", "", "note")
    first = run.job.first_round
    strange = [n for job, n in charged if job == run.manifest.run_id and not first <= n <= run.job.training.rounds]
    if strange:
        text = f"it was charged for rounds {_few(sorted(strange))} of a job of {run.job.training.rounds}"
        run.say("round-beyond-the-job", site, text, "the server asked for more than was agreed")
    for before in run.job.earlier_runs:
        # the round in which it broke off has no checkpoint
        if denied := sorted(n for job, n in charged if job == before.job and n > before.round + 1):
            text = f"the run '{before.job}' charged rounds {_few(denied)}, it was continued after {before.round}"
            run.say("round-denied", site, text, ASK)


def _check_failures(run: Run, charged: Mapping[str, Attempts]) -> None:
    """No more attempts than the job allows to fail, over all of its rounds."""
    failed: dict[int, int] = {}
    for attempts in charged.values():
        for (job, number), tried in attempts.items():
            if job == run.manifest.run_id:
                failed[number] = max(failed.get(number, 0), *tried)
    allowed = run.job.federation.max_failed_rounds
    if sum(failed.values()) > allowed:
        numbers = sorted(number for number, count in failed.items() if count)
        text = f"{sum(failed.values())} attempts failed in rounds {_few(numbers)}, the job allows {allowed}"
        run.say("attempts-beyond-the-job", "run", text, "the server asked for more than was agreed")


def _check_beyond(run: Run, released: Mapping[str, Attempts]) -> None:
    """What was released after the record's last round must be an attempt that failed."""
    last = max((row["round"] for row in run.record["rounds"]), default=0)
    beyond: dict[int, Counter[int]] = defaultdict(Counter)
    for attempts in released.values():
        for (job, number), done in attempts.items():
            if job == run.manifest.run_id and number > last:
                beyond[number].update(done)
    outcome = str(run.record["outcome"])
    for number, attempts in sorted(beyond.items()):
        where, most = f"round {number}", max(attempts.values())
        text = f"the ledgers of {most} sites release an update in it"
        if number > last + 1 or outcome == "completed":
            run.say(
                "round-denied", where, f"{text}, and the record has no such round", f"{ASK}: they suffice for a sum"
            )
        elif not _enough(run, most):
            run.say("round-broken-off", where, f"{text}, too few for a sum: there the run broke off", "", "note")
        elif ABORTED in outcome:
            text += ", and the job was aborted in it, says the record: no sum was formed, or the server hides it"
            remedy = "ask who aborted it, and when; what was released is charged either way"
            run.say("round-broken-off", where, text, remedy, "warning")
        else:
            text += ", enough for a sum, and the record has none: there the run failed, or the server hides it"
            run.say("round-denied", where, text, f"{ASK}; what was released is charged either way", "unshown")


def _enough(run: Run, sites: int) -> bool:
    if not run.job.secagg.masked:
        return sites >= run.job.federation.min_sites
    with suppress(SecAggError):
        return floors_of(run.job).threshold(sites) <= sites
    return False


def _few(numbers: Sequence[int]) -> str:
    """Numbers for a sentence, cut to ten."""
    return ", ".join(map(str, numbers[:10])) + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")
