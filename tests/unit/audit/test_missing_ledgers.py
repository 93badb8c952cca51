"""A ledger that is not here is not shown, which is no accusation; the site's own export takes its place."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedmpt_core.audit.known_keys import KnownKeys
from fedmpt_core.common.files import file_digest
from fedmpt_core.common.signing import load_signer
from fedmpt_core.privacy.ledger.export import EXPORT, export_ledger, read_export
from fedmpt_core.privacy.ledger.site_ledger import create_ledger
from fedmpt_core.secagg.start_up_kit import write_roster
from fedmpt_flare.cli.main import app
from tests.audited import JOB, SITES, Federation, details, edit_field, edit_record
from tests.unit.audit.test_renewed_keys import codes, examined

SITE = SITES[0]
MISSING = {("ledger-missing", site) for site in SITES}


class Aborted:
    """A run that was aborted in round 2, which one site was charged for already; the server has no ledger."""

    def __init__(self, root: Path, kits: Path, keys: KnownKeys) -> None:
        self.federation = Federation(root, kits)
        self.federation.run("earlier")
        self.early = root / "early"
        export_ledger(self.federation.policy(SITE), SITE, self.federation.kit(SITE), self.early)
        self.run = self.federation.run("run-1", rounds=1)
        self.federation.budget(SITE, JOB, "run-1").reserve(2, 0, details(JOB, f"run-1 {SITE}"))
        for copy in (self.run / "privacy").iterdir():
            copy.unlink()
        edit_record(self.run, lambda record: record.update(outcome="failed: the job was aborted"))
        self.federation.resign(self.run)
        self.exports = [root / "exports" / site for site in SITES]
        for site, out in zip(SITES, self.exports, strict=True):
            export_ledger(self.federation.policy(site), site, self.federation.kit(site), out)
        self.roster = root / "roster.json"
        write_roster(self.roster, keys.roster or pytest.fail("no roster"))


@pytest.fixture(scope="module")
def aborted(provisioned: Path, keys: KnownKeys, tmp_path_factory: pytest.TempPathFactory) -> Aborted:
    return Aborted(tmp_path_factory.mktemp("aborted"), provisioned, keys)


def test_an_aborted_run_without_ledgers_is_not_shown_and_accuses_nobody(aborted: Aborted, keys: KnownKeys) -> None:
    audit = examined(keys, aborted.run)
    assert codes(audit) == set()
    assert codes(audit, "unshown") == MISSING
    assert not audit.passed
    assert "`fedmpt ledger export`" in audit.audits[0].findings[0].remedy


def test_with_the_sites_exports_it_audits_clean_and_counts_the_round_that_broke_off(
    aborted: Aborted, keys: KnownKeys
) -> None:
    audit = examined(keys, aborted.run, *aborted.exports)
    assert audit.passed
    assert codes(audit, "warning") == set()
    assert {("ledger-from-export", site) for site in SITES} <= codes(audit, "note")
    spent = audit.audits[0].spending
    assert spent[SITE].open == spent[SITES[1]].open + 1
    assert spent[SITE].job > spent[SITES[1]].job > 0
    left = [one.what for one in audit.audits[0].releases[SITE]]
    assert "a copy of the ledger" not in left  # it did not leave the site in this run


def test_one_that_is_still_missing_is_named_alone(aborted: Aborted, keys: KnownKeys) -> None:
    audit = examined(keys, aborted.run, *aborted.exports[1:])
    assert codes(audit, "unshown") == {("ledger-missing", SITE)}
    assert not audit.passed


def of_no_use(aborted: Aborted, folder: Path, kind: str) -> Path:
    """Something that stands in for the site's ledger and is not what shows it."""
    kits = aborted.federation.kits
    match kind:
        case "made before the run ended":
            return aborted.early
        case "of another data set":
            policy = replace(aborted.federation.policy(SITE), dataset="others", ledger=str(folder / "ledgers"))
            create_ledger(policy, SITE, kits / SITE / "startup")
            export_ledger(policy, SITE, kits / SITE / "startup", folder / "other")
            return folder / "other"
        case "a bare file":
            return Path(shutil.copy(aborted.exports[0] / "images.ledger.jsonl", folder))
        case _:
            return aborted.exports[1]


@pytest.mark.parametrize("kind", ["made before the run ended", "of another data set", "a bare file", "of another site"])
def test_what_does_not_show_the_ledger_leaves_it_missing(
    aborted: Aborted, keys: KnownKeys, tmp_path: Path, kind: str
) -> None:
    audit = examined(keys, aborted.run, *aborted.exports[1:], of_no_use(aborted, tmp_path, kind))
    assert ("ledger-missing", SITE) in codes(audit, "unshown")
    assert codes(audit) == set()
    assert not audit.passed


def test_an_export_that_was_changed_is_a_failure_and_not_used(
    aborted: Aborted, keys: KnownKeys, tmp_path: Path
) -> None:
    export = Path(shutil.copytree(aborted.exports[0], tmp_path / "export"))
    (export / "privacy").mkdir()
    ledger = (export / "images.ledger.jsonl").rename(export / "privacy" / "images.ledger.jsonl")
    edit_field(export)
    ledger.rename(export / "images.ledger.jsonl")
    audit = examined(keys, aborted.run, *aborted.exports[1:], export)
    assert ("ledger-missing", SITE) in codes(audit, "unshown")
    assert {code for code, _ in codes(audit)} >= {"file-changed", "ledger-damaged"}


def test_an_export_whose_end_was_cut_is_a_failure(aborted: Aborted, keys: KnownKeys, tmp_path: Path) -> None:
    """The site signs it anew, without what the server saw of the round."""
    export = Path(shutil.copytree(aborted.exports[0], tmp_path / "export"))
    path = export / "images.ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    kit, old = aborted.federation.kit(SITE), read_export(export)
    sign, _, _ = load_signer(kit / "client.key", kit / "client.crt")
    account = json.loads((export / "statement.json").read_text())
    last = json.loads(path.read_bytes().splitlines()[-1])
    (export / "statement.json").write_text(json.dumps({**account, "entries": last["seq"] + 1, "head": last["hash"]}))
    new = replace(old, files={name: file_digest(export / name) for name in old.files}, signature="")
    (export / EXPORT).write_text(replace(new, signature=sign(new.signed_text())).to_json())
    audit = examined(keys, aborted.run, *aborted.exports[1:], export)
    assert ("ledger-cut", SITE) in codes(audit)


def test_the_commands_tell_missing_from_contradicted(aborted: Aborted, tmp_path: Path) -> None:
    run, roster = aborted.run, ["--roster", str(aborted.roster)]

    def invoke(command: str, *places: Path) -> Any:
        out = ["--out", str(tmp_path / "r.html")] if command == "report" else []
        return CliRunner().invoke(app, [command, *map(str, places), *roster, *out])

    missing = invoke("audit", run)
    assert missing.exit_code == 3, missing.output
    assert "NOT SHOWN" in missing.output
    assert "FAIL" not in missing.output
    plain = json.loads(CliRunner().invoke(app, ["audit", str(run), *roster, "--json"]).output)
    assert (plain["passed"], plain["worst"]) == (False, "unshown")
    whole = invoke("audit", run, *aborted.exports)
    assert whole.exit_code == 0, whole.output
    said = invoke("report", run)
    assert said.exit_code == 3
    assert "The claim is not shown: evidence is missing in 3 points." in said.output
    page = (tmp_path / "r.html").read_text()
    assert "Nothing that was checked contradicts" in page
    assert "does not stand" not in page.lower()
    partly = invoke("report", run, *aborted.exports[1:])
    assert partly.exit_code == 3
    assert "of those whose ledgers are here" in (tmp_path / "r.html").read_text()
    stands = invoke("report", run, *aborted.exports)
    assert stands.exit_code == 0, stands.output
    assert "The claim stands" in stands.output


def test_a_contradiction_beside_a_missing_ledger_is_a_failure(
    aborted: Aborted, keys: KnownKeys, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(aborted.run, tmp_path / "run-1"))
    edit_record(run, lambda record: record["rounds"].append(record["rounds"][-1]))
    aborted.federation.resign(run)
    audit = examined(keys, run)
    assert audit.worst == "fail"
    assert codes(audit, "unshown") == MISSING
