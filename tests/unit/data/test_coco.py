"""COCO 2014: official classes and lists, every picture kept, damaged files named, in a memory that does not grow."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmpt_core.data.manifest_rows import ManifestError, Problems
from fedmpt_core.data.public.coco import CLASSES
from fedmpt_core.data.public.folder import FolderOptions
from fedmpt_core.data.public.instances import DEEPEST, read_instances
from fedmpt_core.data.public.registry import folder_rows
from tests.miniature import COCO_LABELS, COCO_TRAIN, COCO_VAL, coco_folder, edit_json, instances, write_json
from tests.records import load_folder

TRAIN = "annotations/instances_train2014.json"
VAL = "annotations/instances_val2014.json"


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return coco_folder(tmp_path / "coco")


def found(folder: Path, *splits: str, **options: Any) -> dict[str, dict[int, tuple[str, ...]]]:
    shown: dict[str, dict[int, tuple[str, ...]]] = {}
    left_out = options.pop("left_out", None)
    asked = splits or ("train", "val", "test")
    for row in folder_rows("coco2014", folder, asked, FolderOptions(**options), left_out=left_out):
        assert Path(row.path).is_file()
        shown.setdefault(row.split, {})[int(Path(row.path).stem[-12:])] = row.labels
    return shown


def words(number: int) -> tuple[str, ...]:
    return tuple(c for c in CLASSES if c in COCO_LABELS.get(number, ()))


def test_the_official_lists_with_a_drawn_val_and_every_picture(coco: Path) -> None:
    shown = found(coco)
    assert shown["test"] == {n: words(n) for n in COCO_VAL}
    assert shown["train"] | shown["val"] == {n: words(n) for n in COCO_TRAIN}
    assert len(shown["val"]) == 1
    assert (shown["train"] | shown["val"])[78] == ()
    assert shown["test"][74] == ()


def test_the_80_classes_stand_in_the_official_order() -> None:
    assert len(set(CLASSES)) == 80
    assert [CLASSES.index(c) for c in ("person", "stop sign", "zebra", "kite", "couch", "toothbrush")] == [
        0,
        11,
        22,
        33,
        57,
        79,
    ]


def test_val_is_drawn_from_train_by_seed_and_never_from_test(coco: Path) -> None:
    one = found(coco, val_share=0.25, seed=1)
    assert found(coco, val_share=0.25, seed=1) == one
    assert len(one["val"]) == 3
    assert set(one["test"]) == set(COCO_VAL)
    assert {frozenset(found(coco, "val", val_share=0.25, seed=s)["val"]) for s in range(8)} != {frozenset(one["val"])}
    assert found(coco, "val", val_share=0.25, seed=1) == {"val": one["val"]}


def test_a_list_that_nobody_asks_for_may_be_missing(coco: Path) -> None:
    (coco / VAL).unlink()
    assert set(found(coco, "train", "val")) == {"train", "val"}
    with pytest.raises(ManifestError, match=r"instances_val2014.json: does not exist: unpack annotations_trainval2014"):
        found(coco)


@pytest.mark.parametrize("last", ["categories", "images", "annotations"])
def test_the_order_of_the_lists_does_not_matter(coco: Path, last: str) -> None:
    before = found(coco, "test")
    write_json(coco / VAL, instances(CLASSES, COCO_VAL, {n: COCO_LABELS[n] for n in (42, 73)}, last=last))
    assert found(coco, "test") == before


def test_a_crowd_shows_its_class(coco: Path) -> None:
    def crowd(values: dict[str, Any]) -> None:
        values["annotations"][0] |= {"iscrowd": 1, "segmentation": {"counts": [3, 4], "size": [6, 8]}}

    before = found(coco, "test")
    edit_json(coco / VAL, crowd)
    assert found(coco, "test") == before


def test_pictures_may_lie_below_images(coco: Path) -> None:
    (coco / "images").mkdir()
    (coco / "val2014").rename(coco / "images/val2014")
    assert len(found(coco, "test")["test"]) == 3


def test_missing_pictures_are_named_or_left_out_and_counted(coco: Path) -> None:
    (coco / "train2014" / COCO_TRAIN[25]).unlink()
    with pytest.raises(ManifestError, match=r"instances_train2014\.json image 25: picture .* does not exist"):
        found(coco)
    left_out: list[str] = []
    shown = found(coco, left_out=left_out)
    assert left_out == ["instances_train2014.json image 25"]
    assert 25 not in shown["train"] | shown["val"]
    for path in (coco / "val2014").iterdir():
        path.unlink()
    with pytest.raises(ManifestError, match="split 'test': all of its 3 pictures are missing"):
        found(coco, left_out=[])


def set_image(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["images"][0].update(changes)


def set_annotation(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["annotations"][0].update(changes)


DEFECTS: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (set_image(id=30), "image 30: has an id that is no number, or given twice"),
    (set_image(id="9"), "image '9': has an id"),
    (set_image(file_name=COCO_TRAIN[30]), f"picture '{COCO_TRAIN[30]}' is listed more than once"),
    (set_image(file_name="../../secret.jpg"), "leads out of the data set's folder"),
    (set_image(file_name="/etc/passwd"), "leads out of the data set's folder"),
    (set_image(file_name="..\\secret.jpg"), "leads out of the data set's folder"),
    (set_image(file_name="C:\\secret.jpg"), "leads out of the data set's folder"),
    (set_image(file_name=None), "picture None is no file name"),
    (set_annotation(image_id=10), "annotation 100: is of image 10, which is not in the file"),
    (set_annotation(category_id=2), "annotation 100: is of category 2, which is not in the file"),
    (set_annotation(category_id="1"), "annotation 100: is of category '1', which is not in the file"),
    (lambda v: v["categories"][0].update(name="lion"), "'lion' is not one of the data set's classes"),
    (lambda v: v["categories"][0].update(name="bicycle"), "'bicycle' is listed more than once"),
    (lambda v: v["categories"][0].update(id=4), "category 4: has an id that is no number, or given twice"),
    (lambda v: v["categories"].pop(2), "lacks the categories 'car'"),
    (lambda v: v["images"].append(7), "images: entry 13 is no object"),
    (lambda v: v.update(images=[]), 'has no "images"'),
    (lambda v: v.update(annotations=[]), 'has no "annotations"'),
]


@pytest.mark.parametrize(("change", "message"), DEFECTS, ids=[m for _, m in DEFECTS])
def test_defects_are_named(coco: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit_json(coco / TRAIN, change)
    with pytest.raises(ManifestError) as error:
        found(coco)
    assert message in str(error.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named_with_the_place(coco: Path, share: float) -> None:
    text = (coco / TRAIN).read_text()
    (coco / TRAIN).write_text(text[: int(share * len(text))])
    with pytest.raises(ManifestError, match=r"instances_train2014.json, \w+: is not whole JSON after entry \d+"):
        found(coco)


@pytest.mark.parametrize("content", [b"", b"no json", b"[]", b'{"images": [{"id": "\xff"}]}'])
def test_what_is_no_annotation_file_is_refused(coco: Path, content: bytes) -> None:
    (coco / TRAIN).write_bytes(content)
    with pytest.raises(ManifestError, match=r"instances_train2014.json"):
        found(coco)


def test_a_picture_in_both_lists_is_refused(coco: Path) -> None:
    edit_json(coco / VAL, lambda v: v["images"][2].update(id=9))
    with pytest.raises(ManifestError, match=r"shares image 9 with instances_val2014\.json"):
        found(coco)


def test_a_record_of_the_data_set_has_the_job_s_columns(coco: Path) -> None:
    backwards = CLASSES[::-1]
    data = load_folder("coco2014", coco, backwards, "test", verify=True)
    assert data.targets.sum(1).tolist() == [2, 1, 0]
    assert [backwards[c] for c in data.targets[0].nonzero()[0]] == ["dog", "person"]
    with pytest.raises(ValueError, match="classes and coco2014 differ in 'lion'"):
        load_folder("coco2014", coco, (*CLASSES, "lion"), "test")


@pytest.mark.parametrize("where", ["images", "annotations", "categories"])
def test_nesting_whose_square_is_the_memory_is_refused(coco: Path, where: str) -> None:
    """20 times as deep as this, ijson's ways to all levels took all memory."""
    values = json.loads((coco / TRAIN).read_text())
    values[where][-1]["extra"] = "here"
    (coco / TRAIN).write_text(json.dumps(values).replace('"here"', '{"a": ' * 5_000 + "1" + "}" * 5_000))
    with pytest.raises(ManifestError, match=r"instances_train2014\.json, categories: nests .* more than 64 deep"):
        found(coco)


def levels(text: str) -> int:
    """The slow twin: depth of nesting, character by character."""
    depth = most = at = 0
    string = False
    while at < len(text):
        letter = text[at]
        if string:
            at += letter == "\\"
            string = letter != '"'
        elif letter == '"':
            string = True
        else:
            depth += (letter in "[{") - (letter in "]}")
        most, at = max(most, depth), at + 1
    return most


def test_brackets_in_strings_and_torn_escapes_are_no_depth(tmp_path: Path) -> None:
    rng = random.Random(0)

    def value(left: int) -> Any:
        kind = rng.random()
        if not left or kind < 0.3:
            return "".join(rng.choice('[]{}"\\ax') for _ in range(rng.randrange(9)))
        if kind < 0.6:
            return [value(left - 1) for _ in range(rng.randrange(4))]
        return {str(value(0)): value(left - 1) for _ in range(rng.randrange(4))}

    for _ in range(150):
        text = json.dumps([value(8)])
        for deepest in (DEEPEST, DEEPEST + 1):
            around = deepest - 1 - levels(text)
            torn = rng.randrange(len(text))  # where a piece of 64 KiB ends that is read at once
            blank = " " * (65536 - len('{"x":') - around - torn)
            (tmp_path / "x.json").write_text(f'{{"x":{blank}{"[" * around}{text}{"]" * around}}}')
            problems = Problems("the file")
            read_instances(tmp_path / "x.json", {}, "", problems)
            assert any("64 deep" in problem.message for problem in problems.listed) == (deepest > DEEPEST)


def test_reading_holds_no_polygon(tmp_path: Path) -> None:
    """A file of 3 MB (13 MB as Python values), most of it polygons, is read in a memory that is a fraction of it."""
    files = {n: f"{n}.jpg" for n in range(1, 51)}
    values = instances(CLASSES, files, dict.fromkeys(files, ("person", "car")))
    polygon = [[round(0.37 * i, 2) for i in range(8_000)]]
    path = tmp_path / "big.json"
    with path.open("w") as file:
        file.write('{"categories": ' + json.dumps(values["categories"]) + ', "images": ' + json.dumps(values["images"]))
        file.write(', "annotations": [')
        text = json.dumps(polygon)
        for i, entry in enumerate(values["annotations"][:50]):
            entry.pop("segmentation")
            file.write((", " if i else "") + json.dumps(entry)[:-1] + f', "segmentation": {text}}}')
        file.write("]}")
    assert path.stat().st_size > 2.5e6
    code = f"""
import tracemalloc
from pathlib import Path
from fedmpt_core.data.public.coco import CLASSES
from fedmpt_core.data.public.instances import read_instances
from fedmpt_core.data.manifest_rows import Problems
import ijson
tracemalloc.start()
found = read_instances(Path({str(path)!r}), {{c: i for i, c in enumerate(CLASSES)}}, "", Problems("x"))
print(len(found.ids), sum(map(bool, found.labels)), tracemalloc.get_traced_memory()[1])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pictures, labelled, peak = map(int, run.stdout.split())
    assert (pictures, labelled) == (50, 25)
    assert peak < 2e6
