"""`fedmpt bench` on own manifests: spurious pairs are found in the labels, or a sentence says that there are none."""

from pathlib import Path

import numpy as np
import pytest

from fedmpt_core.benchmark.folder import pairs_sentence
from fedmpt_core.benchmark.spurious import spurious_pairs
from tests.records import read_rows

DATA = Path(__file__).parents[3] / "shared" / "data"


def independent(seed: int, records: int = 400, classes: int = 5) -> np.ndarray:
    return (np.random.default_rng(seed).random((records, classes)) < 0.3).astype(np.uint8)


def with_pair(targets: np.ndarray, a: int, b: int) -> np.ndarray:
    """Where a is, b is; nowhere else."""
    planted = targets.copy()
    planted[:, b] = planted[:, a]
    return planted


def test_pairs_that_a_site_alone_has_are_found() -> None:
    sites = [with_pair(independent(0), 0, 3), independent(1), with_pair(independent(2), 4, 2)]
    assert spurious_pairs(sites, independent(3)).tolist() == [[0, 3], [2, 4]]


def test_pairs_that_belong_together_everywhere_are_no_spurious_ones() -> None:
    sites = [with_pair(independent(0), 0, 3), with_pair(independent(1), 0, 3)]
    assert not len(spurious_pairs(sites, with_pair(independent(2), 0, 3)))


@pytest.mark.parametrize("train", [independent(0), independent(0, records=4), independent(0)[:0], 2 * independent(0)])
def test_where_nothing_hangs_together_there_are_none(train: np.ndarray) -> None:
    """Not in many records, few, none, nor among labels that nobody knows."""
    assert spurious_pairs([train], independent(1)).shape == (0, 2)


def test_the_tables_say_which_pairs_or_why_there_are_none() -> None:
    assert "cat + dog" in pairs_sentence([{"spurious_pairs": [["cat", "dog"]]}, {"spurious_pairs": [["cat", "dog"]]}])
    assert pairs_sentence([{"spurious_pairs": []}]).startswith("No false activations of spurious pairs: no two labels")
    assert "and 2 more" in pairs_sentence([{"spurious_pairs": [[str(i), "x"] for i in range(10)]}])


@pytest.mark.skipif(not DATA.is_dir(), reason="the real pictures are not here")
def test_the_pairs_of_real_hospitals() -> None:
    labels = ("apple", "bicycle", "bird", "boat", "person")
    targets = {}
    for name in "abc":
        rows = read_rows(DATA / "photos" / f"hospital-{name}" / "manifest.csv")
        for split in ("train", "test"):
            mine = [[label in row.labels for label in labels] for row in rows if row.split == split]
            targets[name, split] = np.array(mine, np.uint8).reshape(-1, len(labels))
    found = spurious_pairs([targets[name, "train"] for name in "abc"], targets["a", "test"])
    assert {(labels[a], labels[b]) for a, b in found} == {("bicycle", "person"), ("boat", "person")}
