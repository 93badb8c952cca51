"""The examples at six doors of the core are true: typed as they stand, they print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

from tests.federation import REPOSITORY

DOORS = {
    "fedmpt_core.config.toml": "load_job",
    "fedmpt_core.federation.site.session": "SiteSession",
    "fedmpt_core.privacy.accounting.epsilon": "epsilon",
    "fedmpt_core.privacy.ledger.ledger": "Ledger",
    "fedmpt_core.secagg.client": "SecAggClient",
}


@pytest.mark.parametrize("name", DOORS)
def test_the_example_at_a_door_is_true(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").symlink_to(REPOSITORY / "jobs")
    monkeypatch.chdir(tmp_path)  # what an example writes is gone with it
    module = importlib.import_module(name)
    # no globals: an example imports whatever it uses, as its reader must
    examples = [e for e in doctest.DocTestFinder().find(module, globs={}) if e.examples]
    assert [e.name.removeprefix(f"{name}.") for e in examples] == [DOORS[name]]
    report: list[str] = []
    assert doctest.DocTestRunner().run(examples[0], out=report.append).failed == 0, "".join(report)
