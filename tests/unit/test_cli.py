"""The command line as a person meets it: one sentence, an exit code, and no work done on bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "jobs" / "demo"


def fedmpt(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedmpt_flare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def changed(folder: Path, **replace: str) -> Path:
    """A copy of the demo job with words replaced."""
    text = (DEMO / "job.toml").read_text()
    for old, new in replace.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "site.toml").write_text((DEMO / "site.toml").read_text())
    path = folder / "job.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("command", ["check", "simulate", "export"])
def test_a_misspelt_key_is_named_before_anything_starts(tmp_path: Path, command: str) -> None:
    job = changed(tmp_path, learning_rate="lerning_rate")
    run = fedmpt(command, job, *(["--out", tmp_path / "out"] if command != "check" else []))
    assert run.returncode == 2
    assert "unknown key 'lerning_rate': did you mean 'learning_rate'?" in " ".join(run.stderr.split())
    assert run.stdout == ""
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "nowhere.toml"], "nowhere.toml: no such file"),
        (["check"], "JOB.TOML is missing"),
        (["simulate", DEMO / "job.toml", "--sites", "nowhere.toml"], "nowhere.toml: no such file"),
        (["predict", "nowhere", "picture.jpg"], "result.json: no such file"),
        (["prepare", "nowhere", "--out", "m.csv"], "nowhere"),
    ],
)
def test_a_wrong_argument_is_one_sentence(tmp_path: Path, arguments: list[object], says: str) -> None:
    run = fedmpt(*arguments)
    assert run.returncode == 2
    assert says in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr


def test_the_schema_is_json_and_knows_every_key() -> None:
    schema = json.loads(fedmpt("check", "--schema").stdout)
    assert "learning_rate" in json.dumps(schema)


def test_too_few_sites_are_refused(tmp_path: Path) -> None:
    job = changed(tmp_path, **{"min_sites = 2": "min_sites = 9"})
    run = fedmpt("simulate", job, "--out", tmp_path / "out")
    assert run.returncode == 2
    assert "names 3 sites, the job needs min_sites=9" in " ".join(run.stderr.split())


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    job = changed(tmp_path)
    sites = tmp_path / "site.toml"
    sites.write_text(sites.read_text().replace("[defaults]", '[defaults]\ndevice = "cuda:63"', 1))
    run = fedmpt("simulate", job, "--out", tmp_path / "out")
    assert run.returncode == 2
    assert "device='cuda:63'" in run.stderr
