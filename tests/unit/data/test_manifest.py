"""A manifest is read as it is meant or refused, every problem named with its line in one pass."""

import codecs
import os
import pickle
import stat
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedmpt_core.data.manifest_rows import SPLITS, ManifestError, ManifestRow, Problems, write_manifest
from tests.records import load_manifest, read_rows

CLASSES = ("cat", "dog", "dining table")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures a.png to f.png, the last two of them in the folder `deep`."""
    (tmp_path / "deep").mkdir()
    for i, name in enumerate(("a", "b", "c", "d", "deep/e", "deep/f")):
        Image.new("RGB", (8, 6), (40 * i, 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


def csv(folder: Path, *lines: str, header: str = "path,labels,split", end: str = "\n") -> Path:
    path = folder / "manifest.csv"
    path.write_bytes(end.join([header, *lines, ""]).encode())
    return path


def refusal(path: Path) -> Problems:
    """What is wrong with a manifest whose `train` pictures are decoded."""
    try:
        load_manifest(path, CLASSES, "train", verify=True)
    except ManifestError as error:
        return error.problems
    return Problems("nothing")


def found(path: Path) -> list[str]:
    return [str(p) for p in refusal(path).listed]


def test_labels_splits_and_order_are_kept(folder: Path) -> None:
    path = csv(folder, "a.png,cat|dining table,train", "b.png,dog,val", "deep/e.png,,train", "c.png,dog;cat,train")
    train = load_manifest(path, CLASSES, "train")
    assert [Path(p.name).name for p in train.pictures] == ["a.png", "e.png", "c.png"]
    assert train.targets.tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 0]]
    assert train.groups is None
    assert train.skipped == 0
    assert train.classes == CLASSES
    assert load_manifest(path, CLASSES, "val").targets.tolist() == [[0, 1, 0]]
    assert train.pictures[1].load().size == (8, 6)


def test_columns_follow_the_order_of_the_job_s_classes(folder: Path) -> None:
    path = csv(folder, "a.png,cat,train")
    assert load_manifest(path, ("dog", "cat"), "train").targets.tolist() == [[0, 1]]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
def test_byte_order_mark_and_line_ends_do_not_matter(folder: Path, end: str, bom: bytes) -> None:
    path = csv(folder, "a.png,cat,train", "nowhere.png,cat,train", end=end)
    path.write_bytes(bom + path.read_bytes())
    assert found(path) == [f"manifest.csv line 3: picture 'nowhere.png' does not exist in {str(folder)!r}"]


def test_blanks_blank_lines_quotes_and_repeated_labels_do_not_matter(folder: Path) -> None:
    (folder / "x, y.png").write_bytes((folder / "a.png").read_bytes())
    path = csv(
        folder,
        "",
        " a.png , cat | dog ,train ",
        ",,",
        '"x, y.png", "dining table|dining table",train',
        header=" path, labels ,split",
    )
    assert load_manifest(path, CLASSES, "train").targets.tolist() == [[1, 1, 0], [0, 0, 1]]


def test_groups_are_kept_with_their_records(folder: Path) -> None:
    path = csv(folder, "a.png,cat,val,p1", "b.png,cat,train,p2", "c.png,,train,p2", header="path,labels,split,group")
    assert load_manifest(path, CLASSES, "train").groups == ("p2", "p2")


def test_an_empty_group_column_is_no_group(folder: Path) -> None:
    assert (
        load_manifest(csv(folder, "a.png,cat,train,", header="path,labels,split,group"), CLASSES, "train").groups
        is None
    )


def test_an_explicit_root_moves_relative_paths(folder: Path, tmp_path: Path) -> None:
    path = csv(folder, "e.png,cat,train")
    assert len(load_manifest(path, CLASSES, "train", folder / "deep")) == 1
    with pytest.raises(ManifestError, match=r"root='.*nowhere' is not a folder"):
        load_manifest(path, CLASSES, "train", tmp_path / "nowhere")


def test_every_problem_is_found_in_one_pass_with_its_line(folder: Path) -> None:
    (folder / "broken.png").write_text("no picture")
    os.mkfifo(folder / "pipe")
    path = csv(
        folder,
        "a.png,cat,train",  # 2
        "./a.png,dog,val",
        "nowhere.png,cat,train",
        "b.png,Cta,train",
        "c.png,cat,Train",
        "broken.png,cat,train",  # 7
        "deep,cat,train",
        "pipe,cat,train",
        "d.png,cat||dog,train",
        ",cat,train",
        "d.png,cat,train,more",  # 12
        "deep/e.png,cat",
        "deep/f.png,Cta,test",
        "deep\\f.png,cat,test",
    )
    assert found(path) == [
        "manifest.csv line 12: has 4 cells, the header has 3: put a cell with a comma in quotes",
        "manifest.csv line 13: has 2 cells, the header has 3: put a cell with a comma in quotes",
        "manifest.csv line 3: picture './a.png' is already listed in manifest.csv line 2",
        f"manifest.csv line 4: picture 'nowhere.png' does not exist in {str(folder)!r}",
        "manifest.csv line 6: split 'Train' is not known: did you mean 'train'?",
        "manifest.csv line 8: picture 'deep' is not a regular file",
        "manifest.csv line 9: picture 'pipe' is not a regular file",
        "manifest.csv line 10: has an empty label: remove the separator that is too many",
        "manifest.csv line 11: path '' is empty or holds a control character",
        f"manifest.csv line 15: picture 'deep\\\\f.png' does not exist in {str(folder)!r}: use '/' between folders",
        "manifest.csv line 5: label 'Cta' (and in 1 more rows) is not one of the job's classes: did you mean 'cat'?",
        f"manifest.csv line 7: picture '{folder}/broken.png' is not a picture in one of the formats "
        "JPEG, PNG, WEBP, TIFF, BMP, GIF, PPM, JPEG2000",
    ]


@pytest.mark.parametrize(
    ("label", "hint"),
    [
        ("Dog", "did you mean 'dog'?"),
        ("diningtable", "did you mean 'dining table'?"),
        ("zebra", "correct it, or add it to the job"),
        ('"cat,dog,cat,dog,cat"', "separate labels by '|' or ';'"),
    ],
)
def test_an_unknown_label_gets_a_suggestion(folder: Path, label: str, hint: str) -> None:
    (problem,) = found(csv(folder, f"a.png,{label},train"))
    assert problem.startswith(f"manifest.csv line 2: label '{label.strip(chr(34))}' is not one of")
    assert problem.endswith(hint)


def test_many_problems_are_counted_and_the_first_are_listed(folder: Path) -> None:
    path = csv(folder, *(f"nowhere{i}.png,cat,{10**i}" for i in range(25)), *(f"n{i}.png,cat,train" for i in range(25)))
    problems = refusal(path)
    assert problems.count == 75  # each split is another mistake, the missing pictures are one
    assert [p.where for p in problems.listed] == [f"manifest.csv line {i}" for i in (2, 2, *range(3, 21))]
    with pytest.raises(ManifestError) as error:
        load_manifest(path, CLASSES, "train")
    lines = str(error.value).splitlines()
    assert lines[0] == "manifest.csv cannot be used, 75 problems:"
    assert len(lines) == 22
    assert lines[-1] == "  and 6 more"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["a.png,cat,trian"] * 3, None),
        (["a.png,cat,trian"] * 140, "(and 139 more, such as line 3 and line 4): split 'trian' is not known: did you"),
        (
            ["nowhere.png,cat,train"] * 9,
            "(and 8 more, such as line 3 and line 4): picture 'nowhere0.png' does",
        ),
        (
            ["../../nowhere.png,cat,train"] * 9,
            "(and 8 more, such as line 3 and line 4): picture '../../nowhere0.png'",
        ),
        (["a.png,cat|,train"] * 5, "(and 4 more, such as line 3 and line 4): has an empty label"),
    ],
)
def test_one_mistake_in_many_rows_is_one_line(folder: Path, rows: list[str], says: str | None) -> None:
    for i in range(len(rows)):
        (folder / f"a{i}.png").write_bytes((folder / "a.png").read_bytes())
    lines = (row.replace(".png", f"{i}.png") for i, row in enumerate(rows))
    problems = refusal(csv(folder, *lines, "a.png,cat,train"))
    assert problems.count == len(rows)
    if says is None:
        assert [str(p) for p in problems.listed] == [
            f"manifest.csv line {i}: split 'trian' is not known: did you mean 'train'?" for i in (2, 3, 4)
        ]
    else:
        (line,) = map(str, problems.listed)
        assert line.startswith(f"manifest.csv line 2 {says}")


def test_paths_may_lead_from_the_manifest_into_the_root_and_no_further(folder: Path) -> None:
    """As a lab keeps them: a table for each hospital beside one folder of pictures."""
    (folder / "hospital").mkdir()
    path = csv(folder / "hospital", "../a.png,cat,train", "../deep/f.png,cat,train")
    assert all("leads out of" in p for p in found(path))
    assert len(load_manifest(path, CLASSES, "train", root=folder, start=path.parent)) == 2
    path = csv(folder / "hospital", "../../a.png,cat,train")
    with pytest.raises(ManifestError, match=r"leads out of .* set root to a folder that holds it"):
        load_manifest(path, CLASSES, "train", root=folder, start=path.parent)


def test_many_unknown_labels_cost_no_suggestion_each(folder: Path) -> None:
    class Counted(tuple[str, ...]):
        read = 0

        def __iter__(self) -> Iterator[str]:
            Counted.read += 1
            return super().__iter__()

    path = csv(folder, "a.png," + "|".join(f"unknown {i}" for i in range(400)) + ",train")
    with pytest.raises(ManifestError) as error:
        load_manifest(path, Counted(CLASSES), "train")
    assert error.value.problems.count == 400
    assert 20 <= Counted.read < 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: it needs a header with the columns path, labels, split"),
        (b" \r\n\n", "is empty"),
        (b"path,labels,split\n", "lists no picture"),
        (b"path,labels,split\n\n,,\n", "lists no picture"),
        (b"path,label,split\na.png,cat,train\n", "line 1: column 'labels' is missing"),
        (b"path,label,split\na.png,cat,train\n", "line 1: column 'label' is not known: did you mean 'labels'?"),
        (
            b"path,labels,split,groups\na.png,cat,train,p\n",
            "line 1: column 'groups' is not known: did you mean 'group'?",
        ),
        (b"path,labels,split,zzz\na.png,cat,train,p\n", "line 1: column 'zzz' is not known: remove it"),
        (b"path,labels,split,path\na.png,cat,train,p\n", "line 1: column 'path' is there more than once"),
        (b"a.png,cat,train\n", "line 1: column 'path' is missing"),
        (b"path;labels;split\na.png;cat;train\n", "line 1: does not separate columns by commas"),
        (b"path\tlabels\tsplit\na.png\tcat\ttrain\n", "line 1: does not separate columns by commas"),
        ("path,labels,split\na.png,cat,train\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (b"path,labels,split\na.png,cat,train\nb\xe9.png,cat,train\n", "line 3: is not UTF-8"),
        (b"pa\xffth,labels,split\na.png,cat,train\n", "line 1: is not UTF-8"),
        (b'path,labels,split\na.png,cat,train\n"b.png,cat,train\nc.png,cat,train\n', "line 3: is not valid CSV"),
        (b'path,labels,split\n"b"x.png,cat,train\n', "line 2: is not valid CSV"),
        (b'path,labels,split\na.png,"cat\n",train\nb.png,"cat\n|dog",train\n', "line 4: has a cell of several lines"),
        (b"path,labels,split\na\x00.png,cat,train\n", r"line 2: path 'a\x00.png' is empty or holds a control"),
        (b"path,labels,split\n" + b"a" * 5000 + b".png,cat,train\n", "line 2: picture"),
        (b'path,labels,split\n"' + b"a\n" * 100_000 + b'",cat,train\n', "line 2: is not valid CSV"),
    ],
)
def test_defects_of_the_table_are_named(folder: Path, content: bytes, message: str) -> None:
    path = folder / "manifest.csv"
    path.write_bytes(content)
    assert any(f"manifest.csv {message}" in p or f"manifest.csv: {message}" in p for p in found(path)), found(path)
    with pytest.raises(ManifestError):
        load_manifest(path, CLASSES, "train")


def test_rows_after_a_bad_line_are_still_checked(folder: Path) -> None:
    path = csv(folder, '"a"x.png,cat,train', "nowhere.png,cat,train")
    assert [p.split(":")[0] for p in found(path)] == ["manifest.csv line 2", "manifest.csv line 3"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.csv", "does not exist"),
        ("deep", "is not a regular file"),
        ("a.png", "a manifest is a .csv or a .parquet"),
    ],
)
def test_what_is_no_manifest_file_is_refused(folder: Path, name: str, message: str) -> None:
    (problem,) = found(folder / name)
    assert message in problem


def test_a_group_must_be_given_for_all_or_for_none(folder: Path) -> None:
    path = csv(folder, "a.png,cat,train,p1", "b.png,cat,train,", header="path,labels,split,group")
    (problem,) = found(path)
    assert problem.startswith("manifest.csv line 3: has no group while others have one")


@pytest.mark.parametrize("split", SPLITS)
def test_an_empty_split_is_refused_unless_allowed(folder: Path, split: str) -> None:
    other = {"train": "val", "val": "test", "test": "train"}[split]
    path = csv(folder, f"a.png,cat,{other}")
    with pytest.raises(ManifestError, match=f"manifest.csv: no picture is in split '{split}'"):
        load_manifest(path, CLASSES, split)
    assert len(load_manifest(path, CLASSES, split, allow_empty=True)) == 0


def test_a_relative_path_may_not_leave_the_root(folder: Path) -> None:
    inside = folder / "inside"
    inside.mkdir()
    (inside / "link.png").symlink_to(folder / "a.png")
    (inside / "linked").symlink_to(folder / "deep")
    (inside / "fine.png").write_bytes((folder / "b.png").read_bytes())
    (inside / "loop.png").symlink_to(inside / "loop.png")
    path = csv(
        inside, "../a.png,cat,train", "link.png,cat,train", "linked/e.png,cat,train", "loop.png,cat,train",
        "x/../fine.png,cat,train", f"{folder / 'c.png'},cat,train",
    )  # fmt: skip
    problems = found(path)
    assert [p.split(":")[0] for p in problems] == [f"manifest.csv line {i}" for i in (2, 3, 4, 5)]
    assert all("leads out of" in p and "set root to a folder that holds it" in p for p in problems[:3])
    assert "cannot be read" in problems[3]


def test_two_names_of_one_file_are_one_picture(folder: Path) -> None:
    (folder / "again.png").symlink_to(folder / "a.png")
    (problem,) = found(csv(folder, "a.png,cat,train", "b.png,cat,train", "again.png,cat,train"))
    assert problem == "manifest.csv line 4: picture 'again.png' is already listed in manifest.csv line 2"


def damaged(folder: Path) -> Path:
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:30])
    (folder / "c.png").write_text("no picture")
    return csv(folder, "a.png,cat,train", "b.png,cat,train", "c.png,dog,train", "d.png,dog,train", "deep/e.png,,val")


def test_unreadable_pictures_are_refused_all_at_once(folder: Path) -> None:
    with pytest.raises(ManifestError) as error:
        load_manifest(damaged(folder), CLASSES, "train", verify=True)
    assert error.value.problems.count == 2
    assert [p.where for p in error.value.problems.listed] == ["manifest.csv line 3", "manifest.csv line 4"]
    assert pickle.loads(pickle.dumps(error.value)).args == error.value.args


def test_unreadable_pictures_are_left_for_later_unless_asked_for(folder: Path) -> None:
    assert len(load_manifest(damaged(folder), CLASSES, "train")) == 4
    assert len(load_manifest(damaged(folder), CLASSES, "val", verify=True)) == 1


def test_skipping_drops_unreadable_pictures_and_says_how_many(folder: Path) -> None:
    train = load_manifest(damaged(folder), CLASSES, "train", on_bad_image="skip")
    assert [Path(p.name).name for p in train.pictures] == ["a.png", "d.png"]
    assert train.targets.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert train.skipped == 2


def test_skipping_hides_nothing_else(folder: Path) -> None:
    path = csv(folder, "a.png,cat,train", "nowhere.png,cat,train")
    with pytest.raises(ManifestError, match=r"line 3: picture 'nowhere\.png' does not exist"):
        load_manifest(path, CLASSES, "train", on_bad_image="skip")


def test_skipping_every_picture_is_refused(folder: Path) -> None:
    (folder / "a.png").write_text("no picture")
    with pytest.raises(ManifestError, match="none of the 1 pictures in split 'train' can be decoded"):
        load_manifest(csv(folder, "a.png,cat,train"), CLASSES, "train", on_bad_image="skip")


def test_decoding_keeps_no_picture(folder: Path) -> None:
    lines = []
    for i in range(30):
        Image.new("RGB", (600, 600)).save(folder / f"big{i}.png")
        lines.append(f"big{i}.png,cat,train")
    tracemalloc.start()
    load_manifest(csv(folder, *lines), CLASSES, "train", verify=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 600 * 600 * 3


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)
LABEL = TEXT.filter(lambda t: "|" not in t and ";" not in t and t == t.strip())


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@settings(max_examples=40, deadline=None)
@given(
    entries=st.dictionaries(
        TEXT, st.tuples(st.lists(LABEL, max_size=3), st.sampled_from(SPLITS)), min_size=1, max_size=5
    ),
    group=st.one_of(st.just(""), LABEL),
)
def test_rows_survive_writing_and_reading(tmp_path_factory, suffix: str, entries: dict, group: str) -> None:
    rows = [ManifestRow(path, tuple(labels), split, group) for path, (labels, split) in entries.items()]
    path = tmp_path_factory.mktemp("m") / f"m{suffix}"
    write_manifest(rows, path)
    again = read_rows(path)
    assert [ManifestRow(r.path, r.labels, r.split, r.group) for r in again] == rows
    assert again[-1].origin.endswith(str(len(rows) + (suffix == ".csv")))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_written_manifest_is_private_and_loads(folder: Path, suffix: str) -> None:
    path = folder / f"new{suffix}"
    write_manifest([ManifestRow("a.png", ("cat", "dog"), "train", "p"), ManifestRow("b.png", (), "train", "q")], path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    train = load_manifest(path, CLASSES, "train", verify=True)
    assert train.targets.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert train.groups == ("p", "q")
    assert not list(folder.glob(".new*"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ManifestRow("", (), "train"), "a cell is empty"),
        (ManifestRow(" b.png", (), "train"), "starts or ends blank"),
        (ManifestRow("b\n.png", (), "train"), "control character"),
        (ManifestRow("b.png", ("a|b",), "train"), "'|' or ';'"),
        (ManifestRow("b.png", ("a;b",), "train"), "'|' or ';'"),
        (ManifestRow("b.png", ("",), "train"), "empty label"),
        (ManifestRow("b.png", (), "dev"), "split='dev'"),
        (ManifestRow("a.png", (), "val"), "given twice"),
        (ManifestRow("b.png", (), "train", "p"), "group is given for some rows only"),
    ],
)
def test_rows_that_could_not_be_read_back_are_not_written(tmp_path: Path, row: ManifestRow, message: str) -> None:
    path = tmp_path / "m.csv"
    with pytest.raises(ValueError) as error:
        write_manifest([ManifestRow("a.png", (), "train"), row], path)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_writing_needs_rows_and_a_known_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows is empty"):
        write_manifest([], tmp_path / "m.csv")
    with pytest.raises(ValueError, match=r"ends in '\.xlsx'"):
        write_manifest([ManifestRow("a.png", (), "train")], tmp_path / "m.xlsx")


def parquet(folder: Path, **columns: object) -> Path:
    whole = {"path": ["a.png", "b.png"], "labels": [["cat"], []], "split": ["train", "train"]} | columns
    path = folder / "manifest.parquet"
    pq.write_table(pa.table({k: v for k, v in whole.items() if v is not None}), path)
    return path


def test_parquet_lists_are_labels(folder: Path) -> None:
    kinds = pa.DictionaryArray.from_arrays(pa.array([0, 0]), pa.array(["train"]))
    for columns in (
        {},
        {"path": pa.array(["a.png", "b.png"], pa.large_string()), "split": kinds},
        {"labels": pa.array([["cat"], []], pa.large_list(pa.large_string()))},
        {"group": pa.nulls(2)},
    ):
        train = load_manifest(parquet(folder, **columns), CLASSES, "train")
        assert np.array_equal(train.targets, [[1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"labels": ["cat", ""]}, "column 'labels' has type string: store a list of strings"),
        ({"labels": [[1], []]}, "store a list of strings"),
        ({"path": [1, 2]}, "column 'path' has type int64: store a string"),
        ({"group": [1, 2]}, "column 'group' has type int64: store a string"),
        ({"split": None}, "column 'split' is missing"),
        ({"groups": ["p", "q"]}, "column 'groups' is not known"),
        ({"labels": [None, ["cat"]]}, "row 1: has a null in labels"),
        ({"labels": [["cat"], ["cat", None]]}, "row 2: has a null in labels"),
        ({"path": ["a.png", None]}, "row 2: path '' is empty"),
        ({"split": ["train", None]}, "row 2: split '' is not known: use train, val, test"),
        ({"path": ["a.png", "nowhere.png"]}, "row 2: picture 'nowhere.png' does not exist"),
        ({"group": ["p", None]}, "row 2: has no group while others have one"),
    ],
)
def test_defects_of_a_parquet_manifest_are_named(folder: Path, columns: dict[str, object], message: str) -> None:
    problems = found(parquet(folder, **columns))
    assert len(problems) == 1
    assert message in problems[0]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"path,labels,split\na.png,cat,train\n"])
def test_what_is_no_parquet_is_refused(folder: Path, content: bytes) -> None:
    path = folder / "manifest.parquet"
    path.write_bytes(content)
    (problem,) = found(path)
    assert "cannot be read" in problem
