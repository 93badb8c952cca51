"""How a command starts: nothing is loaded that it does not need."""

import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "nvflare", "numpy", "scipy", "opacus", "dp_accounting", "matplotlib", "cryptography")
SITE = """
[data]
path = "manifest.csv"
[privacy]
dataset = "pets"
units = 100
epsilon = 8.0
delta = 1e-5
ledger = "ledgers"
"""


def loaded(*commands: list[str], ends: int = 0) -> set[str]:
    """Which of the heavy packages a process has after these commands, each of which must end with that exit code."""
    code = f"""
import sys
from fedmpt_flare.cli.main import main
for command in {commands!r}:
    try:
        main(command)
    except SystemExit as ended:
        assert (ended.code or 0) == {ends}, (command, ended.code)
print(*sorted(set({HEAVY!r}) & set(sys.modules)), sep=",")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(filter(None, run.stdout.splitlines()[-1].split(",")))


def test_help_the_schema_and_an_unused_ledger_load_no_heavy_package(tmp_path: Path) -> None:
    site = tmp_path / "fedmpt_site.toml"
    site.write_text(SITE)
    of_the_site = [str(site), "--name", "hospital-a", "--unsigned"]
    helps = [["--help"], ["check", "--help"], ["ledger", "--help"]]
    ledger = [["ledger", "create", *of_the_site], ["ledger", "show", *of_the_site]]
    assert loaded(*helps, ["check", "--schema"], *ledger) == set()


def test_a_mistake_is_told_before_torch_or_flare_is_loaded(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    commands = [[name, nowhere] for name in ("check", "simulate", "export", "partition", "audit", "report", "canaries")]
    of_a_site = [["roster", "show", "--kit", nowhere], ["site", "policy", nowhere]]
    assert not loaded(*commands, *of_a_site, ends=2) & {"torch", "nvflare"}
