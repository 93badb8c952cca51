"""The command line as a person meets it: one sentence, an exit code, and no work done on bad input."""

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch

from fedmpt_core.config.toml import load_job
from fedmpt_core.federation.run.record import RunRecord
from fedmpt_core.federation.server.checkpoint import Checkpoint
from fedmpt_core.model.device import device_name, pick_device
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.privacy.ledger.budget import resolved

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "jobs" / "demo"


Fedmpt = Callable[..., subprocess.CompletedProcess[str]]


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


def test_an_error_is_a_sentence_of_the_process_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedmpt_flare", "check", str(tmp_path / "nowhere.toml")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert " ".join(run.stderr.split()) == f"error: {tmp_path / 'nowhere.toml'}: no such file"


def test_versions_and_device_are_told(fedmpt: Fedmpt) -> None:
    run = fedmpt("--version")
    assert run.returncode == 0
    versions = dict(line.split(maxsplit=1) for line in run.stdout.splitlines())
    assert set(versions) == {"fedmpt", "nvflare", "torch", "python", "device"}
    for name in ("fedmpt", "nvflare", "torch"):
        assert versions[name] == importlib.metadata.version(name)
    assert versions["device"] == device_name(pick_device("auto"))


@pytest.mark.parametrize("command", ["check", "simulate", "export"])
def test_a_misspelt_key_is_named_before_anything_starts(fedmpt: Fedmpt, tmp_path: Path, command: str) -> None:
    job = changed(tmp_path, learning_rate="lerning_rate")
    run = fedmpt(command, job, *(["--out", tmp_path / "out"] if command != "check" else []))
    assert run.returncode == 2
    assert "unknown key 'lerning_rate': did you mean 'learning_rate'?" in " ".join(run.stderr.split())
    assert run.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "nowhere.toml"], "nowhere.toml: no such file"),
        (["check"], "JOB.TOML is missing"),
        (["audit"], "Missing argument 'DIR...'"),
        (["audit", "--canaries", DEMO / "job.toml"], "No such option: --canaries"),
        (["simulate", DEMO / "job.toml", "--sites", "nowhere.toml"], "nowhere.toml: no such file"),
        (["predict", "nowhere", "picture.jpg"], "result.json: no such file"),
        (["prepare", "voc2007", "nowhere", "--out", "m.csv"], "nowhere"),
    ],
)
def test_a_wrong_argument_is_one_sentence(fedmpt: Fedmpt, tmp_path: Path, arguments: list[object], says: str) -> None:
    run = fedmpt(*arguments)
    assert run.returncode == 2
    assert says in " ".join(run.stderr.split())


def test_the_schema_is_json_and_knows_every_key(fedmpt: Fedmpt) -> None:
    schema = json.loads(fedmpt("check", "--schema").stdout)
    assert "learning_rate" in json.dumps(schema)


def test_a_simulation_loads_the_towers_once_and_needs_a_folder_before_that(
    fedmpt: Fedmpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Any] = []
    read = safetensors.torch.load_file

    def counted(path: Any) -> Any:  # of the text tower's weights
        loads.append(path)
        return read(path)

    monkeypatch.setattr(safetensors.torch, "load_file", counted)
    text = (DEMO / "site.toml").read_text()
    job = changed(tmp_path)
    few = re.sub(r"(?m)^(train|val|test) = \d+", r"\1 = 2", text)
    (tmp_path / "site.toml").write_text(few.replace("threads = 1", f"threads = 1\ncache_dir = '{tmp_path}'"))
    (tmp_path / "file").touch()
    run = fedmpt("simulate", job, "--out", tmp_path / "file" / "out")
    assert run.returncode == 2
    assert f"error: '{tmp_path}/file/out' cannot be written (Not a directory): name another place" in run.stderr
    assert not loads
    start = subprocess.Popen
    ends = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(subprocess, "Popen", lambda _, **how: start(ends, **how))
    run = fedmpt("simulate", job, "--out", tmp_path / "out")
    assert run.returncode == 1
    assert "FLARE's simulator ended with exit code 3 before the job did" in run.stderr
    assert len(loads) == 1


def test_too_few_sites_are_refused(fedmpt: Fedmpt, tmp_path: Path) -> None:
    job = changed(tmp_path, **{"min_sites = 3": "min_sites = 9"})
    run = fedmpt("simulate", job, "--out", tmp_path / "out")
    assert run.returncode == 2
    assert "names 3 sites, the job needs min_sites=9" in " ".join(run.stderr.split())


def test_a_device_that_is_not_there_is_refused(fedmpt: Fedmpt, tmp_path: Path) -> None:
    job = changed(tmp_path)
    sites = tmp_path / "site.toml"
    sites.write_text(sites.read_text().replace("[defaults]", '[defaults]\ndevice = "cuda:63"', 1))
    run = fedmpt("simulate", job, "--out", tmp_path / "out")
    assert run.returncode == 2
    assert "device='cuda:63'" in run.stderr


def test_check_shows_what_every_site_would_spend(fedmpt: Fedmpt, tmp_path: Path) -> None:
    job = changed(tmp_path, **{"epsilon = 8.0": "epsilon = 3.0", "local_steps = 8": "local_steps = 2"})
    run = fedmpt("check", job, "--json")
    assert run.returncode == 0, run.stderr
    shown = json.loads(run.stdout)
    plan = shown["privacy"]
    assert plan["steps"] == 10
    assert 2.9 < plan["epsilons"]["pld"] <= 3.0
    assert abs(plan["epsilons"]["pld"] - plan["epsilons"]["prv"]) <= 0.02
    assert plan["epsilons"]["rdp"] > 3.0
    assert {s: p["projection"]["cap"] for s, p in plan["sites"].items()} == dict.fromkeys(
        ("site-1", "site-2", "site-3"), 8.0
    )
    ratios = plan["sites"]["site-1"]["signal_to_noise"]
    assert set(ratios) == {"contexts", "contexts+gate", "adapters", "all"}
    assert ratios["adapters"] > ratios["all"] > 0
    assert shown["config"]["privacy"]["noise_multiplier"] > 0
    assert "max_failed_rounds = 0: the first round that fails ends the job" in shown["warnings"][0]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "epsilon = 8.0",
            "epsilon = 0.5",
            "site-1: privacy budget: with this job, data set 'scenes' would reach epsilon",
        ),
        ("delta = 1e-5", "delta = 0.01", r"delta=0.01 must be below 1 / units = 0.002"),
        ("units = 500", "units = 500\nmin_sites = 4", "min_sites=3 of the job is below this site's min_sites=4"),
        ("[defaults.privacy]", "[defaults.other]", "unknown key 'other'"),
    ],
)
def test_a_site_s_policy_speaks_before_anything_starts(
    fedmpt: Fedmpt, tmp_path: Path, old: str, new: str, says: str
) -> None:
    job = changed(tmp_path)
    sites = tmp_path / "site.toml"
    assert old in sites.read_text()
    sites.write_text(sites.read_text().replace(old, new, 1))
    run = fedmpt("simulate", job, "--out", tmp_path / "out")
    assert run.returncode == 2
    assert says in " ".join(run.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "insecure_identities = true",
            "colluders = 1",
            "simulated sites have no keys to prove who they are: add --insecure",
        ),
        ("min_sites = 3", "min_sites = 2", "federation.min_sites=2: secure aggregation hides a site among at least 3"),
        ("insecure_identities = true", "value_range = 30.0", "value_range=20.479 is the largest that fits"),
        ("insecure_identities = true", 'metrics = ["loss"]', "figures of training are not covered by differential"),
        ("insecure_identities = true", 'mechanism = "none"', "the job shows this site's updates to the server"),
        ("min_sites = 3", 'min_sites = 3\nweighting = "records"', "needs secagg.max_weight"),
        (
            "[federation]",
            '[resume]\njob = "../x"\nround = 1\n\n[federation]',
            "[resume] job='../x': use 1 to 64 letters",
        ),
        (
            "[federation]",
            '[resume]\njob = "x"\nround = 5\n\n[federation]',
            "the job has 5 rounds, nothing is left to do",
        ),
    ],
)
def test_masks_are_checked_before_anything_starts(
    fedmpt: Fedmpt, tmp_path: Path, old: str, new: str, says: str
) -> None:
    job = changed(tmp_path, **{old: new})
    run = fedmpt("simulate", job, "--out", tmp_path / "out")
    assert run.returncode == 2
    assert says in " ".join(run.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_job_for_simulations_is_not_exported(fedmpt: Fedmpt, tmp_path: Path) -> None:
    run = fedmpt("export", DEMO / "job.toml", "--out", tmp_path / "out")
    assert run.returncode == 2
    assert "every site with a start-up kit refuses it" in " ".join(run.stderr.split())
    assert not (tmp_path / "out").exists()


def test_only_a_run_with_a_checkpoint_goes_on_and_in_its_own_folder(fedmpt: Fedmpt, tmp_path: Path) -> None:
    run = fedmpt("simulate", DEMO / "job.toml", "--resume", tmp_path)
    assert run.returncode == 2
    assert "holds no checkpoint" in " ".join(run.stderr.split())

    job = resolved(load_job(DEMO / "job.toml"))
    layout = ParameterLayout(("head.scale",), ((1,),))
    kept = Checkpoint("run-1", job, 2, layout, np.zeros(1, np.float32), RunRecord.start(job, "run-1"), {})
    kept.save(tmp_path / "checkpoints")
    run = fedmpt("simulate", DEMO / "job.toml", "--resume", tmp_path, "--out", tmp_path / "other")
    assert run.returncode == 2
    assert "goes on in its own folder" in " ".join(run.stderr.split())
    run = fedmpt("simulate", DEMO / "job.toml", "--seed", 7, "--resume", tmp_path)
    assert run.returncode == 2
    assert "run 'run-1' was of another job: seed differ" in " ".join(run.stderr.split())


def test_a_ledger_is_started_once(fedmpt: Fedmpt, tmp_path: Path) -> None:
    site = tmp_path / "fedmpt_site.toml"
    policy = '[privacy]\ndataset = "pets"\nunits = 100\nepsilon = 8.0\ndelta = 1e-5\nledger = "ledgers"\n'
    site.write_text('[data]\npath = "manifest.csv"\n' + policy)
    run = fedmpt("ledger", "create", site, "--name", "hospital-a", "--unsigned")
    assert run.returncode == 0, run.stderr
    assert "epsilon 0 of 8 spent" in run.stdout
    path = tmp_path / "ledgers" / "pets.ledger.jsonl"
    before = path.read_bytes()
    for arguments, says in (
        (["--unsigned"], "exists"),
        ([], "give --kit DIR, or --unsigned"),
        (["--kit", tmp_path], "client.crt"),
    ):
        again = fedmpt("ledger", "create", site, "--name", "hospital-a", *arguments)
        assert again.returncode == 2
        assert says in " ".join(again.stderr.split())
    assert path.read_bytes() == before
    site.write_text('[data]\npath = "manifest.csv"\n')
    run = fedmpt("ledger", "create", site, "--name", "hospital-a", "--unsigned")
    assert (run.returncode, "has no [privacy] table" in " ".join(run.stderr.split())) == (2, True)


def broken_run(folder: Path, job: Path, rounds: int) -> Path:
    """A run of a job file that broke off after so many rounds, as the server keeps it."""
    agreed = resolved(load_job(job))
    layout = ParameterLayout(("head.scale",), ((1,),))
    record = RunRecord.start(agreed, "run-1").with_round(0, 1.0, {}, {}).ended_as("failed: the job was aborted")
    Checkpoint("run-1", agreed, rounds, layout, np.zeros(1, np.float32), record, {}).save(folder)
    return folder / "run-1"


def test_a_broken_job_is_written_anew_with_what_it_spent(fedmpt: Fedmpt, tmp_path: Path) -> None:
    """What it writes can be exported as it is; a job file with [resume] by hand says which command to take."""
    job = changed(tmp_path, **{"insecure_identities = true": ""})
    run = broken_run(tmp_path / "checkpoints", job, 2)
    written = fedmpt("resume-job", job, run, "--out", tmp_path / "again.toml")
    assert written.returncode == 0, written.stderr
    before, after = resolved(load_job(job)), load_job(tmp_path / "again.toml")
    assert "rounds 3 to 5 of run run-1" in written.stdout
    assert after.privacy.noise_multiplier == before.privacy.noise_multiplier
    assert (after.resume and (after.resume.job, after.resume.round, len(after.resume.state))) == ("run-1", 2, 64)
    assert f"privacy.epsilon is {after.privacy.epsilon:g}, not {before.privacy.epsilon:g}" in written.stdout
    assert "every attempt that it may have made is counted" in written.stdout
    assert after.digest()[:16] in written.stdout
    assert resolved(after) == after
    again = fedmpt("resume-job", job, run, "--out", tmp_path / "again.toml")
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    by_hand = tmp_path / "by_hand.toml"
    by_hand.write_text(job.read_text() + '\n[resume]\njob = "run-1"\nround = 2\n')
    refused = fedmpt("export", by_hand, "--out", tmp_path / "exported")
    assert refused.returncode == 2
    assert "`fedmpt resume-job` writes it" in " ".join(refused.stderr.split())
    missing = fedmpt("resume-job", job, tmp_path / "nowhere", "--out", tmp_path / "other.toml")
    assert (missing.returncode, (tmp_path / "other.toml").exists()) == (2, False)
