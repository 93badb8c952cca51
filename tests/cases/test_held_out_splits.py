"""Held-out pictures of which some show nothing, and pictures that are in two splits: said before any work is spent."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmpt_core.config.job import JobConfig, ModelConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.site import DataConfig, SiteConfig
from fedmpt_core.data.manifest_rows import ManifestRow, write_manifest
from fedmpt_core.federation import preflight
from fedmpt_core.federation.run.record import mean_figures
from fedmpt_core.federation.site.session import SiteSession
from tests.fakes import FakeBackbone
from tests.settings import OPEN, POLICY, UNMASKED, UNPROTECTED

JOB = JobConfig(
    "h",
    ("cat", "dog"),
    unseen_classes=("bus", "zebra"),
    model=ModelConfig(conditions=("color", "pose")),
    training=TrainingConfig(rounds=1, local_steps=1),
    privacy=UNPROTECTED,
    secagg=UNMASKED,
)
SIZE = preflight.ModelSize({}, {}, "towers", True, ())
FULL = {"train": ["cat", "dog", "cat", "dog"], "val": ["cat", "dog"], "test": ["cat", "dog", "bus", "zebra"]}
Shown = Mapping[str, Sequence[str]]


def a_site(folder: Path, shown: Shown, first: int = 0, *, copies: Mapping[str, str] | None = None) -> SiteConfig:
    """Pictures of one colour each, named by split and number; `copies` gives some the bytes of others."""
    folder.mkdir()
    rows, value = [], first
    for split, labels in shown.items():
        for i, label in enumerate(labels):
            value += 1
            Image.new("RGB", (12, 12), (value, 7 * value % 256, 90)).save(folder / f"{split}{i}.png")
            rows.append(ManifestRow(f"{split}{i}.png", (label,) if label else (), split))
    for copy, original in (copies or {}).items():
        (folder / copy).write_bytes((folder / original).read_bytes())
    write_manifest(rows, folder / "m.csv")
    data = DataConfig(path=str(folder / "m.csv"), evaluate=True)
    return SiteConfig(data, privacy=POLICY, secagg=OPEN, cache_dir=str(folder / "cache"), device="cpu")


def warned(sites: Mapping[str, SiteConfig], job: JobConfig = JOB) -> list[str]:
    return preflight.warnings_of(job, SIZE, preflight.check_data(job, sites))


LACKING = {
    "val of nothing": ({"val": ["", ""]}, ["its val split is without a positive, no picture in it shows any label"]),
    "val of unseen labels": ({"val": ["bus"]}, ["its val split is without a positive of the labels that are trained"]),
    "one label missing": ({"test": ["cat", "bus", "zebra"]}, ["without a positive of dog: no figure"]),
    "no unseen label": (
        {"test": ["cat", "dog"]},
        ["without a positive of the unseen labels: it gives no figures of them", "without a positive of bus, zebra"],
    ),
    "unseen labels alone": (
        {"test": ["bus", "zebra"]},
        ["without a positive of the seen labels: it gives no figures of them", "without a positive of cat, dog"],
    ),
    "nothing lacks": ({}, []),
    "no val split": ({"val": []}, []),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_cannot_be_scored_is_said_and_the_rest_is_scored(tmp_path: Path, name: str) -> None:
    shown, expected = FULL | LACKING[name][0], LACKING[name][1]
    site = a_site(tmp_path / "a", shown)
    sentences = warned({"hospital-a": site})
    assert len(sentences) == len(expected)
    for sentence, words in zip(sentences, expected, strict=True):
        assert sentence.startswith("hospital-a: ") and words in sentence
    session = SiteSession(JOB, site, "hospital-a", backbone=FakeBackbone())
    figures = session.evaluate(session.prepare().initial) or {}
    seen, unseen = {"cat", "dog"} & set(shown["test"]), {"bus", "zebra"} & set(shown["test"])
    assert ("seen" in figures, "unseen" in figures) == (bool(seen), bool(unseen))
    assert [ap >= 0 for ap in figures["AP"]] == [label in shown["test"] for label in JOB.all_classes]
    assert figures["threshold_from_val"] == float(bool({"cat", "dog"} & set(shown["val"])))
    assert figures["threshold_from_val"] or figures["threshold"] == 0.5
    assert np.isfinite(figures["mAP"])


def test_a_site_whose_test_pictures_show_nothing_gives_no_figures_and_others_do(tmp_path: Path) -> None:
    empty = a_site(tmp_path / "a", FULL | {"test": ["", ""]})
    sites = {"a": empty, "b": a_site(tmp_path / "b", FULL, 50)}
    assert warned(sites) == [
        "a: its test split is without a positive, no picture in it shows any label: it gives no figures"
    ]
    session = SiteSession(JOB, empty, "a", backbone=FakeBackbone())
    ready = session.prepare()
    assert not ready.evaluates and session.evaluate(ready.initial) is None


def test_a_job_of_which_nothing_can_be_scored_is_refused(tmp_path: Path) -> None:
    sites = {n: a_site(tmp_path / n, FULL | {"test": [""]}, 50 * k) for k, n in enumerate("ab")}
    with pytest.raises(ValueError, match="no site holds test pictures that show a label of the job"):
        preflight.check_data(JOB, sites)
    silent = replace(JOB, federation=replace(JOB.federation, evaluate_every=0))
    assert warned(sites, silent) == []


def test_sites_that_can_score_different_parts_are_averaged_over_what_each_gives() -> None:
    both = {"mAP": 10.0, "AP": [10.0, -1.0], "seen": {"mAP": 20.0}, "unseen": {"mAP": 40.0}}
    seen = {"mAP": 30.0, "AP": [30.0, 50.0], "seen": {"mAP": 40.0}}
    for reports in ([both, seen], [seen, both]):
        mean = mean_figures(reports)
        assert mean == {"mAP": 20.0, "AP": [20.0, 50.0], "seen": {"mAP": 30.0}, "unseen": {"mAP": 40.0}}


COPIES = {
    "test of the same site": ({"test0.png": "train1.png"}, "train1.png (train of a) is ", "test0.png (test of a)"),
    "val of the same site": ({"val1.png": "train0.png"}, "train0.png (train of a) is ", "val1.png (val of a)"),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_between_splits_of_a_site_are_named_or_refused(tmp_path: Path, name: str) -> None:
    copies, trained, judged = COPIES[name]
    sites = {"a": a_site(tmp_path / "a", FULL, copies=copies)}
    (sentence,) = warned(sites)
    assert "1 pictures are trained on and, byte for byte, judged" in sentence
    assert trained in sentence and judged in sentence
    private = replace(JOB, privacy=PrivacyConfig(epsilon=8.0, delta=1e-5, sample_rate=0.5, noise_multiplier=1.5))
    with pytest.raises(ValueError, match=r"a: 1 pictures are in training and, byte for byte, in val or test"):
        preflight.check_data(private, sites)


@pytest.mark.parametrize("split", ["test", "val"])
@pytest.mark.parametrize("privacy", [UNPROTECTED, PrivacyConfig(sample_rate=0.5, noise_multiplier=1.5)])
def test_copies_across_sites_are_found(tmp_path: Path, split: str, privacy: PrivacyConfig) -> None:
    sites = {"a": a_site(tmp_path / "a", FULL), "b": a_site(tmp_path / "b", FULL, 50)}
    (tmp_path / "a" / f"{split}1.png").write_bytes((tmp_path / "b" / "train2.png").read_bytes())
    (sentence,) = warned(sites, replace(JOB, privacy=privacy))
    assert f"b/train2.png (train of b) is {tmp_path}/a/{split}1.png ({split} of a)" in sentence


def test_copies_within_training_are_found_at_one_site_and_across_sites(tmp_path: Path) -> None:
    sites = {
        "a": a_site(tmp_path / "a", FULL, copies={"train3.png": "train0.png"}),
        "b": a_site(tmp_path / "b", FULL, 50),
    }
    (tmp_path / "b" / "train1.png").write_bytes((tmp_path / "a" / "train2.png").read_bytes())
    (sentence,) = warned(sites)
    assert "2 pictures are, byte for byte, trained on more than once" in sentence
    assert "train0.png (train of a) is" in sentence and "train1.png (train of b)" in sentence


def test_no_copies_no_word(tmp_path: Path) -> None:
    sites = {"a": a_site(tmp_path / "a", FULL), "b": a_site(tmp_path / "b", FULL, 50)}
    Image.open(tmp_path / "a" / "train0.png").save(tmp_path / "a" / "test0.png", compress_level=0)  # other bytes
    assert warned(sites) == []
