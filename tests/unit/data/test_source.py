"""From a site's settings to records: shares, dropped labels and unseen classes touch training records only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import DataConfig
from fedmpt_core.data.manifest_rows import write_manifest
from fedmpt_core.data.masks import drop_positives
from fedmpt_core.data.partition import divide
from fedmpt_core.data.partition_file import Partition, PartitionError, save_partition
from fedmpt_core.data.pictures import UNKNOWN, Dataset
from fedmpt_core.data.public.coco import CLASSES
from fedmpt_core.data.public.prepare import prepare
from fedmpt_core.data.scenes import CLASSES as SCENES
from fedmpt_core.data.source import NoData, load_split
from tests.miniature import COCO_TRAIN, coco_folder
from tests.records import read_rows

JOB = JobConfig("x", CLASSES, seed=3)
SPLITS = ("train", "val", "test")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return coco_folder(tmp_path / "coco")


@pytest.fixture
def table(coco: Path, tmp_path: Path) -> Path:
    prepare("coco2014", coco, tmp_path / "m.parquet")
    return tmp_path / "m.parquet"


def settings(coco: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"source": "coco2014", "path": str(coco), "evaluate": True, **changes})


def loaded(data: DataConfig, split: str = "train", job: JobConfig = JOB, **options: Any) -> Dataset:
    dataset = load_split(job, data, split, **options)  # type: ignore[arg-type]
    assert dataset is not None
    return dataset


def names(dataset: Dataset) -> list[str]:
    return [Path(picture.name).name for picture in dataset.pictures]


@pytest.mark.parametrize("kind", ["folder", "manifest"])
@pytest.mark.parametrize("partition", ["labels", "dirichlet", "uniform"])
def test_sites_share_out_the_training_records_of_any_source(coco: Path, table: Path, kind: str, partition: Any) -> None:
    place = {"source": "manifest", "path": str(table)} if kind == "manifest" else {}
    parts = [loaded(settings(coco, **place, share=s, shares=3, partition=partition)) for s in (1, 2, 3)]
    whole = loaded(settings(coco, **place))
    assert sorted(name for part in parts for name in names(part)) == sorted(names(whole))
    assert all(len(part) for part in parts)
    assert [names(p) for p in parts] == [names(whole.take(i)) for i in divide(whole, partition, 3, JOB.seed)]
    for held_out in ("val", "test"):
        assert names(loaded(settings(coco, **place, share=2, shares=3), held_out)) == names(
            loaded(settings(coco, **place), held_out)
        )


def test_every_source_has_the_same_records_with_the_same_labels(coco: Path, table: Path) -> None:
    for split in SPLITS:
        one, other = loaded(settings(coco), split), loaded(settings(coco, source="manifest", path=str(table)), split)
        assert names(one) == names(other)
        assert np.array_equal(one.targets, other.targets)


def test_a_saved_partition_is_shared_whatever_the_seed(coco: Path, tmp_path: Path) -> None:
    whole = loaded(settings(coco))
    parts = divide(whole, "uniform", 2, 99)
    path = tmp_path / "partition.json"
    save_partition(Partition("features", 99, parts), whole, path)
    for job in (JOB, JobConfig("y", CLASSES, seed=8)):
        for site in (1, 2):
            data = settings(coco, partition="features", partition_file=str(path), share=site, shares=2)
            assert names(loaded(data, job=job)) == names(whole.take(parts[site - 1]))


def test_a_partition_that_does_not_fit_is_refused(coco: Path, tmp_path: Path) -> None:
    whole = loaded(settings(coco))
    path = tmp_path / "partition.json"
    save_partition(Partition("uniform", 0, divide(whole, "uniform", 2, 0)), whole, path)
    fits = {"partition": "uniform", "partition_file": str(path), "shares": 2}
    loaded(settings(coco, **fits))
    with pytest.raises(PartitionError, match="divides by uniform, the site's file says partition='labels'"):
        loaded(settings(coco, **(fits | {"partition": "labels"})))
    with pytest.raises(PartitionError, match="is for 2 sites, the site's file says shares=3"):
        loaded(settings(coco, **(fits | {"shares": 3})))
    with pytest.raises(ValueError, match="needs partition_file"):
        settings(coco, partition="features")


def test_a_site_decodes_its_own_pictures_only(coco: Path) -> None:
    mine = set(names(loaded(settings(coco, share=1, shares=3))))
    for name in set(COCO_TRAIN.values()) - mine:
        (coco / "train2014" / name).write_bytes(b"no picture")
    assert set(names(loaded(settings(coco, share=1, shares=3), verify=True))) == mine
    assert len(loaded(settings(coco, share=1, shares=3), "test", verify=True))
    tested = names(loaded(settings(coco), "test"))[0]
    (coco / "val2014" / tested).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=f"{tested}' is not a picture"):
        loaded(settings(coco, share=1, shares=3), "test", verify=True)


@pytest.mark.parametrize("shares", [1, 2])
def test_a_damaged_picture_is_refused_or_skipped_at_the_site_that_has_it(coco: Path, shares: int) -> None:
    bad = coco / "train2014" / COCO_TRAIN[49]
    mine = next(s for s in range(1, shares + 1) if bad.name in names(loaded(settings(coco, share=s, shares=shares))))
    bad.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=f"{bad.name}' is not a picture"):
        loaded(settings(coco, share=mine, shares=shares), verify=True)
    kept = loaded(settings(coco, share=mine, shares=shares, on_bad_image="skip"))
    assert kept.skipped == 1
    assert bad.name not in names(kept)


def assert_training_labels_alone_are_dropped(coco: Path, load: Callable[[DataConfig, str], Dataset]) -> None:
    full = {split: load(settings(coco), split) for split in SPLITS}
    for become, value in (("negative", 0), ("unknown", UNKNOWN)):
        some = {s: load(settings(coco, drop_positives=0.6, dropped=become), s) for s in SPLITS}
        for split in ("val", "test"):
            assert np.array_equal(some[split].targets, full[split].targets)
        expected = drop_positives(full["train"], 0.6, JOB.seed, become=become)  # type: ignore[arg-type]
        assert np.array_equal(some["train"].targets, expected.targets)
        gone = some["train"].targets != full["train"].targets
        assert gone.any()
        assert set(some["train"].targets[gone]) == {value}


def test_labels_are_dropped_in_training_only(coco: Path) -> None:
    assert_training_labels_alone_are_dropped(coco, loaded)


def test_that_test_would_see_a_masked_test_split(coco: Path) -> None:
    """The twin that masks every split, as the released loaders do, fails the test above."""

    def masked(data: DataConfig, split: str) -> Dataset:
        whole = loaded(settings(coco), split)
        return drop_positives(whole, data.drop_positives, JOB.seed, become=data.dropped)

    with pytest.raises(AssertionError):
        assert_training_labels_alone_are_dropped(coco, masked)


def test_dropped_labels_do_not_depend_on_the_site(coco: Path) -> None:
    whole = loaded(settings(coco, drop_positives=0.5))
    of = {name: row.tolist() for name, row in zip(names(whole), whole.targets, strict=True)}
    for partition in ("labels", "uniform"):
        for site in (1, 2, 3):
            part = loaded(settings(coco, drop_positives=0.5, partition=partition, share=site, shares=3))
            assert {n: r.tolist() for n, r in zip(names(part), part.targets, strict=True)}.items() <= of.items()


def test_shares_hang_on_the_full_labels(coco: Path) -> None:
    plain = [names(loaded(settings(coco, share=s, shares=3))) for s in (1, 2, 3)]
    assert [names(loaded(settings(coco, share=s, shares=3, drop_positives=0.9))) for s in (1, 2, 3)] == plain


def test_unseen_classes_are_scored_and_never_trained(coco: Path) -> None:
    unseen = ("zebra", "person")
    job = JobConfig("zsl", tuple(c for c in CLASSES if c not in unseen))
    everything = {split: loaded(settings(coco), split) for split in SPLITS}
    train = loaded(settings(coco), "train", job, unseen=unseen)
    assert train.classes == job.classes
    assert names(train) == names(everything["train"])
    assert np.array_equal(train.targets, everything["train"].of(job.classes).targets)
    for split in ("val", "test"):
        judged = loaded(settings(coco), split, job, unseen=unseen)
        assert judged.classes == (*job.classes, *unseen)
        assert np.array_equal(judged.of(CLASSES).targets, everything[split].targets)
    with pytest.raises(ValueError, match="classes and coco2014 differ in 'person', 'zebra'"):
        loaded(settings(coco), "train", job)


def test_unseen_classes_of_the_embedded_scenes() -> None:
    job = JobConfig("zsl", SCENES[:15])
    data = DataConfig(source="scenes", train=30, test=30, evaluate=True)
    assert loaded(data, "train", job, unseen=SCENES[15:]).targets.shape == (30, 15)
    test = loaded(data, "test", job, unseen=SCENES[:14:-1])
    assert test.classes == (*SCENES[:15], *SCENES[:14:-1])
    assert test.targets[:, 15:].any()
    with pytest.raises(ValueError, match="differ from those of the embedded scenes"):
        load_split(job, data, "train")


def test_no_training_picture_is_a_sentence(table: Path, tmp_path: Path) -> None:
    rows = [row for row in read_rows(table) if row.split != "train"]
    write_manifest(rows, tmp_path / "held.csv")
    with pytest.raises(ValueError, match="no picture is in split 'train'"):
        load_split(JOB, DataConfig(path=str(tmp_path / "held.csv")), "train")
    assert issubclass(NoData, ValueError)
    assert load_split(JOB, DataConfig(path=str(table)), "test") is None
