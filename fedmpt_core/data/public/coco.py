"""MS-COCO 2014 -> manifest rows: the official 2014 annotations and pictures.

    annotations/instances_train2014.json, instances_val2014.json
    train2014/*.jpg, val2014/*.jpg                                  or both below images/

`test` is the official val list (40,504 pictures), as multi-label work has it. `train` and `val` are the official train
list (82,783), of which a seeded tenth is `val`, where thresholds are chosen. All pictures are kept, those without any
annotation as pictures without labels; crowds count (see `instances`). The 80 classes stand in the official order.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedmpt_core.data.manifest_rows import SPLITS, ManifestRow, Problems
from fedmpt_core.data.public.folder_checks import LeftOut, Progress, first_folder, present
from fedmpt_core.data.public.instances import Instances, read_instances
from fedmpt_core.data.public.splits import VAL_SHARE, drawn

CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone"),
    *("microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear"),
    *("hair drier", "toothbrush"),
)
"""The official categories by ascending id (1 to 90, ten of which do not exist)."""

_COLUMNS = {name: c for c, name in enumerate(CLASSES)}
_HINT = "unpack annotations_trainval2014.zip into the folder"


def coco_rows(
    folder: str | Path,
    splits: Sequence[str] = SPLITS,
    *,
    val_share: float = VAL_SHARE,
    seed: int = 0,
    left_out: LeftOut | None = None,
    on_progress: Progress | None = None,
) -> Iterator[ManifestRow]:
    """One row per picture, with absolute paths, by file and id.

    Args:
        folder: the folder that holds `annotations`.
        splits: which of `train`, `val`, `test` to read; a file that none of them needs may be missing.
        val_share: share of the official train list that becomes `val`, (0, 1).
        seed: which pictures become `val`.
        left_out: as in `folder_checks.present`.
        on_progress: called with (bytes done, bytes in all) for each annotation file.

    Yields:
        The rows, their labels in the order of `CLASSES`. They are good only once the iterator has ended.

    Raises:
        ManifestError: the folder cannot be used; names every problem.
        ValueError: the share is out of range.
    """
    problems = Problems("the COCO 2014 folder")
    base = Path(folder).absolute()
    found: dict[str, Instances] = {}
    for year_list, needed in (("train2014", {"train", "val"}), ("val2014", {"test"})):
        if needed & set(splits):
            path = base / "annotations" / f"instances_{year_list}.json"
            read = read_instances(path, _COLUMNS, _HINT, problems, on_progress)
            if read:
                found[year_list] = read
    problems.refuse_any()
    if len(found) == 2:
        both = set(found["train2014"].ids) & set(found["val2014"].ids)
        if both:
            problems.add("instances_train2014.json", f"shares image {min(both)} with instances_val2014.json")
    val: frozenset[str] = frozenset()
    if "train2014" in found:
        val = drawn([str(n) for n in found["train2014"].ids], val_share, seed)

    def split_of(number: int, year_list: str) -> str:
        split = "test" if year_list == "val2014" else "val" if str(number) in val else "train"
        return split if split in splits else ""

    for year_list, instances in found.items():
        hint = f"unpack {year_list}.zip into the folder"
        pictures = first_folder(base, (year_list, f"images/{year_list}"), hint, problems)
        rows = instances.rows(CLASSES, lambda name, p=pictures: str(p / name), lambda n, y=year_list: split_of(n, y))
        yield from present(rows, problems, left_out)
    problems.refuse_any()
