"""The trainer process: refusals are sentences, its death is an exception, and it never outlives its parent."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from nvflare.apis.signal import Signal

from fedmpt_core.config.job import FederationConfig, JobConfig, PrivacyConfig
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_flare.site.trainer import Trainer, TrainerError

JOB = JobConfig("t", ("cat", "dog"))
SITE = SiteConfig(DataConfig(source="manifest", path="/nowhere/manifest.csv"))


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    trainer = Trainer(tmp_path / "trainer.log")
    trainer.start()
    yield trainer
    trainer.stop()


def test_a_refusal_arrives_as_its_sentence(trainer: Trainer) -> None:
    plain = {"job": {**JOB.to_dict(), "surprise": 1}, "site": {}, "name": "site-1"}
    with pytest.raises(TrainerError, match="unknown key 'surprise'") as caught:
        trainer.ask("prepare", abort=Signal(), timeout=100, **plain)
    assert caught.value.expected
    with pytest.raises(TrainerError, match="order='dance' is unknown"):
        trainer.ask("dance", abort=Signal(), timeout=100)
    assert trainer.alive


def test_of_a_refusal_by_policy_the_public_part_is_marked(trainer: Trainer) -> None:
    policy = SitePrivacyConfig("ward-7", units=10, epsilon=5.0, delta=1e-5, min_noise_multiplier=2.71)
    job = replace(JOB, privacy=PrivacyConfig(noise_multiplier=1.5), federation=FederationConfig(min_sites=3))
    site = replace(SITE, privacy=policy)
    plain = {"job": job.to_dict(), "site": asdict(site), "name": "site-1", "run_id": "run-1", "kit": ""}
    with pytest.raises(TrainerError, match=r"below this site's least of 2\.71") as caught:
        trainer.ask("prepare", abort=Signal(), timeout=100, **plain)
    assert caught.value.public == "privacy.noise_multiplier=1.5 is below this site's least"
    with pytest.raises(TrainerError, match="order='dance' is unknown") as caught:
        trainer.ask("dance", abort=Signal(), timeout=100)
    assert caught.value.public == ""


def test_a_killed_trainer_is_an_exception_and_can_be_started_again(trainer: Trainer) -> None:
    assert trainer.pid
    os.kill(trainer.pid, signal.SIGKILL)
    with pytest.raises(TrainerError, match=r"exit code -9|not running"):
        trainer.ask("prepare", abort=Signal(), timeout=100)
    trainer.start()
    with pytest.raises(TrainerError, match="order='dance' is unknown"):
        trainer.ask("dance", abort=Signal(), timeout=100)


def test_an_aborted_job_stops_the_trainer(trainer: Trainer) -> None:
    abort = Signal()
    abort.trigger(True)
    with pytest.raises(TrainerError, match="aborted"):
        trainer.ask("dance", abort=abort, timeout=100)
    assert not trainer.alive


def test_a_trainer_that_gives_no_answer_in_time_is_stopped(trainer: Trainer) -> None:
    assert trainer.pid
    os.kill(trainer.pid, signal.SIGSTOP)
    with pytest.raises(TrainerError, match=r"no answer to dance in 0.1 s") as caught:
        trainer.ask("dance", abort=Signal(), timeout=0.1)
    assert not caught.value.died
    assert not trainer.alive


def test_the_trainer_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, os, signal; from pathlib import Path; from fedmpt_flare.site.trainer import Trainer\n"
        "t = Trainer(Path(sys.argv[1])); t.start(); print(t.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "log")], stdout=subprocess.PIPE, check=False)
    assert run.returncode == -signal.SIGKILL
    try:
        child = psutil.Process(int(run.stdout))
    except psutil.NoSuchProcess:
        return
    child.wait(60)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_trainer_writes_no_core(trainer: Trainer) -> None:
    with pytest.raises(TrainerError):
        trainer.ask("dance", abort=Signal(), timeout=100)  # it is up
    limits = Path(f"/proc/{trainer.pid}/limits").read_text().splitlines()
    assert next(line for line in limits if line.startswith("Max core file size")).split()[4:6] == ["0", "0"]


@pytest.mark.parametrize("before", [None, 0o644, 0o666])
def test_the_log_is_its_owner_s_alone_also_when_it_was_there_before(tmp_path: Path, before: int | None) -> None:
    folder = tmp_path / "job"
    folder.mkdir(mode=0o755)
    log = folder / "trainer.log"
    if before:
        log.write_text("earlier\n")
        log.chmod(before)
    trainer = Trainer(log)
    trainer.start()
    trainer.stop()
    assert (log.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)
    assert log.read_text().startswith("earlier" if before else "")
