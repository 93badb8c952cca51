"""The public data sets as they come out of their archives, by name: one way in for all of them.

What each folder must look like is the docstring of its own module; docs/data.md has them all.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fedmpt_core.data.manifest import load_rows
from fedmpt_core.data.manifest_rows import SPLITS, ManifestRow, Problems
from fedmpt_core.data.pictures import Dataset
from fedmpt_core.data.public import coco, mlrsnet, multiscene, nuswide, objects365, voc
from fedmpt_core.data.public.folder_checks import LeftOut, Progress

FolderKind = Literal["voc2007", "coco2014", "nuswide", "objects365", "multiscene", "mlrsnet"]
KINDS: tuple[FolderKind, ...] = get_args(FolderKind)


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
    test_split: mlrsnet.TestSplit = "random"
    include_difficult: bool = False


STANDARD = FolderOptions()


def classes_of(kind: FolderKind) -> tuple[str, ...]:
    """The words of a data set's classes, in its official order."""
    match kind:
        case "voc2007":
            return voc.CLASSES
        case "coco2014":
            return coco.CLASSES
        case "nuswide":
            return nuswide.CLASSES
        case "objects365":
            return objects365.CLASSES
        case "multiscene":
            return multiscene.CLASSES
        case "mlrsnet":
            return mlrsnet.CLASSES


def folder_rows(
    kind: FolderKind,
    folder: str,
    splits: Sequence[str] = SPLITS,
    options: FolderOptions = STANDARD,
    *,
    left_out: LeftOut | None = None,
    on_progress: Progress | None = None,
) -> Iterable[ManifestRow]:
    """The pictures of a folder.

    Args:
        kind: the data set.
        folder: where it was unpacked.
        splits: which of `train`, `val`, `test`.
        options: how it is split.
        left_out: as in `folder_checks.present`.
        on_progress: called with (done, total) while annotations are read.

    Returns:
        The rows; good only once they have been gone through to the end.

    Raises:
        ManifestError: the folder cannot be used; names every problem. Some data sets raise it while the rows are read.
        ValueError: an option is out of range or has no meaning for this data set.
    """
    if options.test_split != "random" and kind != "mlrsnet":
        raise ValueError(f"test_split='{options.test_split}' is for mlrsnet, {kind} has a test list of its own")
    if options.include_difficult and kind != "voc2007":
        raise ValueError(f"include_difficult is for voc2007: {kind} marks no object as difficult")
    common = {"left_out": left_out, "on_progress": on_progress, "seed": options.seed}
    share = {} if options.val_share is None else {"val_share": options.val_share}
    match kind:
        case "voc2007":
            difficult = options.include_difficult
            return voc.voc_rows(folder, splits, include_difficult=difficult, **share, **common)
        case "coco2014":
            return coco.coco_rows(folder, splits, **share, **common)
        case "nuswide":
            return nuswide.nuswide_rows(folder, splits, **share, **common)
        case "objects365":
            return objects365.objects365_rows(folder, splits, **share, **common)
        case "multiscene":
            return multiscene.multiscene_rows(folder, splits, **share, **common)
        case "mlrsnet":
            return mlrsnet.mlrsnet_rows(folder, splits, test_split=options.test_split, **share, **common)


def load_folder(
    kind: FolderKind,
    folder: str,
    classes: Sequence[str],
    split: str,
    options: FolderOptions = STANDARD,
    *,
    on_bad_image: Literal["refuse", "skip"] = "refuse",
    verify: bool = False,
) -> Dataset:
    """The records of one split of a data set.

    Args:
        kind: the data set.
        folder: where it was unpacked.
        classes: all of its classes, in any order.
        split: `train`, `val` or `test`.
        options: how it is split.
        on_bad_image: as in `manifest.load_manifest`.
        verify: decode every picture now.

    Raises:
        ManifestError: the folder cannot be used; names every problem.
        ValueError: an argument is out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: use one of {', '.join(SPLITS)}")
    own = classes_of(kind)
    differing = sorted(set(classes) ^ set(own))
    if differing:
        few = ", ".join(map(repr, differing[:5]))
        raise ValueError(f"classes and {kind} differ in {few}: list exactly {', '.join(own)}")
    rows = folder_rows(kind, folder, (split,), options)
    problems = Problems(f"the {kind} folder")
    return load_rows(rows, classes, split, root=folder, problems=problems, on_bad_image=on_bad_image, verify=verify)
