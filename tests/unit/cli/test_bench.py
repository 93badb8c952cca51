"""`fedmpt bench` as a user runs it, in the small form that CI runs: two methods on the real stand-in towers."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from fedmpt_core.data.scenes import CLASSES
from fedmpt_flare.cli.main import app
from tests.benchmarks import SITES

Bench = Callable[..., Result]
JOB = f"""
name = "small"
classes = {json.dumps(list(CLASSES))}
[backbone]
image_size = 96
[model]
conditions = ["pose"]
adapter_width = 4
[training]
rounds = 1
local_steps = 1
batch_size = 8
optimizer = "adam"
learning_rate = 0.003
[privacy]
mechanism = "none"
[secagg]
mechanism = "none"
"""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "job.toml").write_text(JOB)
    (folder / "site.toml").write_text(re.sub(r"(?m)^(train|val|test) = \d+", r"\1 = 8", SITES))
    (folder / "grid.toml").write_text('[coop]\n"training.learning_rate" = [0.001, 0.01]\n')
    return folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The command with one feature cache for all tests, and with a seed that is not the default."""
    cache = str(tmp_path_factory.mktemp("features"))

    def run(*arguments: object) -> Result:
        command = ["bench", *map(str, arguments), "--seeds", "1", "--first-seed", "7", "--cache", cache]
        return CliRunner().invoke(app, command, catch_exceptions=False)

    return run


def test_one_command_makes_the_table_and_repeating_it_costs_no_run(bench: Bench, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = bench("zero-shot,coop,fedmpt", data, "--out", out)
    assert run.exit_code == 0
    for name in ("zero-shot", "Fed-CoOp", "FedMPT"):
        assert f"| {name} | " in run.stdout
        assert re.search(rf"(?m)^\d of 3: {name}, seed 7: mAP [\d.]+ in \d+ s$", run.stderr)
    assert "Spurious pairs, which occur together at a site" in run.stdout
    results = json.loads((out / "results.json").read_text())
    rows = {row["row"]: row["figures"] for row in results["tables"]["methods"]}
    assert rows["zero-shot"]["trained"]["mean"] == 0
    for name in ("Fed-CoOp", "FedMPT"):
        assert 0 < rows[name]["figures.mAP"]["mean"] <= 100
        assert 0 <= rows[name]["figures.false_activation"]["mean"] <= 100
        assert rows[name]["cost_ratio"]["mean"] > 1
    assert {p.name for p in out.iterdir()} == {"runs.jsonl", "results.json", "results.csv", "results.md", "methods.png"}
    lines = (out / "runs.jsonl").read_bytes()
    again = bench("zero-shot,coop,fedmpt", data, "--out", out, "--json")
    assert (out / "runs.jsonl").read_bytes() == lines
    assert json.loads(again.stdout)["tables"] == results["tables"]


def test_tuning_writes_settings_for_the_next_benchmark(bench: Bench, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = bench("coop", data, "--tune", "--out", out)
    assert run.exit_code == 0
    assert "Means over seeds 7." in run.stdout
    assert "learning_rate" in (out / "methods.toml").read_text()
    assert (out / "tuning.md").read_text().count("Fed-CoOp: training.learning_rate") == 2


def test_what_is_not_known_is_named(bench: Bench, data: Path, tmp_path: Path) -> None:
    for arguments, says in (
        (["clip", data], "method 'clip' is not known: use zero-shot"),
        (["all", tmp_path / "nowhere"], "is not a folder"),
        (["coop", data, "--table", "speed"], "table 'speed' is not known"),
    ):
        with pytest.raises(ValueError, match=says):
            bench(*arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
