"""A site's own ledger: shown, planned, exported for an authority, audited without a run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from fedmpt_core.audit.auditor import compare
from fedmpt_core.audit.known_keys import KnownKeys
from fedmpt_core.audit.ledger_copy import LedgerReader
from fedmpt_core.audit.run_evidence import NoRun, load_run
from fedmpt_core.audit.site_ledger import LedgerAudit, audit_ledger, load_ledger
from fedmpt_core.audit.spending import further_accountants
from fedmpt_core.privacy.accounting.epsilon import epsilon
from fedmpt_core.privacy.ledger import succession
from fedmpt_core.privacy.ledger.budget import history
from fedmpt_core.privacy.ledger.export import EXPORT, export_ledger
from fedmpt_core.privacy.ledger.site_ledger import ledger_path, read_site_ledger
from fedmpt_core.secagg.start_up_kit import write_roster
from fedmpt_flare.cli.main import app
from tests.audited import SITES, Federation

SITE = SITES[0]


@pytest.fixture
def exported(audited: Federation, tmp_path: Path) -> Path:
    export_ledger(audited.policy(SITE), SITE, audited.kit(SITE), tmp_path / "export")
    return tmp_path / "export"


@pytest.fixture
def federation(provisioned: Path, tmp_path: Path) -> Federation:
    """One whose ledgers may be changed, after one run."""
    federation = Federation(tmp_path, provisioned)
    federation.run("run-1")
    return federation


def audited_ledger(place: Path, known: KnownKeys, certificate: Path | None = None) -> LedgerAudit:
    return audit_ledger(load_ledger(place, known, LedgerReader(), certificate), further_accountants(independent=True))


def codes(place: Path, known: KnownKeys, severity: str = "fail", certificate: Path | None = None) -> set[str]:
    return {f.code for f in audited_ledger(place, known, certificate).findings if f.severity == severity}


def test_an_export_passes_with_the_numbers_of_the_ledger(audited: Federation, keys: KnownKeys, exported: Path) -> None:
    audit = audited_ledger(exported, keys)
    assert audit.passed
    assert [f.code for f in audit.findings] == ["retries-charged"]
    entries = read_site_ledger(audited.policy(SITE), audited.kit(SITE))
    assert audit.statement
    assert audit.statement.total == epsilon(history(entries), 1e-5)
    assert audit.statement.cap == 20.0
    assert len(audit.accountants) == 3
    assert max(audit.accountants.values()) - min(audit.accountants.values()) < 0.02
    assert json.loads((exported / "statement.json").read_text())["total"] == audit.statement.total
    assert codes(exported, KnownKeys(), "warning") == {"no-roster"}


def rewrite(name: str, change: Callable[[str], str]) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (rewrite(EXPORT, lambda t: t.replace('"cap": 20.0', '"cap": 90.0')), "file-changed"),
        (rewrite("statement.json", lambda t: t.replace('"open": 2', '"open": 0')), "file-changed"),
        (rewrite("images.ledger.jsonl", lambda t: t.replace('"steps":2', '"steps":1', 1)), "ledger-damaged"),
        (lambda f: (f / "images.ledger.jsonl").unlink(), "ledger-missing"),
        (lambda f: (f / f"{SITE}.crt").unlink(), "ledger-damaged"),
        (lambda f: (f / "rootCA.pem").write_text("x"), "ledger-damaged"),
    ],
    ids=["cap", "statement", "entry", "no ledger", "no certificate", "root"],
)
def test_a_changed_export_is_found(
    exported: Path,
    keys: KnownKeys,
    change: Callable[[Path], Any],
    code: str,
) -> None:
    change(exported)
    assert code in codes(exported, keys)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": 9}', "null", '{"ledger": "../x"}'],
)
def test_what_is_no_export_is_a_sentence(exported: Path, keys: KnownKeys, text: str) -> None:
    (exported / EXPORT).write_text(text)
    with pytest.raises(NoRun, match="export"):
        load_ledger(exported, keys, LedgerReader())


def test_an_export_names_no_file_outside_its_folder(exported: Path, keys: KnownKeys) -> None:
    values = json.loads((exported / EXPORT).read_text())
    (exported / EXPORT).write_text(json.dumps({**values, "root": "../../etc/passwd"}))
    with pytest.raises(NoRun, match="outside the export's folder"):
        load_ledger(exported, keys, LedgerReader())


def test_a_bare_file_is_audited_with_the_site_s_certificate(
    audited: Federation,
    keys: KnownKeys,
    exported: Path,
) -> None:
    path = ledger_path(audited.policy(SITE))
    assert codes(path, keys, certificate=audited.kit(SITE) / "client.crt") == set()
    assert codes(path, keys, "warning") == {"ledger-not-verified"}
    assert codes(path, keys, certificate=audited.kit(SITES[1]) / "client.crt") == {"ledger-damaged"}
    with pytest.raises(NoRun, match=r"client\.crt"):
        load_ledger(path, keys, LedgerReader(), exported / "client.crt")


def test_a_site_s_own_ledger_is_compared_with_what_it_handed_to_a_run(
    audited: Federation,
    keys: KnownKeys,
    exported: Path,
) -> None:
    run = load_run(audited.root / "run-1", keys)
    own = load_ledger(exported, keys, LedgerReader())
    assert compare([run], [own]) == []
    own.entries = (*own.entries[:-1], replace(own.entries[-1], hash="e" * 64))
    assert [(f.code, f.where) for f in compare([run], [own])] == [("ledger-forked", SITE)]


def test_a_key_that_served_two_jobs_is_named(keys: KnownKeys, exported: Path) -> None:
    own = load_ledger(exported, keys, LedgerReader())
    first = next(e for e in own.entries if e.kind == "reserve")
    own.entries = tuple(replace(e, job="another") if e.seq == first.seq else e for e in own.entries)
    assert "noise-key-reused" in {f.code for f in audit_ledger(own, {}).findings}


def test_a_rotated_and_a_migrated_ledger_say_so(
    federation: Federation,
    keys: KnownKeys,
    tmp_path: Path,
) -> None:
    policy, kit = federation.policy(SITE), federation.kit(SITE)
    renamed = replace(policy, dataset="pictures")
    succession.migrate(renamed, SITE, kit, ["images"])
    export_ledger(policy, SITE, kit, tmp_path / "old")
    export_ledger(renamed, SITE, kit, tmp_path / "new")
    assert "ledger-closed" in codes(tmp_path / "old", keys, "note")
    assert codes(tmp_path / "new", keys, "note") == {"ledger-continues"}


# the command line


def site_file(federation: Federation, folder: Path) -> Path:
    policy = federation.policy(SITE)
    values = {"data": {"source": "scenes"}, "privacy": {n: v for n, v in vars(policy).items() if v not in ("", None)}}
    (folder / "site.toml").write_text(tomli_w.dumps(values))
    return folder / "site.toml"


JOB = """
name = "planned"
classes = ["cat", "dog"]
[training]
rounds = 2
local_steps = 2
[privacy]
epsilon = 3.0
"""


def test_the_commands_show_plan_and_export(audited: Federation, keys: KnownKeys, tmp_path: Path) -> None:
    kit = audited.kit(SITE)
    options = [str(site_file(audited, tmp_path)), "--name", SITE, "--kit", str(kit)]
    (tmp_path / "job.toml").write_text(JOB)
    done = CliRunner().invoke(app, ["ledger", "show", *options, "--plan", str(tmp_path / "job.toml")])
    assert done.exit_code == 0, done.output
    total = epsilon(history(read_site_ledger(audited.policy(SITE), kit)), 1e-5)
    assert f"images: epsilon {total:.3f} of 20" in done.output
    assert "Job planned would spend epsilon 3.0" in done.output or "Job planned would spend epsilon 2.99" in done.output
    plain = json.loads(
        CliRunner().invoke(app, ["ledger", "show", *options, "--json", "--plan", str(tmp_path / "job.toml")]).output
    )
    assert plain["ledgers"][0]["total"] == total
    assert plain["plan"]["total"] > total
    full = site_file(audited, tmp_path)
    full.write_text(full.read_text().replace("epsilon = 20.0", "epsilon = 4.0"))
    done = CliRunner().invoke(app, ["ledger", "show", *options, "--plan", str(tmp_path / "job.toml")])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert f"images: epsilon {total:.3f} of 4, 0.000 left" in done.output and "It fits 0 times in a row." in done.output
    assert "Cap 20 since" in done.output and "The site's file says 4: the ledger notes that change" in done.output
    plain = CliRunner().invoke(app, ["ledger", "show", *options, "--json", "--plan", str(tmp_path / "job.toml")])
    assert plain.exit_code == 1 and json.loads(plain.output)["plan"]["repeats"] == 0
    site_file(audited, tmp_path)
    assert CliRunner().invoke(app, ["ledger", "export", *options, "--out", str(tmp_path / "out")]).exit_code == 0
    again = CliRunner().invoke(app, ["ledger", "export", *options, "--out", str(tmp_path / "out")])
    assert "is not an empty folder" in str(again.exception)
    assert keys.roster
    write_roster(tmp_path / "roster.json", keys.roster)
    place = [str(tmp_path / "out"), str(audited.root / "run-1"), "--roster", str(tmp_path / "roster.json")]
    done = CliRunner().invoke(app, ["audit", *place])
    assert done.exit_code == 0, done.output
    assert "data set 'images'" in done.output
    with (tmp_path / "out" / "images.ledger.jsonl").open("ab") as stream:
        stream.write(b"{}\n")
    assert CliRunner().invoke(app, ["audit", *place]).exit_code == 1


def test_the_commands_rotate_and_migrate(federation: Federation, tmp_path: Path) -> None:
    file = site_file(federation, tmp_path)
    kit, other = str(federation.kit(SITE)), str(federation.kit(SITES[1]))
    options = [str(file), "--name", SITE]
    run = CliRunner().invoke
    done = run(app, ["ledger", "rotate", *options, "--old-kit", kit, "--kit", other])
    assert done.exit_code == 0, done.output
    assert "Nothing to do" in run(app, ["ledger", "rotate", *options, "--old-kit", kit, "--kit", other]).output
    file.write_text(file.read_text().replace('dataset = "images"', 'dataset = "pictures"'))
    done = run(app, ["ledger", "migrate", *options, "--kit", other, "--from", "images"])
    assert done.exit_code == 0, done.output
    done = run(app, ["ledger", "show", *options, "--kit", other])
    assert "closed, goes on as 'pictures'" in done.output.replace("\n", " ")
    assert "carried" in done.output


@pytest.mark.parametrize(
    ("more", "says"),
    [(["--unsigned"], "give --kit DIR, or --unsigned"), (["--plan", "nowhere.toml"], "nowhere.toml")],
)
def test_the_commands_mistakes_are_sentences(audited: Federation, tmp_path: Path, more: list[str], says: str) -> None:
    options = [str(site_file(audited, tmp_path)), "--name", SITE, "--kit", str(audited.kit(SITE)), *more]
    done = CliRunner().invoke(app, ["ledger", "show", *options])
    assert isinstance(done.exception, ValueError)
    assert says in str(done.exception)
