"""Miniature folders of the public data sets: the real file tree, a few pictures of one colour each."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fedmpt_core.data.public import coco, mlrsnet, multiscene, nuswide, objects365


def picture(path: Path, value: int) -> None:
    """A small picture; another `value` is another content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value % 256, value // 256, 0)).save(path, quality=95)


def instances(
    names: Sequence[str], files: Mapping[int, str], labels: Mapping[int, Iterable[str]], *, last: str = "categories"
) -> dict[str, Any]:
    """A COCO-style annotation file: `files` and `labels` by image id; category ids have gaps."""
    ids = {name: 3 * c + 1 for c, name in enumerate(names)}
    boxes = [(image, name) for image, shown in labels.items() for name in shown]
    values: dict[str, Any] = {
        "info": {"description": "miniature", "nested": [[1.5, "annotations"], {"images": 0}]},
        "categories": [{"id": n, "name": name, "supercategory": "thing"} for name, n in ids.items()],
        "images": [{"id": n, "file_name": name, "height": 6, "width": 8} for n, name in files.items()],
        "annotations": [
            {
                "id": 100 + a,
                "image_id": image,
                "category_id": ids[name],
                "iscrowd": 0,
                "segmentation": [[0.5, 1.5, 2.5]],
                "bbox": [0.0, 1.0, 2.0, 3.0],
            }
            for a, (image, name) in enumerate(boxes)
        ],
    }
    values[last] = values.pop(last)
    return values


COCO_TRAIN = {n: f"COCO_train2014_{n:012d}.jpg" for n in (9, 25, 30, 34, 36, 49, 61, 64, 71, 72, 77, 78)}
COCO_VAL = {n: f"COCO_val2014_{n:012d}.jpg" for n in (42, 73, 74)}
COCO_LABELS: dict[int, tuple[str, ...]] = {
    9: ("bowl", "orange", "bowl", "broccoli"),
    25: ("giraffe",),
    30: ("vase", "potted plant"),
    34: ("zebra",),
    36: ("person", "umbrella"),
    49: ("person", "horse", "person"),
    61: ("person", "elephant"),
    64: ("clock",),
    71: ("truck", "car", "train"),
    72: ("giraffe",),
    77: ("person", "skateboard"),
    42: ("dog", "person"),
    73: ("motorcycle",),
}
"""Image 78 and 74 have no annotation."""


def coco_folder(base: Path) -> Path:
    """COCO 2014: twelve training and three val pictures."""
    (base / "annotations").mkdir(parents=True)
    for name, files in (("train2014", COCO_TRAIN), ("val2014", COCO_VAL)):
        shown = {n: COCO_LABELS[n] for n in files if n in COCO_LABELS}
        write_json(base / f"annotations/instances_{name}.json", instances(coco.CLASSES, files, shown))
        for n, file in files.items():
            picture(base / name / file, n)
    return base


O365_TRAIN = {n: f"images/v1/patch{n % 3}/objects365_v1_{n:08d}.jpg" for n in range(10, 22)}
O365_VAL = {n: f"images/v2/patch16/objects365_v2_{n:08d}.jpg" for n in (30, 31)}


def objects365_folder(base: Path, *, as_listed: bool = True) -> Path:
    """Objects365: twelve training and two val pictures, at the paths of the lists or in `patchN` folders."""
    (base / "annotations").mkdir(parents=True)
    for part, files in (("train", O365_TRAIN), ("val", O365_VAL)):
        shown = {n: ("Person", "Moniter/TV", "Dog")[: n % 3 + 1] for n in files if n != 20}
        values = instances([f"{name} " for name in objects365.NAMES], files, {})
        ids = {entry["name"].strip(): entry["id"] for entry in values["categories"]}
        values["annotations"] = [
            {"id": i, "image_id": n, "category_id": ids[name]}
            for i, (n, name) in enumerate((n, name) for n, names in shown.items() for name in names)
        ]
        write_json(base / f"annotations/zhiyuan_objv2_{part}.json", values)
        for n, file in files.items():
            path = Path(file) if as_listed else Path(*Path(file).parts[-2:])
            picture(base / part / path, n)
    return base


NUS_TRAIN = [f"actor\\{i:04d}_21244941{i:02d}.jpg" for i in range(6)] + [
    f"zebra\\{i:04d}_31244941{i:02d}.jpg" for i in range(6)
]
NUS_TEST = [f"water\\{i:04d}_41244941{i:02d}.jpg" for i in range(3)]
NUS_LABELS = {"person": {0, 1, 2, 3, 4, 5}, "sky": {0, 6, 7}, "zebra": {6, 7, 8, 9, 10}}
"""Concept to positions in the train list; in the test list, position 0 shows water and nothing else is shown."""


def nuswide_folder(base: Path) -> Path:
    """NUS-WIDE: twelve training pictures, of which number 11 shows nothing, and three test pictures."""
    truth = base / "Groundtruth" / "TrainTestLabels"
    truth.mkdir(parents=True)
    (base / "ImageList").mkdir()
    (base / "ConceptsList").mkdir()
    (base / "ConceptsList/Concepts81.txt").write_text("\n".join(nuswide.CLASSES) + "\n")
    for part, names in (("Train", NUS_TRAIN), ("Test", NUS_TEST)):
        (base / f"ImageList/{part}Imagelist.txt").write_text("".join(f"{name}\r\n" for name in names))
        for concept in nuswide.CLASSES:
            shown = NUS_LABELS.get(concept, set()) if part == "Train" else {0} if concept == "water" else set()
            lines = "".join(f"{int(i in shown)}\n" for i in range(len(names)))
            (truth / f"Labels_{concept}_{part}.txt").write_text(lines)
    for i, name in enumerate(NUS_TRAIN + NUS_TEST):
        picture(base / "Flickr" / name.replace("\\", "/"), i)
    return base


def table(header: Sequence[str], lines: Iterable[tuple[str, Iterable[str]]]) -> str:
    """A CSV of zeros and ones: the labels of each name."""
    rows = [",".join(("image", *header))]
    for name, labels in lines:
        shown = set(labels)
        rows.append(",".join((name, *(str(int(cell in shown)) for cell in header))))
    return "\n".join(rows) + "\n"


def multiscene_folder(base: Path) -> Path:
    """MultiScene-Clean: twelve training and three test pictures."""
    names = list(multiscene.NAMES)
    train = [(f"{i:05d}", [names[i], "Sea"] if i else []) for i in range(12)]
    test = [(f"{100 + i:05d}", [names[20 + i]]) for i in range(3)]
    base.mkdir(parents=True)
    for file, lines in (("Tra.csv", train), ("Test.csv", test)):
        (base / file).write_text(table(names, lines))
    for i, (name, _) in enumerate(train + test):
        picture(base / f"images/{name}.jpg", i)
    return base


def mlrsnet_folder(base: Path, each: int = 4) -> Path:
    """MLRSNet: `each` pictures of every category; the first of each has no label."""
    (base / "Labels").mkdir(parents=True)
    for c, category in enumerate(mlrsnet.CATEGORIES):
        own = [mlrsnet.NAMES[c], "habor"]
        lines = [(f"{category}_{i + 1:05d}.jpg", own if i else []) for i in range(each)]
        (base / f"Labels/{category}.csv").write_text(table(mlrsnet.NAMES, lines))
        for i, (name, _) in enumerate(lines):
            picture(base / "Images" / category / name, 8 * c + i)
    return base


def write_json(path: Path, values: object) -> None:
    """As compact JSON."""
    path.write_text(json.dumps(values))


def edit_json(path: Path, change: Any) -> None:
    """Read, `change(values)` in place, write."""
    values = json.loads(path.read_text())
    change(values)
    write_json(path, values)
