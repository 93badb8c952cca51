"""MS-COCO 2014 -> manifest rows: the official 2014 annotations and pictures.

    annotations/instances_train2014.json, instances_val2014.json
    train2014/*.jpg, val2014/*.jpg                                  or both below images/

`test` is the official val list (40,504 pictures), as multi-label work has it. `train` and `val` are the official train
list (82,783), of which a seeded tenth is `val`, where thresholds are chosen. All pictures are kept, those without any
annotation as pictures without labels; crowds count (see `instances`). The 80 classes stand in the official order.
"""

from collections.abc import Iterator

from fedmpt_core.data.manifest_rows import ManifestRow
from fedmpt_core.data.public.classes import names_and_words
from fedmpt_core.data.public.folder import Folder
from fedmpt_core.data.public.instances import Instances, read_instances

_, CLASSES = names_and_words("coco2014")

_COLUMNS = {name: c for c, name in enumerate(CLASSES)}
_HINT = "unpack annotations_trainval2014.zip into the folder"


def rows(folder: Folder) -> Iterator[ManifestRow]:
    """One row per picture, with absolute paths, by file and id; good only once the iterator has ended.

    Raises:
        ManifestError: the folder cannot be used; names every problem.
        ValueError: the share of `val` is out of range.
    """
    lists: dict[str, Instances] = {}
    for name, needed in (("train2014", ("train", "val")), ("val2014", ("test",))):
        if folder.asks(*needed):
            path = folder.base / "annotations" / f"instances_{name}.json"
            instances = read_instances(path, _COLUMNS, _HINT, folder.problems, folder.on_progress)
            if instances:
                lists[name] = instances
    folder.problems.refuse_any()
    if len(lists) == 2:
        both = set(lists["train2014"].ids) & set(lists["val2014"].ids)
        if both:
            folder.problems.add("instances_train2014.json", f"shares image {min(both)} with instances_val2014.json")
    for name, instances in lists.items():
        pictures = folder.first((name, f"images/{name}"), f"unpack {name}.zip into the folder")
        test = name == "val2014"
        yield from instances.rows(CLASSES, lambda file, place=pictures: str(place / file), folder, test=test)
