"""What the sections say in words, the same in HTML and JSON: each paragraph one string."""

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

from fedmpt_core.audit.auditor import Audit
from fedmpt_core.audit.finding import worst
from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.privacy.accounting.epsilon import Steps, epsilon
from fedmpt_core.report.content import Profile, Utility
from fedmpt_core.report.plain import count, names, number, signed, up
from fedmpt_core.report.words import WORDS


def notes_of(run: Run, audit: Audit, profiles: Sequence[Profile], utility: Utility) -> dict[str, tuple[str, ...]]:
    """Paragraphs by section."""
    private = run.job.privacy.private
    doubt = WORDS["doubt"].get(worst(audit.findings), ())
    notes = {
        "budgets": (*doubt, *_budgets(audit)) if private else WORDS["not_private"],
        "profile": (*doubt, *_profile(profiles, audit)),
        "sampling": WORDS["sampling" if private else "shuffled"],
        "adjacency": _adjacency(profiles, run) if private else WORDS["not_private"],
        "aggregation": _aggregation(run, audit),
        "utility": _utility(utility),
        "labels": _labels(utility),
        **{section: WORDS[section] for section in ("limits", "gate", "tuning", "canaries")},
    }
    return {section: tuple(texts) for section, texts in notes.items()}


def _budgets(audit: Audit) -> tuple[str, ...]:
    texts = [
        "A budget belongs to a data set, not to a job. Epsilons do not add up: mechanisms are composed, so a run adds "
        "less to the account than it would cost alone. Everything that was reserved counts, whether or not anything "
        "was released for it.",
    ]
    if any(s.cap is None for s in audit.spending.values()):
        texts.append("Where a cap is missing, no policy card was given and the ledger states none; the bar has no end.")
    for site, spent in audit.spending.items():
        if changes := [cap for cap in spent.caps if cap.before is not None]:
            steps = "; ".join(f"from {c.before:g} to {c.epsilon:g} on {c.time[:10]}" for c in changes)
            texts.append(f"What {names([site])} promised was changed: its cap {steps}.")
    if audit.spending and all(len(s.caps) == 1 for s in audit.spending.values()):
        texts.append("What was promised was not changed: each ledger states one cap.")
    return tuple(texts)


def _profile(profiles: Sequence[Profile], audit: Audit) -> tuple[str, ...]:
    if not profiles:
        return ("There is no profile: nothing was spent, or no accountant can answer.",)
    first = profiles[0]
    whose = names(first.sites) if len(first.sites) < len(audit.spending) else "every site"
    texts = [
        "One pair of epsilon and delta is a point on a curve; the whole curve holds at once. "
        f"For {whose}: whoever knows everything else and guesses at even odds whether a given unit was used is right "
        f"in at most {up(first.guess, 1)} of 100 cases, and whoever accepts one false accusation in a hundred can "
        f"name at most {up(first.named, 1)} % of the units that were used. These are bounds on every attack, not "
        "results of one.",
    ]
    if first.mu is not None:
        texts.append(
            f"In one number: the releases tell no more than a Gaussian mechanism with mu {up(first.mu)} "
            f"(mu-GDP), that is, than one look at the unit under noise {number(1 / max(first.mu, 1e-9), 2)} times its "
            "size, for every epsilon shown and delta down to 1e-10."
        )
    if sum(len(p.sites) for p in profiles) < len(audit.spending):
        texts.append("Drawn are the data sets that spent most; the others are in the table of budgets.")
    return tuple(texts)


def _adjacency(profiles: Sequence[Profile], run: Run) -> tuple[str, ...]:
    unit = run.job.privacy.unit
    text = f"All numbers here compare data sets that differ in one {unit} that is there or not (add or remove)."
    if not profiles or profiles[0].replace_one is None:
        return (text, f"For a {unit} that is replaced by another no number was worked out here; it is larger.")
    first = profiles[0]
    return (
        text,
        f"If instead one {unit} is replaced by another, epsilon is at most {up(first.replace_one or 0.0)} at the same "
        f"delta, for {names(first.sites)}. Compare numbers of other programs only with the one of the same kind.",
    )


def _aggregation(run: Run, audit: Audit) -> tuple[str, ...]:
    sums, secagg = audit.sums, run.job.secagg
    if not sums.masked:
        return (
            f"There was none. The server saw {count(sums.rounds, 'round')} of single updates of every site; the sites' "
            "epsilons alone protect the records in them, and they do so in full.",
        )
    insecure = run.manifest.identities == "insecure"
    made_up = ("Identities were made up in this run, so its masks protected nobody.",) if insecure else ()
    least, most = sums.least, sums.most
    several = f"{least}" if least == most else f"{least} to {most}"
    return (
        f"The server saw {count(sums.rounds, 'sum')} of {several} sites, and of single updates nothing. By the rules a "
        f"sum of the largest cohort needs {sums.threshold}. With {count(sums.colluders, 'site')} on the server's side "
        f"an update still hides among {sums.hidden_among}.",
        f"Assumptions: no more than {secagg.colluders} of the sites work with the server; sites hold the keys in their "
        "roster; X25519, HKDF-SHA256, AES-256, Ed25519 and RSA-PSS hold. The protocol has had no outside review. It "
        "does not stop a site from sending a false update, nor the server from publishing another model than the sum.",
        _if_masks_fail(run, audit),
        f"{count(sums.attempts, 'attempt')} of sites were charged and are in no sum that was opened."
        if sums.attempts
        else "Every attempt that was charged is in a sum that was opened.",
        *made_up,
    )


def _if_masks_fail(run: Run, audit: Audit) -> str:
    if all(spent.total_alone == spent.total for spent in audit.spending.values()):
        return (
            "If the masks fail, the server sees each site's update alone. Every site adds its whole noise itself, so "
            "its epsilon stays the same: no number in this report rests on the masks."
        )
    site, spent = max(audit.spending.items(), key=lambda item: item[1].total_alone)
    whole = f"If the masks fail, all jobs on the data set of {site} come to epsilon {up(spent.total_alone)}."
    if not run.job.privacy.distributed:
        return f"In this run every site adds its whole noise itself; in an earlier one sites shared it. {whole}"
    rows = "; ".join(f"{honest}: {up(value)}" for honest, value in if_all_but(run, audit, site))
    return (
        f"The sites share the noise: epsilon holds for sums with the noise of {run.job.honest} honest sites or more. "
        f"By the number of sites in a sum that do not work with the server it is, for this run at {site}: {rows}. With "
        f"1, no more is left than if the masks fail. {whole}"
    )


def if_all_but(run: Run, audit: Audit, site: str) -> list[tuple[int, float]]:
    """Epsilon of the run at a site by the number of honest sites in each sum, from those of the claim down to one.

    The noise of j of h sites that share it has standard deviation sigma sqrt(j / h).
    """
    history = [Steps(*kind) for kind in audit.spending[site].charged]
    honest, delta = run.job.honest, audit.spending[site].job_delta
    return [
        (j, epsilon([replace(s, noise_multiplier=s.noise_multiplier * sqrt(j / honest)) for s in history], delta))
        for j in range(honest, 0, -1)
    ]


def _utility(utility: Utility) -> tuple[str, ...]:
    if utility.round is None:
        return (f"No figures: {utility.none_since}.",)
    return (
        f"On test pictures of {names(utility.sites)}, after round {utility.round}. Zero-shot is the same frozen model "
        "with a plain prompt. What differential privacy itself costs is not measured here: it takes the same job "
        "without it.",
    )


def _labels(utility: Utility) -> tuple[str, ...]:
    scored = [label for label in utility.labels if label.gain is not None]
    if not scored:
        return ("No label was scored both before and after training.",)
    text = (
        "Differential privacy hurts rare labels most: clipping and noise weigh every record alike, so what few records "
        f"show is lost first. {utility.worse} of {count(len(scored), 'label')} are below zero-shot."
    )
    if utility.rare is None or utility.common is None:
        return (text, "How often a label occurs is not in the record, so labels are in the order of their gain.")
    return (
        text,
        f"The rarer half of the labels gains {signed(utility.rare)} on average, the other half "
        f"{signed(utility.common)}. Labels are in the order of their share of the test pictures, the rarest first.",
    )
