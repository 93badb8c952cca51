"""MS-COCO 2014 and 2017 -> manifest rows: the official annotations and pictures of that year.

    annotations/instances_train2014.json, instances_val2014.json
    train2014/*.jpg, val2014/*.jpg                                  or both below images/

`test` is the official val list (40,504 pictures, of 2017 5,000), as multi-label work has it. `train` and `val` are the
official train list (82,783, of 2017 118,287), of which a seeded tenth is `val`, where thresholds are chosen. All
pictures are kept, those without any annotation as pictures without labels; crowds count (see `instances`). The 80
classes stand in the official order.
"""

from collections.abc import Iterator

from fedmpt_core.data.manifest_rows import ManifestRow
from fedmpt_core.data.public.classes import names_and_words
from fedmpt_core.data.public.folder import Folder
from fedmpt_core.data.public.instances import Instances, read_instances

_, CLASSES = names_and_words("coco2014")

_COLUMNS = {name: c for c, name in enumerate(CLASSES)}


def rows(folder: Folder, year: int) -> Iterator[ManifestRow]:
    """One row per picture, with absolute paths, by file and id; good only once the iterator has ended.

    Args:
        folder: where the archives were unpacked.
        year: 2014 or 2017.

    Raises:
        ManifestError: the folder cannot be used; names every problem.
        ValueError: the share of `val` is out of range.
    """
    lists: dict[str, Instances] = {}
    train, held_out = f"train{year}", f"val{year}"
    hint = f"unpack annotations_trainval{year}.zip into the folder"
    for name, needed in ((train, ("train", "val")), (held_out, ("test",))):
        if folder.asks(*needed):
            path = folder.base / "annotations" / f"instances_{name}.json"
            instances = read_instances(path, _COLUMNS, hint, folder.problems, folder.on_progress)
            if instances:
                lists[name] = instances
    folder.problems.refuse_any()
    if len(lists) == 2:
        both = set(lists[train].ids) & set(lists[held_out].ids)
        if both:
            folder.problems.add(f"instances_{train}.json", f"shares image {min(both)} with instances_{held_out}.json")
    for name, instances in lists.items():
        pictures = folder.first((name, f"images/{name}"), f"unpack {name}.zip into the folder")
        test = name == held_out
        yield from instances.rows(CLASSES, lambda file, place=pictures: str(place / file), folder, test=test)
