"""D: what the server could have learned; E: everything that left each site, and what protects it."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from fedmpt_core.audit.membership import cohort_of
from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.audit.spending import Spending
from fedmpt_core.federation.terms import floors_of
from fedmpt_core.secagg.errors import SecAggError


@dataclass(frozen=True)
class Disclosure:
    """One kind of thing that left a site.

    Attributes:
        what: in words.
        protection: what protects it.
        private: whether the privacy claim covers it, or it depends on no record.
    """

    what: str
    protection: str
    private: bool


@dataclass(frozen=True)
class Sums:
    """What the server saw of the sites' updates, and what that rests on.

    Attributes:
        masked: whether it saw sums only.
        rounds: sums that were opened.
        least: fewest sites in a sum; 0 without sums. `most` likewise.
        threshold: fewest that the rules allow in a sum of the largest cohort.
        colluders: sites that may work with the server before a sum shows more.
        hidden_among: sites that an update hides among in the smallest sum when all colluders subtract their own.
        attempts: site attempts that were charged and from which nothing left, or nothing was opened.
        without_masks: by site, epsilon of the run against a server that sees its updates, as if the masks had failed.
            Where every site adds the whole noise itself it is the site's epsilon.
    """

    masked: bool
    rounds: int
    least: int
    most: int
    threshold: int
    colluders: int
    hidden_among: int
    attempts: int
    without_masks: dict[str, float]


def sums_of(run: Run, spending: Mapping[str, Spending]) -> Sums:
    """The facts of a run that `check_membership` has looked at."""
    sizes, secagg = [len(set(row["sites"])) for row in run.rounds], run.job.secagg
    tried = sum(e.kind == "reserve" and e.job in run.jobs for entries in run.ledgers.values() for e in entries)
    opened = sum(site in run.ledgers for row in run.rounds for site in row["sites"])
    threshold = 0
    if secagg.masked and sizes:
        cohorts = [len(set(cohort_of(row))) for row in run.rounds]
        with suppress(SecAggError):  # a cohort below the floors is a finding of its own
            threshold = floors_of(run.job).threshold(max(cohorts))
    return Sums(
        masked=secagg.masked,
        rounds=len(sizes),
        least=min(sizes, default=0),
        most=max(sizes, default=0),
        threshold=threshold,
        colluders=secagg.colluders if secagg.masked else 0,
        hidden_among=max(0, min(sizes, default=0) - secagg.colluders) if secagg.masked else min(1, len(sizes)),
        attempts=max(0, tried - opened),
        without_masks={site: spent.job_alone for site, spent in spending.items()},
    )


def disclosures(run: Run) -> dict[str, list[Disclosure]]:
    """By site, everything that left it in this run; adds findings for what nothing protects."""
    by_site = {}
    private, masked = run.job.privacy.private, run.job.secagg.masked
    for site, joined in sorted(run.sites.items()):
        noise = f"differential privacy per {run.job.privacy.unit}" if private else "nothing"
        mask = "seen by the server in sums only" if masked else "seen by the server"
        took_part = sum(site in row["sites"] for row in run.rounds)
        listed = [
            Disclosure("its presence, device, package versions, timing", "depends on no record", True),
            Disclosure(f"{took_part} updates, {mask}", noise, private),
        ]
        if private:
            listed.append(Disclosure("epsilon, delta and head of the ledger", "follow from the job alone", True))
            if "file" in run.manifest.sites.get(site, {}).get("ledger", {}):
                listed.append(Disclosure("a copy of the ledger", "mechanisms and digests, nothing of a record", True))
        if joined.get("evaluates") and run.job.federation.evaluate_every:
            listed.append(Disclosure("exact figures of its val and test pictures", "nothing", False))
            text = "it gave exact figures of its val and test pictures, which no privacy claim covers"
            run.say("figures-unprotected", site, text, "make sure that these pictures need no protection", "warning")
        if run.job.secagg.metrics:
            listed.append(Disclosure("its training loss, in sums", "nothing but the sum", False))
        if not private:
            text = "its updates are not differentially private"
            run.say("updates-unprotected", site, text, "treat the updates and the model as the data itself")
        by_site[site] = listed
    return by_site
