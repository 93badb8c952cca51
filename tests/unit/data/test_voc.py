"""Every picture of a VOC2007 list becomes a row with the labels of its own annotation, or an error."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedmpt_core.data.manifest_rows import SPLITS, ManifestError, ManifestRow, write_manifest
from fedmpt_core.data.pictures import Dataset
from fedmpt_core.data.public.folder import FolderOptions
from fedmpt_core.data.public.registry import folder_rows
from fedmpt_core.data.public.voc import CLASSES, NAMES
from tests.records import load_folder, load_manifest

LISTS = {"train": [12, 5], "val": [7, 9], "trainval": [5, 7, 9, 12], "test": [1, 2, 3]}
OBJECTS = {
    5: [("chair", 0), ("chair", 1), ("tvmonitor", 0)],
    12: [("car", 1)],
    7: [("person", 0)],
    9: [("dog", 1), ("dog", 0), ("cat", 1)],
    1: [("diningtable", 0), ("pottedplant", 0)],
    2: [("aeroplane", 0)],
    3: [("boat", 0), ("person", 0)],
}


def annotation(number: int, objects: list[tuple[str, int]]) -> str:
    shown = "".join(
        "<object><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        f"<name>{name}</name><pose>Left</pose><difficult>{difficult}</difficult></object>"
        for name, difficult in objects
    )
    return f"<annotation><folder>VOC2007</folder><filename>{number:06d}.jpg</filename>{shown}</annotation>\n"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """A miniature VOCdevkit/VOC2007."""
    base = tmp_path / "VOCdevkit" / "VOC2007"
    for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (base / name).mkdir(parents=True)
    for name, numbers in LISTS.items():
        (base / f"ImageSets/Main/{name}.txt").write_text("".join(f"{n:06d}\n" for n in numbers))
    # The per-class lists of the devkit must not be mistaken for labels.
    (base / "ImageSets/Main/cat_train.txt").write_text("000005  1\n000012  1\n")
    for number, objects in OBJECTS.items():
        (base / f"Annotations/{number:06d}.xml").write_text(annotation(number, objects))
        Image.new("RGB", (8, 6), (number, 0, 0)).save(base / f"JPEGImages/{number:06d}.jpg")
    return base


def load_voc(folder: Path, classes: Sequence[str], split: str, *, verify: bool = False) -> Dataset:
    return load_folder("voc2007", folder, classes, split, verify=verify)


def voc_rows(
    folder: Path, splits: Sequence[str] = SPLITS, *, left_out: list[str] | None = None, **options: Any
) -> list[ManifestRow]:
    return list(folder_rows("voc2007", folder, splits, FolderOptions(**options), left_out=left_out))


def labels(folder: Path, **options: Any) -> dict[str, dict[str, tuple[str, ...]]]:
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for row in voc_rows(folder, **options):
        found.setdefault(row.split, {})[Path(row.path).stem] = row.labels
    return found


def test_standard_splits_keep_every_picture_with_its_own_labels(voc: Path) -> None:
    assert labels(voc) == {
        "train": {"000005": ("chair", "tv monitor"), "000012": ()},
        "val": {"000007": ("person",), "000009": ("dog",)},
        "test": {
            "000001": ("dining table", "potted plant"),
            "000002": ("aeroplane",),
            "000003": ("boat", "person"),
        },
    }


def test_difficult_objects_can_count_as_present(voc: Path) -> None:
    found = labels(voc, include_difficult=True)
    assert found["train"]["000012"] == ("car",)
    assert found["val"]["000009"] == ("cat", "dog")


@pytest.mark.parametrize("up", [0, 1, 2])
def test_the_folder_is_found_from_above(voc: Path, up: int) -> None:
    folder = [voc, *voc.parents][up]
    assert voc_rows(folder) == voc_rows(voc)
    assert all(Path(row.path).is_file() for row in voc_rows(folder))


def test_classes_are_twenty_readable_labels() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 20
    assert {"dining table", "potted plant", "tv monitor"} < set(CLASSES)
    assert [words.replace(" ", "") for words in CLASSES] == list(NAMES)


def test_val_share_draws_a_fixed_part_of_trainval(voc: Path) -> None:
    found = labels(voc, val_share=0.25, seed=3)
    assert sorted([*found["train"], *found["val"]]) == [f"{n:06d}" for n in LISTS["trainval"]]
    assert len(found["val"]) == 1
    assert labels(voc, val_share=0.25, seed=3) == found
    assert found["test"] == labels(voc)["test"]
    drawn = {next(iter(labels(voc, val_share=0.25, seed=seed)["val"])) for seed in range(20)}
    assert len(drawn) > 1
    # The draw hangs on the ids alone, not on the order of the list.
    path = voc / "ImageSets/Main/trainval.txt"
    path.write_text("\n".join(reversed(path.read_text().split())))
    assert labels(voc, val_share=0.25, seed=3) == found


def test_lists_may_begin_with_a_byte_order_mark(voc: Path) -> None:
    before = labels(voc)
    path = voc / "ImageSets/Main/train.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert labels(voc) == before


def test_val_share_needs_trainval_only(voc: Path) -> None:
    for name in ("train", "val", "test"):
        (voc / f"ImageSets/Main/{name}.txt").unlink()
    assert len(voc_rows(voc, ("train", "val"), val_share=0.5)) == 4


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 0.99, float("nan")])
def test_a_share_that_leaves_a_split_empty_is_refused(voc: Path, share: float) -> None:
    with pytest.raises(ValueError, match="val_share"):
        voc_rows(voc, val_share=share)


def test_one_split_needs_the_others_neither_read_nor_there(voc: Path) -> None:
    (voc / "ImageSets/Main/test.txt").unlink()
    (voc / "Annotations/000001.xml").unlink()
    assert {row.split for row in voc_rows(voc, ("train", "val"))} == {"train", "val"}
    with pytest.raises(ManifestError, match=r"test.txt: does not exist: unpack VOCtest_06-Nov-2007.tar"):
        voc_rows(voc)


def test_rows_go_through_a_manifest(voc: Path, tmp_path: Path) -> None:
    write_manifest(voc_rows(voc), tmp_path / "m.csv")
    data = load_manifest(tmp_path / "m.csv", CLASSES, "test", verify=True)
    direct = load_voc(voc, CLASSES, "test", verify=True)
    assert [p.name for p in data.pictures] == [p.name for p in direct.pictures]
    assert (data.targets == direct.targets).all()
    assert data.targets.sum() == 5
    assert direct.targets[:, CLASSES.index("person")].tolist() == [0, 0, 1]


def test_load_follows_the_job_s_order_and_refuses_other_classes(voc: Path) -> None:
    backwards = CLASSES[::-1]
    assert (load_voc(voc, backwards, "val").targets[:, ::-1] == load_voc(voc, CLASSES, "val").targets).all()
    with pytest.raises(ValueError, match="differ in 'zebra'"):
        load_voc(voc, (*CLASSES, "zebra"), "val")


def test_an_undecodable_picture_is_named_when_verified(voc: Path) -> None:
    (voc / "JPEGImages/000002.jpg").write_bytes(b"no picture")
    assert len(load_voc(voc, CLASSES, "test")) == 3
    with pytest.raises(ManifestError, match=r"VOC2007 test 000002: picture '.*000002.jpg' is not a picture"):
        load_voc(voc, CLASSES, "test", verify=True)


def write(base: Path, name: str, text: str | bytes | None) -> None:
    path = base / name
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


ENTITY = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bb">]><annotation><filename>000005.jpg</filename></annotation>'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("JPEGImages/000012.jpg", None, r"VOC2007 train 000012: picture '.*000012.jpg' does not exist"),
        ("Annotations/000012.xml", None, "Annotations/000012.xml: does not exist"),
        ("Annotations/000005.xml", annotation(5, [("zebra", 0)]), "000005.xml: object 'zebra' is not one of VOC2007's"),
        ("Annotations/000005.xml", annotation(5, [("cat", 2)]), "000005.xml: difficult='2'"),
        ("Annotations/000005.xml", annotation(7, [("cat", 0)]), "000005.xml: describes '000007.jpg'"),
        ("Annotations/000005.xml", "<annotation>", "000005.xml: cannot be read"),
        ("Annotations/000005.xml", b"\xff\xfe<", "000005.xml: cannot be read"),
        ("Annotations/000005.xml", "<a/>", "000005.xml: starts with <a>"),
        ("Annotations/000005.xml", ENTITY, "000005.xml: cannot be read .a document type or entity"),
        ("Annotations/000005.xml", ENTITY.encode("utf-16"), "000005.xml: cannot be read"),
        ("Annotations/000005.xml", b" " * (1 << 20) + b"<a/>", "000005.xml: cannot be read .more than"),
        ("ImageSets/Main/train.txt", "", "train.txt: is empty"),
        ("ImageSets/Main/train.txt", "000005\n000005\n", "train.txt: lists an id more than once"),
        ("ImageSets/Main/train.txt", "2008_000008\n", "train.txt: id '2008_000008' is not one of VOC2007"),
        ("ImageSets/Main/train.txt", "../secret\n", "train.txt: id '../secret' is not one of VOC2007"),
        ("ImageSets/Main/train.txt", "000005 -1\n000012 1\n", "train.txt: id '-1' is not one of VOC2007"),
        ("ImageSets/Main/train.txt", "000005\n000007\n000012\n", "train.txt: shares id 000007 with val.txt"),
        ("ImageSets/Main/test.txt", "000005\n", "train.txt: shares id 000005 with test.txt"),
        ("ImageSets/Main/train.txt", "000005\n", "trainval.txt: does not hold exactly the ids"),
        ("ImageSets/Main/val.txt", None, "val.txt: does not exist: unpack VOCtrainval_06-Nov-2007.tar"),
    ],
)
def test_defects_are_named(voc: Path, name: str, text: str | bytes | None, message: str) -> None:
    write(voc, name, text)
    with pytest.raises(ManifestError, match=message):
        voc_rows(voc)


def test_all_defects_are_found_at_once(voc: Path) -> None:
    for number in (1, 2, 3):
        write(voc, f"JPEGImages/{number:06d}.jpg", None)
    write(voc, "Annotations/000005.xml", annotation(5, [("zebra", 0), ("lion", 0)]))
    with pytest.raises(ManifestError) as error:
        voc_rows(voc)
    assert error.value.problems.count == 5


def test_missing_pictures_can_be_left_out(voc: Path) -> None:
    write(voc, "JPEGImages/000012.jpg", None)
    left_out: list[str] = []
    assert len(voc_rows(voc, left_out=left_out)) == 6
    assert left_out == ["VOC2007 train 000012"]


def test_a_wrong_folder_is_refused(tmp_path: Path, voc: Path) -> None:
    with pytest.raises(ManifestError, match="is not a VOC2007 folder: give VOCdevkit"):
        voc_rows(voc / "JPEGImages")
    (voc / "Annotations").rename(tmp_path / "elsewhere")
    with pytest.raises(ManifestError, match="lacks the folder Annotations"):
        voc_rows(voc)
