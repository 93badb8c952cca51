"""The audit on signed runs: an honest one passes, and each manipulation is found and named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedmpt_core.audit.auditor import audit_run, compare
from fedmpt_core.audit.run_evidence import KnownKeys, NoRun, load_run
from fedmpt_core.audit.spending import INDEPENDENT, REPORTED, SECOND
from fedmpt_core.common.signing import load_signer
from fedmpt_core.federation.run.manifest import read_manifest
from fedmpt_core.federation.run.record import MANIFEST
from fedmpt_core.privacy.accounting.epsilon import AGREEMENT
from fedmpt_core.secagg.start_up_kit import write_roster
from fedmpt_flare.cli.main import app
from tests.audited import (
    JOB,
    MANIPULATIONS,
    SERVER,
    SITES,
    Federation,
    edit_record,
    lines,
    provision,
    roster_of,
    write,
)
from tests.kits import write_kit


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return provision(tmp_path_factory.mktemp("provisioned"))


@pytest.fixture(scope="module")
def anchors(kits: Path) -> KnownKeys:
    return roster_of(kits)


@pytest.fixture
def federation(tmp_path: Path, kits: Path) -> Federation:
    return Federation(tmp_path, kits)


def codes(folder: Path, anchors: KnownKeys, severity: str = "fail", **options: Any) -> set[str]:
    return {f.code for f in audit_run(load_run(folder, anchors), **options).findings if f.severity == severity}


def test_an_honest_run_passes_and_its_numbers_agree(federation: Federation, anchors: KnownKeys) -> None:
    federation.run("earlier")
    folder = federation.run("run-1")
    found = audit_run(
        load_run(folder, anchors), independent=True, policy_cards=[federation.policy_card(SITES[0], 20.0)]
    )
    assert found.passed
    assert [(f.code, f.severity) for f in found.findings] == [("retries-charged", "note")] * 3
    for site, spent in found.spending.items():
        assert (spent.dataset, spent.jobs, spent.cap) == ("images", 2, 20.0 if site == SITES[0] else None)
        assert 0 < spent.job <= JOB.privacy.epsilon < spent.total
        assert list(spent.accountants) == [REPORTED, SECOND, INDEPENDENT]
        for value in spent.accountants.values():
            assert value == pytest.approx(spent.job, abs=AGREEMENT)
        assert sorted(spent.by_round) == [1, 2, 3]
    record = json.loads((folder / "result.json").read_text())
    assert record["rounds"][3]["privacy"][SITES[0]]["epsilon"] == pytest.approx(found.spending[SITES[0]].by_round[3])


@pytest.mark.parametrize(("change", "code"), MANIPULATIONS.values(), ids=MANIPULATIONS)
def test_a_manipulation_is_found_and_named(
    federation: Federation, anchors: KnownKeys, change: Callable[[Path], Any], code: str
) -> None:
    federation.run("earlier")
    folder = federation.run("run-1")
    assert codes(folder, anchors) == set()
    change(folder)
    found = codes(folder, anchors)
    assert "file-changed" in found
    if code:
        federation.resign(folder)
        found = codes(folder, anchors)
        assert code in found
        assert "file-changed" not in found


def test_a_manifest_signed_by_somebody_else_is_not_believed(
    federation: Federation, anchors: KnownKeys, tmp_path: Path
) -> None:
    folder = federation.run("run-1")
    other = tmp_path / "other"
    write_kit(other, SERVER, who="server")
    old, (sign, _, _) = read_manifest(folder), load_signer(other / "server.key", other / "server.crt")
    theirs = (other / "server.crt").read_text()
    for root in (old.root, theirs):
        new = replace(old, server={**old.server, "certificate": theirs}, root=root, signature="")
        (folder / MANIFEST).write_text(replace(new, signature=sign(new.signed_text())).to_json())
        assert "manifest-signed-by-another" in codes(folder, anchors)


def test_without_a_roster_the_audit_says_what_it_could_not_check(federation: Federation) -> None:
    folder = federation.run("run-1")
    assert codes(folder, KnownKeys()) == set()
    assert codes(folder, KnownKeys(), "warning") == {"no-roster"}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_epsilon_that_the_ledger_does_not_bear_out_is_named(
    federation: Federation, anchors: KnownKeys, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Also in a round whose epsilon is not worked out, as there are too many."""
    monkeypatch.setattr("fedmpt_core.audit.run_ledgers.MOST_ROUNDS", 2)
    folder = federation.run("run-1")
    assert sorted(audit_run(load_run(folder, anchors)).spending[SITES[1]].by_round) == [1, 3]
    edit_record(folder, lambda r: r["rounds"][number]["privacy"][SITES[1]].update(epsilon=0.5))
    federation.resign(folder)
    assert codes(folder, anchors) == {"epsilon-differs"}


def test_a_site_over_its_cap_is_named(federation: Federation, anchors: KnownKeys) -> None:
    folder = federation.run("run-1")
    assert codes(folder, anchors, policy_cards=[federation.policy_card(SITES[1], 1.0)]) == {"epsilon-above-the-cap"}


def test_ledgers_that_do_not_continue_between_runs_are_named(
    federation: Federation, anchors: KnownKeys, tmp_path: Path, kits: Path
) -> None:
    first, second = federation.run("run-1"), federation.run("run-2")
    runs = [load_run(f, anchors) for f in (second, first)]
    assert compare(runs) == []
    kept = runs[1].ledgers[SITES[0]]  # the shorter one ends differently
    runs[1].ledgers[SITES[0]] = (*kept[:-1], replace(kept[-1], hash="f" * 64))
    assert [(f.code, f.where) for f in compare(runs)] == [("ledger-forked", SITES[0])]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["rounds"][1]["secagg"].update(threshold=2),
        lambda r: r["rounds"][1]["secagg"].pop("cohort"),
        lambda r: r["rounds"][1].update(sites=list(SITES[:2])),
        lambda r: r["rounds"][1].update(sites=["hospital-x", *SITES[:2]]),
    ],
    ids=["threshold", "no cohort", "too few", "a stranger"],
)
def test_sums_against_the_rules_are_named(
    federation: Federation, anchors: KnownKeys, change: Callable[[dict[str, Any]], Any]
) -> None:
    folder = federation.run("run-1")
    edit_record(folder, change)
    federation.resign(folder)
    assert "aggregation-rules" in codes(folder, anchors)


BROKEN: dict[str, Callable[[Path], Any]] = {
    "empty folder": lambda f: [shutil.rmtree(f), f.mkdir()],
    "no folder": shutil.rmtree,
    "half downloaded": lambda f: (f / MANIFEST).unlink(),
    "no record": lambda f: (f / "result.json").unlink(),
    "a later record": lambda f: edit_record(f, lambda r: r.update(schema=2)),
    "rounds of another kind": lambda f: edit_record(f, lambda r: r.update(rounds={"1": 2})),
    "a round of another kind": lambda f: edit_record(f, lambda r: r["rounds"].append(7)),
    "privacy of another kind": lambda f: edit_record(f, lambda r: r["rounds"][1].update(privacy=[])),
    "no job": lambda f: edit_record(f, lambda r: r.pop("config")),
    "a later job": lambda f: edit_record(f, lambda r: r["config"].update(surprise=1)),
    "no text": lambda f: (f / "result.json").write_bytes(b"\xff\x00"),
}


@pytest.mark.parametrize("breaks", BROKEN.values(), ids=BROKEN)
def test_what_is_no_run_is_a_sentence(
    federation: Federation, anchors: KnownKeys, breaks: Callable[[Path], Any]
) -> None:
    folder = federation.run("run-1")
    breaks(folder)
    with pytest.raises(NoRun, match="run-1"):
        load_run(folder, anchors)
    done = CliRunner().invoke(app, ["audit", str(folder)])
    assert isinstance(done.exception, NoRun)


def test_the_command_line_tells_scripts_and_people(federation: Federation, anchors: KnownKeys, tmp_path: Path) -> None:
    folder = federation.run("run-1")
    assert anchors.roster
    write_roster(tmp_path / "roster.json", anchors.roster)
    options = ["--roster", str(tmp_path / "roster.json")]
    done = CliRunner().invoke(app, ["audit", str(folder), *options, "--json", "--independent"])
    assert done.exit_code == 0, done.output
    plain = json.loads(done.output)
    assert plain["passed"]
    found = audit_run(load_run(folder, anchors), independent=True)
    assert plain["runs"][0]["spending"] == json.loads(json.dumps({s: asdict(v) for s, v in found.spending.items()}))
    write(folder, lines(folder)[:-1])
    done = CliRunner().invoke(app, ["audit", str(folder), *options])
    assert done.exit_code == 1
    assert "FAILED" in done.output
    assert "ledger-cut" in done.output
    assert not json.loads(CliRunner().invoke(app, ["audit", str(folder), *options, "--json"]).output)["passed"]


def test_names_cannot_draw_on_the_terminal(federation: Federation) -> None:
    folder = federation.run("run-1")
    name = "\x1b[31m[red]hospital\x07"
    edit_record(folder, lambda r: r["sites"].update({name: r["sites"][SITES[0]]}))
    done = CliRunner().invoke(app, ["audit", str(folder)], terminal_width=200)
    assert done.exit_code == 1
    assert "\x1b[31m[" not in done.output
    assert "\x07" not in done.output
    assert "[red]hospital" in done.output
