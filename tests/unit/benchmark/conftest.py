"""A small benchmark on fake towers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedmpt_core.benchmark.inputs import BenchmarkInputs, load_inputs
from fedmpt_core.benchmark.shared_records import SharedRecords
from tests.benchmarks import GRID, JOB, METHOD_FILE, SITES
from tests.fakes import FakeBackbone


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def inputs(tmp_path: Path) -> BenchmarkInputs:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, text in (("job", JOB), ("site", SITES), ("methods", METHOD_FILE), ("grid", GRID)):
        (folder / f"{name}.toml").write_text(text)
    return load_inputs(str(folder))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One feature cache for all tests."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def shared(cache: Path) -> SharedRecords:
    return SharedRecords(cache, load=lambda _: FakeBackbone())
