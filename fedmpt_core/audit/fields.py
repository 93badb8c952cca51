"""What of a run's record and manifest is held against evidence, and what is the server's word alone.

Every field has a place in one of the two lists, by its path; `*` is any name or number, and a path covers all below it.
A field in neither is one that this release does not know: a finding, since nobody has thought of how to check it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.federation.run.record import MANIFEST, RESULT

FIGURES = (
    *("mAP", "CF1", "CF1_macro", "OF1", "threshold", "threshold_from_val", "ece", "classes_without_positives"),
    *("AP", "share", "gate", "gate_entropy", "seen", "unseen", "zero_shot"),
)
"""Names that a round may have beside its own: what `training.evaluation.evaluate` gives, and `zero_shot`."""

CHECKED: dict[str, str] = {
    "record.config": "its digest is in every reservation of the sites' signed ledgers",
    "record.config_digest": "the same digest, worked out anew",
    "record.schema": "this release reads one",
    "record.started": "no reservation of the run is older",
    "record.ended": "no entry of the ledgers' copies is newer",
    "record.run_id": "the job that the sites' ledgers charge",
    "record.aggregation": "follows from the job; in every reservation",
    "record.identities": "follows from the job; in every reservation",
    "record.resumed": "follows from the job; the earlier rounds are in the ledgers under its name",
    "record.sites": "each has a ledger that it signed, each is in the roster, and none is missing that is in a sum",
    "record.sites.*.versions.fedmpt": "the release in the site's own reservations",
    "record.sites.*.backbone_digest": "equal at all sites",
    "record.sites.*.weight": "1, or the number of units that the site's own reservations declare",
    "record.rounds": "every round that a ledger releases, and no other",
    "record.rounds.*.round": "0, 1, 2, ... once each",
    "record.rounds.*.sites": "each has released an update in the attempt that gave the sum",
    "record.rounds.*.bytes_sent": "of the sites in the sum and no other",
    "record.rounds.*.privacy": "of the sites in the sum and no other",
    "record.rounds.*.privacy.*.epsilon": "worked out anew from the site's ledger",
    "record.rounds.*.privacy.*.delta": "the job's",
    **{
        f"record.rounds.*.privacy.*.head.{name}": "of an entry of the site's ledger, from the one that commits this "
        "round to the one before its next round"
        for name in ("seq", "hash", "sig")
    },
    "record.rounds.*.secagg.cohort": "the round's sites; with the left out, all that released in its attempt",
    "record.rounds.*.secagg.left_out": "within the sites",
    "record.rounds.*.secagg.threshold": "follows from `members` and the job",
    "record.rounds.*.secagg.attempt": "no more than the job allows to fail",
    "record.rounds.*.secagg.epoch": "never goes back within a run",
    "record.rounds.*.secagg.faults": "within the cohort",
    "record.rounds.*.secagg.beyond": "none",
    "record.lost": "rounds that the record lacks",
    "record.rounds.*.secagg.metrics": "those that the job asks for and no other",
    "manifest.schema": "this release reads one",
    "manifest.run_id": "the record's",
    "manifest.job": "the name in the job",
    "manifest.config_digest": "the record's",
    "manifest.outcome": "the record's",
    "manifest.started": "the record's",
    "manifest.ended": "the record's",
    "manifest.aggregation": "the record's",
    "manifest.identities": "the record's; no run without signatures where a roster is given",
    "manifest.resumed": "the record's",
    "manifest.server.versions.fedmpt": "the release in the sites' reservations",
    "manifest.server.certificate": "follows from the root; the signature is its key's",
    "manifest.root": "the roster's",
    "manifest.sites.*.*": "what the record says of the same site",
    "manifest.sites.*.head": "the last one in the record",
    "manifest.sites.*.ledger.file": "the copy is read, its signatures are verified",
    "manifest.sites.*.ledger.certificate": "follows from the root; its key is the roster's",
    "manifest.rounds": "what the record says of the same rounds",
    "manifest.files": "the files that a run has, and no other, each with its digest",
    "manifest.signature": "verified",
}
"""By path, what it is held against. Without differential privacy there are no ledgers, and what rests on them is not
checked."""

WORD: dict[str, str] = {
    "record.backbone": "name of the towers",
    "record.is_stand_in": "whether they only stand in for CLIP; that the embedded ones do is checked",
    "record.outcome": "why a run ended; that a completed one has every round of the job is checked",
    "record.server": "the server's hardware",
    "record.sites.*.evaluates": "whether a site gives figures; that there are none if no site does is checked",
    "record.sites.*.device": "what a site computes on",
    "record.sites.*.versions.*": "packages of a site; that of this program is checked",
    "record.rounds.*.seconds": "how long a round took",
    "record.rounds.*.bytes_sent.*": "how much a site sent",
    "record.rounds.*.secagg.members": "sites whose keys were exchanged; that the sum has "
    "as many of them as it must is checked",
    "record.absent": "sites that were invited and did not join, and why; that none of them took part is checked",
    "record.lost.*": "why a round has no sum",
    "record.rounds.*.secagg.faults.*": "what a site did wrong at the opening",
    "record.rounds.*.secagg.transcript": "what was said under the masks; that no two rounds have the same is checked",
    "record.rounds.*.secagg.seconds": "how long each phase took",
    "record.rounds.*.secagg.metrics.*": "sums of figures of training",
    "record.rounds.*.secagg.left_out.*": "why a site is not in the sum",
    **{f"record.rounds.*.{name}": "figures that sites reported" for name in FIGURES},
    "manifest.server.versions.*": "packages of the server; that of this program is checked",
    "manifest.sites.*.ledger.kept": "why there is no copy of a ledger",
}
"""By path, what nothing that a site signs speaks of."""

WORD_BEYOND_FIELDS = (
    "that `model.safetensors` is the sum of the updates (its names and shapes are checked, and nothing else)",
    "that a site whose update left it and is in no sum dropped out",
)
"""What no field says and nobody but the server knows."""


def servers_word(run: Run) -> list[str]:
    """What in this run rests on the server's word, a sentence each, the same ones next to each other."""
    if not run.job.privacy.private:
        return ["everything: without differential privacy no site keeps a ledger, so none has signed anything"]
    return [*dict.fromkeys(WORD.values()), *WORD_BEYOND_FIELDS]


def check_fields(run: Run) -> None:
    """Adds a finding for every field that is in neither list."""
    for file, name, value in ((RESULT, "record", run.record), (MANIFEST, "manifest", vars(run.manifest))):
        for path in unknown_fields({name: value}):
            text = f"it has the field {path[:80]!r}, which this release does not know"
            run.say("field-unknown", file, text, "audit with the release that wrote the run; else somebody added it")


def unknown_fields(value: Mapping[str, Any]) -> list[str]:
    """Paths in neither list, each by its upper end.

    Args:
        value: `{"record": ..., "manifest": ...}`, or one of them.
    """
    return [".".join(path) for path in _unknown(value, _TREE, ())]


def _unknown(value: Any, known: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    inside = value.items() if isinstance(value, Mapping) else ((str(i), item) for i, item in enumerate(value or ()))
    for name, item in inside:
        below = known.get(name, known.get("*"))
        if below is None:
            yield (*path, str(name))
        elif below and isinstance(item, Mapping | list):
            yield from _unknown(item, below, (*path, str(name)))


def _tree() -> dict[str, Any]:
    """The paths as nested tables; an empty one covers all below it."""
    tree: dict[str, Any] = {}
    for path in (*CHECKED, *WORD):
        node = tree
        for name in path.split("."):
            node = node.setdefault(name, {})
    return tree


_TREE = _tree()
