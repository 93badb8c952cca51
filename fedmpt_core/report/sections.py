"""Sections of facts: mechanism, accountants, sums and the run itself, each value taken from job or audit."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from fedmpt_core.audit.auditor import Audit
from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.common.release import PROGRAM, named
from fedmpt_core.common.text import shown
from fedmpt_core.config.job import JobConfig
from fedmpt_core.privacy.accounting.epsilon import AGREEMENT
from fedmpt_core.report.content import Fact, RoundSpan, SiteFacts
from fedmpt_core.report.plain import count, moment, name, names, number, small

ENGINES = {
    "feature_space": "noise goes on the gradients of the text features and the head; the text tower is passed once",
    "exact": "noise goes on the gradients of the trained parameters themselves",
}
TRAINED = {
    "contexts": "the learnable words of the prompts",
    "contexts+gate": "the learnable words of the prompts, the gate, scale and bias",
    "adapters": "the patch adapters' outer matrices, scale and bias",
    "all": "prompts, adapters, gate, scale and bias",
}


def mechanism_of(run: Run, audit: Audit) -> tuple[Fact, ...]:
    """What the job asks for, what the ledgers charged and, where one is here, what a site noted of it."""
    if not run.job.privacy.private:
        return (Fact("Mechanism", "none", "updates are what training gave"),)
    kinds = dict.fromkeys(kind for spent in audit.spending.values() for kind in spent.charged)
    charged = "; ".join(f"{steps} at rate {rate:g}, noise {noise:g}" for rate, noise, steps in list(kinds)[:8])
    by_whom = "by the sites' ledgers for this run; differing sites in turn"
    return (*_agreed(run.job), Fact("Steps charged", charged or "none", by_whom), *_noted(run))


def accountants_of(audit: Audit) -> tuple[Fact, ...]:
    """Which accountants answered, in which versions, and how far apart they are."""
    answers: dict[str, list[float]] = {}
    apart = 0.0
    for spent in audit.spending.values():
        for accountant, value in spent.accountants.items():
            answers.setdefault(accountant, []).append(value)
            apart = max(apart, abs(value - spent.job))
    facts = [
        Fact(
            accountant, " to ".join(dict.fromkeys((number(min(values)), number(max(values))))), _version_of(accountant)
        )
        for accountant, values in answers.items()
    ]
    if len(answers) > 1:
        facts.append(Fact("Largest difference", number(apart, 4), f"{AGREEMENT} is allowed"))
    return tuple(facts)


def spans_of(run: Run) -> tuple[RoundSpan, ...]:
    """Rounds with masked sums; neighbours that were formed alike are one span."""
    rows = []
    for row in run.rounds if run.job.secagg.masked else ():
        facts = row["secagg"]
        cohort = facts.get("cohort")
        size = len(cohort) if isinstance(cohort, list) else 0
        rows.append(
            (row["round"], (size, len(row["sites"]), _whole(facts.get("threshold")), _whole(facts.get("attempt"))))
        )
    spans = []
    for (cohort, survivors, threshold, retried), some in groupby(rows, key=lambda r: r[1]):
        numbers = [r[0] for r in some]
        spans.append(RoundSpan(numbers[0], numbers[-1], cohort, survivors, threshold, retried))
    return tuple(spans)


def manifest_of(run: Run) -> tuple[Fact, ...]:
    """Who ran what, when, and who signed for it."""
    manifest, job = run.manifest, run.job
    signed = "signed by the server" if manifest.signature else "not signed"
    versions = manifest.server.get("versions")
    stand_in = "a stand-in, not CLIP: its figures say nothing of CLIP" if run.record.get("is_stand_in") else ""
    facts = [
        Fact("Run", name(manifest.run_id)),
        Fact("Job", job.name),
        Fact("Job digest", name(manifest.config_digest), "SHA-256 of everything that the sites agreed on"),
        Fact("Outcome", shown(manifest.outcome, 200)),
        Fact("Began", moment(manifest.started)),
        Fact("Ended", moment(manifest.ended)),
        Fact("Manifest", signed, "the server's signature proves what it said, not that it was honest"),
        Fact(
            "Identities",
            name(manifest.identities),
            "" if manifest.identities != "insecure" else "made up, as in a simulation",
        ),
        Fact("Aggregation", name(manifest.aggregation), "what the server saw of updates: sums, or each one"),
        Fact("Backbone", name(run.record.get("backbone") or "–"), stand_in),
        Fact("Labels", count(len(job.classes), "label")),
        Fact("Conditions", names(job.model.conditions)),
        Fact("Server's packages", _versions(versions)),
    ]
    if manifest.resumed:
        facts.append(Fact("Continues", name(manifest.resumed.get("job")), "its steps count as this run's"))
    return tuple(facts)


def sites_of(run: Run) -> tuple[SiteFacts, ...]:
    """What every site said when it joined, and its ledger's copy."""
    facts = []
    for site, joined in sorted((run.record["sites"] or {}).items()):
        stated = run.manifest.sites.get(site, {})
        ledger = stated.get("ledger")
        copy = "verified here" if site in run.ledgers else shown((ledger or {}).get("kept", "not verified"), 200)
        head = stated.get("head") or {}
        seen = f"{name(head.get('seq'))} {name(head.get('hash'))[:12]}" if head else "–"
        device, evaluates = name(joined.get("device", "–")), joined.get("evaluates") is True
        facts.append(SiteFacts(site, device, _versions(joined.get("versions")), copy, seen, evaluates))
    return tuple(facts)


def _agreed(job: JobConfig) -> tuple[Fact, ...]:
    """The mechanism as the job has it."""
    privacy = job.privacy
    bound = ", ".join(f"{group} {norm:g}" for group, norm in privacy.group_norms.items())
    bound = bound or f"{privacy.max_grad_norm:g}"
    clipped = "each unit's gradient is clipped, summed and covered by Gaussian noise (Abadi 2016)"
    every_step = "each one noisy, each one charged, also where a batch is empty"
    declared = f"epsilon {privacy.epsilon:g}, delta {small(privacy.delta)}"
    group = "all records of a group count as one unit" if privacy.unit == "group" else ""
    failures = job.federation.max_failed_rounds
    return (
        Fact("Mechanism", "DP-SGD", clipped),
        Fact("Protected unit", privacy.unit, group),
        Fact("Sampling rate", f"{privacy.sample_rate:g}", "probability of each unit to take part in a step"),
        Fact("Noise multiplier", f"{privacy.noise_multiplier:g}", "standard deviation of the noise over the bound"),
        Fact("Bound on a unit's gradient", bound, "L2 norm; longer ones are cut to it"),
        Fact("Steps in a round", f"{job.steps_per_round}", every_step),
        Fact(
            "Rounds",
            f"{job.training.rounds}",
            f"and at most {count(failures, 'failed attempt')}, charged too" if failures else "and no failed attempt",
        ),
        Fact("Declared by the job", declared, "most that it may spend"),
        Fact("Engine", privacy.engine, ENGINES[privacy.engine]),
        Fact("Trained", job.model.trained, TRAINED[job.model.trained]),
    )


def _noted(run: Run) -> tuple[Fact, ...]:
    """What the first site with an entry of this run noted in it; none without one."""
    entries = (entry for ledger in run.ledgers.values() for entry in ledger)
    noted: Mapping[str, Any] = next(
        (entry.details for entry in entries if entry.kind == "reserve" and entry.job == run.manifest.run_id), {}
    )
    if not noted:
        return ()
    divisor = shown(noted.get("expected_batch_size", "–"), 40)
    return (
        Fact("Numbers under noise in a step", shown(noted.get("released", "–"), 40), "as a site noted them"),
        Fact("Divisor of the sum", divisor, "from the declared number of units"),
        Fact("Grid", f"2^-{shown(noted.get('grid_bits', '–'), 10)} of the bound", "all released numbers lie on it"),
        Fact("Randomness", shown(noted.get("rng", "–"), 80), "key from the operating system, never stored"),
        Fact("Program at the sites", shown(noted.get("code", "–"), 80), "as noted in the ledger"),
    )


def _version_of(accountant: str) -> str:
    """Of the package that an accountant of the audit comes from, as installed where the report was made."""
    for package in ("dp-accounting", "opacus"):
        if package in accountant.lower():
            return named(package)
    return PROGRAM


def _versions(packages: Any) -> str:
    if not isinstance(packages, dict):
        return "–"
    return ", ".join(f"{name(package)} {name(number)}" for package, number in list(packages.items())[:20])


def _whole(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 10**9 else 0
