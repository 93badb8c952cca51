"""The embedded scenes: what is drawn is what is labelled, pairs are each site's own, test labels are independent."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedmpt_core.data import scenes as module
from fedmpt_core.data.scenes import CLASSES, SIDE, SceneConfig, ScenePicture, co_occurrence, scenes

SPRITES = Path(module.__file__).parent / "sprites"
INDEX = json.loads((SPRITES / "index.json").read_text())["sprites"]
CONFIG = SceneConfig(5)


def test_a_scene_is_the_same_in_another_process() -> None:
    picture = scenes(CONFIG, site=1, sites=3, split="train", count=8).pictures[7]
    code = (
        "from fedmpt_core.data.scenes import *\n"
        "print(scenes(SceneConfig(5), site=1, sites=3, split='train', count=8).pictures[7].digest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == picture.digest()
    assert picture.digest() == hashlib.sha256(picture.load().tobytes()).hexdigest()
    assert (picture.load().mode, picture.load().size) == ("RGB", (SIDE, SIDE))


def test_more_scenes_leave_the_first_as_they_were_and_seeds_differ() -> None:
    few, many = (scenes(CONFIG, site=0, sites=3, split="train", count=n) for n in (5, 50))
    assert np.array_equal(few.targets, many.targets[:5])
    other = scenes(SceneConfig(6), site=0, sites=3, split="train", count=50)
    assert len({p.digest() for p in (*few.pictures, *other.pictures[:5])}) == 10


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_are_what_is_drawn_and_every_object_can_be_seen(split: str) -> None:
    """Draw each object's mask: none is hidden by a later one, and the labels are theirs."""
    dataset = scenes(CONFIG, site=2, sites=3, split=split, count=60)  # type: ignore[arg-type]
    by_file = {row["file"]: row["class"] for row in INDEX}
    for picture, target in zip(dataset.pictures, dataset.targets, strict=True):
        assert isinstance(picture, ScenePicture)
        things = picture.objects()
        assert {by_file[t.sprite] for t in things} == {c for c, there in zip(CLASSES, target, strict=True) if there}
        masks = []
        for thing in things:
            mask = np.zeros((SIDE, SIDE), bool)
            x, y, side = thing.box
            assert 0 <= x <= SIDE - side
            assert 0 <= y <= SIDE - side
            mask[y : y + side, x : x + side] = np.asarray(thing.drawn())[..., 3] > 127
            masks.append(mask)
        for i, mask in enumerate(masks):
            covered = np.any([mask & later for later in masks[i + 1 :]], axis=0) if masks[i + 1 :] else ~mask & mask
            assert covered.sum() <= 0.5 * mask.sum()


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.9])
def test_pairs_come_as_often_as_the_matrix_says(strength: float) -> None:
    config = SceneConfig(3, strength)
    matrix = co_occurrence(config, 1)
    drawn = [p.objects() for p in scenes(config, site=1, sites=3, split="train", count=1500).pictures]  # type: ignore[attr-defined]
    partner = co_occurrence(SceneConfig(3, 1.0), 1)
    # of the scenes that show one label alone, or one label and its partner, the share that `strength` says has both
    alone = sum(len(things) == 1 for things in drawn)
    pairs = sum(len(things) == 2 and bool(partner[things[0].label, things[1].label]) for things in drawn)
    assert matrix.max() == strength
    assert abs(pairs / (alone + pairs) - strength) < 0.06


def test_no_pair_occurs_at_two_sites_and_every_label_has_one_partner() -> None:
    pairs = [co_occurrence(CONFIG, site) > 0 for site in range(len(CLASSES) - 1)]
    assert sum(p.astype(int) for p in pairs).max() == 1  # type: ignore[union-attr]
    for p in pairs:
        assert (p.sum(0) == 1).all()
        assert np.array_equal(p, p.T)
        assert not p.diagonal().any()


def test_test_labels_are_independent_and_training_labels_are_not() -> None:
    def strongest(targets: np.ndarray) -> float:
        return float((np.corrcoef(targets.T) - np.eye(len(CLASSES))).max())

    assert strongest(scenes(CONFIG, site=0, sites=3, split="test", count=2000).targets) < 0.08
    assert strongest(scenes(CONFIG, site=0, sites=3, split="train", count=2000).targets) > 0.7


def test_test_scenes_are_public_and_show_drawings_unseen_in_training() -> None:
    here, there = (scenes(CONFIG, site=s, sites=3, split="test", count=20) for s in (0, 2))
    assert [p.digest() for p in here.pictures] == [p.digest() for p in there.pictures]
    held_out = {row["file"] for row in INDEX if row["held_out"]}

    def used(split: str, site: int) -> set[str]:
        pictures = scenes(CONFIG, site=site, sites=3, split=split, count=800).pictures  # type: ignore[arg-type]
        return {t.sprite for p in pictures for t in p.objects()}  # type: ignore[attr-defined]

    assert len(held_out) >= 20
    assert not held_out & (used("train", 0) | used("train", 1) | used("train", 2))
    assert held_out <= used("test", 0)


def test_sites_draw_in_styles_of_their_own() -> None:
    def share(site: int) -> float:
        pictures = scenes(CONFIG, site=site, sites=3, split="train", count=400).pictures
        drawn = [t.sprite for p in pictures for t in p.objects()]  # type: ignore[attr-defined]
        return sum("-fluent-" in s for s in drawn) / len(drawn)

    assert share(0) > 0.85
    assert share(1) < 0.15
    assert 0.4 < share(2) < 0.6


def test_every_sprite_is_attributed_small_and_in_both_styles() -> None:
    listed = {row["file"] for row in INDEX}
    assert listed == {p.name for p in SPRITES.glob("*.webp")}
    assert {(row["class"], row["style"]) for row in INDEX} == {(c, s) for c in CLASSES for s in module.STYLES}
    assert sum(p.stat().st_size for p in SPRITES.iterdir()) < 500_000
    text = (SPRITES / "ATTRIBUTION.md").read_text()
    assert all(word in text for word in ("Microsoft", "Google", "MIT", "Apache-2.0", "index.json"))


def test_more_sites_than_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 19"):
        scenes(CONFIG, site=0, sites=20, split="train", count=1)


@pytest.mark.parametrize("fields", [{"seed": -1}, {"seed": 2**32}, {"seed": 0, "spurious_strength": 1.1}])
def test_an_impossible_config_is_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match="out of range"):
        SceneConfig(**fields)
