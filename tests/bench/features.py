"""Filling the feature cache against the image tower alone, and reading annotations of COCO's size.

The cache reads, hashes, decodes and resizes a picture, runs the tower and stores the outcome; the tower alone is called
with batches of tensors that are ready. All are timed in turn, in one run.
"""

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fedmpt_core.data.manifest_rows import Problems
from fedmpt_core.data.pictures import FilePicture
from fedmpt_core.data.public.coco import CLASSES
from fedmpt_core.data.public.instances import read_instances
from fedmpt_core.model.backbone.embedded import EmbeddedBackbone
from fedmpt_core.model.features.cache import FeatureCache
from tests.bench.measure import Row, cpu_seconds, in_own_process, peak_mib

PICTURES, BATCH, REPEATS = 64, 16, 6
SIZES = (1, 4, 16)
IMAGES, ANNOTATIONS, BYTES = 82_783, 604_907, 448e6  # of instances_train2014.json


def photographs(folder: Path) -> list[FilePicture]:
    """JPEGs of the size of VOC's: 500 x 375 pixels, 80 kB, smooth with some noise."""
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(smooth, np.float32) + rng.normal(0, 8, (375, 500, 1))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    return [FilePicture(str(folder / f"{i}.jpg")) for i in range(PICTURES)]


def caching() -> list[Row]:
    """Pictures per CPU second: the cache, and the tower alone in batches of several sizes."""
    folder = Path(tempfile.mkdtemp())
    try:
        pictures, backbone = photographs(folder), EmbeddedBackbone()
        ready = torch.stack([backbone.preprocess(p.load()) for p in pictures])
        backbone.patches(ready[:BATCH])

        def tower(size: int) -> None:
            for batch in ready.split(size):
                backbone.patches(batch)

        def cache() -> None:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            FeatureCache(folder / "cache", max_bytes=1 << 30).features(pictures, backbone, batch_size=BATCH)

        # in turn, so that what else the machine does hits all alike
        calls: list[Callable[[], None]] = [cache, *(lambda size=size: tower(size) for size in SIZES)]
        times = [[cpu_seconds(call, 1) for call in calls] for _ in range(REPEATS)]
    finally:
        shutil.rmtree(folder)
    cached, *alone = (PICTURES / min(column) for column in zip(*times, strict=True))
    same, best = alone[SIZES.index(BATCH)], max(alone)
    what = (
        "filling the feature cache (embedded towers, JPEGs of 500 x 375, pictures per CPU-s), against the image tower"
    )
    return [
        Row(
            f"{what} alone, called with as many pictures at once ({BATCH})",
            f"{cached:.1f}",
            f"{same:.1f}",
            f"{cached / same:.0%}",
            ">= 90%",
            cached >= 0.9 * same,
        ),
        Row(
            f"the same against the tower's best of batches of {', '.join(map(str, SIZES))}: {SIZES[alone.index(best)]}",
            f"{cached:.1f}",
            f"{best:.1f}",
            f"{cached / best:.0%}",
            "–",
            None,
        ),
    ]


def annotations(path: Path) -> None:
    """A file like COCO's train annotations: as many pictures and annotations, as many bytes, polygons included."""
    rng = random.Random(0)
    polygons = []
    for _ in range(500):
        numbers = [round(rng.uniform(0, 640), 2) for _ in range(2 * max(4, int(rng.expovariate(1 / 36))))]
        polygons.append(json.dumps([numbers]))
    with path.open("w") as file:
        file.write('{"info": {"year": 2014}, "images": [')
        for i in range(IMAGES):
            name = f"COCO_train2014_{7 * i:012d}.jpg"
            entry = {"license": 5, "file_name": name, "coco_url": f"http://images.cocodataset.org/train2014/{name}"}
            entry |= {"height": 480, "width": 640, "date_captured": "2013-11-14 16:28:13", "id": 7 * i}
            entry["flickr_url"] = "http://farm4.staticflickr.com/3153/2970773875_164f0c0b83_z.jpg"
            file.write((", " if i else "") + json.dumps(entry))
        file.write('], "licenses": [], "annotations": [')
        for a in range(ANNOTATIONS):
            file.write(
                f'{", " if a else ""}{{"segmentation": {rng.choice(polygons)}, "area": 1481.38064999994, "iscrowd": 0, '
                f'"image_id": {7 * rng.randrange(IMAGES)}, "bbox": [217.62, 240.54, 38.99, 57.75], '
                f'"category_id": {rng.randrange(80)}, "id": {a}}}'
            )
        file.write('], "categories": [')
        file.write(", ".join(json.dumps({"supercategory": "x", "id": c, "name": n}) for c, n in enumerate(CLASSES)))
        file.write("]}")


def measured(read: Callable[[Path], int], path: Path) -> None:
    """Prints CPU seconds and peak memory of one reading, for the process that started this one."""
    before, start = peak_mib(), time.process_time()
    count = read(path)
    print(json.dumps({"pictures": count, "before": before, "peak": peak_mib(), "cpu": time.process_time() - start}))


def ours(path: Path) -> int:
    """All rows, as a loader holds them."""
    problems = Problems("benchmark")
    found = read_instances(path, {name: c for c, name in enumerate(CLASSES)}, "", problems)
    problems.refuse_any()
    return len(list(found.rows(CLASSES, str, lambda _: "train"))) if found else 0


def whole(path: Path) -> int:
    """The other side: the whole file as Python values."""
    with path.open() as file:
        return len(json.load(file)["images"])


def loading() -> Row:
    """Peak memory of one annotation file of COCO's size, both ways."""
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / "instances_train2014.json"
        annotations(path)
        size = path.stat().st_size
        streamed = in_own_process("tests.bench.features", "ours", str(path))
        at_once = in_own_process("tests.bench.features", "whole", str(path))
    finally:
        shutil.rmtree(folder)
    if streamed["pictures"] != IMAGES or abs(size / BYTES - 1) > 0.1:
        raise RuntimeError(f"the file has {size} bytes and {streamed['pictures']} pictures: it is not like COCO's")
    return Row(
        f"COCO-size annotations ({size / 1e6:.0f} MB, {ANNOTATIONS:,} of {IMAGES:,} pictures), against json.load "
        f"(peak MiB, of which all that was there before; CPU-s {streamed['cpu']:.0f} and {at_once['cpu']:.0f})",
        f"{streamed['peak']:.0f} ({streamed['before']:.0f})",
        f"{at_once['peak']:.0f}",
        f"{at_once['peak'] / streamed['peak']:.0f}x",
        "<= 1024",
        streamed["peak"] <= 1024,
    )


def run() -> list[Row]:
    """All figures."""
    return [*caching(), loading()]


if __name__ == "__main__" and sys.argv[1:]:
    measured({"ours": ours, "whole": whole}[sys.argv[1]], Path(sys.argv[2]))
