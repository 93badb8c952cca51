"""Pictures as people have them: COCO 2017, a folder per class, YOLO's text files, tables of any columns."""

import json
import shlex
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmpt_core.data.manifest_rows import ManifestRow
from fedmpt_core.data.pictures import UNKNOWN
from tests.miniature import coco_folder
from tests.records import load_manifest, read_rows

Fedmpt = Callable[..., subprocess.CompletedProcess[str]]
DATA = Path(__file__).parents[3] / "shared" / "data"


def picture(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), shade % 250, np.uint8)).save(path)
    return path


def prepared(fedmpt: Fedmpt, out: Path, *arguments: object) -> dict[str, ManifestRow]:
    """Rows by the picture's name."""
    run = fedmpt("prepare", *arguments, "--out", out)
    assert run.returncode == 0, run.stderr
    return {Path(row.path).name: row for row in read_rows(out)}


def splits(rows: dict[str, ManifestRow]) -> Counter[str]:
    return Counter(row.split for row in rows.values())


def test_coco_2017_is_read_as_its_archives_leave_it(fedmpt: Fedmpt, tmp_path: Path) -> None:
    """2014's miniature under the names of 2017."""
    folder = coco_folder(tmp_path / "coco")
    for path in sorted(folder.rglob("*2014*"), key=lambda p: -len(p.parts)):
        if path.is_dir() or path.suffix == ".json":
            path.rename(path.with_name(path.name.replace("2014", "2017")))
    rows = prepared(fedmpt, tmp_path / "m.csv", "coco2017", folder)
    assert splits(rows) == {"train": 11, "val": 1, "test": 3}
    run = fedmpt("prepare", "coco2014", folder, "--out", tmp_path / "n.csv")
    assert (run.returncode, "instances_train2014.json" in run.stderr) == (2, True)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real pictures are not here")
def test_a_real_extract_of_coco_2017(fedmpt: Fedmpt, tmp_path: Path) -> None:
    rows = prepared(fedmpt, tmp_path / "m.csv", "coco2017", DATA / "coco2017-extract")
    assert splits(rows) == {"train": 23, "val": 3, "test": 25}
    assert json.loads((tmp_path / "m.csv.json").read_text())["kind"] == "coco2017"


@pytest.mark.skipif(not DATA.is_dir(), reason="the real pictures are not here")
def test_a_real_table_is_read_by_the_command_that_its_refusal_names(fedmpt: Fedmpt, tmp_path: Path) -> None:
    rows = prepared(fedmpt, tmp_path / "m.csv", "table", DATA / "photos" / "labels.csv")
    assert len(rows) == 571
    assert {label for row in rows.values() for label in row.labels} == {"apple", "bicycle", "bird", "boat", "person"}
    assert sum(not row.labels for row in rows.values()) == 3


@pytest.mark.parametrize("stated", [True, False])
def test_a_folder_per_class(fedmpt: Fedmpt, tmp_path: Path, stated: bool) -> None:
    for label in ("cat", "potted_plant"):
        for i in range(20):
            part = ("Train", "valid", "test")[min(i // 8, 2)] if stated else ""
            picture(tmp_path / "data" / part / label / f"{label}{i}.JPG", i)
    rows = prepared(fedmpt, tmp_path / "m.csv", "folders", tmp_path / "data")
    assert splits(rows) == ({"train": 16, "val": 16, "test": 8} if stated else {"train": 29, "val": 3, "test": 8})
    assert {row.labels for row in rows.values()} == {("cat",), ("potted plant",)}


def test_a_picture_beside_the_classes_is_named(fedmpt: Fedmpt, tmp_path: Path) -> None:
    picture(tmp_path / "data" / "cat" / "a.png")
    picture(tmp_path / "data" / "train" / "b.png")
    run = fedmpt("prepare", "folders", tmp_path / "data", "--out", tmp_path / "m.csv")
    assert run.returncode == 2
    assert "train/b.png: lies in no class's folder" in run.stderr
    assert not (tmp_path / "m.csv").exists()


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("data.yaml", "train: images/train\nnc: 3\nnames: ['cat', dog, \"traffic light\"]\n"),
        ("data.yaml", "names:\n  0: cat\n  1: dog\n  2: traffic light\nnc: 3\n"),
        ("data.yaml", "names:\n- cat\n- dog\n- traffic light\n"),
        ("classes.txt", "cat\ndog\ntraffic light\n"),
    ],
)
def test_yolo_text_files(fedmpt: Fedmpt, tmp_path: Path, file: str, names: str) -> None:
    """With train and val alone, as most have it: val is what is tested on, thresholds are chosen on a part of train."""
    base = tmp_path / "yolo"
    for i in range(12):
        part = "val" if i > 8 else "train"
        picture(base / "images" / part / f"{i}.png", i)
        text = base / "labels" / part / f"{i}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        if i:
            text.write_text(f"{i % 3} 0.5 0.5 0.1 0.1\n2 0.1 0.1 0.1 0.1\n2 0.2 0.2 0.1 0.1\n")
    (base / file).write_text(names)
    rows = prepared(fedmpt, tmp_path / "m.parquet", "yolo", base, "--classes", tmp_path / "classes.toml")
    assert splits(rows) == {"train": 8, "val": 1, "test": 3}
    assert rows["0.png"].labels == ()
    assert rows["1.png"].labels == ("dog", "traffic light")
    assert rows["9.png"].split == "test"
    assert '"traffic light"' in (tmp_path / "classes.toml").read_text()
    (base / "labels" / "train" / "3.txt").write_text("7 0.5 0.5 0.1 0.1\n")
    run = fedmpt("prepare", "yolo", base, "--out", tmp_path / "n.csv")
    assert (run.returncode, "3.txt line 1: begins with '7'" in run.stderr) == (2, True)


TABLES = [
    ("file,labels\n{}.png,cat;dog\n", "csv", ()),
    ("Image Index;Finding Labels\n{}.png;cat|dog\n", "csv", ()),
    ("filename\ttags\n{}.png\tcat, dog\n", "tsv", ()),
    ("where,what\n{}.png,cat/dog\n", "csv", ("--path-column", "where", "--labels-column", "what", "--separator", "/")),
    ("image,age,cat,dog,bird\n{}.png,77,1,1.0,0\n", "csv", ()),
]


@pytest.mark.parametrize(("table", "suffix", "options"), TABLES)
def test_tables_of_other_columns(
    fedmpt: Fedmpt, tmp_path: Path, table: str, suffix: str, options: tuple[object, ...]
) -> None:
    head, line = table.splitlines()
    for i in range(20):
        picture(tmp_path / "lab" / "images" / f"{i}.png", i)
    text = "\n".join([head, *(line.format(i) for i in range(20))])
    path = tmp_path / "lab" / f"table.{suffix}"
    path.write_text(text + "\n")
    rows = prepared(fedmpt, tmp_path / "m.csv", "table", path, *options)
    assert splits(rows) == {"train": 14, "val": 2, "test": 4}
    assert {row.labels for row in rows.values()} == {("cat", "dog")}


def test_minus_one_is_unknown_and_patients_stay_together(fedmpt: Fedmpt, tmp_path: Path) -> None:
    """As CheXpert's train.csv: paths that start beside the archive, blank for what is not mentioned."""
    lines = ["Path,Sex,Age,No Finding,Edema,Fracture,Patient"]
    for i in range(30):
        picture(tmp_path / "CheXpert" / "train" / f"{i}.jpg", i)
        edema = ("1.0", "0.0", "-1.0")[i % 3]
        lines.append(f"CheXpert/train/{i}.jpg,Female,{i + 20},{1.0 if i % 2 else ''},{edema},,p{i // 3}")
    (tmp_path / "CheXpert" / "train.csv").write_text("\n".join(lines) + "\n")
    for i in (1, 4, 7):  # patients of whom all is known
        text = (tmp_path / "CheXpert" / "train.csv").read_text().splitlines()
        text = [x.replace("-1.0", "1.0") if x.endswith(f",p{i}") else x for x in text]
        (tmp_path / "CheXpert" / "train.csv").write_text("\n".join(text) + "\n")
    rows = prepared(fedmpt, tmp_path / "m.csv", "table", tmp_path / "CheXpert" / "train.csv")
    by_patient: dict[str, set[str]] = {}
    for row in rows.values():
        by_patient.setdefault(row.group, set()).add(row.split)
        assert row.split == "train" or not row.unknown
    assert all(len(parts) == 1 for parts in by_patient.values())
    assert set(splits(rows)) == {"train", "val", "test"}
    assert rows["2.jpg"].unknown == ("Edema",)
    train = load_manifest(tmp_path / "m.csv", ("No Finding", "Edema"), "train")
    assert (train.targets == UNKNOWN).sum() == 7
    assert not (train.targets[:, 0] == UNKNOWN).any()


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ("file,labels", "column 'file' is not known: that command reads it"),
        ("Image Index,Finding Labels,Age", "column 'Age' is not known: that command leaves it out"),
        ("picture;tags", "does not separate columns by commas"),
    ],
)
def test_a_table_of_other_columns_is_told_the_command_that_works(
    fedmpt: Fedmpt, tmp_path: Path, head: str, says: str
) -> None:
    separator = ";" if ";" in head else ","
    cells = [["cat", "dog"][i % 2] for i in range(20)]
    lines = [separator.join([f"{i}.png", c, "70"][: head.count(separator) + 1]) for i, c in enumerate(cells)]
    for i in range(20):
        picture(tmp_path / f"{i}.png", i)
    table = tmp_path / "my table.csv"
    table.write_text("\n".join([head, *lines]) + "\n")
    run = fedmpt("init", tmp_path / "job", table)
    assert run.returncode == 2
    assert says in run.stderr
    command = shlex.split(run.stderr.split("`")[1])
    assert command[0] == "fedmpt"
    made = fedmpt(*command[1:])
    assert made.returncode == 0, made.stderr
    assert splits({row.path: row for row in read_rows(tmp_path / "manifest.csv")}) == {"train": 14, "val": 2, "test": 4}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--path-column", "nope"), "has no column 'nope' (--path-column): its columns are file, what"),
        ((), "has no column of labels, nor columns of 0, 1 and -1: name one with --labels-column"),
        (("--labels-column", "what", "--pictures", "/nowhere"), "picture '0.png' is in none of '/nowhere'"),
    ],
)
def test_what_cannot_be_guessed_is_asked_for(
    fedmpt: Fedmpt, tmp_path: Path, options: tuple[object, ...], says: str
) -> None:
    picture(tmp_path / "0.png")
    (tmp_path / "t.csv").write_text("file,what\n0.png,cat\n")
    run = fedmpt("prepare", "table", tmp_path / "t.csv", "--out", tmp_path / "m.csv", *options)
    assert run.returncode == 2
    assert says in run.stderr
    assert not (tmp_path / "m.csv").exists()
