"""Pictures as labs keep them -> manifest rows: a folder per class, YOLO's text files, tables of any columns.

- `folders`: `CAT/x.jpg`, or `train/CAT/x.jpg`: the folder that holds a picture is its only label.
- `yolo`: `images/train/x.jpg` with `labels/train/x.txt`, a line per box that begins with the class's number; names from
  `data.yaml`, `classes.txt` or `obj.names`. A picture without a text file has no label.
- `table`: a CSV with a column of pictures and one of labels, or a column per label: 1 yes, 0 or blank no, -1 unknown.

A folder or cell called train, val (valid, validation) or test says the split. Where there is no test, val becomes it;
what is missing then is drawn from train, whole groups at a time, by SHA-256 of seed and name (`public.splits`).
"""

import csv
import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmpt_core.config.datasets import LayoutName
from fedmpt_core.data.manifest_rows import (
    LABEL_COLUMNS,
    PICTURE_COLUMNS,
    SPLITS,
    ManifestError,
    ManifestRow,
    Problems,
    guessed,
)
from fedmpt_core.data.public.splits import VAL_SHARE, drawn

TEST_SHARE = 0.2
"""Share of the pictures that becomes `test` where nothing says which do (chosen)."""

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".jp2"}
_SPLIT_OF = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
_SPLIT_OF |= {"test": "test", "testing": "test"}
_BESIDE = (".", "..", "pictures", "images", "imgs", "photos", "../pictures", "../images")
_MARKS = {"": 0, "0": 0, "0.0": 0, "false": 0, "no": 0, "1": 1, "1.0": 1, "true": 1, "yes": 1, "-1": -1, "-1.0": -1}
_GROUPS = ("group", "patient", "patientid", "subject", "subjectid")


@dataclass(frozen=True)
class TableOptions:
    """How a table is read; what is empty is guessed from the columns' names.

    Attributes:
        path_column: of pictures.
        labels_column: of labels, several in a cell; where there is none, every column of marks is a label.
        separator: between labels in a cell; empty takes `|` or `;`, or a comma where there is neither.
        split_column: of train, val, test; where there is none, they are drawn.
        group_column: of what belongs together, such as a patient.
        pictures: folder that relative paths start from; empty looks in the table's folder and around it.
    """

    path_column: str = ""
    labels_column: str = ""
    separator: str = ""
    split_column: str = ""
    group_column: str = ""
    pictures: str = ""


@dataclass(frozen=True)
class Layout:
    """What was read: rows with absolute paths, their splits complete; all labels, sorted or in the order of a list."""

    rows: tuple[ManifestRow, ...]
    classes: tuple[str, ...]

    @property
    def has_unknown(self) -> bool:
        """Whether some label of some picture is unknown."""
        return any(row.unknown for row in self.rows)


def read_layout(
    kind: LayoutName,
    place: Path,
    table: TableOptions | None = None,
    *,
    val_share: float | None = None,
    test_share: float | None = None,
    seed: int = 0,
) -> Layout:
    """The pictures of a folder or table.

    Args:
        kind: how they are kept.
        place: the folder; of a table, the file.
        table: how a table is read.
        val_share: share of the training pictures that becomes `val` where there is none, (0, 1); None is a tenth.
        test_share: share of all that becomes `test` where there is neither, (0, 1); None is a fifth.
        seed: of these draws.

    Raises:
        ManifestError: the place cannot be used; names every problem.
        ValueError: a share is out of range, or there are too few pictures to draw from.
    """
    problems = Problems(str(place))
    try:
        match kind:
            case "folders":
                rows, classes = list(_folders(place, problems)), None
            case "yolo":
                rows, classes = _yolo(place, problems)
            case "table":
                rows, classes = _table(place, table or TableOptions(), problems)
    except FileNotFoundError:
        problems.add(str(place), "does not exist")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.add(str(place), f"cannot be read ({error})")
    problems.refuse_any()
    if not rows:
        problems.add(str(place), "holds no picture that this layout finds: see `fedmpt prepare --help`")
        raise ManifestError(problems)
    labels = classes or tuple(sorted({label for row in rows for label in (*row.labels, *row.unknown)}))
    return Layout(tuple(_shared_out(rows, val_share or VAL_SHARE, test_share or TEST_SHARE, seed)), labels)


def _shared_out(rows: Sequence[ManifestRow], val: float, test: float, seed: int) -> Iterator[ManifestRow]:
    there = {row.split for row in rows if row.split}
    moved = {"val": "test"} if "test" not in there else {}
    rows = [dataclasses.replace(row, split=moved.get(row.split, row.split) or "train") for row in rows]
    rows = rows if "test" in {row.split for row in rows} else _drawn_from_train(rows, "test", test, seed)
    rows = rows if "val" in {row.split for row in rows} else _drawn_from_train(rows, "val", val, seed)
    yield from rows


def _drawn_from_train(rows: Sequence[ManifestRow], split: str, share: float, seed: int) -> list[ManifestRow]:
    """A part of the training pictures, whole groups, becomes another split; none with an unknown label does."""
    units: dict[str, bool] = defaultdict(lambda: True)
    for row in rows:
        if row.split == "train":
            units[row.group or row.path] &= not row.unknown
    known = [unit for unit, fits in units.items() if fits]
    if len(known) < 2:
        raise ValueError(
            f"{len(known)} pictures (or groups) of which every label is known are too few to draw '{split}' from: "
            "say the splits in folders or a column"
        )
    chosen = drawn(known, share, seed)
    taken = {row.path for row in rows if row.split == "train" and (row.group or row.path) in chosen}
    return [dataclasses.replace(row, split=split) if row.path in taken else row for row in rows]


def _pictures(place: Path) -> Iterator[Path]:
    return (p for p in sorted(place.rglob("*")) if p.suffix.lower() in _SUFFIXES and p.is_file())


def _split_in(parts: Iterable[str]) -> str:
    return next((_SPLIT_OF[part.casefold()] for part in parts if part.casefold() in _SPLIT_OF), "")


def _folders(place: Path, problems: Problems) -> Iterator[ManifestRow]:
    base = place.absolute()
    if not base.is_dir():
        problems.add(str(place), "is not a folder")
        return
    for path in _pictures(base):
        *outer, label = path.relative_to(base).parts[:-1] or ("",)
        if not label or label.casefold() in _SPLIT_OF:
            problems.add(str(path), "lies in no class's folder: move it into one", "no class")
            continue
        yield ManifestRow(str(path), (_words(label),), _split_in(outer), origin=str(path))


def _words(name: str) -> str:
    return " ".join(re.sub(r"[_|;]+", " ", name).split())


def _yolo(place: Path, problems: Problems) -> tuple[list[ManifestRow], tuple[str, ...]]:
    base = place.absolute()
    names = _yolo_names(base)
    if not names:
        problems.add(str(place), "has no class names: put a data.yaml with `names`, or a classes.txt, into the folder")
        return [], ()
    rows = []
    for path in _pictures(base):
        inner = path.relative_to(base)
        parts = ["labels" if part == "images" else part for part in inner.parts]
        text = base.joinpath(*parts).with_suffix(".txt")
        text = text if text.exists() else path.with_suffix(".txt")
        numbers = dict.fromkeys(_yolo_numbers(text, len(names), problems)) if text.exists() else {}
        labels = tuple(names[n] for n in numbers)
        rows.append(ManifestRow(str(path), labels, _split_in(inner.parts[:-1]), origin=str(inner)))
    return rows, tuple(names)


def _yolo_numbers(path: Path, classes: int, problems: Problems) -> Iterator[int]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        first = line.split()[0]
        if first.isdecimal() and int(first) < classes:
            yield int(first)
        else:
            problems.add(
                f"{path.name} line {number}",
                f"begins with {first!r}, which is no number of one of the {classes} classes",
                "yolo number",
            )


def _yolo_names(base: Path) -> list[str]:
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (base / name).is_file():
            return _yaml_names((base / name).read_text(encoding="utf-8-sig"))
    for name in ("classes.txt", "obj.names", "labels/classes.txt"):
        if (base / name).is_file():
            return [line.strip() for line in (base / name).read_text("utf-8-sig").splitlines() if line.strip()]
    return []


def _yaml_names(text: str) -> list[str]:
    """`names` of a YOLO data.yaml: `[a, b]`, a list of `- a`, or `0: a`."""
    match = re.search(r"(?m)^names:[ \t]*(.*)((?:\n(?:[ \t]+|- ).*)*)", text)
    if not match:
        return []
    inline, block = match.group(1).partition("#")[0].strip(), match.group(2)
    entries = inline.strip("[]{}").split(",") if inline else block.splitlines()
    return [word for entry in entries if (word := re.sub(r"^\s*(-|\d+:)\s*", "", entry).strip(" \t'\""))]


def _table(place: Path, options: TableOptions, problems: Problems) -> tuple[list[ManifestRow], tuple[str, ...] | None]:
    text = place.read_text(encoding="utf-8-sig")
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    lines = list(csv.DictReader(text.splitlines(), delimiter=delimiter, restkey="", restval=""))
    header = [name.strip() for name in next(csv.reader([head], delimiter=delimiter), [])]
    lines = [{(k or "").strip(): str(v or "").strip() for k, v in line.items()} for line in lines]
    asked = {name: value for name, value in dataclasses.asdict(options).items() if name.endswith("column") and value}
    for name, value in asked.items():
        if value not in header:
            option = f"--{name.replace('_', '-')}"
            problems.add(place.name, f"has no column {value!r} ({option}): its columns are {', '.join(header)}")
    picture = options.path_column or guessed(header, PICTURE_COLUMNS)
    if not picture:
        problems.add(place.name, f"name the column of pictures with --path-column: {', '.join(header)}")
    problems.refuse_any()
    labels = options.labels_column or guessed(header, LABEL_COLUMNS)
    split = options.split_column or guessed(header, ("split", "subset", "fold", "partition"))
    group = options.group_column or guessed(header, _GROUPS)
    marks = [] if labels else _label_columns(lines, [c for c in header if c not in (picture, split, group)])
    if not labels and not marks:
        problems.add(
            place.name,
            "has no column of labels, nor columns of 0, 1 and -1: name one with --labels-column: " + ", ".join(header),
        )
        problems.refuse_any()
    base = _picture_folder(place, options.pictures, [line[picture] for line in lines], problems)
    rows = []
    for number, line in enumerate(lines, start=2):
        where = f"{place.name} line {number}"
        shown, unknown = _labels(line, labels, marks, options.separator)
        named = line.get(split, "") if split else ""
        if named and named.casefold() not in _SPLIT_OF:
            problems.add(where, f"split {named!r} is not one of {', '.join(SPLITS)}", f"split {named}")
        kept = _SPLIT_OF.get(named.casefold(), "")
        rows.append(ManifestRow(str(base / line[picture]), shown, kept, line.get(group, ""), where, unknown))
    return rows, tuple(marks) or None


def _labels(
    line: dict[str, str], labels: str, marks: Sequence[str], separator: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels of a line, and those that nobody knows."""
    if labels:
        cell = line[labels]
        parts = cell.split(separator) if separator else re.split(r"[|;]" if re.search(r"[|;]", cell) else ",", cell)
        return tuple(dict.fromkeys(part.strip() for part in parts if part.strip())), ()
    value = {column: _MARKS[line[column].casefold()] for column in marks}
    return tuple(c for c in marks if value[c] == 1), tuple(c for c in marks if value[c] < 0)


def _label_columns(lines: Sequence[dict[str, str]], columns: Sequence[str]) -> list[str]:
    """Columns that hold nothing but marks, and 1 at least once."""
    kept = []
    for column in columns:
        cells = {line.get(column, "").casefold() for line in lines}
        if cells <= set(_MARKS) and any(_MARKS[cell] == 1 for cell in cells):
            kept.append(column)
    return kept


def _picture_folder(place: Path, named: str, paths: Sequence[str], problems: Problems) -> Path:
    """The folder that the first picture lies in, with its path; the table's own where none does."""
    table = place.absolute().parent
    candidates = [Path(named).absolute()] if named else [(table / beside).resolve() for beside in _BESIDE]
    first = next((path for path in paths if path), "")
    there = next((base for base in candidates if (base / first).is_file()), None)
    if there is None and first:
        looked = ", ".join(map(repr, map(str, dict.fromkeys(candidates))))
        problems.add(
            place.name, f"picture {first!r} is in none of {looked}: name the folder that it starts from with --pictures"
        )
        problems.refuse_any()
    return there or table
