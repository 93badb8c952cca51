"""`fedmpt prepare` and `fedmpt partition`: what is written, what is recorded, and that nothing is half-written."""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedmpt_core.data.partition_file import load_partition
from fedmpt_core.data.public.coco import CLASSES
from fedmpt_core.data.public.folder import FolderOptions
from fedmpt_core.data.public.prepare import ClassFile, PrepareOptions, prepare, record_path
from fedmpt_flare.cli.main import app
from tests.miniature import COCO_TRAIN, coco_folder, mlrsnet_folder
from tests.records import load_manifest, read_rows


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return coco_folder(tmp_path / "coco")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_manifest_of_everything_and_a_record_of_it(coco: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"m{suffix}"
    found = prepare("coco2014", coco, out)
    assert (found.pictures, found.unlabelled) == ({"train": 11, "val": 1, "test": 3}, {"train": 1, "val": 0, "test": 1})
    assert found.few_labels == {"train": 0, "val": 0, "test": 0}
    assert len(load_manifest(out, CLASSES, "train", verify=True)) == 11
    record = json.loads(record_path(out).read_text())
    assert record["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert record["kind"] == "coco2014"
    assert record["options"] == {
        "folder": {"val_share": None, "seed": 0, "test_split": "random", "include_difficult": False},
        "missing": "refuse",
        "min_labels": 0,
        "test_share": None,
        "table": None,
    }
    assert tuple(record["classes"]) == CLASSES
    assert {p.name for p in tmp_path.iterdir()} == {"coco", out.name, f"{out.name}.json"}


def test_few_labels_are_left_out_only_when_asked_for_and_counted(coco: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.csv"
    found = prepare("coco2014", coco, out, PrepareOptions(FolderOptions(0.25, 1), min_labels=1))
    rows = read_rows(out)
    assert all(row.labels for row in rows)
    assert found.few_labels["train"] + found.few_labels["val"] == 1
    assert found.few_labels["test"] == 1
    assert sum(found.pictures.values()) == len(rows) == 13
    assert json.loads(record_path(out).read_text())["few_labels"] == found.few_labels
    with pytest.raises(ValueError, match="min_labels=9, missing='refuse': no picture is left in split 'train'"):
        prepare("coco2014", coco, tmp_path / "n.csv", PrepareOptions(min_labels=9))
    with pytest.raises(ValueError, match="min_labels=-1"):
        prepare("coco2014", coco, tmp_path / "n.csv", PrepareOptions(min_labels=-1))
    assert not (tmp_path / "n.csv").exists()


def test_missing_pictures_are_skipped_only_when_asked_for_and_counted(coco: Path, tmp_path: Path) -> None:
    (coco / "train2014" / COCO_TRAIN[49]).unlink()
    with pytest.raises(ValueError, match=r"image 49: picture .* does not exist"):
        prepare("coco2014", coco, tmp_path / "m.csv")
    found = prepare("coco2014", coco, tmp_path / "m.csv", PrepareOptions(missing="skip"))
    assert found.missing == 1
    assert json.loads(record_path(tmp_path / "m.csv").read_text())["missing"] == 1
    assert len(load_manifest(tmp_path / "m.csv", CLASSES, "train")) == found.pictures["train"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_an_interrupted_run_leaves_what_was_there(
    coco: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / f"m{suffix}"
    prepare("coco2014", coco, out)
    before = {p: p.read_bytes() for p in (out, record_path(out))}
    seen: list[str] = []
    is_file = Path.is_file

    def interrupted(path: Path) -> bool:
        seen.append(path.name)
        if len(seen) == 9:  # in the middle of the rows
            raise KeyboardInterrupt
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("coco2014", coco, out, PrepareOptions(min_labels=1))
    monkeypatch.undo()
    assert len(seen) == 9
    assert {p: p.read_bytes() for p in before} == before
    assert {p.name for p in tmp_path.iterdir()} == {"coco", out.name, f"{out.name}.json"}


def test_a_folder_with_problems_writes_nothing(coco: Path, tmp_path: Path) -> None:
    path = coco / "annotations/instances_val2014.json"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match="is not whole JSON"):
        prepare("coco2014", coco, tmp_path / "m.csv")
    with pytest.raises(ValueError, match=r"a manifest is a .csv or a .parquet file"):
        prepare("coco2014", coco, tmp_path / "m.txt")
    with pytest.raises(ValueError, match="cannot be written"):
        prepare("coco2014", coco, tmp_path / "nowhere" / "m.csv")
    assert {p.name for p in tmp_path.iterdir()} == {"coco"}


def test_class_lists_are_lines_of_a_job(tmp_path: Path) -> None:
    lists = ClassFile(tmp_path / "c.toml", ("tv monitor", 'the "x"'), ("dog",))
    lists.write()
    found = tomllib.loads((tmp_path / "c.toml").read_text())
    assert found == {"classes": ["tv monitor", 'the "x"'], "unseen_classes": ["dog"]}
    lists.write()  # the same again is no loss
    with pytest.raises(ValueError, match="exists and holds something else"):
        ClassFile(tmp_path / "c.toml", ("tv monitor", 'the "x"')).write()
    assert tomllib.loads((tmp_path / "c.toml").read_text()) == found


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--classes", "job.toml"), "job.toml' exists and holds something else: name a new file"),
        (("--classes", "dangling.toml"), "dangling.toml' exists and holds something else"),
        (("--classes", "coco"), "coco' exists and holds something else"),
        (("--classes", "m.csv"), "m.csv' is where the manifest or its record goes"),
        (("--classes", "coco/../m.csv"), "m.csv' is where the manifest or its record goes"),
        (("--classes", "m.csv.json"), "m.csv.json' is where the manifest or its record goes"),
        (("--classes", "nowhere/c.toml"), "its folder does not exist"),
        (("--classes", "c.toml", "--unseen-share", 2), "unseen_share=2.0 is out of range"),
        (("--classes", "c.toml", "--unseen-share", 0.99), "leaves 1 classes to train"),
    ],
)
def test_class_lists_replace_nothing_and_are_checked_first(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text("precious")
    (tmp_path / "dangling.toml").symlink_to("not-there")
    with pytest.raises(ValueError, match=says):
        run("prepare", "coco2014", "coco", "--out", "m.csv", *options)
    assert {p.name for p in tmp_path.iterdir()} == {"coco", "job.toml", "dangling.toml"}
    assert (tmp_path / "job.toml").read_text() == "precious"


def test_the_command_says_what_it_kept(coco: Path, tmp_path: Path) -> None:
    (coco / "train2014" / COCO_TRAIN[49]).unlink()
    out, classes = tmp_path / "m.csv", tmp_path / "c.toml"
    said = run(
        *("prepare", "coco2014", coco, "--out", out, "--classes", classes, "--unseen-share", 0.25),
        *("--missing", "skip", "--seed", 2, "--val-share", 0.2),
    )
    assert "9 train, 2 val, 3 test pictures" in said
    assert "without any label, kept as all-negative: 0 train, 1 val, 1 test" in said
    assert "because the file is missing: 1" in said
    assert "60 classes and 20 unseen ones" in said
    lists = tomllib.loads(classes.read_text())
    assert sorted([*lists["classes"], *lists["unseen_classes"]]) == sorted(CLASSES)
    said = run("prepare", "coco2014", coco, "--out", out, "--missing", "skip", "--min-labels", 1)
    assert "left out with fewer than 1 labels: 1 train, 0 val, 1 test" in said
    with pytest.raises(ValueError, match="--unseen-share needs --classes"):
        run("prepare", "coco2014", coco, "--out", out, "--unseen-share", 0.25)


def test_the_command_has_the_data_sets_own_options(tmp_path: Path) -> None:
    folder = mlrsnet_folder(tmp_path / "mlrs", each=2)
    said = run("prepare", "mlrsnet", folder, "--out", tmp_path / "m.parquet", "--split", "scenes")
    assert "23 train, 23 val, 46 test pictures" in said
    record = json.loads((tmp_path / "m.parquet.json").read_text())
    assert record["options"]["folder"]["test_split"] == "scenes"
    result = CliRunner().invoke(app, ["prepare", "imagenet", str(folder)])
    assert result.exit_code == 2
    assert "voc2007" in result.output


SITE = """
[defaults.data]
source = "coco2014"
path = "coco"
{data}
[sites.a]
[sites.b]
[sites.c]
"""


def job_files(folder: Path, data: str = "", **job: Any) -> Path:
    lines = [f"{k} = {json.dumps(v)}" for k, v in {"name": "x", "seed": 4, "classes": list(CLASSES), **job}.items()]
    (folder / "job.toml").write_text("\n".join(lines) + '\n[backbone]\nkind = "embedded"\nimage_size = 96\n')
    (folder / "site.toml").write_text(SITE.format(data=data))
    return folder / "job.toml"


@pytest.mark.parametrize("kind", ["labels", "dirichlet", "uniform"])
def test_a_partition_is_written_once_for_all(coco: Path, tmp_path: Path, kind: str) -> None:
    job, out = job_files(tmp_path), tmp_path / "p.json"
    alpha = ("--alpha", 2) if kind == "dirichlet" else ()
    said = run("partition", job, "--kind", kind, "--out", out, *alpha)
    assert "11 records in 3 parts" in said
    first = out.read_bytes()
    run("partition", job, "--kind", kind, "--out", out, *alpha)
    assert out.read_bytes() == first
    assert json.loads(first)["kind"] == kind
    assert json.loads(first)["alpha"] == (2 if kind == "dirichlet" else None)
    run("partition", job, "--kind", kind, "--out", out, *alpha, "--seed", 5)
    assert json.loads(out.read_bytes())["seed"] == 5
    assert out.read_bytes() != first


def test_alpha_is_refused_where_it_would_do_nothing(coco: Path, tmp_path: Path) -> None:
    job, out = job_files(tmp_path), tmp_path / "p.json"
    with pytest.raises(ValueError, match="--alpha 2: 'uniform' has none: leave it out, or add --kind dirichlet"):
        run("partition", job, "--kind", "uniform", "--out", out, "--alpha", 2)
    with pytest.raises(ValueError, match="--alpha 2: 'labels' has none"):  # what the sites' file says
        run("partition", job, "--out", out, "--alpha", 2)
    assert not out.exists()


def test_as_many_parts_as_asked_for(coco: Path, tmp_path: Path) -> None:
    job, out = job_files(tmp_path), tmp_path / "p.json"
    assert "needs 5" in run("partition", job, "--out", out, "--count", 5)
    assert len(json.loads(out.read_text())["sites"]) == 5
    assert "in 8 parts" in run("partition", job, "--out", out, "--heterogeneity", 0.1)
    with pytest.raises(ValueError, match="give one of them"):
        run("partition", job, "--out", out, "--count", 5, "--heterogeneity", 0.1)
    with pytest.raises(ValueError, match=r"names no data.partition_file"):
        run("partition", job)
    with pytest.raises(ValueError, match="sites=80 is out of range"):
        run("partition", job, "--out", out, "--heterogeneity", 1.0)


def test_features_of_the_frozen_towers_are_clustered(coco: Path, tmp_path: Path) -> None:
    place = json.dumps(str(tmp_path / "p.json"))
    cache = json.dumps(str(tmp_path / "cache"))
    job = job_files(tmp_path, f'partition = "features"\npartition_file = {place}')
    (tmp_path / "site.toml").write_text(f"[defaults]\ncache_dir = {cache}\n" + (tmp_path / "site.toml").read_text())
    run("partition", job)
    values = json.loads((tmp_path / "p.json").read_text())
    assert (values["kind"], len(values["sites"]), len(values["backbone"])) == ("features", 3, 64)
    data = load_manifest_of(coco, tmp_path)
    assert sorted(i for part in load_partition(tmp_path / "p.json", data).parts for i in part) == list(range(11))


def load_manifest_of(coco: Path, tmp_path: Path) -> Any:
    prepare("coco2014", coco, tmp_path / "m.csv")
    return load_manifest(tmp_path / "m.csv", CLASSES, "train")
