"""What the server says of a whole run, against the job, the roster, the folder and itself."""

import json
from dataclasses import asdict
from datetime import timedelta

from safetensors import SafetensorError

from fedmpt_core.audit.fields import FIGURES
from fedmpt_core.audit.ledger_copy import time_of
from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.audit.sums import sum_files
from fedmpt_core.federation.run.manifest import round_facts
from fedmpt_core.federation.run.record import MANIFEST, MODEL, RESULT, load_state
from fedmpt_core.model.vector import LayoutError, ParameterLayout

CLOCKS = timedelta(hours=1)  # by which clocks of a site and of the server may differ; chosen
EDIT = "the record was edited"
EDITED = "one of the two was edited: download the run again"


def check_statements(run: Run) -> None:
    """Adds findings to the run for all that its record and manifest say of the run as a whole."""
    _check_kind(run)
    _check_manifest(run)
    _check_files(run)
    _check_dates(run)
    _check_figures(run)


def layout_of(run: Run) -> ParameterLayout | None:
    """Names and shapes of what was trained, from the model; None, with a finding, where there should be one."""
    path = run.folder / MODEL
    if not path.is_file() or path.is_symlink():
        if _has_trained(run):
            run.say("model-missing", MODEL, "the run has rounds and no model", "download the run again")
        return None
    try:
        _, layout, _, _ = load_state(path)
        return layout
    except (OSError, SafetensorError, LayoutError, ValueError, KeyError, TypeError) as error:
        run.say("model-damaged", MODEL, f"it is no model of this program: {str(error)[:200]}", "download the run again")
        return None


def _check_kind(run: Run) -> None:
    """Masks, identities and what is continued follow from the job, whose digest the sites' reservations hold."""
    manifest, job = run.manifest, run.job
    follows = {
        "aggregation": "masked" if job.secagg.masked else "unmasked",
        "identities": "insecure" if job.secagg.insecure_identities else "start-up kits",
        "resumed": json.loads(json.dumps(asdict(job.resume) if job.resume else None)),
        "job": job.name,
    }
    for name, value in follows.items():
        if getattr(manifest, name) != value:
            text = f"it says {name}={str(getattr(manifest, name))[:80]!r}, the job {value!r}"
            run.say("record-changed", MANIFEST, text, "the manifest or the job was edited: download the run again")
    if job.backbone.kind == "embedded" and run.record.get("is_stand_in") is not True:
        run.say("record-changed", RESULT, "the embedded towers are no stand-in, it says", EDIT)
    signed = bool(manifest.signature or manifest.root or manifest.server["certificate"])
    if manifest.identities == "insecure" and signed:
        text = "identities are made up, it says, and it names a certificate: a simulation has none"
        run.say("record-changed", MANIFEST, text, "signatures were removed: ask the server for the run")
    if run.roster and not (signed and manifest.signature and manifest.identities != "insecure"):
        text = "the roster's sites have keys, and nobody has signed this run"
        run.say("unsigned", MANIFEST, text, "signatures were removed, or this is a simulation: rely on nothing in it")


def _check_manifest(run: Run) -> None:
    """It says of sites and rounds what the record says, no less and no more."""
    heads = {site: spent["head"] for row in run.record["rounds"] for site, spent in row["privacy"].items()}
    for site in sorted({*run.sites, *run.manifest.sites}):
        stated = dict(run.manifest.sites.get(site, {}))
        stated.pop("ledger", None)
        expected = {**run.sites[site], "head": heads.get(site)} if site in run.sites else {}
        differ = sorted(name for name in {*stated, *expected} if stated.get(name) != expected.get(name))
        if (site in run.sites) != (site in run.manifest.sites):
            differ = ["whether it took part"]
        if differ:
            text = f"{RESULT} and {MANIFEST} differ in {', '.join(differ)[:200]}"
            run.say("record-changed", site, text, EDITED)
    if run.manifest.rounds != [round_facts(row) for row in run.record["rounds"]]:
        text = "the record and the manifest differ in who was in the sums"
        run.say("record-changed", "run", text, EDITED)
    if len(digests := {str(joined.get("backbone_digest")) for joined in run.sites.values()}) > 1:
        text = f"its sites have {len(digests)} different frozen towers"
        run.say("record-changed", RESULT, text, "the server lets only sites with the same ones take part")


def _check_files(run: Run) -> None:
    copies = [site.get("ledger", {}) for site in run.manifest.sites.values()]
    named = {copy[key] for copy in copies for key in ("file", "certificate") if key in copy}
    expected = {RESULT, *named, *([MODEL] if _has_trained(run) else ()), *sum_files(run)}
    for file in sorted(expected ^ set(run.manifest.files)):
        text = "its digest is missing" if file in expected else "it belongs to no site and is no part of a run"
        if file != MODEL or file in expected:
            run.say("file-changed", file[:80], text, "a file was added or removed: download the run again")


def _has_trained(run: Run) -> bool:
    return any(run.job_of(row["round"]) == run.manifest.run_id for row in run.rounds)


def _check_dates(run: Run) -> None:
    began, ended = time_of(run.manifest.started), time_of(run.manifest.ended)
    if began > ended:
        text = f"it began at {run.manifest.started} and ended before, at {run.manifest.ended}"
        run.say("dates-differ", "run", text, EDIT)
    for site, entries in run.ledgers.items():
        times = [time_of(e.time) for e in entries if e.job == run.manifest.run_id]
        if times and not began - CLOCKS <= times[0] <= times[-1] <= ended + CLOCKS:
            text = (
                f"its ledger has entries of this run from {times[0]:%Y-%m-%d %H:%M} to {times[-1]:%Y-%m-%d %H:%M}, the "
                f"record says {run.manifest.started} to {run.manifest.ended}"
            )
            run.say("dates-differ", site, text, "the record was edited, or the clock of the site or server is wrong")


def _check_figures(run: Run) -> None:
    """A round has figures if the job asks for them then and a site gives them; numbers, and finite ones."""
    gives = any(joined.get("evaluates") for joined in run.sites.values())
    for row in run.record["rounds"]:
        number, figures = row["round"], {name: row[name] for name in FIGURES if name in row}
        where = f"round {number}"
        ours = run.job_of(number) == run.manifest.run_id
        if figures and not gives and ours:
            run.say("figures-unexplained", where, "it has figures, and no site evaluates", EDIT)
        elif figures and not run.job.is_judged(number) and ours:
            text = "it has figures, and the job evaluates none in this round"
            run.say("figures-unexplained", where, text, EDIT)
        elif not figures and gives and run.job.is_judged(number) and ours:
            text = "it has no figures: no site that evaluates has answered, or they were removed"
            run.say("figures-missing", where, text, "ask the sites that evaluate", "warning")
        if "zero_shot" in row and number:
            run.say("figures-unexplained", where, "only round 0 has figures of the plain prompt", EDIT)
        if not _numbers(figures):
            run.say("figures-malformed", where, "a figure is no finite number", EDIT)


def _numbers(figures: object) -> bool:
    if isinstance(figures, dict | list):
        return all(map(_numbers, figures.values() if isinstance(figures, dict) else figures))
    return type(figures) in (int, float) and abs(figures) < float("inf")  # type: ignore[operator]  # NaN is below nothing
