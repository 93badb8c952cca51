"""A saved partition comes back as it was, for the same list of records and no other."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmpt_core.data.partition_file import (
    Partition,
    PartitionError,
    load_partition,
    record_list_digest,
    save_partition,
)
from fedmpt_core.data.pictures import Dataset, FilePicture

PARTS = (np.array([0, 3, 4]), np.array([1, 2, 5]))


def records(folder: str = "/data/voc", names: str = "abcdef", groups: tuple[str, ...] | None = None) -> Dataset:
    pictures = tuple(FilePicture(f"{folder}/{'train' if n < 'd' else 'more'}/{n}.png") for n in names)
    return Dataset(("cat", "dog"), pictures, np.zeros((len(names), 2), int), groups)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "partition.json"
    save_partition(Partition("dirichlet", 7, PARTS, 0.5), records(), path)
    return path


def test_a_partition_comes_back_as_it_was(saved: Path) -> None:
    found = load_partition(saved, records())
    assert (found.kind, found.seed, found.alpha, found.backbone) == ("dirichlet", 7, 0.5, "")
    assert [p.tolist() for p in found.parts] == [p.tolist() for p in PARTS]
    assert all(p.dtype == np.int64 for p in found.parts)
    assert saved.stat().st_mode & 0o077 == 0
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_the_same_list_in_another_place_is_the_same_list(saved: Path) -> None:
    load_partition(saved, records("/mnt/elsewhere"))


@pytest.mark.parametrize(
    "other",
    [
        records(names="abcdeg"),
        records(names="abcde"),
        records(names="bacdef"),
        records(groups=("p", "p", "q", "q", "r", "r")),
    ],
)
def test_another_list_is_refused(saved: Path, other: Dataset) -> None:
    with pytest.raises(PartitionError, match="was made of another list of 6 training records, here are"):
        load_partition(saved, other)


def test_labels_are_no_part_of_the_list() -> None:
    one = records()
    other = Dataset(("cat", "dog"), one.pictures, np.ones((6, 2), int))
    assert record_list_digest(one) == record_list_digest(other)


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": [[0, 3], [1, 2, 5]]}, "does not give every record to exactly one site"),
        ({"sites": [[0, 3, 4, 5], [1, 2, 5]]}, "does not give every record to exactly one site"),
        ({"sites": [[0, 3, 4, 1, 2, 5], []]}, "does not give every record to exactly one site"),
        ({"sites": [[0, 3, 4], [1, 2, 6]]}, "does not give every record to exactly one site"),
        ({"sites": []}, "does not give every record to exactly one site"),
        ({"sites": [[0, 3, 4], [1, 2, 5.0]]}, "wrong type"),
        ({"sites": {"a": [1]}}, "wrong type"),
        ({"seed": "7"}, "wrong type"),
        ({"kind": "magic"}, "wrong type"),
        ({"schema": 2}, "is not a partition of schema 1"),
        ({"extra": 2}, "is not a partition of schema 1"),
    ],
)
def test_damage_is_named(saved: Path, changes: dict[str, Any], message: str) -> None:
    edited(saved, **changes)
    with pytest.raises(PartitionError, match=message):
        load_partition(saved, records())


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_what_is_no_partition_is_refused(saved: Path, text: str) -> None:
    saved.write_text(text)
    with pytest.raises(PartitionError, match="make it again with `fedmpt partition`"):
        load_partition(saved, records())
    saved.unlink()
    with pytest.raises(PartitionError, match="no such file: make it with `fedmpt partition`"):
        load_partition(saved, records())


def test_groups_are_not_torn_apart(tmp_path: Path) -> None:
    together = records(groups=("p", "q", "q", "p", "p", "q"))
    save_partition(Partition("labels", 0, PARTS), together, tmp_path / "p.json")
    apart = records(groups=("p", "p", "q", "q", "r", "r"))
    with pytest.raises(PartitionError, match="gives the records of group 'p' to two sites"):
        save_partition(Partition("labels", 0, PARTS), apart, tmp_path / "q.json")
    assert not (tmp_path / "q.json").exists()


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/p.json' cannot be written"):
        save_partition(Partition("labels", 0, PARTS), records(), tmp_path / "nowhere" / "p.json")
