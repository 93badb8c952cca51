"""The manifest: a table of pictures and labels, the one way in for a site's own data.

| column | content |
|---|---|
| `path` | picture file; relative paths start at the manifest's folder, or at an explicit root |
| `labels` | CSV: separated by `|` or `;`, blank for a picture without labels; Parquet: a list of strings |
| `split` | `train`, `val` or `test` |
| `group` | optional: what records belong together, say a patient; given for all records or for none |
| `unknown` | optional, as `labels`: labels of which nobody says whether the picture shows them; `train` only |

Everything is checked before anything is used, and every problem is found in one pass and named with its
line. Must never guess: an unknown label or split is refused, and no relative path leads out of its root, by
`..` or by a link. Messages name paths and labels, so they are for the site's own eyes.
"""

import os
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from fedmpt_core.common.text import likeness
from fedmpt_core.data.manifest_rows import CONTROL, SPLITS, ManifestRow, Problems, nearest
from fedmpt_core.data.pictures import UNKNOWN, BadPicture, Dataset, FilePicture, Picture

_CHUNK, _THREADS = 512, 4  # pictures and threads that decode (chosen)


def load_rows(
    rows: Iterable[ManifestRow],
    classes: Sequence[str],
    split: str,
    *,
    root: str | Path,
    start: str | Path = "",
    problems: Problems,
    on_bad_image: Literal["refuse", "skip"] = "refuse",
    verify: bool = False,
    allow_empty: bool = False,
) -> Dataset:
    """The records of one split; the lines of the other splits are checked, their pictures are not decoded.

    Args:
        rows: the lines of a manifest, or of a public data set, their `origin` set.
        classes: the job's C labels.
        split: `train`, `val` or `test`.
        root: folder that relative paths start from, and that none leads out of.
        start: the manifest's folder, from which a path may start that leads out of `root` otherwise.
        problems: what is already known to be wrong; grows.
        on_bad_image: `refuse`, or `skip` pictures that cannot be decoded (every other problem is still
            refused).
        verify: decode every picture of the split now; always done for `skip`. Otherwise a damaged picture is
            refused when it is first loaded.
        allow_empty: whether the split may hold no picture.

    Returns:
        The records in the order of the rows; `skipped` says how many pictures were left out.

    Raises:
        ManifestError: the rows cannot be used; names every problem.
    """
    rows = list(rows)
    mine = [entry for entry in _check_rows(rows, classes, root, str(start), problems) if entry[0].split == split]
    # Where no row could be read at all, that has been named already.
    if not allow_empty and not any(row.split == split for row in rows) and (rows or not problems.count):
        problems.add(problems.source, f"no picture is in split '{split}'")
    skipped = 0
    if verify or on_bad_image == "skip":
        unreadable = _unreadable([picture for _, picture in mine])
        if on_bad_image == "skip":
            skipped = len(unreadable)
            mine = [entry for i, entry in enumerate(mine) if i not in unreadable]
            if skipped and not mine:
                problems.add(problems.source, f"none of the {skipped} pictures in split '{split}' can be decoded")
        else:
            _add_unreadable(unreadable, problems)
    problems.refuse_any()
    column = {label: c for c, label in enumerate(classes)}
    targets = np.zeros((len(mine), len(column)), np.uint8)
    for r, (row, _) in enumerate(mine):
        targets[r, [column[label] for label in row.unknown]] = UNKNOWN
        targets[r, [column[label] for label in row.labels]] = 1
    grouped = any(row.group for row, _ in mine)
    return Dataset(
        tuple(classes),
        tuple(picture for _, picture in mine),
        targets,
        tuple(row.group for row, _ in mine) if grouped else None,
        skipped,
    )


def verified(
    dataset: Dataset,
    source: str,
    *,
    on_bad_image: Literal["refuse", "skip"] = "refuse",
) -> Dataset:
    """Decode every picture of records that are already loaded.

    Args:
        dataset: the records.
        source: where they come from, for messages.
        on_bad_image: as in `load_rows`.

    Returns:
        The records, without those that cannot be decoded where `on_bad_image` is `skip`.

    Raises:
        ManifestError: pictures cannot be decoded; names them.
    """
    unreadable = _unreadable(dataset.pictures)
    if on_bad_image == "skip":
        kept = [i for i in range(len(dataset)) if i not in unreadable]
        return replace(dataset.take(kept), skipped=dataset.skipped + len(unreadable))
    problems = Problems(source)
    _add_unreadable(unreadable, problems)
    problems.refuse_any()
    return dataset


def _check_rows(
    rows: Iterable[ManifestRow], classes: Sequence[str], root: str | Path, start: str, problems: Problems
) -> list[tuple[ManifestRow, FilePicture]]:
    """Every row that names a picture of its own, with that picture; all problems are added."""
    base = os.path.realpath(root)
    if not Path(base).is_dir():
        problems.add(problems.source, f"root={str(root)!r} is not a folder")
        return []
    rows, known = list(rows), set(classes)
    grouped = any(row.group for row in rows)
    first: dict[str, str] = {}
    unknown: dict[str, list[str]] = {}
    checked = []
    for row in rows:
        _check_row(row, problems, grouped=grouped)
        for label in sorted({label for label in (*row.labels, *row.unknown) if label and label not in known}):
            unknown.setdefault(label, []).append(row.origin)
        path = _resolve(row, base, start or base, problems)
        if path is None:
            continue
        if path in first:
            problems.add(row.origin, f"picture {row.path!r} is already listed in {first[path]}", "listed already")
        else:
            first[path] = row.origin
            checked.append((row, FilePicture(path, row.origin)))
    for label, origins in unknown.items():
        problems.add(origins[0], partial(_unknown_label, label, len(origins), classes))
    return checked


def _check_row(row: ManifestRow, problems: Problems, *, grouped: bool) -> None:
    """What one row alone says."""
    if row.split not in SPLITS:
        hint = nearest(row.split, SPLITS) or f": use {', '.join(SPLITS)}"
        problems.add(row.origin, f"split {row.split!r} is not known{hint}", f"split {row.split}")
    if grouped and not likeness(row.group):
        problems.add(
            row.origin, "has no group while others have one: give every record one, or remove the column", "group"
        )
    if "" in (*row.labels, *row.unknown):
        problems.add(row.origin, "has an empty label: remove the separator that is too many", "empty label")
    if row.unknown and row.split != "train":
        problems.add(row.origin, "has unknown labels, which figures need to know: move it to train", "unknown")
    if twice := set(row.labels) & set(row.unknown):
        problems.add(row.origin, f"has {min(twice)!r} both in labels and in unknown: take it out of one")


def _unknown_label(label: str, times: int, classes: Sequence[str]) -> str:
    hint = nearest(label, classes)
    if not hint and "," in label:
        hint = ": separate labels by '|' or ';'"
    more = f" (and in {times - 1} more rows)" if times > 1 else ""
    return f"label {label!r}{more} is not one of the job's classes{hint or ': correct it, or add it to the job'}"


def _resolve(row: ManifestRow, base: str, start: str, problems: Problems) -> str | None:
    """The picture's real path, or None once its problem has been added.

    A relative path starts at `base`; one that leads out of it may start at the manifest's folder, and lead back in.
    """
    if not row.path or CONTROL.search(row.path):
        problems.add(row.origin, f"path {row.path!r} is empty or holds a control character")
        return None
    path = os.path.realpath(Path(base, row.path))
    if not Path(row.path).is_absolute() and not Path(path).is_relative_to(base):
        path = os.path.realpath(Path(start, row.path))
        if not Path(path).is_relative_to(base):
            problems.add(
                row.origin,
                f"picture {row.path!r} leads out of {base!r}: set root to a folder that holds it, in [data] of the "
                "site's file, or give its full path",
                "leads out",
            )
            return None
    try:
        status = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        inside = "" if Path(row.path).is_absolute() else f" in {base!r}"
        hint = ": use '/' between folders" if "\\" in row.path else ""
        problems.add(row.origin, f"picture {row.path!r} does not exist{inside}{hint}", f"missing{hint}")
    except OSError as error:
        problems.add(row.origin, f"picture {row.path!r} cannot be read ({error.strerror})")
    else:
        if stat.S_ISREG(status.st_mode):
            return path
        problems.add(row.origin, f"picture {row.path!r} is not a regular file")
    return None


def _unreadable(pictures: Sequence[Picture]) -> dict[int, BadPicture]:
    """Decodes every picture; what is wrong with those that cannot be, by position."""

    def error(picture: Picture) -> BadPicture | None:
        try:
            picture.load()
        except BadPicture as bad:
            return bad
        return None

    unreadable: dict[int, BadPicture] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        # In pieces: an interrupt must not wait for the whole set.
        for start in range(0, len(pictures), _CHUNK):
            piece = pictures[start : start + _CHUNK]
            unreadable |= {start + i: bad for i, bad in enumerate(pool.map(error, piece)) if bad}
    return unreadable


def _add_unreadable(unreadable: dict[int, BadPicture], problems: Problems) -> None:
    for bad in unreadable.values():
        problems.add(bad.origin, f"picture {bad.name!r} {bad.reason}")
