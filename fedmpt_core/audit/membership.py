"""Who is in each sum: within the round's cohort, within the run's sites, within the roster, and by the sites' rules."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.common.text import likeness
from fedmpt_core.federation.run.record import RESULT
from fedmpt_core.federation.server.participation import participants
from fedmpt_core.federation.terms import floors_of
from fedmpt_core.secagg.errors import SecAggError

CHANGED = "the record was changed"
RULES = "the record was changed, or the sites did not keep their rules"


@dataclass(frozen=True)
class MaskedSum:
    """What the record says of the masks of one round; nothing else of the audit knows these names.

    Attributes:
        cohort: the sites in the sum.
        members: of the directory of keys; `threshold`: fewest of them that had to be in the sum, and to open it.
        attempt: of the round, from 0; `epoch` of the keys, from 1; `transcript` of context, cohort and sum.
        left_out: sites that were asked and are not in the sum.
        faults: sites that did wrong at the opening; the sum did without their shares.
        beyond: numbers of the sum that no honest updates give.
        metrics: names of the figures of training in the sum.
    """

    cohort: tuple[str, ...]
    members: int
    threshold: int
    attempt: int
    epoch: int
    transcript: str
    left_out: tuple[str, ...]
    faults: tuple[str, ...]
    beyond: int
    metrics: tuple[str, ...]

    @staticmethod
    def of(row: Mapping[str, Any]) -> "MaskedSum":
        """Of a round of the record, whose fields have been checked for their kinds. Raises KeyError."""
        facts = row["secagg"]
        return MaskedSum(
            tuple(facts["cohort"]),
            facts["members"],
            facts["threshold"],
            facts["attempt"],
            facts["epoch"],
            facts["transcript"],
            tuple(facts["left_out"]),
            tuple(facts["faults"]),
            facts["beyond"],
            tuple(facts.get("metrics", ())),
        )


def cohort_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Who is in a masked sum; nobody where the record does not say."""
    return tuple(row["secagg"].get("cohort", ()))


def asked_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Who was asked in a masked round, the sum's among them."""
    return (*cohort_of(row), *row["secagg"].get("left_out", ()))


def check_membership(run: Run) -> None:
    """Compare who was in each sum with the rules that the sites keep; adds findings to the run."""
    _check_numbers(run)
    _check_names(run)
    if run.manifest.identities == "insecure":
        text = "identities were made up, as in a simulation: nobody is who they say"
        run.say("insecure-identities", "run", text, "", "note")
    if not run.job.secagg.masked:
        text = "the server saw every site's update; differential privacy alone protects the records in them"
        run.say("unmasked", "run", text, "decide whether the sites' epsilons suffice without masks", "warning")
    for row in run.record["rounds"]:
        _check_row(run, row)
    if run.job.secagg.masked:
        _check_masks(run)


def _check_numbers(run: Run) -> None:
    """Rounds are 0, 1, 2, 3, ... once each, but for those that were lost, and all of the job's when it completed."""
    numbers: list[Any] = [row["round"] for row in run.record["rounds"]]
    lost = {int(number) for number in run.record["lost"]}
    if numbers != [n for n in range(len(numbers) + len(lost) + 1) if n not in lost][: len(numbers)]:
        text = f"its rounds are {str(numbers)[:200]}"
        run.say("round-twice", "run", text, "a round was copied, moved or removed in the record")
    elif run.record["outcome"] == "completed" and len(run.rounds) + len(lost) != run.job.training.rounds:
        text = f"it completed with {len(run.rounds)} of {run.job.training.rounds} rounds"
        run.say("round-missing", "run", text, "a round was removed from the record")
    for number, reason in run.record["lost"].items():
        text = f"sites may have trained in it, and it has no sum: {reason[:200]}"
        run.say("round-lost", f"round {number}", text, "", "note")
    if run.record["outcome"] != "completed":
        run.say("not-completed", "run", f"the run ended as {str(run.record['outcome'])[:200]!r}", "", "note")


def _check_names(run: Run) -> None:
    """No name passes for another, and every one is in the roster."""
    if both := sorted({*run.record["absent"]} & {*run.sites}):
        text = f"{', '.join(both)[:200]} took part, and did not join, it says"
        run.say("record-changed", RESULT, text, CHANGED)
    everybody = {*run.sites}.union(*(row["sites"] for row in run.record["rounds"]), *map(asked_of, run.rounds))
    alike: dict[str, list[str]] = defaultdict(list)
    for site in sorted(everybody):
        alike[_bare(site)].append(site)
        if run.roster and site not in run.roster.members:
            run.say("not-in-the-roster", site, "it takes part in the run and is not in the roster", "ask who it is")
    for names in alike.values():
        if len(names) > 1:
            text = f"{len(names)} sites have names that look alike: {', '.join(map(ascii, names))}"
            run.say("names-alike", names[0], text, "one site may be counted twice: ask who they are")


def _bare(name: str) -> str:
    """A name without what people do not see: its likeness, without blanks and accents."""
    letters = unicodedata.normalize("NFD", likeness(name))
    return "".join(c for c in letters if unicodedata.category(c) not in ("Zs", "Mn"))


def _check_row(run: Run, row: Mapping[str, Any]) -> None:
    where, sites = f"round {row['round']}", row["sites"]
    for what, names in (
        ("its sum", sites),
        ("its cohort", cohort_of(row)),
        ("its list of the left out", asked_of(row)),
    ):
        if twice := sorted(name for name, count in Counter(names).items() if count > 1):
            run.say("member-twice", where, f"{what} has {', '.join(twice)[:200]} more than once", CHANGED)
        if strangers := sorted({*names} - {*run.sites}):
            text = f"{what} has {', '.join(strangers)[:200]}, no site of the run"
            run.say("member-unknown", where, text, _remedy(run, row["round"]))
    if row["round"] == 0 and (sites or row["secagg"]):
        text = "it is the model before any training, and the record has a sum of updates"
        run.say("round-zero", where, text, CHANGED)
    private = run.job.privacy.private
    for what, names in (("bytes_sent", row["bytes_sent"]), ("privacy", row["privacy"])):
        expected = {*sites} if what == "bytes_sent" or private else set()
        if differ := sorted(expected ^ {*names}):
            text = f"its {what} and the sites in its sum differ in {', '.join(differ)[:200]}"
            run.say("record-changed", where, text, "a site was added to the round or removed from it")
    for site, stated in row["privacy"].items():
        if stated["delta"] != run.job.privacy.delta:
            text = f"{site} states its epsilon at delta {stated['delta']:g}, the job's is {run.job.privacy.delta:g}"
            run.say("delta-differs", where, text, "epsilon at another delta says nothing of the claim")
    _check_asked(run, row)


def _check_asked(run: Run, row: Mapping[str, Any]) -> None:
    """Enough sites, and only such as the job's public draw asks in one of the attempts that it allows."""
    number, sites, job = row["round"], {*row["sites"]}, run.job
    if number == 0 or run.job_of(number) != run.manifest.run_id:
        return
    where = f"round {number}"
    if not job.secagg.masked and (row["secagg"] or len(sites) < job.federation.min_sites):
        text = f"{len(sites)} sites, at least {job.federation.min_sites} by the job, without masks"
        run.say("aggregation-rules", where, text, RULES)
    attempts = range(job.federation.max_failed_rounds + 1)
    if job.federation.participation < 1 and not any(
        sites <= set(participants(run.sites, job, number, attempt)) for attempt in attempts
    ):
        text = f"no attempt of the job asks {', '.join(sorted(sites))[:200]} together"
        run.say("aggregation-rules", where, text, "the server asked others than the job says, or " + CHANGED)


def _check_masks(run: Run) -> None:
    transcripts, epochs = set[str](), defaultdict[str, int](int)
    for row in run.rounds:
        where = f"round {row['round']}"
        try:
            masks = MaskedSum.of(row)
        except KeyError as error:
            run.say("aggregation-rules", where, f"its sum is not described: it lacks {error}", CHANGED)
            continue
        for text in _broken_rules(run, row["sites"], masks):
            run.say("aggregation-rules", where, text, RULES)
        if masks.transcript in transcripts:
            run.say("round-twice", where, "its transcript is that of another round", "a round was copied in the record")
        transcripts.add(masks.transcript)
        name = run.job_of(row["round"])
        if masks.epoch < max(1, epochs[name]):
            text = f"its keys are of epoch {masks.epoch}, those before it of {epochs[name]}"
            run.say("aggregation-rules", where, text, "rounds were moved in the record")
        epochs[name] = masks.epoch


def _broken_rules(run: Run, sites: Sequence[str], masks: MaskedSum) -> Iterable[str]:
    survivors, cohort, job = {*sites}, {*masks.cohort}, run.job
    try:
        threshold = floors_of(job).threshold(masks.members)
    except SecAggError as error:
        yield f"its sum is not described: {error}"
        return
    if masks.threshold != threshold or len(cohort) < threshold or masks.members < len(cohort):
        sizes = f"{len(cohort)} of {masks.members} sites, threshold {masks.threshold}"
        yield f"{sizes}: the rules ask for {threshold}"
    if differ := sorted(survivors ^ cohort):
        yield f"its sites and the cohort of its sum differ in {', '.join(differ)[:200]}"
    if masks.attempt > job.federation.max_failed_rounds:
        yield f"attempt {masks.attempt}, the job allows {job.federation.max_failed_rounds} to fail"
    if strangers := sorted({*masks.faults} - cohort):
        yield f"shares of {', '.join(strangers)[:200]} were left aside, which are not in the sum"
    if masks.beyond:
        yield f"{masks.beyond} numbers of its sum are none that honest updates give: a site sent a false one"
    if {*masks.metrics} != {*job.secagg.metrics}:
        yield f"it sums the figures {', '.join(sorted(masks.metrics))[:200] or 'of none'}, the job asks for others"


def _remedy(run: Run, number: int) -> str:
    if run.job_of(number) == run.manifest.run_id:
        return "a site was removed from the run, or added to the round"
    return f"it may be of the run '{run.job_of(number)}' that this one continues: audit that one beside it"
