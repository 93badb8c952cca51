"""The product in FLARE's simulator on small pictures: same numbers as a plain loop, faults, and the exported job."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fedmpt_core.benchmark.in_process import open_federation
from fedmpt_core.config.job import (
    BackboneConfig,
    FederationConfig,
    JobConfig,
    ModelConfig,
    PrivacyConfig,
    TrainingConfig,
)
from fedmpt_core.config.secagg import SecAggConfig
from fedmpt_core.config.site import DataConfig, SiteConfig
from fedmpt_core.federation.run.record import load_model
from fedmpt_core.federation.server.checkpoint import newest_checkpoint
from fedmpt_core.federation.terms import secure_terms
from fedmpt_core.privacy.ledger.budget import resolved
from fedmpt_core.privacy.ledger.ledger import read_ledger
from fedmpt_flare.job.simulation import Simulation, SimulationFailed
from tests.pictures import CLASSES, small_sites
from tests.settings import POLICY, REHEARSED, UNMASKED, UNPROTECTED

pytestmark = [pytest.mark.flare, pytest.mark.xdist_group("simulation")]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SiteConfig]:
    return small_sites(tmp_path_factory.mktemp("sites"))


def job(name: str, rounds: int = 2, secagg: SecAggConfig = UNMASKED, **federation: Any) -> JobConfig:
    return JobConfig(
        name,
        CLASSES,
        seed=4,
        backbone=BackboneConfig(image_size=96),
        model=ModelConfig(conditions=("color", "pose")),
        training=TrainingConfig(rounds=rounds, local_steps=2, batch_size=5, optimizer="adam", learning_rate=0.01),
        privacy=UNPROTECTED,
        secagg=secagg,
        federation=FederationConfig(**{"min_sites": 2, "join_timeout": 300, "round_timeout": 120, **federation}),
    )


def run(simulation: Simulation) -> list[dict[str, Any]]:
    return list(simulation.run())


def test_masked_rounds_compute_what_plain_averaging_computes(sites: dict[str, SiteConfig], tmp_path: Path) -> None:
    masked = dataclasses.replace(REHEARSED, metrics=("loss",))
    plain = job("same", secagg=masked, min_sites=3)
    # not Adam, which makes large steps of what rounding does to a gradient near zero
    agreed = dataclasses.replace(
        plain, training=dataclasses.replace(plain.training, optimizer="sgd", learning_rate=0.05)
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with open_federation(agreed, sites) as federation:
        expected = list(federation.rounds())
    torch.set_num_threads(threads)

    events = run(Simulation(agreed, sites, tmp_path))
    config, layout, state = load_model(tmp_path)
    assert config == agreed
    bound = secure_terms(agreed, "r", layout, "")[1].error_bound([1.0] * 3)
    # patch features computed in other batches differ in their last bits
    assert np.allclose(state, expected[-1].state, atol=2 * bound + 1e-5)
    assert np.abs(state - expected[0].state).max() > 1e-3

    record = json.loads((tmp_path / "result.json").read_text())
    assert record["outcome"] == "completed"
    assert record["config_digest"] == agreed.digest()
    assert (record["aggregation"], record["identities"]) == ("masked", "insecure")
    assert record["run_id"].startswith("simulation-")
    for row, other in zip(record["rounds"][1:], expected[1:], strict=True):
        facts = row["secagg"]
        assert facts["metrics"]["loss"] == pytest.approx(other.loss, rel=1e-3)
        assert (facts["cohort"], facts["threshold"]) == (["site-1", "site-2", "site-3"], 3)
        assert len(facts["transcript"]) == 64
        # four bytes a number, and, in the first round, keys and shares for all that follow
        assert all(4 * layout.size < sent < 4 * layout.size + 15_000 for sent in row["bytes_sent"].values())
    assert [sorted(row["secagg"]["seconds"]) for row in record["rounds"][1:]] == [
        ["advertise", "confirm", "deal", "mask", "open", "train"],
        ["mask", "open", "train"],
    ]
    assert [r["mAP"] for r in record["rounds"]] == pytest.approx([r.row["mAP"] for r in expected], abs=0.5)
    assert record["rounds"][0]["zero_shot"]["mAP"] == pytest.approx(expected[0].row["zero_shot"]["mAP"], abs=0.5)
    assert all(len(r["bytes_sent"]) == 3 for r in record["rounds"][1:])
    assert record["is_stand_in"] is True
    assert record["sites"]["site-2"]["versions"]["nvflare"]
    assert [e["event"] for e in events][-1] == "completed"
    log = (tmp_path / "fedmpt.log").read_text()
    assert "INFO" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("gpus", [0, 2])
def test_an_exported_job_is_configuration_only(tmp_path: Path, gpus: int) -> None:
    agreed = job("exported", gpus=gpus)
    code = (
        "import sys, json; from fedmpt_core.config.toml import job_from_dict\n"
        "from fedmpt_flare.job.recipe import FedMPTRecipe\n"
        "FedMPTRecipe(job_from_dict(json.loads(sys.argv[1]))).export(sys.argv[2])"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(agreed.to_dict()), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    files = {str(p.relative_to(tmp_path / "exported")) for p in (tmp_path / "exported").rglob("*") if p.is_file()}
    assert files == {"meta.json", "app/config/config_fed_server.json", "app/config/config_fed_client.json"}
    client = json.loads((tmp_path / "exported/app/config/config_fed_client.json").read_text())
    executor = client["executors"][0]["executor"]
    assert executor["path"] == "fedmpt_flare.site.executor.FedMPTExecutor"
    arguments = executor["args"]["job"]
    assert arguments.pop("config_type") == "dict"
    from fedmpt_core.config.toml import job_from_dict

    assert job_from_dict(arguments).digest() == agreed.digest()
    meta = json.loads((tmp_path / "exported/meta.json").read_text())
    assert meta["min_clients"] == 2
    assert (meta.get("resource_spec") or {}).get("@default", {}).get("num_of_gpus", 0) == gpus


def _trainers() -> list[psutil.Process]:
    me = psutil.Process()
    return [p for p in me.children(recursive=True) if "fedmpt_flare.site.trainer_main" in " ".join(p.cmdline())]


# what a simulated federation leaves for whoever watches it, and how it ends
FAILS = """
import json, pathlib
run = pathlib.Path("failing/server/simulate_job")
run.mkdir(parents=True)
reason = "join: 0 sites answered, min_sites=2; each site's log says why it did not"
events = [{"event": "joining"}, {"event": "failed", "reason": reason}]
(run / "events.jsonl").write_text("".join(json.dumps({**e, "time": 0.0}) + "\\n" for e in events))
(run / "result.json").write_text(json.dumps({"outcome": f"failed: {reason}"}))
"""
DIES = "raise SystemExit(3)"


@pytest.mark.parametrize(
    ("program", "sentence", "left"),
    [
        (FAILS, "join: 0 sites answered, min_sites=2", [".lock", "fedmpt.log", "ledgers", "result.json"]),
        (DIES, "FLARE's simulator ended with exit code 3 before the job did", [".lock", "fedmpt.log", "ledgers"]),
    ],
)
def test_a_run_that_failed_ends_with_its_sentence(
    sites: dict[str, SiteConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    sentence: str,
    left: list[str],
) -> None:
    """That too few sites end a job so is a test of the workflow and of a federation."""
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **how: start([sys.executable, "-c", program], **how))
    earlier = tmp_path / "model.safetensors"
    earlier.write_bytes(b"of an earlier run")
    with pytest.raises(SimulationFailed, match=r"holds model\.safetensors of another run: name another folder"):
        run(Simulation(job("failing"), sites, tmp_path))
    assert earlier.read_bytes() == b"of an earlier run"
    earlier.unlink()
    with pytest.raises(SimulationFailed, match=sentence):
        run(Simulation(job("failing"), sites, tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == left


def private(name: str, rounds: int) -> JobConfig:
    """A job with masks and differential privacy."""
    plain = job(name, rounds, REHEARSED, min_sites=3)
    training = dataclasses.replace(plain.training, batch_size=None)
    return resolved(dataclasses.replace(plain, training=training, privacy=PrivacyConfig(epsilon=5.0, sample_rate=0.5)))


def test_private_masked_sites_keep_ledgers_and_one_of_a_low_cap_or_without_data_stays_out(
    sites: dict[str, SiteConfig], tmp_path: Path
) -> None:
    agreed = private("private", rounds=2)
    poor = dataclasses.replace(sites["site-3"], privacy=dataclasses.replace(POLICY, epsilon=1.0))
    lost = dataclasses.replace(sites["site-1"], data=DataConfig(path=str(tmp_path / "nowhere.csv")))
    events = run(Simulation(agreed, {**sites, "site-4": poor, "site-5": lost}, tmp_path / "out"))
    dropped = {e["site"]: e["reason"] for e in events if e["event"] == "dropped"}
    assert sorted(dropped) == ["site-4", "site-5"]
    assert dropped["site-4"] == "privacy budget: what is left at this site does not suffice for the job"
    # what is spent and paths stay at the site, in its own log
    assert "nowhere" not in dropped["site-5"]
    log = (tmp_path / "out" / "fedmpt.log").read_text()
    assert "0.000 is spent and the cap is 1" in log
    assert "nowhere.csv" in log.split("trainer of site-5")[1]
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["outcome"] == "completed"
    assert record["aggregation"] == "masked"
    spent = [r["privacy"] for r in record["rounds"]]
    assert [sorted(p) for p in spent] == [[], sorted(sites), sorted(sites)]
    assert 0 < spent[1]["site-1"]["epsilon"] < spent[2]["site-1"]["epsilon"] <= 5.0
    for site in sites:
        entries = read_ledger(tmp_path / "out" / "ledgers" / site / "pictures.ledger.jsonl")
        assert {e.details["aggregation"] for e in entries if e.kind == "reserve"} == {"masked"}
        assert {e.details["identities"] for e in entries if e.kind == "reserve"} == {"insecure"}
        assert [e.kind for e in entries] == ["genesis", "hold", *["reserve", "commit"] * 2, "free"]
        assert [e.round for e in entries[2:-1]] == [1, 1, 2, 2]
        assert len({e.job for e in entries[1:]}) == 1
        assert spent[2][site]["head"] == {"seq": 5, "hash": entries[5].hash, "sig": ""}
        assert spent[1][site]["head"]["hash"] == entries[3].hash
    for site, kinds in (("site-4", ["genesis"]), ("site-5", ["genesis", "hold", "free"])):
        entries = read_ledger(tmp_path / "out" / "ledgers" / site / "pictures.ledger.jsonl")
        assert [e.kind for e in entries] == kinds


@pytest.mark.thorough
def test_a_private_masked_run_that_was_killed_goes_on_where_it_was(
    sites: dict[str, SiteConfig], tmp_path: Path
) -> None:
    """A trainer is killed in its second round, which costs one attempt of that round; all of it in the third."""
    agreed = private("resumed", rounds=3)
    simulation = Simulation(agreed, sites, tmp_path).run()
    killed: list[int] = []
    for event in simulation:
        if event["event"] == "training" and event["round"] == 2 and not killed:
            trainer = _trainers()[0]
            trainer.kill()
            killed.append(trainer.pid)
        if event["event"] == "training" and event["round"] == 3:
            break
    simulation.close()  # ends the simulator's processes
    assert killed
    assert _trainers() == []
    kept = newest_checkpoint(tmp_path / "checkpoints")
    assert (kept.round, sorted(kept.privacy)) == (2, ["site-1", "site-2", "site-3"])
    rounds = json.loads((tmp_path / "result.json").read_text())["rounds"]
    assert [len(r["sites"]) for r in rounds] == [0, 3, 3]
    assert rounds[1]["secagg"]["attempt"] == 0
    assert rounds[2]["secagg"]["attempt"] <= 1  # 0 when it had answered already

    continued = dataclasses.replace(agreed, resume=kept.resuming())
    run(Simulation(continued, sites, tmp_path))
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["outcome"] == "completed"
    assert record["resumed"] == json.loads(json.dumps(dataclasses.asdict(kept.resuming())))
    assert record["run_id"] != kept.run_id
    assert [r["round"] for r in record["rounds"]] == [0, 1, 2, 3]
    for site in ("site-1", "site-2", "site-3"):
        entries = read_ledger(tmp_path / "ledgers" / site / "pictures.ledger.jsonl")
        done = [(e.job, e.round) for e in entries if e.kind == "commit"]
        assert done[:2] == [(kept.run_id, 1), (kept.run_id, 2)]
        assert done[-1] == (record["run_id"], 3)
        assert {e.details["aggregation"] for e in entries if e.kind == "reserve"} == {"masked"}
        assert {e.details["identities"] for e in entries if e.kind == "reserve"} == {"insecure"}
        spent = record["rounds"][3]["privacy"][site]["epsilon"]
        assert record["rounds"][2]["privacy"][site]["epsilon"] < spent <= 5.0


def test_no_process_outlives_a_run() -> None:
    assert _trainers() == []
