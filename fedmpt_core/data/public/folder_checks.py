"""What the folders of all data sets have in common: names that stay inside, and pictures that are there or are not.

Annotation files come from others. A name in one must never lead out of the folder, and a picture that is missing is
named or, if that was asked for, counted; it never vanishes.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from fedmpt_core.data.manifest_rows import CONTROL, ManifestError, ManifestRow, Problems

Progress = Callable[[int, int], None]
LeftOut = list[str]
"""Where the pictures were listed that are missing; a list that is handed in asks to go on without them."""


def inside(name: object, where: str, problems: Problems) -> str | None:
    """A path from an annotation file, with `/` between folders; None once its problem was added.

    Backslashes, which NUS-WIDE writes, separate folders as well.
    """
    if not isinstance(name, str) or not name.strip() or CONTROL.search(name):
        problems.add(where, f"picture {name!r} is no file name")
        return None
    path = PurePosixPath(name.strip().replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", str(path)):
        problems.add(where, f"picture {name!r} leads out of the data set's folder: the file is not the original one")
        return None
    return str(path)


def first_folder(base: Path, names: Iterable[str], hint: str, problems: Problems) -> Path:
    """The first of these folders below `base` that is there. Raises ManifestError when none is."""
    names = list(names)
    for name in names:
        if (base / name).is_dir():
            return base / name
    problems.add(str(base), f"has no folder {' or '.join(map(repr, names))}: {hint}")
    raise ManifestError(problems)


def present(rows: Iterable[ManifestRow], problems: Problems, left_out: LeftOut | None) -> Iterator[ManifestRow]:
    """The rows whose picture is there.

    Args:
        rows: rows with absolute paths.
        problems: a missing picture is added when `left_out` is None; so is a split of which every picture is missing.
        left_out: receives the origin of every row that is left out; None refuses them.
    """
    there: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    for row in rows:
        if Path(row.path).is_file():
            there[row.split] += 1
            yield row
            continue
        missing[row.split] += 1
        if left_out is None:
            problems.add(row.origin, f"picture {row.path!r} does not exist: complete the folder, or leave it out")
        else:
            left_out.append(row.origin)
    for split, count in missing.items():
        if left_out is not None and not there[split]:
            problems.add(f"split '{split}'", f"all of its {count} pictures are missing: is this the right folder?")
