"""What the folders of all data sets have in common: how one is split, names that stay inside, pictures that are there.

Annotation files come from others. A name in one must never lead out of the folder, and a picture that is missing is
named or, if that was asked for, counted; it never vanishes.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from fedmpt_core.common.progress import Progress
from fedmpt_core.data.manifest_rows import CONTROL, ManifestError, ManifestRow, Problems
from fedmpt_core.data.public.splits import VAL_SHARE, drawn

LeftOut = list[str]
"""Where the pictures were listed that are missing; a list that is handed in asks to go on without them."""


@dataclass(frozen=True)
class FolderOptions:
    """How a folder is split.

    Attributes:
        val_share: share of the training pictures that becomes `val`, (0, 1); None is the standard: VOC2007's own lists,
            a tenth elsewhere.
        seed: of every draw.
        test_split: MLRSNet only: `random`, or `scenes` for the first and last 23 categories.
        include_difficult: VOC2007 only: a class with difficult objects only counts as present.
    """

    val_share: float | None = None
    seed: int = 0
    test_split: Literal["random", "scenes"] = "random"
    include_difficult: bool = False


@dataclass(frozen=True)
class Folder:
    """A folder that is being read.

    Attributes:
        base: where the data set was unpacked, absolute.
        splits: which of `train`, `val`, `test` are asked for; a file that none of them needs may be missing.
        problems: what is wrong is added here.
        options: how it is split.
        on_progress: called with (done, total) while annotations are read.
    """

    base: Path
    splits: Collection[str]
    problems: Problems
    options: FolderOptions = field(default_factory=FolderOptions)
    on_progress: Progress | None = None

    def asks(self, *splits: str) -> bool:
        """Whether one of these splits is asked for."""
        return bool(set(splits) & set(self.splits))

    def first(self, names: Iterable[str], hint: str) -> Path:
        """The first of these folders that is there. Raises ManifestError when none is."""
        names = list(names)
        for name in names:
            if (self.base / name).is_dir():
                return self.base / name
        self.problems.add(str(self.base), f"has no folder {' or '.join(map(repr, names))}: {hint}")
        raise ManifestError(self.problems)

    def held_out(self, names: Collection[str]) -> frozenset[str]:
        """Which of the names of a training list become `val`; none where neither part of the list is asked for.

        Raises ValueError when the share is out of range.
        """
        if not self.asks("train", "val"):
            return frozenset()
        share = VAL_SHARE if self.options.val_share is None else self.options.val_share
        return drawn(names, share, self.options.seed)

    def report(self, done: int, total: int) -> None:
        """Tell whoever waits how far the annotations are read."""
        if self.on_progress:
            self.on_progress(done, total)


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
