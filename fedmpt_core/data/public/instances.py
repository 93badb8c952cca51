"""COCO-style annotation files ("instances"), read in a memory that does not grow with the file.

    {"images": [{"id", "file_name", ..}], "annotations": [{"image_id", "category_id", "iscrowd", ..}],
     "categories": [{"id", "name", ..}]}

The file is gone through once for each of its three lists, so that their order does not matter and no polygon is kept:
COCO's 600,000 annotations take some 20 MiB beside what is returned. A label counts as present when one annotation says
so; crowds (`iscrowd` = 1, a group marked as one region) count too, since the class is there. Pictures without an
annotation are kept: they have no label.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from fedmpt_core.common.progress import Progress
from fedmpt_core.data.manifest_rows import ManifestRow, Problems
from fedmpt_core.data.public.folder import Folder, inside

_REPORT_EVERY = 5000  # entries between two reports of progress (chosen)
_BUFFER = 1 << 16
DEEPEST = 64  # objects and lists in each other; COCO's polygons are at 5 (chosen)
_BRACKETS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # as int8: +1 and -1
_NO_BRACKET = bytes(set(range(256)) - set(b"[{]}"))


@dataclass(frozen=True)
class Instances:
    """I pictures and their labels.

    Attributes:
        source: name of the file.
        ids: I image ids, ascending.
        files: I paths as the file gives them, with `/`.
        labels: I bit sets: bit c is one where class c is present.
    """

    source: str
    ids: list[int]
    files: list[str]
    labels: list[int]

    def rows(
        self, classes: Sequence[str], path_of: Callable[[str], str], folder: Folder, *, test: bool
    ) -> Iterator[ManifestRow]:
        """One row per picture.

        Args:
            classes: words of the classes, in the order of the bits.
            path_of: absolute path of a file's path.
            folder: says what is drawn.
            test: whether all are `test`; else they are `train` with a drawn `val`.
        """
        val = frozenset[str]() if test else folder.held_out([str(number) for number in self.ids])
        for number, name, labels in zip(self.ids, self.files, self.labels, strict=True):
            words = tuple(word for c, word in enumerate(classes) if labels >> c & 1)
            split = "test" if test else "val" if str(number) in val else "train"
            yield ManifestRow(path_of(name), words, split, origin=f"{self.source} image {number}")


def read_instances(
    path: Path, columns: Mapping[str, int], hint: str, problems: Problems, on_progress: Progress | None = None
) -> Instances | None:
    """Read an annotation file.

    Args:
        path: the file.
        columns: place of every class by its name, in lower case; several names may stand for one class.
        hint: what to do when the file is missing.
        problems: what is wrong is added here.
        on_progress: called with (bytes done, bytes in all).

    Returns:
        The pictures, or None when the file cannot be used at all.
    """
    before = problems.count
    reader = _Reader(path, hint, problems, on_progress)
    column_of = _categories(reader, columns, problems)
    if column_of is None:
        return None
    place, files = _pictures(reader, problems)
    if problems.count > before:
        return None
    labels = [0] * len(files)
    for i, entry in enumerate(reader.entries("annotations", 2)):
        where = f"{path.name} annotation {entry.get('id', f'number {i + 1}')}"
        image, category = entry.get("image_id"), entry.get("category_id")
        if type(image) is not int or image not in place:
            problems.add(where, f"is of image {image!r}, which is not in the file")
        elif type(category) is not int or category not in column_of:
            problems.add(where, f"is of category {category!r}, which is not in the file")
        else:
            labels[place[image]] |= 1 << column_of[category]
    if not any(labels) and problems.count == before:
        problems.add(path.name, 'has no "annotations": take the file with the instances')
    order = sorted(place)
    return Instances(path.name, order, [files[place[n]] for n in order], [labels[place[n]] for n in order])


def _pictures(reader: "_Reader", problems: Problems) -> tuple[dict[int, int], list[str]]:
    """Place of every image id, and the files by place."""
    before = problems.count
    place: dict[int, int] = {}
    files: list[str] = []
    seen: set[str] = set()
    for entry in reader.entries("images", 1):
        number = entry.get("id")
        where = f"{reader.path.name} image {number!r}"
        if type(number) is not int or number in place:
            problems.add(where, "has an id that is no number, or given twice")
            continue
        name = inside(entry.get("file_name"), where, problems)
        if name is None:
            continue
        if name in seen:
            problems.add(where, f"picture {name!r} is listed more than once")
        seen.add(name)
        place[number] = len(files)
        files.append(name)
    if not files and problems.count == before:
        problems.add(reader.path.name, 'has no "images": it is not an annotation file of this data set')
    return place, files


def _categories(reader: "_Reader", columns: Mapping[str, int], problems: Problems) -> dict[int, int] | None:
    """Category id to column; None once a problem was added."""
    before = problems.count
    column_of: dict[int, int] = {}
    for entry in reader.entries("categories", 0):
        number, name = entry.get("id"), entry.get("name")
        column = columns.get(name.strip().casefold()) if isinstance(name, str) else None
        where = f"{reader.path.name} category {number!r}"
        if type(number) is not int or number in column_of:
            problems.add(where, "has an id that is no number, or given twice")
        elif column is None:
            problems.add(where, f"{name!r} is not one of the data set's classes: is this the right file?")
        elif column in column_of.values():
            problems.add(where, f"{name!r} is listed more than once")
        else:
            column_of[number] = column
    missing = sorted(name for name, column in columns.items() if column not in column_of.values())
    if missing and problems.count == before:
        few = ", ".join(map(repr, missing[:5]))
        problems.add(reader.path.name, f"lacks the categories {few}: is this the right file?")
    return column_of if problems.count == before else None


class _Reader:
    """Goes through one list of the file at a time."""

    def __init__(self, path: Path, hint: str, problems: Problems, on_progress: Progress | None) -> None:
        self.path = path
        self._hint, self._problems, self._on_progress = hint, problems, on_progress

    def entries(self, name: str, turn: int) -> Iterator[dict[str, Any]]:
        """The objects of the list `name`; what is wrong ends it and is added."""
        import ijson  # only who reads such a file needs it

        done = 0
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                source = file if turn else _Shallow(file)  # the first turn goes through the whole file
                for entry in ijson.items(source, f"{name}.item", use_float=True, buf_size=_BUFFER):
                    done += 1
                    if self._on_progress and done % _REPORT_EVERY == 0:
                        self._on_progress(turn * size + file.tell(), 3 * size)
                    if isinstance(entry, dict):
                        yield entry
                    else:
                        self._problems.add(f"{self.path.name}, {name}", f"entry {done} is no object")
            if self._on_progress:
                self._on_progress((turn + 1) * size, 3 * size)
        except _TooDeep:
            self._problems.add(
                f"{self.path.name}, {name}",
                f"nests lists and objects more than {DEEPEST} deep: it is not an annotation file of this data set",
            )
        except FileNotFoundError:
            self._problems.add(str(self.path), f"does not exist: {self._hint}")
        except OSError as error:
            self._problems.add(self.path.name, f"cannot be read ({error.strerror})")
        except (ijson.JSONError, UnicodeDecodeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "damaged"
            self._problems.add(
                f"{self.path.name}, {name}",
                f"is not whole JSON after entry {done} ({reason}): fetch the file again",
            )


class _TooDeep(Exception):
    pass


class _Shallow:
    """A file that ends with `_TooDeep` before anything deeper than `DEEPEST` is handed out.

    ijson keeps the way to every level, in a memory that grows with the square of the depth.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._depth = 0
        self._in_string, self._escape = False, b""

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        # A pair of backslashes is none; what is left before a quote makes it part of its string.
        text = (self._escape + data).replace(b"\\\\", b"")
        self._escape = b"\\" if text.endswith(b"\\") else b""
        parts = text.replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        steps = np.frombuffer(outside.translate(_BRACKETS, _NO_BRACKET), np.int8)
        if len(steps):
            depths = self._depth + np.cumsum(steps, dtype=np.int64)
            self._depth = int(depths[-1])
            if depths.max() > DEEPEST:
                raise _TooDeep
        return data
