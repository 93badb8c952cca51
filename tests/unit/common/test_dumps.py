"""A process that holds pictures or keys leaves none of them in a core dump, and no other may read its memory."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="dumpable is Linux's word")
LOOK = """
import ctypes, resource
print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), flush=True)
"""
FORBID = "from fedmpt_core.common.dumps import forbid_dumps; forbid_dumps()"
OURS = {
    "itself": FORBID,
    "parent process of a site": "from fedmpt_flare.site.budget_gate import BudgetGate; BudgetGate()",
    "job process of a site": "from tests.running_site import RunningSite\n"
    "from fedmpt_core.config.job import JobConfig\nfrom pathlib import Path\n"
    "RunningSite(Path('site'), JobConfig('x', ('a', 'b')))",
    "job process of the server": "from fedmpt_flare.server.workflow import FedMPTWorkflow\n"
    "try: FedMPTWorkflow({}).start_controller(None)\nexcept Exception: pass",
    "command": "from fedmpt_flare.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
}


def run(code: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    root = str(Path(__file__).parents[3])
    path = f"import sys; sys.path[:0] = [{root!r}, {root + '/custom'!r}]\n"
    return subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=False, cwd=folder)


@linux
@pytest.mark.parametrize("code", OURS.values(), ids=OURS)
def test_a_process_of_ours_is_not_dumped(code: str, tmp_path: Path) -> None:
    done = run(code + LOOK, tmp_path)
    assert done.stdout.splitlines()[-1] == "(0, 0) 0", done.stderr


@linux
def test_a_crash_leaves_no_file(tmp_path: Path) -> None:
    done = run(f"{FORBID}\nimport os; os.abort()", tmp_path)
    assert done.returncode == -signal.SIGABRT
    assert list(tmp_path.iterdir()) == []


@linux
def test_a_program_that_it_starts_writes_none_either(tmp_path: Path) -> None:
    done = run(f"{FORBID}\nimport subprocess\nsubprocess.run([sys.executable, '-c', {LOOK!r}])", tmp_path)
    assert done.stdout.startswith("(0, 0) "), done.stderr


def test_services_write_none() -> None:
    units = Path(__file__).parents[3] / "deploy" / "systemd"
    for unit in units.iterdir():
        assert "\nLimitCORE=0\n" in unit.read_text(), unit.name
