"""A small benchmark on fake towers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedmpt_core.benchmark import shared_records as workshop_module
from fedmpt_core.benchmark.inputs import BenchmarkInputs, load_setup
from fedmpt_core.benchmark.shared_records import SharedRecords
from fedmpt_core.federation.site import session
from tests.benchmarks import GRID, JOB, METHOD_FILE, SITES
from tests.fakes import FakeBackbone


@pytest.fixture(autouse=True)
def fake_towers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (workshop_module, session):
        monkeypatch.setattr(module, "load_backbone", lambda _: FakeBackbone())
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def setup(tmp_path: Path) -> BenchmarkInputs:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, text in (("job", JOB), ("site", SITES), ("methods", METHOD_FILE), ("grid", GRID)):
        (folder / f"{name}.toml").write_text(text)
    return load_setup(str(folder))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One feature cache for all tests."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def workshop(shared: Path) -> SharedRecords:
    return SharedRecords(shared)
