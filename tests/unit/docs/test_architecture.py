"""The page on the house names the rooms that exist, on the floors that import-linter holds them to."""

import re
import tomllib
from pathlib import Path

from tests.federation import REPOSITORY

CORE = REPOSITORY / "fedmpt_core"
FLOOR = re.compile(r"^\| ((?:`\w+`(?:, )?)+) \| (.*) \|$", re.MULTILINE)


def floors() -> dict[tuple[str, ...], str]:
    """Rooms of each floor of the page, from the top, and what the page says of them."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    return {tuple(re.findall(r"\w+", rooms)): text for rooms, text in FLOOR.findall(page)}


def packages(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("*/__init__.py")}


def test_its_floors_are_the_layers_of_the_import_contract() -> None:
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [c["layers"] for c in contracts if c["type"] == "layers" and "containers" not in c]
    assert list(floors()) == [tuple(re.findall(r"(?:fedmpt_core\.)?(\w+)", layer)) for layer in layers]


def test_it_names_every_room_and_no_other() -> None:
    named = [room for floor in floors() for room in floor]
    assert sorted(named) == sorted(packages(CORE) | packages(REPOSITORY / "custom"))
    assert [path.name for path in CORE.glob("*.py")] == ["__init__.py"]


def test_it_names_every_room_within_a_room_and_no_other() -> None:
    for floor, text in floors().items():
        folders = [CORE.parent / "custom" / room if room == "fedmpt_flare" else CORE / room for room in floor]
        assert set(re.findall(r"`(\w+)/`", text)) == set().union(*map(packages, folders)), floor
