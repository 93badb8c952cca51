"""Dropped positives: how many, which ones, and what they do not depend on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmpt_core.data.masks import drop_positives
from fedmpt_core.data.pictures import UNKNOWN, BadPicture, Dataset, FilePicture

R, C = 400, 6


@dataclass(frozen=True)
class Named:
    """A picture whose content is its number."""

    number: int

    @property
    def name(self) -> str:
        return f"picture {self.number}"

    def digest(self) -> str:
        return hashlib.sha256(f"{self.number}".encode()).hexdigest()

    def load(self) -> Image.Image:
        return Image.new("RGB", (1, 1))


def records() -> Dataset:
    targets = (np.random.default_rng(0).random((R, C)) < 0.5).astype(np.uint8)
    return Dataset(tuple(f"class {c}" for c in range(C)), tuple(Named(r) for r in range(R)), targets)


def dropped(dataset: Dataset, share: float = 0.3, seed: int = 1, become: str = "negative") -> np.ndarray:
    return drop_positives(dataset, share, seed, become=become).targets  # type: ignore[arg-type]


@pytest.mark.parametrize(("become", "value"), [("negative", 0), ("unknown", UNKNOWN)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_each_positive_goes_with_the_probability_and_nothing_else_changes(
    become: str, value: int, share: float
) -> None:
    full = records().targets
    found = dropped(records(), share, become=become)
    gone = found != full
    assert (full[gone] == 1).all()
    assert (found[gone] == value).all()
    positives = full.sum()
    assert abs(gone.sum() - share * positives) < 4 * np.sqrt(share * (1 - share) * positives)
    # labels go one by one: both fates occur within one record
    assert (gone.any(1) & (found == 1).any(1)).sum() > R / 10


def test_the_ends_of_the_range() -> None:
    assert (dropped(records(), 1.0) == 0).all()
    assert np.array_equal(dropped(records(), 0.0), records().targets)


def test_neither_order_nor_site_nor_other_labels_matter() -> None:
    whole = dropped(records())
    order = np.random.default_rng(2).permutation(R)
    assert np.array_equal(dropped(records().take(order)), whole[order])
    assert np.array_equal(dropped(records().take(np.arange(100, 150))), whole[100:150])
    assert np.array_equal(dropped(records().of(["class 4", "class 1"])), whole[:, [4, 1]])


def test_the_seed_decides_and_a_larger_share_drops_more_of_the_same() -> None:
    assert np.array_equal(dropped(records()), dropped(records()))
    assert not np.array_equal(dropped(records()), dropped(records(), seed=2))
    assert (dropped(records(), 0.6) <= dropped(records(), 0.3)).all()


def test_a_picture_that_cannot_be_read_is_named_only_when_it_is_needed(tmp_path: Path) -> None:
    data = Dataset(("cat",), (FilePicture(str(tmp_path / "gone.png")),), np.ones((1, 1), int))
    assert drop_positives(data, 0.0, 0, become="negative") is data
    with pytest.raises(BadPicture, match=r"gone.png' does not exist"):
        drop_positives(data, 0.5, 0, become="negative")
