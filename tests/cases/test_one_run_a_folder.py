"""Two runs into one folder would mix their ledgers: the second is refused while the first goes on, and after it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.audit.run_ledgers import check_alone
from fedmpt_core.config.job import JobConfig, ResumeConfig, TrainingConfig
from fedmpt_core.federation.run.lock import FolderTaken, held, require_free
from fedmpt_flare.job.simulation import Simulation, SimulationFailed
from tests.command_line import Fedmpt
from tests.settings import UNPROTECTED

DEMO = Path(__file__).parents[2] / "jobs" / "demo" / "job.toml"
JOB = JobConfig("j", ("cat", "dog"), privacy=UNPROTECTED)


def test_a_folder_in_which_a_run_goes_on_is_refused_before_any_work(fedmpt: Fedmpt, tmp_path: Path) -> None:
    with held(tmp_path):
        before = sorted(tmp_path.iterdir())
        run = fedmpt("simulate", DEMO, "--out", tmp_path)
        assert (run.returncode, run.stdout) == (2, "")
        assert "another run goes on in it" in run.stderr and "name another folder with --out" in run.stderr
        with pytest.raises(FolderTaken, match="another run goes on in it"):
            next(Simulation(JOB, {}, tmp_path).run())
        assert sorted(tmp_path.iterdir()) == before
    require_free(tmp_path)


def test_a_folder_that_filled_meanwhile_is_refused(tmp_path: Path) -> None:
    simulation = Simulation(JOB, {}, tmp_path)
    (tmp_path / "result.json").touch()
    with pytest.raises(SimulationFailed, match=r"holds result\.json of another run"):
        next(simulation.run())


@pytest.mark.parametrize(
    ("jobs", "mixed"), [(["mine"], False), (["mine", "other"], True), (["earlier", "mine"], False)]
)
def test_an_audit_says_that_a_folder_mixes_two_runs(tmp_path: Path, jobs: list[str], *, mixed: bool) -> None:
    (tmp_path / "ledgers" / "a").mkdir(parents=True)
    job = replace(JOB, training=TrainingConfig(rounds=3), resume=ResumeConfig("earlier", 1))
    entries: Any = tuple(SimpleNamespace(kind="reserve", job=name) for name in jobs)
    manifest: Any = SimpleNamespace(run_id="mine", identities="insecure")
    run = Run(tmp_path, {}, job, manifest, ledgers={"a": entries})
    check_alone(run)
    assert [finding.code for finding in run.findings] == ["two-runs"] * mixed


def test_the_lock_lasts_as_long_as_the_simulator_and_goes_with_it(tmp_path: Path) -> None:
    script = (
        "from fedmpt_core.federation.run.lock import held\n"
        "from pathlib import Path\n"
        "import os, subprocess\n"
        f"with held(Path({str(tmp_path)!r})) as lock:\n"
        "    print(subprocess.Popen(['cat'], stdin=0, pass_fds=(lock,)).pid, flush=True)\n"
        "    os._exit(9)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdin
        child = int(process.stdout.readline())
        assert process.wait() == 9
        with pytest.raises(FolderTaken):  # the run's parent was killed, its simulator writes on
            require_free(tmp_path)
        process.stdin.close()
        while Path(f"/proc/{child}").exists() and (Path(f"/proc/{child}/stat").read_text().split()[2]) != "Z":
            os.sched_yield()
    require_free(tmp_path)
    assert not any(p.name != ".lock" for p in tmp_path.iterdir())
