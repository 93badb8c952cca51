"""NUS-WIDE, Objects365, MultiScene and MLRSNet: every listed picture with its own labels, or a sentence."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest

from fedmpt_core.config.datasets import PublicName
from fedmpt_core.config.toml import load_job, load_sites
from fedmpt_core.data.manifest_rows import ManifestError, ManifestRow
from fedmpt_core.data.partition import sites_for
from fedmpt_core.data.public import mlrsnet, multiscene, nuswide, objects365, voc
from fedmpt_core.data.public.folder import FolderOptions
from fedmpt_core.data.public.registry import DATASETS, folder_rows
from tests.miniature import (
    NUS_LABELS,
    NUS_TEST,
    NUS_TRAIN,
    O365_TRAIN,
    O365_VAL,
    edit_json,
    mlrsnet_folder,
    multiscene_folder,
    nuswide_folder,
    objects365_folder,
    picture,
)
from tests.records import load_folder

BUILT = {
    "nuswide": nuswide_folder,
    "objects365": objects365_folder,
    "multiscene": multiscene_folder,
    "mlrsnet": mlrsnet_folder,
}


@pytest.fixture
def nus(tmp_path: Path) -> Path:
    return nuswide_folder(tmp_path / "nus")


@pytest.fixture
def o365(tmp_path: Path) -> Path:
    return objects365_folder(tmp_path / "o365")


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return multiscene_folder(tmp_path / "multiscene")


@pytest.fixture
def mlrs(tmp_path: Path) -> Path:
    return mlrsnet_folder(tmp_path / "mlrs")


def rows(kind: Any, folder: Path, *splits: str, left_out: list[str] | None = None, **options: Any) -> list[ManifestRow]:
    found = folder_rows(
        kind, str(folder), splits or ("train", "val", "test"), FolderOptions(**options), left_out=left_out
    )
    return list(found)


def by_split(found: list[ManifestRow]) -> dict[str, set[str]]:
    return {split: {row.path for row in found if row.split == split} for split in ("train", "val", "test")}


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("kind", sorted(BUILT))
def test_splits_are_apart_repeat_and_lose_nothing(kind: Any, tmp_path: Path) -> None:
    folder = BUILT[kind](tmp_path / "data")
    found = rows(kind, folder)
    parts = by_split(found)
    assert all(parts.values())
    assert sum(map(len, parts.values())) == len(found) == len(set().union(*parts.values()))
    assert found == rows(kind, folder)
    assert any(by_split(rows(kind, folder, seed=s))["val"] != parts["val"] for s in range(1, 6))
    for split in parts:
        assert rows(kind, folder, split) == [row for row in found if row.split == split]
    assert {Path(row.path) for row in found} == set(folder.rglob("*.jpg"))
    classes = DATASETS[kind].classes
    assert all(set(row.labels) <= set(classes) for row in found)
    assert load_folder(kind, folder, classes, "train", verify=True).targets.sum() == sum(
        len(row.labels) for row in found if row.split == "train"
    )


@pytest.mark.parametrize("kind", sorted(BUILT))
def test_missing_pictures_are_refused_or_left_out_and_counted(kind: Any, tmp_path: Path) -> None:
    folder = BUILT[kind](tmp_path / "data")
    gone = next(row for row in rows(kind, folder) if row.split == "train")
    Path(gone.path).unlink()
    with pytest.raises(ManifestError) as error:
        rows(kind, folder)
    assert f"{gone.origin}: picture {gone.path!r} does not exist" in str(error.value)
    left_out: list[str] = []
    kept = rows(kind, folder, left_out=left_out)
    assert left_out == [gone.origin]
    assert gone.path not in {row.path for row in kept}


@pytest.mark.parametrize("kind", DATASETS)
def test_a_wrong_folder_or_option_is_a_sentence(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be used, "):
        rows(kind, tmp_path)
    if kind != "mlrsnet":
        with pytest.raises(ValueError, match=f"is for mlrsnet, {kind} has"):
            rows(kind, tmp_path, test_split="scenes")
    if kind != "voc2007":
        with pytest.raises(ValueError, match=f"is for voc2007: {kind} marks no object"):
            rows(kind, tmp_path, include_difficult=True)


@pytest.mark.parametrize("kind", sorted(BUILT))
@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(kind: Any, share: float, tmp_path: Path) -> None:
    folder = BUILT[kind](tmp_path / "data")
    with pytest.raises(ValueError, match="val_share"):
        rows(kind, folder, val_share=share)


def test_class_lists_have_the_right_length_and_distinct_words() -> None:
    assert set(DATASETS) == set(get_args(PublicName))
    sizes = {kind: len(DATASETS[kind].classes) for kind in DATASETS}
    assert sizes == {
        "voc2007": 20,
        "coco2014": 80,
        "coco2017": 80,
        "nuswide": 81,
        "objects365": 365,
        "multiscene": 36,
        "mlrsnet": 60,
    }
    for kind in DATASETS:
        words = DATASETS[kind].classes
        assert len(set(words)) == len(words)
        assert all(w == w.strip().lower() and w.replace(" ", "").isalnum() for w in words)
    assert DATASETS["voc2007"].classes is voc.CLASSES


# NUS-WIDE


def test_nuswide_labels_belong_to_the_line_of_the_list(nus: Path) -> None:
    found = {Path(row.path).relative_to(nus / "Flickr").as_posix(): row for row in rows("nuswide", nus)}
    for i, name in enumerate(NUS_TRAIN):
        expected = tuple(c for c in nuswide.CLASSES if i in NUS_LABELS.get(c, ()))
        assert found[name.replace("\\", "/")].labels == expected
    assert [found[name.replace("\\", "/")].labels for name in NUS_TEST] == [("water",), (), ()]
    assert found[NUS_TEST[0].replace("\\", "/")].split == "test"


def test_nuswide_without_its_optional_files(nus: Path) -> None:
    before = rows("nuswide", nus)
    (nus / "ConceptsList/Concepts81.txt").unlink()
    (nus / "Groundtruth/TrainTestLabels").rename(nus / "TrainTestLabels")
    assert rows("nuswide", nus) == before
    (nus / "ImageList/TrainImagelist.txt").unlink()
    assert len(rows("nuswide", nus, "test")) == 3


def test_nuswide_files_may_begin_with_a_byte_order_mark(nus: Path) -> None:
    before = rows("nuswide", nus)
    files = ("ImageList/TrainImagelist.txt", "ConceptsList/Concepts81.txt")
    for file in (*files, "Groundtruth/TrainTestLabels/Labels_sky_Train.txt"):
        (nus / file).write_bytes(b"\xef\xbb\xbf" + (nus / file).read_bytes())
    assert rows("nuswide", nus) == before


NUS_DEFECTS = [
    ("ImageList/TrainImagelist.txt", "actor\\0001", "actor\\0000_2124494100.jpg\nactor\\0001", "is listed more than"),
    ("ImageList/TrainImagelist.txt", "actor\\0001", "..\\..\\secret", "line 2: picture '..*' leads out of the data"),
    ("ImageList/TrainImagelist.txt", "actor\\0001", "\nactor\\0001", "line 2: picture '' is no file name"),
    (
        "ImageList/TrainImagelist.txt",
        "actor\\0001",
        "water\\0000_4124494100.jpg\nactor\\0001",
        "shares picture 'water/",
    ),
    ("Groundtruth/TrainTestLabels/Labels_sky_Train.txt", "1\n", "2\n", "Labels_sky_Train.txt line 1: is '2', not 0"),
    ("Groundtruth/TrainTestLabels/Labels_sky_Train.txt", "1\n", "", "has 11 labels for the 12 pictures of Train"),
    ("Groundtruth/TrainTestLabels/Labels_sky_Train.txt", "1\n", "1\n1\n", "has 13 labels for the 12 pictures of Train"),
    ("ConceptsList/Concepts81.txt", "airport\n", "airport\nlion\n", "and the 81 concepts differ in 'lion'"),
]


@pytest.mark.parametrize(("file", "old", "new", "message"), NUS_DEFECTS, ids=[m for *_, m in NUS_DEFECTS])
def test_nuswide_defects_are_named(nus: Path, file: str, old: str, new: str, message: str) -> None:
    replace(nus / file, old, new)
    with pytest.raises(ManifestError, match=message):
        rows("nuswide", nus)


def test_nuswide_lacking_or_strange_concepts_are_named(nus: Path) -> None:
    truth = nus / "Groundtruth/TrainTestLabels"
    (truth / "Labels_zebra_Test.txt").rename(truth / "Labels_lion_Test.txt")
    with pytest.raises(ManifestError, match=r"Labels_lion_Test\.txt: 'lion' is not one of the 81 concepts"):
        rows("nuswide", nus)
    (truth / "Labels_lion_Test.txt").unlink()
    with pytest.raises(ManifestError, match=r"Labels_zebra_Test\.txt: does not exist: unpack Groundtruth\.zip"):
        rows("nuswide", nus)
    assert len(rows("nuswide", nus, "train", "val")) == 12


# Objects365


def test_objects365_labels_are_corrected_words(o365: Path) -> None:
    found = {int(Path(row.path).stem[-8:]): row for row in rows("objects365", o365)}
    assert set(found) == {*O365_TRAIN, *O365_VAL}
    assert found[11].labels == ("person", "monitor or tv", "dog")
    assert found[20].labels == ()
    assert found[30].split == found[31].split == "test"


def test_objects365_pictures_may_lie_in_patches(tmp_path: Path, o365: Path) -> None:
    flat = objects365_folder(tmp_path / "flat", as_listed=False)
    assert (flat / "train/patch1").is_dir()
    assert [(r.labels, r.split) for r in rows("objects365", flat)] == [
        (r.labels, r.split) for r in rows("objects365", o365)
    ]


def test_objects365_takes_corrected_names_too_and_refuses_version_1(o365: Path) -> None:
    before = rows("objects365", o365)
    path = o365 / "annotations/zhiyuan_objv2_train.json"

    def corrected(values: dict[str, Any]) -> None:
        for entry, words in zip(values["categories"], objects365.CLASSES, strict=True):
            entry["name"] = words.title()

    edit_json(path, corrected)
    assert rows("objects365", o365) == before
    edit_json(path, lambda v: v["categories"][1].update(name="CD player"))
    with pytest.raises(ManifestError, match="'CD player' is not one of the data set's classes"):
        rows("objects365", o365)


def test_objects365_ids_come_from_the_file(o365: Path) -> None:
    before = rows("objects365", o365)
    path = o365 / "annotations/zhiyuan_objv2_val.json"

    def renumbered(values: dict[str, Any]) -> None:
        for entry in values["categories"]:
            entry["id"] += 5000
        values["categories"].reverse()
        for entry in values["annotations"]:
            entry["category_id"] += 5000

    edit_json(path, renumbered)
    assert rows("objects365", o365) == before


def test_objects365_pictures_in_both_lists_or_without_a_folder_are_refused(o365: Path) -> None:
    edit_json(
        o365 / "annotations/zhiyuan_objv2_val.json",
        lambda v: v["images"][0].update(file_name="images/v2/patch16/objects365_v1_00000011.jpg"),
    )
    picture(o365 / "val/images/v2/patch16/objects365_v1_00000011.jpg", 1)
    with pytest.raises(ManifestError, match="lists a picture that this file or the train file lists too"):
        rows("objects365", o365)
    (o365 / "train").rename(o365 / "elsewhere")
    with pytest.raises(ManifestError, match="train: does not exist: unpack the patches there"):
        rows("objects365", o365)


# MultiScene


def test_multiscene_columns_go_by_their_place_however_they_are_spelt(scene: Path) -> None:
    found = {Path(row.path).stem: row for row in rows("multiscene", scene)}
    assert found["00003"].labels == ("beach", "sea")
    assert found["00000"].labels == ()
    assert found["00101"].labels == ("residential area",)
    before = rows("multiscene", scene)
    text = (scene / "Tra.csv").read_text().split("\n", 1)
    spelt = ",".join(["id", *(w.replace("panel", "farm") for w in multiscene.CLASSES)])
    (scene / "Tra.csv").write_text(f"\ufeff{spelt}\n{text[1]}")
    assert rows("multiscene", scene) == before
    replace(scene / "Test.csv", ",0,", ",0.0,")
    assert rows("multiscene", scene) == before


SCENE_DEFECTS = [
    ("Beach,Bridge", "Bridge,Beach", "Tra.csv header: column 'Bridge' stands where 'Beach' belongs"),
    ("Quarry", "Volcano", "column 'Volcano' stands where 'Quarry' belongs"),
    ("Quarry,", "", "has 35 label columns, MultiScene has 36"),
    ("00003,0,", "00003,2,", "Tra.csv line 5: 'apron' is '2', neither 0 nor 1"),
    ("00003,0,", "00003,,", "Tra.csv line 5: 'apron' is '', neither 0 nor 1"),
    ("00003,0,", "00003,0,0,", "Tra.csv line 5: has 37 labels, the header has 36"),
    ("00003,", "00004,", "Tra.csv line 6: picture '00004' is listed more than once"),
    ("00003,", "../../00003,", "Tra.csv line 5: picture '../../00003' leads out of the data set's folder"),
    ("00003,", '"00003,', "is not valid CSV"),
    ("00003,", "00101,", "shares picture '00101' with Test.csv"),
]


@pytest.mark.parametrize(("old", "new", "message"), SCENE_DEFECTS, ids=[m for *_, m in SCENE_DEFECTS])
def test_multiscene_defects_are_named(scene: Path, old: str, new: str, message: str) -> None:
    replace(scene / "Tra.csv", old, new)
    with pytest.raises(ManifestError) as error:
        rows("multiscene", scene)
    assert message in str(error.value)


def test_multiscene_lists_that_are_missing_or_empty_are_named(scene: Path) -> None:
    header = (scene / "Test.csv").read_text().split("\n")[0]
    (scene / "Test.csv").write_text(header + "\n")
    with pytest.raises(ManifestError, match=r"Test.csv: lists no picture"):
        rows("multiscene", scene)
    (scene / "Test.csv").unlink()
    assert len(rows("multiscene", scene, "train", "val")) == 12
    with pytest.raises(ManifestError, match=r"Test.csv: cannot be read"):
        rows("multiscene", scene)


# MLRSNet


def test_mlrsnet_halves_every_category(mlrs: Path) -> None:
    found = rows("mlrsnet", mlrs)
    tested = Counter(Path(row.path).parent.name for row in found if row.split == "test")
    assert tested == Counter(dict.fromkeys(mlrsnet.CATEGORIES, 2))
    held = Counter(Path(row.path).parent.name for row in found if row.split == "val")
    assert set(held.values()) == {1}
    labels = {Path(row.path).name: row.labels for row in found}
    assert labels["harbor&port_00002.jpg"] == (mlrsnet.NAMES[18], "harbor")
    assert labels["harbor&port_00001.jpg"] == ()


def test_mlrsnet_scenes_test_the_last_23_categories_not_the_trained_ones(mlrs: Path) -> None:
    found = rows("mlrsnet", mlrs, test_split="scenes")
    trained = {Path(row.path).parent.name for row in found if row.split in ("train", "val")}
    tested = {Path(row.path).parent.name for row in found if row.split == "test"}
    assert (trained, tested) == (set(mlrsnet.CATEGORIES[:23]), set(mlrsnet.CATEGORIES[23:]))


def test_mlrsnet_defects_are_named(mlrs: Path) -> None:
    replace(mlrs / "Labels/lake.csv", ",grass,", ",lawn,")
    replace(mlrs / "Labels/river.csv", ",0\n", ",3\n")
    (mlrs / "Labels/volcano.csv").write_text("x")
    (mlrs / "Labels/park.csv").unlink()
    with pytest.raises(ManifestError) as error:
        rows("mlrsnet", mlrs)
    for message in (
        "Labels/lake.csv header: and the 60 labels differ in 'grass', 'lawn'",
        "Labels/river.csv line 2: 'wind turbine' is '3', neither 0 nor 1",
        "Labels/volcano.csv: 'volcano' is not one of the 46 categories",
        "Labels/park.csv: cannot be read",
    ):
        assert message in str(error.value)


def test_json_of_nested_depth_does_not_end_the_program(o365: Path) -> None:
    path = o365 / "annotations/zhiyuan_objv2_val.json"
    text = json.dumps(json.loads(path.read_text()))
    path.write_text(text[:-1] + ', "x": ' + "[" * 63 + "]" * 63 + "}")
    assert len(rows("objects365", o365, "test")) == 2
    path.write_text(text[:-1] + ', "x": ' + "[" * 64 + "]" * 64 + "}")
    with pytest.raises(ManifestError, match=r"zhiyuan_objv2_val\.json, categories: nests .* more than 64 deep"):
        rows("objects365", o365, "test")


@pytest.mark.parametrize("kind", DATASETS)
def test_every_data_set_has_a_preset_with_its_classes_and_shares(kind: Any) -> None:
    folder = Path(__file__).parents[3] / "jobs" / kind
    job, sites = load_job(folder / "job.toml"), load_sites(folder / "site.toml")
    assert job.classes == DATASETS[kind].classes
    if kind != "objects365":  # no heterogeneity is published for it
        assert len(sites) == sites_for(0.1, len(job.classes))
    assert [(s.data.share, s.data.shares) for s in sites.values()] == [(i + 1, len(sites)) for i in range(len(sites))]
    assert [s.data.evaluate for s in sites.values()] == [True] + [False] * (len(sites) - 1)
