"""The claim of a run in plain words, and whether it stands.

It must never say that all is well where the audit says otherwise: a run without differential privacy claims nothing,
then the audit's failures decide, then what kind of run it was, then what a person has to judge.
"""

from collections.abc import Sequence
from math import exp, isfinite

from fedmpt_core.audit.auditor import Audit
from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.common.text import shown
from fedmpt_core.report.content import Claim, Fact, Profile, Status
from fedmpt_core.report.plain import count, moment, name, names, one_in, small, up
from fedmpt_core.report.words import WORDS

MOST_REASONS = 6  # of the audit's findings that are repeated at the top; the others are counted


def claim_of(run: Run, audit: Audit, profiles: Sequence[Profile]) -> Claim:
    """Who is protected, against whom, how strongly, for how long, what is not covered, and whether it stands.

    Args:
        run: as loaded.
        audit: of this run.
        profiles: those of its data sets.
    """
    status, headline, reasons = _verdict(run, audit)
    spending = audit.spending
    if not run.job.privacy.private or not spending:
        return Claim(status, headline, reasons, (), _not_covered(run))
    site = max(spending, key=lambda s: spending[s].total)
    worst = spending[site]
    guess = next((p.guess for p in profiles if site in p.sites), None)
    facts = (
        Fact("Who is protected", *_who(run, audit)),
        Fact("Against whom", *_against(run, audit)),
        Fact("How strongly", *how_strongly(worst.total, max(s.delta for s in spending.values()), worst.unit, guess)),
        Fact("For how long", *_duration(run, audit)),
    )
    total = worst.total if isfinite(worst.total) else None
    delta = max(s.delta for s in spending.values())
    alike = all(s.total == worst.total for s in spending.values())
    where = "at every site" if alike and len(spending) > 1 else f"at {name(site)}, which has spent most"
    where += " of those whose ledgers are here" if status == "unshown" else ""
    return Claim(status, headline, reasons, facts, _not_covered(run), total, delta, site, where, guess)


def _verdict(run: Run, audit: Audit) -> tuple[Status, str, tuple[str, ...]]:
    bare = not run.job.privacy.private
    findings = [f for f in audit.findings if not (bare and f.code == "updates-unprotected")]
    lines = {
        level: [f"{name(f.where)}: {shown(f.text)}" for f in findings if f.severity == level]
        for level in ("fail", "unshown", "warning")
    }
    more = lines["fail"] or lines["unshown"] or lines["warning"]
    if len(more) > MOST_REASONS:
        more = [*more[:MOST_REASONS], f"and {len(more) - MOST_REASONS} more, under Findings of the audit"]
    kind = _kind(run)
    if bare:
        text = "No privacy claim is made: this run trained without differential privacy."
        return "none", text, ("Treat the sites' updates and the model as the data itself.", *kind, *more)
    if lines["fail"]:
        text = f"The claim does not stand: the audit found {count(len(lines['fail']), 'thing')} against it."
        return "fails", text, (*more, *kind)
    if lines["unshown"]:
        text = f"The claim is not shown: evidence is missing in {count(len(lines['unshown']), 'point')}."
        return "unshown", text, ("Nothing that was checked contradicts it.", *more, *kind)
    if not audit.spending:
        return "nothing", "Nothing is claimed: no site took part, so nothing left one.", (*kind, *more)
    if run.manifest.identities == "insecure":
        text = "A rehearsal: the figures are those of a simulation, and nobody is bound by them."
        return "rehearsal", text, (*kind, *more)
    if lines["warning"]:
        warnings = count(len(lines["warning"]), "warning")
        return "judge", f"The claim stands as far as it was checked; {warnings} for a person to judge.", (*kind, *more)
    return "stands", "The claim stands: the audit found nothing against it.", kind


def _kind(run: Run) -> tuple[str, ...]:
    """What kind of run it was, where that weakens what it says."""
    weaknesses = []
    if run.manifest.identities == "insecure":
        weaknesses.append(
            "Identities were made up and ledgers carry no signature: whoever had this folder could have written it."
        )
    if not run.job.secagg.masked:
        weaknesses.append("No secure aggregation: the server saw every site's updates one by one.")
    if run.record["outcome"] != "completed":
        weaknesses.append(f"The run did not complete: {shown(run.record['outcome'], 200)}. What it spent is spent.")
    return tuple(weaknesses)


def _who(run: Run, audit: Audit) -> tuple[str, str]:
    unit = run.job.privacy.unit
    whom = "every record (a picture with its labels)" if unit == "record" else "every group of records (a patient)"
    one = "record" if unit == "record" else "group"
    return (
        f"One by one, {whom} that a site trained on: {names(audit.spending)}.",
        f"Two worlds are compared, with and without one {one}. That a site takes part at all is no secret.",
    )


def _against(run: Run, audit: Audit) -> tuple[str, str]:
    alone = max(spent.total_alone for spent in audit.spending.values())
    if any(spent.total_alone != spent.total for spent in audit.spending.values()):
        return (
            f"The server and up to {count(run.job.secagg.colluders, 'site')} that work with it, as long as the masks "
            "of secure aggregation hold, and everybody who sees no more than opened sums or the model.",
            "Sites shared the noise of sums. If the masks fail, a site's own share is all that protects it: epsilon is "
            f"then {up(alone)} in place of the number below.",
        )
    text = (
        "Everybody who sees what left a site: the server, the other sites, whoever gets the model, all of them "
        "together, whatever else they know."
    )
    if run.job.secagg.masked:
        return text, "Secure aggregation hides single updates from the server as well; the numbers do not rest on it."
    return text, "Nobody has to be trusted but the site itself and this program."


def how_strongly(total: float, delta: float, unit: str, guess: float | None) -> tuple[str, str]:
    """What an epsilon of all jobs on a data set means, in words, and by the customary tiers.

    Args:
        total: that epsilon, at `delta`.
        delta: of the data set.
        unit: `record` or `group`.
        guess: see `Profile.guess`; None where it was not worked out.
    """
    if not isfinite(total):
        return "Not known: what was spent cannot be worked out.", "Treat the sites' updates as unprotected."
    one = f"one {unit}"
    factor = up(exp(total), 1) if total < 5 else up(exp(total), 0) if total < 25 else f"{exp(total):.1e}"
    text = (
        f"Epsilon is at most {up(total)} and delta {small(delta)} over all jobs on the data set: adding or removing "
        f"{one} makes nothing that can be seen more than {factor} times as likely, but for a chance of {one_in(delta)}."
    )
    odds = (
        f"Somebody who knows everything else and is undecided whether {one} was used is right afterwards in at most "
        f"{up(guess, 1)} of 100 cases (50 without looking). "
        if guess is not None
        else ""
    )
    return text, odds + _tier(total)


def _tier(total: float) -> str:
    """The tiers of Ponomareva et al. 2023, section 5.2 ("How to DP-fy ML")."""
    tier = "By the tiers that are customary in machine learning (Ponomareva et al. 2023), this is"
    if total <= 1:
        return f"{tier} strong protection (epsilon up to 1)."
    if total <= 10:
        return f"{tier} reasonable protection (above 1, up to 10): what many deployments settle for, and not strong."
    return f"{tier} weak protection (above 10): the number alone promises little, and other safeguards must carry it."


def _duration(run: Run, audit: Audit) -> tuple[str, str]:
    jobs = [s.jobs for s in audit.spending.values()]
    many = count(max(jobs), "job") if min(jobs) == max(jobs) else f"{min(jobs)} to {max(jobs)} jobs"
    return (
        f"For ever, for what has left: nothing done with it later weakens the bound. It counts {many} on the data set, "
        f"until {moment(run.manifest.ended)}.",
        "Every further job on the same data set adds to it; each site's ledger refuses what would pass the site's cap.",
    )


def _not_covered(run: Run) -> tuple[str, ...]:
    sites = run.record["sites"] or {}
    telling = sorted(site for site, joined in sites.items() if joined.get("evaluates"))
    gave = any("mAP" in row or "zero_shot" in row for row in run.record["rounds"])
    figures = f"given by {names(telling or ['a site'])} in this run" if gave else "none are in this run's record"
    return (
        f"Exact figures of test and validation pictures ({figures}): no noise is on them.",
        *WORDS["not_covered"],
    )
