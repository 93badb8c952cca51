"""The public data sets as they come out of their archives, by name: one way in for all of them.

What each folder must look like is the docstring of its own module; docs/data.md has them all.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedmpt_core.common.progress import Progress
from fedmpt_core.config.datasets import PublicName
from fedmpt_core.data.manifest_rows import SPLITS, ManifestRow, Problems
from fedmpt_core.data.public import coco, mlrsnet, multiscene, nuswide, objects365, voc
from fedmpt_core.data.public.folder import Folder, FolderOptions, LeftOut, present


@dataclass(frozen=True)
class PublicDataset:
    """One data set.

    Attributes:
        title: what messages call it.
        classes: the words of its classes, in their official order.
        rows: reads a folder; some of the rows may be of splits that are not asked for.
    """

    title: str
    classes: tuple[str, ...]
    rows: Callable[[Folder], Iterable[ManifestRow]]


DATASETS: dict[PublicName, PublicDataset] = {
    "voc2007": PublicDataset("VOC2007", voc.CLASSES, voc.rows),
    "coco2014": PublicDataset("COCO 2014", coco.CLASSES, partial(coco.rows, year=2014)),
    "coco2017": PublicDataset("COCO 2017", coco.CLASSES, partial(coco.rows, year=2017)),
    "nuswide": PublicDataset("NUS-WIDE", nuswide.CLASSES, nuswide.rows),
    "objects365": PublicDataset("Objects365", objects365.CLASSES, objects365.rows),
    "multiscene": PublicDataset("MultiScene-Clean", multiscene.CLASSES, multiscene.rows),
    "mlrsnet": PublicDataset("MLRSNet", mlrsnet.CLASSES, mlrsnet.rows),
}
STANDARD = FolderOptions()


def folder_rows(
    kind: PublicName,
    folder: str | Path,
    splits: Sequence[str] = SPLITS,
    options: FolderOptions = STANDARD,
    *,
    left_out: LeftOut | None = None,
    on_progress: Progress | None = None,
) -> Iterator[ManifestRow]:
    """The pictures of a folder.

    Args:
        kind: the data set.
        folder: where it was unpacked.
        splits: which of `train`, `val`, `test`.
        options: how it is split.
        left_out: as in `folder.present`.
        on_progress: called with (done, total) while annotations are read.

    Returns:
        The rows; good only once they have been gone through to the end.

    Raises:
        ManifestError: while the rows are read: the folder cannot be used; names every problem.
        ValueError: an option has no meaning for this data set, or, while the rows are read, is out of range.
    """
    if options.test_split != "random" and kind != "mlrsnet":
        raise ValueError(f"test_split='{options.test_split}' is for mlrsnet, {kind} has a test list of its own")
    if options.include_difficult and kind != "voc2007":
        raise ValueError(f"include_difficult is for voc2007: {kind} marks no object as difficult")
    dataset = DATASETS[kind]
    problems = Problems(f"the {dataset.title} folder")
    read = Folder(Path(folder).absolute(), splits, problems, options, on_progress)
    return _checked((row for row in dataset.rows(read) if row.split in splits), problems, left_out)


def _checked(rows: Iterable[ManifestRow], problems: Problems, left_out: LeftOut | None) -> Iterator[ManifestRow]:
    yield from present(rows, problems, left_out)
    problems.refuse_any()


def require_classes(kind: PublicName, classes: Sequence[str]) -> None:
    """Raises ValueError unless these are all the classes of a data set, in any order."""
    own = DATASETS[kind].classes
    differing = sorted(set(classes) ^ set(own))
    if differing:
        few = ", ".join(map(repr, differing[:5]))
        raise ValueError(f"classes and {kind} differ in {few}: list exactly {', '.join(own)}")
