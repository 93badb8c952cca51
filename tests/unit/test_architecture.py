"""Who may import whom, read from the source itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "fedmpt_core").rglob("*.py"))
FLARE = sorted((ROOT / "custom" / "fedmpt_flare").rglob("*.py"))
TORCH_ONLY = ("transport", "gating", "causal", "adapters", "losses", "prediction")
WITHOUT_TORCH = ("workflow", "artifacts", "tasks", "site", "guards")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module}
    return found


def top(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.stem)
def test_the_core_knows_neither_flare_nor_a_screen(path: Path) -> None:
    assert not top(path) & {"nvflare", "fedmpt_flare", "jobs", "typer", "rich", "click"}


@pytest.mark.parametrize("path", FLARE, ids=lambda p: p.stem)
def test_the_flare_package_holds_no_arithmetic_and_no_cryptography(path: Path) -> None:
    assert not top(path) & {"torch", "numpy", "cryptography", "open_clip", "opacus"}


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_the_method_s_modules_import_none_of_ours(name: str) -> None:
    assert not {n for n in imports(ROOT / "fedmpt_core" / f"{name}.py") if n.startswith("fedmpt")}


@pytest.mark.parametrize("path", CORE + FLARE, ids=lambda p: p.stem)
def test_modules_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", CORE[1:], ids=lambda p: p.stem)  # the first sets MKL's kernels
def test_the_core_prints_nothing_and_reads_no_environment(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    attributes = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert "print" not in names
    assert not attributes & {"os.environ", "os.getenv", "torch.manual_seed", "np.random.seed", "random.seed"}


def test_server_and_guards_need_no_torch() -> None:
    """A server without torch can run the workflow, and a site's parent process stays small."""
    code = "import sys, " + ", ".join(f"fedmpt_flare.{m}" for m in WITHOUT_TORCH) + "; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_an_auditor_can_run_the_ledger_with_python_alone() -> None:
    privacy = ROOT / "fedmpt_core" / "privacy"
    for name in ("chain", "ledger_file", "ledger"):
        outside = top(privacy / f"{name}.py") - sys.stdlib_module_names - {"fedmpt_core"}
        assert not outside
        own = {n for n in imports(privacy / f"{name}.py") if n.startswith("fedmpt")}
        assert own <= {"fedmpt_core.privacy.chain", "fedmpt_core.privacy.ledger_file"}


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.stem)
def test_opacus_has_two_places_and_nobody_draws_noise_elsewhere(path: Path) -> None:
    if "opacus" in top(path):
        assert path.stem in ("noise", "accounting")
    if path.parent.name == "privacy" and path.stem != "self_test":
        names = {ast.unparse(n) for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Attribute)}
        assert not {n for n in names if n.startswith(("np.random", "torch.rand", "torch.normal", "torch.Generator"))}
