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
from fedmpt_core.audit.known_keys import KnownKeys
from fedmpt_core.audit.run_evidence import NoRun, load_run
from fedmpt_core.audit.run_ledgers import check_ledgers
from fedmpt_core.audit.spending import INDEPENDENT, REPORTED, SECOND
from fedmpt_core.common.signing import load_signer
from fedmpt_core.federation.run.manifest import read_manifest
from fedmpt_core.federation.run.record import MANIFEST
from fedmpt_core.privacy.accounting.epsilon import AGREEMENT
from fedmpt_core.secagg.start_up_kit import write_roster
from fedmpt_flare.cli.main import app
from tests.audited import (
    CAPS,
    JOB,
    MANIPULATIONS,
    SITES,
    Federation,
    edit_record,
    lines,
    write,
)
from tests.kits import write_kit
from tests.provisioning import SERVER


def codes(folder: Path, keys: KnownKeys, severity: str = "fail", **options: Any) -> set[str]:
    severities = ("fail", "unshown") if severity == "fail" else (severity,)
    return {f.code for f in audit_run(load_run(folder, keys), **options).findings if f.severity in severities}


def test_an_honest_run_passes_and_its_numbers_agree(audited: Federation, keys: KnownKeys) -> None:
    folder, capped = audited.root / "run-1", [audited.policy_card(SITES[0], 20.0)]
    audit = audit_run(load_run(folder, keys), independent=True, policy_cards=capped)
    assert audit.passed
    assert [(f.code, f.severity) for f in audit.findings] == [("retries-charged", "note")] * 3
    for site, spent in audit.spending.items():
        assert (spent.dataset, spent.jobs, spent.cap) == ("images", 2, dict(zip(SITES, CAPS, strict=True))[site])
        assert 0 < spent.job <= JOB.privacy.epsilon < spent.total
        assert list(spent.accountants) == [REPORTED, SECOND, INDEPENDENT]
        for value in spent.accountants.values():
            assert value == pytest.approx(spent.job, abs=AGREEMENT)
        assert sorted(spent.by_round) == [1, 2, 3]
    record = json.loads((folder / "result.json").read_text())
    assert record["rounds"][3]["privacy"][SITES[0]]["epsilon"] == pytest.approx(audit.spending[SITES[0]].by_round[3])


@pytest.mark.parametrize(("change", "code"), MANIPULATIONS.values(), ids=MANIPULATIONS)
def test_a_manipulation_is_found_and_named(
    audited: Federation, folder: Path, keys: KnownKeys, change: Callable[[Path], Any], code: str
) -> None:
    assert codes(folder, keys) == set()
    change(folder)
    assert "file-changed" in codes(folder, keys)
    if code:
        audited.resign(folder)
        after = codes(folder, keys)
        assert code in after
        assert "file-changed" not in after


def test_a_manifest_signed_by_somebody_else_is_not_believed(folder: Path, keys: KnownKeys, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_kit(other, SERVER, who="server")
    old, (sign, _, _) = read_manifest(folder), load_signer(other / "server.key", other / "server.crt")
    theirs = (other / "server.crt").read_text()
    for root in (old.root, theirs):
        new = replace(old, server={**old.server, "certificate": theirs}, root=root, signature="")
        (folder / MANIFEST).write_text(replace(new, signature=sign(new.signed_text())).to_json())
        assert "manifest-signed-by-another" in codes(folder, keys)


def test_without_a_roster_the_audit_says_what_it_could_not_check(audited: Federation) -> None:
    folder = audited.root / "run-1"
    assert codes(folder, KnownKeys()) == set()
    assert codes(folder, KnownKeys(), "warning") == {"no-roster"}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_epsilon_that_the_ledger_does_not_bear_out_is_named(
    audited: Federation, folder: Path, keys: KnownKeys, number: int
) -> None:
    """Also in a round whose epsilon is not worked out, as there are too many."""
    edit_record(folder, lambda r: r["rounds"][number]["privacy"][SITES[1]].update(epsilon=0.5))
    audited.resign(folder)
    run = load_run(folder, keys)
    assert run.findings == []
    spending = check_ledgers(run, {}, most_rounds=2)
    assert sorted(spending[SITES[1]].by_round) == [1, 3]
    assert [(f.code, f.where) for f in run.findings if f.severity == "fail"] == [("epsilon-differs", SITES[1])]


def test_a_site_over_its_cap_is_named(audited: Federation, keys: KnownKeys) -> None:
    capped = [audited.policy_card(SITES[1], 1.0)]
    assert codes(audited.root / "run-1", keys, policy_cards=capped) == {"epsilon-above-the-cap"}


def test_ledgers_that_do_not_continue_between_runs_are_named(audited: Federation, keys: KnownKeys) -> None:
    later, earlier = (load_run(audited.root / name, keys) for name in ("run-1", "earlier"))
    assert compare([later, earlier]) == []
    copy = earlier.ledgers[SITES[0]]
    earlier.ledgers[SITES[0]] = (*copy[:-1], replace(copy[-1], hash="f" * 64))
    assert [(f.code, f.where) for f in compare([later, earlier])] == [("ledger-forked", SITES[0])]


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
    audited: Federation, folder: Path, keys: KnownKeys, change: Callable[[dict[str, Any]], Any]
) -> None:
    edit_record(folder, change)
    audited.resign(folder)
    assert "aggregation-rules" in codes(folder, keys)


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
def test_what_is_no_run_is_a_sentence(folder: Path, keys: KnownKeys, breaks: Callable[[Path], Any]) -> None:
    breaks(folder)
    with pytest.raises(NoRun, match="run-1"):
        load_run(folder, keys)
    done = CliRunner().invoke(app, ["audit", str(folder)])
    assert isinstance(done.exception, NoRun)


def test_the_command_line_tells_scripts_and_people(folder: Path, keys: KnownKeys, tmp_path: Path) -> None:
    assert keys.roster
    write_roster(tmp_path / "roster.json", keys.roster)
    options = ["--roster", str(tmp_path / "roster.json")]
    done = CliRunner().invoke(app, ["audit", str(folder), *options, "--json", "--independent"])
    assert done.exit_code == 0, done.output
    plain = json.loads(done.output)
    assert plain["passed"]
    spending = audit_run(load_run(folder, keys), independent=True).spending
    assert plain["runs"][0]["spending"] == json.loads(json.dumps({site: asdict(s) for site, s in spending.items()}))
    write(folder, lines(folder)[:-1])
    done = CliRunner().invoke(app, ["audit", str(folder), *options])
    assert done.exit_code == 1
    assert "FAILED" in done.output
    assert "ledger-cut" in done.output
    assert not json.loads(CliRunner().invoke(app, ["audit", str(folder), *options, "--json"]).output)["passed"]


def test_names_cannot_draw_on_the_terminal(folder: Path) -> None:
    name = "\x1b[31m[red]hospital\x07"
    edit_record(folder, lambda r: r["sites"].update({name: r["sites"][SITES[0]]}))
    done = CliRunner().invoke(app, ["audit", str(folder)], terminal_width=200)
    assert done.exit_code == 1
    assert "\x1b[31m[" not in done.output
    assert "\x07" not in done.output
    assert "[red]hospital" in done.output
