"""The examples at six doors of the core are true: typed as they stand, they print what they say."""

import doctest
import importlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from fedmpt_core.config.toml import load_job
from fedmpt_core.federation.run.record import MODEL, RESULT, RunRecord, save_model
from fedmpt_core.model.backbone.load import load_backbone
from fedmpt_core.model.registry import build_model
from tests.federation import REPOSITORY

pytestmark = pytest.mark.xdist_group("examples")  # the towers' libraries are imported once

DOORS = {
    "fedmpt_core.config.toml": "load_job",
    "fedmpt_core.federation.prediction": "Predictor",
    "fedmpt_core.federation.site.session": "SiteSession",
    "fedmpt_core.privacy.accounting.epsilon": "epsilon",
    "fedmpt_core.privacy.ledger.ledger": "Ledger",
    "fedmpt_core.secagg.client": "SecAggClient",
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder as the demo leaves it, with the parameters that its model starts from."""
    folder = tmp_path_factory.mktemp("demo")
    job = load_job(REPOSITORY / "jobs" / "demo" / "job.toml")
    model = build_model(load_backbone(job.backbone), job.classes, job.model, job.seed)
    (folder / RESULT).write_text(json.dumps(asdict(RunRecord.start(job, "demo"))))
    (folder / MODEL).write_bytes(save_model(model.layout(), model.vector()))
    return folder


@pytest.mark.parametrize("name", DOORS)
def test_the_example_at_a_door_is_true(name: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("jobs", "docs"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(demo)
    monkeypatch.chdir(tmp_path)  # what an example writes is gone with it
    module = importlib.import_module(name)
    # no globals: an example imports whatever it uses, as its reader must
    examples = [e for e in doctest.DocTestFinder().find(module, globs={}) if e.examples]
    assert [e.name.removeprefix(f"{name}.") for e in examples] == [DOORS[name]]
    report: list[str] = []
    assert doctest.DocTestRunner().run(examples[0], out=report.append).failed == 0, "".join(report)
