"""What all jobs spent on each data set, from several runs and exports: the longest ledger counts, all jobs in it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedmpt_core.audit.known_keys import KnownKeys
from fedmpt_core.privacy.accounting.epsilon import epsilon
from fedmpt_core.privacy.ledger.budget import history
from fedmpt_core.privacy.ledger.export import export_ledger
from fedmpt_core.privacy.ledger.site_ledger import read_site_ledger
from fedmpt_core.secagg.start_up_kit import write_roster
from fedmpt_flare.cli.main import app
from fedmpt_flare.cli.options import WrongUse
from tests.audited import CAPS, SITES, Federation, forge
from tests.unit.report.test_report import Page


@pytest.fixture(scope="module")
def roster(keys: KnownKeys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("roster") / "roster.json"
    write_roster(path, keys.roster or pytest.fail("no roster"))
    return path


def report(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def total(federation: Federation, site: str) -> float:
    return epsilon(history(read_site_ledger(federation.policy(site), federation.kit(site))), 1e-5)


def test_several_runs_give_one_page_of_all_jobs(audited: Federation, roster: Path, tmp_path: Path) -> None:
    runs, page = [audited.root / name for name in ("earlier", "run-1")], tmp_path / "budgets.html"
    done = report(*runs, "--roster", roster, "--out", page)
    assert done.exit_code == 0, done.output
    assert "What was spent is shown for 3 data sets" in done.output
    spent = total(audited, SITES[0])
    assert f"hospital-a, data set 'images': epsilon {spent:.3f} of 20 (delta 1e-05) spent by 2 jobs" in done.output
    rows = Page(page.read_text()).rows["budget-table"]
    assert [row[0] for row in rows[1:]] == list(SITES)
    assert f"[{spent!r}]" in rows[1][3]
    for run_id in ("earlier", "run-1"):
        assert run_id in page.read_text()
    assert "Caps, as the site's ledger states them" in Page(page.read_text()).text


def test_exports_bring_the_cap_and_what_came_after_the_runs(audited: Federation, roster: Path, tmp_path: Path) -> None:
    """The first run's copy is short: of two ledgers of one data set the longer counts, once."""
    export_ledger(audited.policy(SITES[0]), SITES[0], audited.kit(SITES[0]), tmp_path / "export")
    page = tmp_path / "budgets.html"
    done = report(tmp_path / "export", audited.root / "earlier", audited.root / "run-1", "--roster", roster, "--json")
    assert done.exit_code == 0, done.output
    accounts = json.loads(done.output)["accounts"]
    assert [(a["account"]["site"], a["account"]["cap"], len(a["account"]["jobs"])) for a in accounts] == [
        (SITES[0], 20.0, 2),
        (SITES[1], CAPS[1], 2),
        (SITES[2], CAPS[2], 2),
    ]
    assert accounts[0]["jobs"] == {"earlier": "audited", "run-1": "audited"}
    alone = report(tmp_path / "export", "--roster", roster, "--out", page)
    assert alone.exit_code == 0, alone.output
    assert "What was spent is shown for 1 data set, and" in alone.output
    assert "By the tiers that are customary" in page.read_text()


def test_a_ledger_that_fails_is_in_no_account(audited: Federation, folder: Path, roster: Path, tmp_path: Path) -> None:
    forge(folder)
    audited.resign(folder)
    done = report(folder, audited.root / "earlier", "--roster", roster, "--out", tmp_path / "b.html")
    assert done.exit_code == 1
    assert "The numbers do not stand" in done.output
    assert "hospital-a, data set 'images': " in done.output  # what the sound copy of the earlier run has
    assert "spent by 1 job\n" in done.output


def test_a_missing_ledger_is_not_shown(audited: Federation, folder: Path, roster: Path, tmp_path: Path) -> None:
    for copy in (folder / "privacy").iterdir():
        copy.unlink()
    audited.resign(folder)
    done = report(folder, audited.root / "earlier", "--roster", roster, "--out", tmp_path / "b.html")
    assert done.exit_code == 3
    assert "and not all of it: evidence is missing" in done.output


def test_a_model_card_is_of_one_run(audited: Federation, tmp_path: Path) -> None:
    done = report(audited.root / "earlier", audited.root / "run-1", "--model-card", tmp_path / "card.md")
    assert isinstance(done.exception, WrongUse)
    assert "name that run alone" in str(done.exception)
