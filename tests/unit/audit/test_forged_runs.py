"""A server that signs what it forged: each forged run fails with a sentence that says where and what differs.

Each of them is internally consistent: record, manifest, digests and signature fit, so only evidence of others tells.
"""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedmpt_core.audit.auditor import Audit, audit_run, compare
from fedmpt_core.audit.fields import CHECKED, FIGURES, WORD, servers_word, unknown_fields
from fedmpt_core.audit.finding import worst
from fedmpt_core.audit.known_keys import KnownKeys
from fedmpt_core.audit.ledger_copy import LedgerReader
from fedmpt_core.audit.run_evidence import NoRun, load_run
from fedmpt_core.audit.site_ledger import load_ledger
from fedmpt_core.common.canonical import canonical
from fedmpt_core.config.federation import EarlierRun, ResumeConfig
from fedmpt_core.config.secagg import SecAggConfig
from fedmpt_core.federation.run.record import ABORTED, MANIFEST, save_model
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.privacy.ledger.export import export_ledger
from fedmpt_core.secagg.start_up_kit import write_roster
from fedmpt_flare.cli.main import app
from tests.audited import JOB, LAYOUT, SITES, Federation, change_job, details, edit_record, roster_of
from tests.federation import DEPLOY

A, B, C = SITES
Record = dict[str, Any]


def failures(folder: Path, keys: KnownKeys) -> list[tuple[str, str, str]]:
    """(code, where, sentence) of all that fails."""
    return [
        (f.code, f.where, f.text)
        for f in audit_run(load_run(folder, keys)).findings
        if f.severity in ("fail", "unshown")
    ]


def expect(folder: Path, keys: KnownKeys, code: str, where: str, says: str) -> None:
    failed = failures(folder, keys)
    assert any(c == code and w == where and says in text for c, w, text in failed), failed


def rounds(record: Record, *numbers: int) -> list[Record]:
    return [row for row in record["rounds"] if row["round"] in (numbers or (1, 2, 3))]


def each(change: Callable[[Record], Any], *numbers: int) -> Callable[[Record], None]:
    """The same change to several rounds."""

    def changed(record: Record) -> None:
        for row in rounds(record, *numbers):
            change(row)

    return changed


def leave_out(site: str) -> Callable[[Record], None]:
    """As if it had not been asked."""

    def change(row: Record) -> None:
        row["sites"].remove(site)
        row["secagg"]["cohort"].remove(site)
        row["privacy"].pop(site)
        row["bytes_sent"].pop(site)

    return change


def add_to_sum(row: Record) -> None:
    row["sites"].append("hospital-x")
    row["secagg"]["cohort"].append("hospital-x")
    row["secagg"]["threshold"] = 3
    row["privacy"]["hospital-x"] = row["privacy"][A]
    row["bytes_sent"]["hospital-x"] = 10


def move(one: int, other: int, *names: str) -> Callable[[Record], None]:
    """Two rounds change places but for their numbers; or parts of them do."""

    def change(record: Record) -> None:
        first, second = record["rounds"][one], record["rounds"][other]
        for name in names or tuple(set(first) - {"round"}):
            first[name], second[name] = second[name], first[name]

    return change


def fail_after(number: int) -> Callable[[Record], None]:
    """As if the run had broken off."""

    def change(record: Record) -> None:
        record["rounds"] = record["rounds"][: number + 1]
        record["outcome"] = "failed: a site did not answer"

    return change


def figures(row: Record) -> None:
    row.update(mAP=99.0, CF1=98.0)


def later(record: Record) -> None:
    for name in ("started", "ended"):
        record[name] = (datetime.fromisoformat(record[name]) + timedelta(days=2)).isoformat()


FORGED: dict[str, tuple[Callable[[Record], Any], str, str, str]] = {
    # who was in the sums
    "a site left out of sites and in every sum": (lambda r: r["sites"].pop(B), "member-unknown", "round 1", B),
    "an invented member of every cohort": (
        each(lambda row: row["secagg"].update(cohort=["hospital-x", *SITES])),
        *("member-unknown", "round 2", "hospital-x"),
    ),
    "an invented member of every sum": (each(add_to_sum), "not-in-the-roster", "hospital-x", "not in the roster"),
    "a cohort that has a site twice": (
        each(lambda row: row["secagg"].update(cohort=[A, A, B, C]), 1),
        *("member-twice", "round 1", A),
    ),
    "a sum that has a site twice": (each(lambda row: row["sites"].append(C), 3), "member-twice", "round 3", C),
    "a site under two names that look alike": (
        lambda r: r["sites"].update({"Hospital-A": r["sites"][A]}),
        *("names-alike", "Hospital-A", "look alike"),
    ),
    "a site under two names but for an invisible letter": (
        lambda r: r["sites"].update({f"{B}\u200b": r["sites"][B]}),
        *("names-alike", B, "\\u200b"),
    ),
    "a site under two names in other Unicode": (
        lambda r: r["sites"].update({"\uff48ospital-c": r["sites"][C]}),
        *("names-alike", C, "\\uff48"),
    ),
    "a site that no round has and nobody knows": (
        lambda r: r["sites"].update({"hospital-x": r["sites"][A]}),
        *("ledger-missing", "hospital-x", "no copy of its ledger"),
    ),
    "a round 0 of one site": (
        lambda r: r["rounds"][0].update(sites=[A], bytes_sent={A: 1}),
        "round-zero",
        "round 0",
        "",
    ),
    "masks in round 0": (lambda r: r["rounds"][0].update(secagg=r["rounds"][1]["secagg"]), "round-zero", "round 0", ""),
    "shares left aside of who is not in the sum": (
        each(lambda row: row["secagg"].update(faults={"hospital-x": "false"}), 2),
        *("aggregation-rules", "round 2", "hospital-x"),
    ),
    "a site that took part and did not join": (
        lambda r: r.update(absent={A: "it did not answer"}),
        *("record-changed", "result.json", A),
    ),
    # rounds, both ways
    "a site that released in a round and was not asked, says the record": (
        each(leave_out(C), 3),
        *("round-denied", C, "round 3"),
    ),
    "the last round removed": (fail_after(2), "round-denied", "round 3", "3 sites"),
    "all rounds removed": (fail_after(0), "round-denied", "round 2", "3 sites"),
    "a round removed": (lambda r: r["rounds"].pop(2), "round-twice", "run", "[0, 1, 3]"),
    "a round more": (
        lambda r: r["rounds"].append({**copy.deepcopy(r["rounds"][3]), "round": 4}),
        *("round-missing", A, "rounds 4"),
    ),
    "two rounds change places": (move(1, 3), "head-of-another-round", A, "round 1"),
    "the budgets of two rounds change places": (move(2, 3, "privacy"), "head-of-another-round", C, "round 2"),
    "the masks of a round are those of another": (
        lambda r: r["rounds"][2].update(secagg=copy.deepcopy(r["rounds"][1]["secagg"])),
        *("round-twice", "round 2", "transcript"),
    ),
    "an attempt beyond the job": (
        each(lambda row: row["secagg"].update(attempt=2), 2),
        *("aggregation-rules", "round 2", "attempt 2"),
    ),
    "keys of an earlier epoch": (
        each(lambda row: row["secagg"].update(epoch=9), 1),
        "aggregation-rules",
        "round 2",
        "9",
    ),
    # budgets
    "a budget removed": (each(lambda row: row["privacy"].pop(B), 2), "record-changed", "round 2", B),
    "a budget of a site that is in no sum": (
        lambda r: r["rounds"][0].update(privacy=r["rounds"][1]["privacy"]),
        *("record-changed", "round 0", A),
    ),
    "another delta": (each(lambda row: row["privacy"][A].update(delta=1e-4), 2), "delta-differs", "round 2", A),
    "bytes of a site that is in no sum": (
        each(lambda row: row["bytes_sent"].update({"hospital-x": 1}), 1),
        *("record-changed", "round 1", "hospital-x"),
    ),
    # figures
    "figures although nobody evaluates": (each(figures, 3), "figures-unexplained", "round 3", "no site evaluates"),
    "figures in a round without evaluation": (
        lambda r: (figures(r["rounds"][2]), r["sites"][A].update(evaluates=True)),
        *("figures-unexplained", "round 2", "evaluates none"),
    ),
    "the plain prompt's figures in a later round": (
        each(lambda row: row.update(zero_shot={"mAP": 1.0}), 1),
        *("figures-unexplained", "round 1", "round 0"),
    ),
    "figures that are no numbers": (
        each(lambda row: row.update(mAP=float("nan"), AP=["a"]), 1),
        *("figures-malformed", "round 1", "finite"),
    ),
    "a field that nobody knows": (
        each(lambda row: row.update(certified=True), 1),
        *("field-unknown", "result.json", "certified"),
    ),
    "a field that nobody knows beside the masks": (
        each(lambda row: row["secagg"].update(verified_by="TUV"), 1),
        *("field-unknown", "result.json", "verified_by"),
    ),
    # the run as a whole
    "later dates": (later, "dates-differ", A, "the record says 20"),
    "dates the wrong way round": (
        lambda r: r.update(started="2099-01-01T00:00:00+00:00"),
        "dates-differ",
        "run",
        "2099",
    ),
    "another run's name": (lambda r: r.update(run_id="run-2"), "round-missing", A, "rounds 1, 2, 3"),
    "no masks, it says": (lambda r: r.update(aggregation="unmasked"), "record-changed", MANIFEST, "aggregation"),
    "it continues a run, it says": (
        lambda r: r.update(resumed={"job": "earlier", "round": 2}),
        *("record-changed", MANIFEST, "resumed"),
    ),
    "no stand-in, it says": (lambda r: r.update(is_stand_in=False), "record-changed", "result.json", "stand-in"),
    "other frozen towers at one site": (
        lambda r: r["sites"][A].update(backbone_digest="bb"),
        *("record-changed", "result.json", "towers"),
    ),
    "another release at one site": (
        lambda r: r["sites"][B]["versions"].update(fedmpt="9.9"),
        *("release-differs", B, "9.9"),
    ),
}


@pytest.mark.parametrize(("change", "code", "where", "says"), FORGED.values(), ids=FORGED)
def test_a_forged_record_is_found_and_named(
    audited: Federation,
    folder: Path,
    keys: KnownKeys,
    change: Callable[[Record], Any],
    code: str,
    where: str,
    says: str,
) -> None:
    edit_record(folder, change)
    audited.resign(folder)
    expect(folder, keys, code, where, says)


KINDS: dict[str, tuple[Callable[[Record], Any], str]] = {
    "epsilon as a string": (each(lambda row: row["privacy"][A].update(epsilon="1.0"), 1), "rounds.1.privacy"),
    "epsilon that is no number": (
        each(lambda row: row["privacy"][A].update(epsilon=float("nan")), 2),
        "rounds.2.privacy",
    ),
    "a negative round": (each(lambda row: row.update(round=-1), 1), "rounds.1.round"),
    "a round that is true": (each(lambda row: row.update(round=True), 1), "rounds.1.round"),
    "a cohort that is a name": (each(lambda row: row["secagg"].update(cohort=A), 1), "rounds.1.secagg.cohort"),
    "bytes below nothing": (each(lambda row: row["bytes_sent"].update({A: -1}), 1), "rounds.1.bytes_sent"),
    "a site that evaluates perhaps": (lambda r: r["sites"][A].update(evaluates="no"), "sites.hospital-a.evaluates"),
}


@pytest.mark.parametrize(("change", "where"), KINDS.values(), ids=KINDS)
def test_values_of_another_kind_are_a_sentence(
    audited: Federation, folder: Path, keys: KnownKeys, change: Callable[[Record], Any], where: str
) -> None:
    edit_record(folder, change)
    audited.resign(folder)
    with pytest.raises(NoRun, match=where):
        load_run(folder, keys)


# the manifest


def restate(folder: Path, federation: Federation, change: Callable[[dict[str, Any]], Any]) -> None:
    """The server changes what it states and signs it; the record stays."""
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    federation.resign(folder, **{name: values[name] for name in ("job", "server", "sites", "rounds", "files")})


STATED: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str, str]] = {
    "another job's name": (lambda m: m.update(job="harmless"), "record-changed", MANIFEST, "harmless"),
    "a site removed": (lambda m: m["sites"].pop(B), "record-changed", B, "whether it took part"),
    "a site added": (lambda m: m["sites"].update(x=m["sites"][A]), "record-changed", "x", "whether it took part"),
    "another device": (lambda m: m["sites"][A].update(device="tpu"), "record-changed", A, "device"),
    "no newest head": (lambda m: m["sites"][A].update(head=None), "record-changed", A, "head"),
    "an older newest head": (
        lambda m: m["sites"][A].update(head=m["sites"][B]["head"]),
        *("record-changed", A, "head"),
    ),
    "a survivor less": (lambda m: m["rounds"][1]["survivors"].pop(), "record-changed", "run", "in the sums"),
    "no digest of the model": (lambda m: m["files"].pop("model.safetensors"), "file-changed", "model.safetensors", ""),
    "no digest of a ledger": (
        lambda m: m["files"].pop(f"privacy/{A}.ledger.jsonl"),
        *("file-changed", f"privacy/{A}.ledger.jsonl", "missing"),
    ),
    "another release": (lambda m: m["server"]["versions"].update(fedmpt="9"), "release-differs", A, "9"),
    "a field that nobody knows": (lambda m: m["server"].update(trusted=True), "field-unknown", MANIFEST, "trusted"),
}


@pytest.mark.parametrize(("change", "code", "where", "says"), STATED.values(), ids=STATED)
def test_a_forged_manifest_is_found_and_named(
    audited: Federation,
    folder: Path,
    keys: KnownKeys,
    change: Callable[[dict[str, Any]], Any],
    code: str,
    where: str,
    says: str,
) -> None:
    restate(folder, audited, change)
    expect(folder, keys, code, where, says)


def test_a_run_without_signatures_fails_where_there_is_a_roster(
    audited: Federation, folder: Path, keys: KnownKeys, tmp_path: Path
) -> None:
    """Everything that is signed is removed, and the job says that identities are made up."""
    job = replace(JOB, secagg=replace(JOB.secagg, insecure_identities=True))
    insecure = {"config": job.to_dict(), "config_digest": job.digest(), "identities": "insecure"}
    edit_record(folder, lambda r: r.update(insecure))
    for ledger in (folder / "privacy").glob("*.jsonl"):
        unsign(ledger, insecure)
    for certificate in (folder / "privacy").glob("*.crt"):
        certificate.unlink()
    heads = {site: heads_of(folder, site) for site in SITES}
    edit_record(folder, each(lambda row: [row["privacy"][s].update(head=heads[s][row["round"]]) for s in SITES]))
    audited.resign(folder)
    values = json.loads((folder / MANIFEST).read_text())
    for site in values["sites"].values():
        site["ledger"].pop("certificate")
    files = {name: digest for name, digest in values["files"].items() if not name.endswith(".crt")}
    values |= {"signature": "", "root": "", "files": files}
    values["server"]["certificate"] = ""
    (folder / MANIFEST).write_text(json.dumps(values))
    assert failures(folder, KnownKeys()) == []  # what a simulation leaves; nobody is who they say, says a note
    expect(folder, keys, "unsigned", MANIFEST, "nobody has signed")
    assert keys.roster
    write_roster(tmp_path / "roster.json", keys.roster)
    done = CliRunner().invoke(app, ["audit", str(folder), "--roster", str(tmp_path / "roster.json")])
    assert done.exit_code == 1
    assert "unsigned" in done.output
    # a simulated site that keeps its ledger hands over an export without a signature
    own = tmp_path / "own"
    own.mkdir()
    (folder / "privacy" / f"{A}.ledger.jsonl").rename(own / "images.ledger.jsonl")
    values["sites"][A]["ledger"] = {"kept": "the site gave none"}
    values["files"].pop(f"privacy/{A}.ledger.jsonl")
    (folder / MANIFEST).write_text(json.dumps(values))
    assert [(code, where) for code, where, _ in failures(folder, KnownKeys())] == [("ledger-missing", A)]
    export_ledger(replace(audited.policy(A), ledger=str(own)), A, None, tmp_path / "export")
    export = load_ledger(tmp_path / "export", KnownKeys(), LedgerReader())
    assert audit_run(load_run(folder, KnownKeys()), ledgers=[export]).passed


def unsign(ledger: Path, details: dict[str, Any]) -> None:
    """The same ledger as a simulation would have it."""
    before, hashes, lines = "0" * 64, dict[str, str](), []
    for line in ledger.read_text().splitlines():
        entry = json.loads(line)
        old = entry.pop("hash")
        entry |= {"prev": before}
        entry.pop("sig")
        if entry["kind"] == "genesis":
            entry |= {"key_spki": "", "public_key": ""}
        if entry["kind"] == "reserve" and entry["job"] == "run-1":
            entry["details"] |= {"identities": "insecure", "config": details["config_digest"]}
        if entry["kind"] == "commit":
            entry["reservation"] = hashes[entry["reservation"]]
        before = hashes[old] = hashlib.sha256(canonical(entry)).hexdigest()
        lines.append(canonical({**entry, "hash": before, "sig": ""}) + b"\n")
    ledger.write_bytes(b"".join(lines))


def heads_of(folder: Path, site: str) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "privacy" / f"{site}.ledger.jsonl").read_text().splitlines()]
    commits = [e for e in lines if e["kind"] == "commit" and e["job"] == "run-1"]
    return {e["round"]: {"seq": e["seq"], "hash": e["hash"], "sig": ""} for e in commits}


# the model


@pytest.mark.parametrize(
    ("content", "code", "where"),
    [
        (b"no model", "model-damaged", "model.safetensors"),
        (save_model(ParameterLayout(("head.bias",), ((2,),)), np.zeros(2, np.float32)), "mechanism-differs", A),
        (save_model(ParameterLayout(LAYOUT.names, ((2, 8), (3,))), np.zeros(19, np.float32)), "mechanism-differs", A),
        (None, "model-missing", "model.safetensors"),
    ],
    ids=["no model", "other tensors", "other shapes", "removed"],
)
def test_a_model_of_other_tensors_than_were_charged_is_named(
    audited: Federation, folder: Path, keys: KnownKeys, content: bytes | None, code: str, where: str
) -> None:
    (folder / "model.safetensors").unlink() if content is None else (folder / "model.safetensors").write_bytes(content)
    audited.resign(folder)
    expect(folder, keys, code, where, "")


# honest runs


@pytest.fixture
def federation(provisioned: Path, tmp_path: Path) -> Federation:
    """One whose ledgers may be changed."""
    return Federation(tmp_path / "federation", provisioned, cap=100.0)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, KnownKeys]:
    """A federation in which one may drop out."""
    from tests.audited import provision

    root, sites = tmp_path_factory.mktemp("four"), (*SITES, "hospital-d")
    kits = provision(root, sites)
    return Federation(root, kits, sites, cap=100.0), roster_of(kits, sites)


def audit_of(folder: Path, keys: KnownKeys) -> Audit:
    return audit_run(load_run(folder, keys))


def test_honest_runs_with_dropouts_resumed_and_unmasked_audit_clean(four: tuple[Federation, KnownKeys]) -> None:
    federation, keys = four
    dropped = audit_of(federation.run("dropped", dropouts={3: ["hospital-d"]}), keys)
    assert dropped.passed
    assert [(f.code, f.where) for f in dropped.findings if f.severity == "warning"] == [
        ("update-not-in-sum", "hospital-d")
    ]
    first = federation.run("first", rounds=1)
    assert {f.code for f in audit_of(first, keys).findings} == {"not-completed"}
    resumed = federation.run("second", resuming("first", 1), rounds=2)
    assert audit_of(resumed, keys).passed
    assert compare([load_run(first, keys), load_run(resumed, keys)]) == []
    twice = federation.run("third", replace(JOB, resume=ResumeConfig("second", 2, "", (EarlierRun("first", 1),))))
    assert audit_of(twice, keys).passed
    assert compare([load_run(folder, keys) for folder in (first, resumed, twice)]) == []
    unmasked = federation.run("seen", replace(JOB, secagg=SecAggConfig(mechanism="none")))
    audit = audit_of(unmasked, keys)
    assert audit.passed
    assert {f.code for f in audit.findings} == {"unmasked", "retries-charged"}


def resuming(job: str, number: int) -> Any:
    return replace(JOB, resume=ResumeConfig(job, number))


def test_a_resumed_run_whose_first_half_was_replaced_is_named(federation: Federation, keys: KnownKeys) -> None:
    first = federation.run("first", rounds=1)
    folder = federation.run("second", resuming("first", 1))
    assert audit_of(folder, keys).passed
    kept = (folder / "result.json").read_bytes()

    def tried(change: Callable[[Record], Any]) -> list[tuple[str, str, str]]:
        (folder / "result.json").write_bytes(kept)
        edit_record(folder, change)
        federation.resign(folder)
        return failures(folder, keys)

    codes = {(code, where) for code, where, _ in tried(each(lambda row: row["privacy"][A].update(epsilon=0.1), 1))}
    assert ("epsilon-differs", A) in codes
    other = json.loads((federation.run("other") / "result.json").read_text())["rounds"][1]
    codes = {(code, where) for code, where, _ in tried(lambda r: r["rounds"].__setitem__(1, other))}
    assert ("ledger-cut", A) in codes  # its heads are younger than this run's ledgers
    # what only the two records together tell
    assert tried(each(lambda row: row.update(seconds=99.0), 1)) == []
    assert [(f.code, f.where) for f in compare([load_run(first, keys), load_run(folder, keys)])] == [
        ("record-changed", "second")
    ]


def test_a_run_that_broke_off_where_too_few_had_released_is_no_lie(federation: Federation, keys: KnownKeys) -> None:
    folder = federation.run("broken", rounds=1)
    ledger = federation.budget(A, JOB, "broken")
    ledger.commit(ledger.reserve(2, 0, details(JOB, f"broken {A}")), "a" * 64)
    federation.hand_over(folder)
    audit = audit_of(folder, keys)
    assert audit.passed
    assert ("round-broken-off", "round 2") in {(f.code, f.where) for f in audit.findings}
    for site in (B, C):
        ledger = federation.budget(site, JOB, "broken")
        ledger.commit(ledger.reserve(2, 0, details(JOB, f"broken {site}")), "a" * 64)
    federation.hand_over(folder)
    expect(folder, keys, "round-denied", "round 2", "3 sites")
    assert worst(audit_of(folder, keys).findings) == "unshown"  # there the run failed, or the server hides the sum
    edit_record(folder, lambda record: record.update(outcome=f"failed: round 2 failed: {ABORTED}"))
    federation.resign(folder)
    aborted = audit_of(folder, keys)
    assert aborted.passed  # for a person to judge, who knows who aborted it
    assert ("round-broken-off", "warning") in {(f.code, f.severity) for f in aborted.findings}


def test_more_attempts_than_the_job_allows_are_named(audited: Federation, folder: Path, keys: KnownKeys) -> None:
    change_job("federation", max_failed_rounds=0)(folder)
    audited.resign(folder)
    expect(folder, keys, "attempts-beyond-the-job", "run", "1 attempts failed in rounds 2")


# every field


def test_every_field_of_a_record_and_a_manifest_is_checked_or_listed(
    audited: Federation, folder: Path, four: tuple[Federation, KnownKeys]
) -> None:
    for run in (folder, *four[0].root.glob("*/manifest.json")):
        place = run if run.is_dir() else run.parent
        record, manifest = (json.loads((place / name).read_text()) for name in ("result.json", MANIFEST))
        assert unknown_fields({"record": record, "manifest": manifest}) == []
        record["rounds"][1]["secagg"]["new"] = 1
        manifest["sites"][A]["ledger"]["new"] = ""
        assert unknown_fields({"record": record, "manifest": manifest}) == [
            "record.rounds.1.secagg.new",
            f"manifest.sites.{A}.ledger.new",
        ]


def test_the_figures_of_an_evaluation_are_all_known() -> None:
    import torch

    from fedmpt_core.config.job import ModelConfig
    from fedmpt_core.model.fedmpt.fedmpt import FedMPT
    from fedmpt_core.training.evaluation import Split, evaluate
    from tests.fakes import FakeBackbone, Table

    model = FedMPT(FakeBackbone(), ("cat", "dog"), ("pose",), ModelConfig(conditions=("pose",)), 0)
    table: Any = Table(torch.randn(4, 9, 16))
    split = Split(table, np.eye(2, dtype=np.uint8)[[0, 1, 0, 1]])
    assert {*evaluate(model, split, unseen=1)} | {"zero_shot"} == set(FIGURES)


def test_what_is_the_server_s_word_alone_is_said_in_output_and_docs(
    folder: Path, keys: KnownKeys, tmp_path: Path
) -> None:
    run = load_run(folder, keys)
    listed = servers_word(run)
    assert set(WORD.values()) <= set(listed)
    assert not set(WORD) & set(CHECKED)
    output = " ".join(CliRunner().invoke(app, ["audit", str(folder)]).output.split())
    plain = json.loads(CliRunner().invoke(app, ["audit", str(folder), "--json"]).output)
    assert plain["runs"][0]["servers_word"] == listed
    docs = " ".join((DEPLOY.parent / "docs" / "audit.md").read_text().split())
    for sentence in listed:
        assert " ".join(sentence.split()) in output
        assert sentence in docs, sentence
    for held in CHECKED.values():
        assert held in docs, held


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inside is None or not value:
        return [path]
    return [leaf for name, item in inside for leaf in leaves(item, (*path, name))]


def other(value: Any) -> Any:
    """Something else of the same kind."""
    match value:
        case bool():
            return not value
        case int():
            return value + 7
        case float():
            return value * 1.5 + 0.25
        case str():
            return f"{value[::-1]}x"
        case list():
            return [*value, "hospital-y"]
        case dict():
            return {**value, "hospital-y": 1}
    return "something"


def is_word(path: tuple[Any, ...]) -> bool:
    """Whether the most exact of the patterns that fit is one of the server's word."""

    def fits(pattern: list[str]) -> bool:
        return len(pattern) <= len(path) and all(p in ("*", str(at)) for p, at in zip(pattern, path, strict=False))

    patterns = [p.split(".") for p in (*CHECKED, *WORD)]
    best = max(filter(fits, patterns), key=lambda p: (len(p), *(name != "*" for name in p)))
    return ".".join(best) in WORD


def changed(value: Any, path: tuple[Any, ...]) -> Any:
    """A copy with another value at one place."""
    copied = copy.deepcopy(value)
    node = copied
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = other(node[path[-1]])
    return copied


def stands_for_all(path: tuple[Any, ...]) -> bool:
    """Of the rounds only 0 and 2, of the sites only the first."""
    return not (path[0] == "rounds" and path[1] not in (0, 2)) and B not in path and C not in path


def is_found(folder: Path, keys: KnownKeys) -> bool:
    """Whether the audit fails, or says that it cannot read the run."""
    try:
        run = load_run(folder, keys)
    except NoRun:
        return True
    return not audit_run(run).passed


def test_every_field_that_is_said_to_be_checked_is(audited: Federation, folder: Path, keys: KnownKeys) -> None:
    """Each is changed alone, and the server signs that."""
    kept = {name: (folder / name).read_bytes() for name in ("result.json", MANIFEST)}
    record, manifest = (json.loads(text) for text in kept.values())
    tried = 0
    for file, value in (("record", record), ("manifest", manifest)):
        for path in leaves(value):
            if is_word((file, *path)) or path[0] in ("config", "schema", "signature") or not stands_for_all(path):
                continue
            for name, text in kept.items():
                (folder / name).write_bytes(text)
            tried += 1
            if file == "record":
                (folder / "result.json").write_text(json.dumps(changed(record, path)))
                audited.resign(folder)
            else:
                audited.resign(folder, **{path[0]: changed(manifest, path)[path[0]]})
            assert is_found(folder, keys), (file, path)
    assert tried > 60
    (folder / "result.json").write_bytes(kept["result.json"])
    audited.resign(folder, **{name: value for name, value in manifest.items() if name not in ("signature", "schema")})
    assert not is_found(folder, keys)
