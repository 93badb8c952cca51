"""What the sections say in words, the same in HTML and JSON: each paragraph one string."""

from collections.abc import Sequence

from fedmpt_core.audit.auditor import Audit
from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.report.content import Profile, Utility
from fedmpt_core.report.plain import count, names, number, signed, up


def notes_of(run: Run, audit: Audit, profiles: Sequence[Profile], utility: Utility) -> dict[str, tuple[str, ...]]:
    """Paragraphs by section."""
    private = run.job.privacy.private
    doubt = () if audit.passed else DOUBT
    return {
        "budgets": (*doubt, *_budgets(audit)) if private else NOT_PRIVATE,
        "profile": (*doubt, *_profile(profiles, audit)),
        "sampling": SAMPLING if private else ("Batches were shuffled, and nothing rests on how they were drawn.",),
        "adjacency": _adjacency(profiles, run) if private else NOT_PRIVATE,
        "aggregation": _aggregation(run, audit),
        "limits": LIMITS,
        "utility": _utility(utility),
        "labels": _labels(utility),
        "gate": GATE,
        "tuning": TUNING,
        "canaries": CANARIES,
    }


NOT_PRIVATE = ("This run had no differential privacy, so nothing was charged to any budget.",)

DOUBT = ("The audit failed: these numbers are what the run's files give, and not ones to rely on.",)

SAMPLING = (
    "Poisson sampling: in every step each unit takes part by a coin of its own, with the sampling rate, drawn from the "
    "site's secret keystream. A batch may be empty and is a step, noised and charged, all the same. Nothing is "
    "shuffled, no batch is dropped, and the sum is divided by the declared number of units times the rate, never by "
    "the size of the batch that was drawn. This is what the accountants assume.",
    "Every step of every round counts, as if each one had been published.",
)

LIMITS = (
    "Noise and sampling come from AES-256 in counter mode, under a key that each training process draws from the "
    "operating system and forgets. No seed of the job reaches them. What remains: who controls a site's machine "
    "controls its randomness.",
    "Clipped sums and noise are rounded to one integer grid, and every number that leaves lies on it, so the low bits "
    "of floating point tell nothing (Mironov 2012). What remains is the last bit of the logarithm and the cosine that "
    "make the noise: an effect on epsilon that was bounded by argument, not measured: about 0.01 in the worst case, "
    "for 0.2 million numbers and 300 steps.",
    "Not covered are side channels: a larger batch takes longer, so round times tell roughly how many units were "
    "drawn. The declared number of units, never the true one, is in every formula that leaves the site.",
    "Access control, disks, backups and the pictures themselves are the site's own to protect.",
)

GATE = (
    "A condition is a word such as background or pose under which labels occur together. The model looks at a picture "
    "once for every condition, and the gate says how much each look counts. Were one condition to carry everything, "
    "accidental label pairs of one site could spread through it; equal weights mean that the gate prefers none. "
    "Weights are means over test pictures.",
)

TUNING = (
    "Trying settings on private data and keeping the best one leaks as well. This report covers what the ledgers were "
    "charged for: a trial that ran as a job on the same data set is in the budget. Settings that were chosen by "
    "looking at exact test figures, at other data, or before the ledger began are not covered, and no program can know "
    "of them.",
    "Thresholds were chosen on validation pictures, figures are of test pictures; both are outside the claim.",
)

CANARIES = (
    "An audit with planted records (canaries) is a run of its own and not part of this one. What it gives is a lower "
    "bound: evidence that an implementation is wrong, never a certificate that it is right.",
)


def _budgets(audit: Audit) -> tuple[str, ...]:
    texts = [
        "A budget belongs to a data set, not to a job. Epsilons do not add up: mechanisms are composed, so a run adds "
        "less to the account than it would cost alone. Everything that was reserved counts, whether or not anything "
        "was released for it.",
    ]
    if any(s.cap is None for s in audit.spending.values()):
        texts.append("Where a cap is missing, the site's policy card was not given; the bar then has no end to reach.")
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
        "roster; X25519, HKDF-SHA256, AES-256, Ed25519 and RSA-PSS hold. The shortened form of the protocol has no "
        "written proof and no outside review. It does not stop a site from sending a false update, nor the server from "
        "publishing another model than the sum.",
        "If the masks fail, the server sees each site's update alone. Every site adds its whole noise itself, so its "
        "epsilon stays the same: no number in this report rests on the masks.",
        f"{count(sums.attempts, 'attempt')} of sites were charged and are in no sum that was opened."
        if sums.attempts
        else "Every attempt that was charged is in a sum that was opened.",
        *made_up,
    )


def _utility(utility: Utility) -> tuple[str, ...]:
    if utility.round is None:
        return ("No figures: the job asked for none, or no site gave any.",)
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
