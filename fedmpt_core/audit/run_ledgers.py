"""A: do the sites' ledgers bear out what the server recorded; B: what the run, and all jobs before it, spent."""

from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import isclose

from fedmpt_core.audit.caps import ALONE, SAME_EPSILON, cap_of, check_caps
from fedmpt_core.audit.cards import Cards, check_cards, check_genesis
from fedmpt_core.audit.finding import Finding
from fedmpt_core.audit.reservations import check_alike, check_reservations, check_weights, declared_units
from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.audit.run_rounds import check_rounds
from fedmpt_core.audit.spending import Accountant, Spending, merged, recompute, spent
from fedmpt_core.audit.statements import layout_of
from fedmpt_core.audit.sums import check_sums
from fedmpt_core.federation.run.record import LEDGERS
from fedmpt_core.federation.site.policy_card import PolicyCard
from fedmpt_core.privacy.accounting.epsilon import Steps
from fedmpt_core.privacy.ledger.budget import charges
from fedmpt_core.privacy.ledger.chain import Entry, LedgerError
from fedmpt_core.privacy.ledger.ledger import stated_caps

MOST_ROUNDS = 64  # of a site whose epsilon is worked out; chosen, as many points as a chart shows
GRID = 1e-3  # what more steps may lower epsilon by, twice the freedom of its accountant's grid


def check_ledgers(
    run: Run,
    accountants: Mapping[str, Accountant],
    cards: Cards | None = None,
    most_rounds: int = MOST_ROUNDS,
) -> dict[str, Spending]:
    """Compare every ledger with the record; adds findings to the run.

    Args:
        run: as loaded.
        accountants: further ones to ask, by name.
        cards: policy cards of sites, for their caps.
        most_rounds: of a site, for which epsilon is worked out; the rounds between them are held to these.

    Returns:
        By site, what it spent.
    """
    spending: dict[str, Spending] = {}
    if not run.job.privacy.private:
        return spending
    if run.job.privacy.noise_multiplier is None:
        text = "the job names no noise multiplier, and no site trains without one"
        run.say("mechanism-differs", "run", text, "the job was changed in the record")
        return spending
    cards, layout = cards or {}, layout_of(run)
    check_cards(run, cards)
    check_alone(run)
    for site, entries in run.ledgers.items():
        try:
            by_round = _by_round(run, entries, most_rounds)
            spending[site] = _spending(run, site, entries, accountants, cards.get((site, entries[0].dataset)), by_round)
        except LedgerError as error:
            run.say("ledger-damaged", site, str(error), "ask the site for its ledger and compare")
            continue
        _check_heads(run, site, entries)
        check_reservations(run, site, entries, layout, cards.get((site, entries[0].dataset)))
        _check_epsilons(run, site, by_round)
    check_rounds(run, sorted(spending))
    check_alike(run, sorted(spending))
    check_weights(run, sorted(spending))
    check_sums(run, layout)
    run.findings += reused_keys({site: entries for site, entries in run.ledgers.items() if site in spending})
    return spending


def check_alone(run: Run) -> None:
    """A simulation's folder, which is where its sites keep their ledgers, is of no other run."""
    own = [site for site in run.ledgers if (run.folder / LEDGERS / site).is_dir()]
    others = {entry.job for site in own for entry in run.ledgers[site] if entry.kind == "reserve"} - {*run.jobs}
    if others and run.manifest.identities == "insecure":
        text = (
            f"the ledgers in this folder were charged by {', '.join(sorted(others))[:200]} too: it mixes several runs"
        )
        run.say("two-runs", "run", text, "none of them can be told from the others: run each into a folder of its own")


def reused_keys(ledgers: Mapping[str, Sequence[Entry]]) -> list[Finding]:
    """Every trainer process draws a noise key of its own, so two sites or jobs never show the same one."""
    users: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for site, entries in ledgers.items():
        for entry in entries:
            if entry.kind == "reserve" and "rng_key_id" in entry.details:
                users[str(entry.details["rng_key_id"])].add((site, entry.job))
    remedy = "noise under a key that is used twice cancels out: treat these updates as unprotected"
    return [
        Finding("noise-key-reused", "fail", site, f"the noise key {key[:16]} serves {len(jobs)} sites or jobs", remedy)
        for key, jobs in users.items()
        for site in sorted({s for s, _ in jobs})
        if len(jobs) > 1
    ]


def _check_heads(run: Run, site: str, entries: Sequence[Entry]) -> None:
    """Every head that the server has seen must be an entry still: else the ledger was cut, restored or forked."""
    rows = [row for row in run.rounds if site in row["privacy"]]
    seen = [(f"round {row['round']}", row["privacy"][site]["head"], row) for row in rows]
    last = run.manifest.sites.get(site, {}).get("head")
    seen += [("the manifest", last, None)] if last else []
    for when, head, row in seen:
        if head["seq"] >= len(entries):
            text = f"its ledger ends at entry {len(entries) - 1}, the server saw entry {head['seq']} ({when})"
            run.say("ledger-cut", site, text, "its end was cut, or an old copy restored: ask the site for its ledger")
            return
        entry = entries[head["seq"]]
        if (entry.hash, entry.sig) != (head["hash"], head["sig"]):
            text = f"entry {head['seq']} of its ledger is not the one that the server saw ({when})"
            run.say("ledger-forked", site, text, "the ledger was rewritten: ask the site for its ledger and compare")
            return
        own = (e for e in entries[head["seq"] :: -1] if e.kind in ("reserve", "commit") and e.job in run.jobs)
        newest = next(own, None)
        number = row["round"] if row else 0
        if row and newest and (newest.kind, newest.job, newest.round) != ("commit", run.job_of(number), number):
            text = f"{when} states entry {head['seq']}, where its ledger is at a {newest.kind} of round {newest.round}"
            run.say("head-of-another-round", site, text, "rounds were moved or copied in the record")
            return


def _spending(
    run: Run,
    site: str,
    entries: Sequence[Entry],
    accountants: Mapping[str, Accountant],
    card: PolicyCard | None,
    by_round: dict[int, float],
) -> Spending:
    jobs, delta, genesis = run.jobs, run.job.privacy.delta, entries[0]
    cap = cap_of(entries, promised := card.privacy.epsilon if card else None)
    cap_alone = cap_of(entries, promised_alone := card.privacy.epsilon_alone if card else None, ALONE)
    units = next((declared_units(e.details) for e in reversed(entries) if e.kind == "reserve"), None)
    run.findings += check_genesis(genesis, units, card, delta)
    every = charges(entries)
    own = [c.steps for c in every if c.job in jobs]
    by_accountant, findings = recompute(own, delta, site, accountants)
    job = next(iter(by_accountant.values()))
    total, more = spent([c.steps for c in every], float(genesis.delta), site)
    run.findings += findings + more
    if job > run.job.privacy.epsilon * (1 + SAME_EPSILON):
        text = f"the run spent epsilon {job:.3f}, the job declares {run.job.privacy.epsilon:g} (delta {delta:g})"
        run.say("epsilon-above-the-job", site, text, "the claim of the job does not hold: the larger number does")
    run.findings += check_caps(entries, promised) + check_caps(entries, promised_alone, ALONE)
    shared = any(c.steps.honest > 1 for c in every)
    if shared:
        job_alone, failed = spent([s.alone for s in own], delta, site)
        total_alone, more = spent([c.steps.alone for c in every], float(genesis.delta), site)
        run.findings += failed + more
    else:
        job_alone, total_alone = job, total
    kinds = Counter(entry.kind for entry in entries)
    return Spending(
        dataset=genesis.dataset,
        unit=genesis.unit,
        job=job,
        total=total,
        delta=float(genesis.delta),
        job_delta=delta,
        jobs=len({c.job for c in every}),
        open=kinds["reserve"] - kinds["commit"],
        cap=cap,
        caps=stated_caps(entries),
        accountants=by_accountant,
        by_round=by_round,
        charged=merged(own),
        charged_before=merged([c.steps for c in every if c.job not in jobs]),
        job_alone=job_alone,
        total_alone=total_alone,
        cap_alone=cap_alone,
    )


def _check_epsilons(run: Run, site: str, by_round: Mapping[int, float]) -> None:
    """What the record says of each round against the ledger; one that was thinned out is bounded by its neighbours."""
    known = sorted(by_round)
    for row in run.rounds:
        stated, number = row["privacy"].get(site), row["round"]
        if not stated:
            continue
        if number in by_round:
            fine, here = isclose(stated["epsilon"], by_round[number], rel_tol=SAME_EPSILON), by_round[number]
        else:
            place = bisect(known, number)
            if not 0 < place < len(known):
                continue  # no release of that round: `check_rounds` says so
            low, here = by_round[known[place - 1]], by_round[known[place]]
            fine = low - GRID <= stated["epsilon"] <= here + GRID
        if not fine:
            text = f"after round {number} the record says epsilon {stated['epsilon']:.4f}, its ledger {here:.4f}"
            run.say("epsilon-differs", site, text, "the record or the ledger was changed")
            return


def _by_round(run: Run, entries: Sequence[Entry], most: int) -> dict[int, float]:
    """Epsilon of the job at each release: what was charged until the commit, open reservations included."""
    jobs, delta = run.jobs, run.job.privacy.delta
    numbers = sorted({e.round for e in entries if e.kind == "commit" and e.job in jobs})
    stride = -(-len(numbers) // most) or 1
    wanted = {*numbers[::stride], *numbers[-1:]}
    sums: dict[tuple[float, float], int] = {}
    epsilons: dict[int, float] = {}
    for entry in entries:
        if entry.job not in jobs:
            continue
        for charge in charges([entry]):
            kind = charge.steps.sample_rate, charge.steps.noise_multiplier
            sums[kind] = sums.get(kind, 0) + charge.steps.count
        if entry.kind == "commit" and entry.round in wanted:
            epsilons[entry.round] = spent([Steps(*kind, count) for kind, count in sums.items()], delta, "")[0]
    return epsilons
