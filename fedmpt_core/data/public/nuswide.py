"""NUS-WIDE -> manifest rows: image lists, ground truth of the 81 concepts, and pictures collected from Flickr.

    ImageList/TrainImagelist.txt, TestImagelist.txt                       161,789 and 107,859 lines
    Groundtruth/TrainTestLabels/Labels_CONCEPT_Train.txt, _Test.txt       or TrainTestLabels/
    Flickr/actor/0001_2124494179.jpg ..                                   or images/

Line i of every label file belongs to line i of the image list: lengths that differ are refused, since a line too few
would move every label behind it. `test` is the official test list; `train` and `val` are the official train list, of
which a seeded tenth is `val`, where thresholds are chosen. All pictures are kept, those without a concept too.

Many pictures have vanished from Flickr, so that copies differ: missing ones are refused unless they are left out
explicitly, and figures on different remainders cannot be compared.
"""

from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedmpt_core.data.manifest_rows import ManifestRow, Problems
from fedmpt_core.data.public.classes import names_and_words
from fedmpt_core.data.public.folder import Folder, inside

_, CLASSES = names_and_words("nuswide")
"""The 81 concepts, as their label files are named."""

_LISTS = {"Train": ("train", "val"), "Test": ("test",)}


def rows(folder: Folder) -> Iterator[ManifestRow]:
    """One row per picture, with absolute paths, in the order of the official lists.

    Raises:
        ManifestError: the folder cannot be used; names every problem.
        ValueError: the share of `val` is out of range.
    """
    problems = folder.problems
    lists = folder.first(("ImageList", "."), "give the folder of the data set")
    truth = folder.first(("Groundtruth/TrainTestLabels", "TrainTestLabels"), "unpack Groundtruth.zip into the folder")
    pictures = folder.first(("Flickr", "images"), "unpack the pictures into Flickr")
    _check_concepts(folder.base, truth, problems)
    # Both lists, whatever is asked for: a picture in both would be trained and tested on.
    names = {part: _read_list(folder, lists / f"{part}Imagelist.txt", part) for part in _LISTS}
    both = sorted(set(names["Train"]) & set(names["Test"]))
    if both:
        problems.add("TrainImagelist.txt", f"shares picture {both[0]!r} with TestImagelist.txt")
    problems.refuse_any()
    val = folder.held_out(names["Train"])
    for part, listed in names.items():
        if not folder.asks(*_LISTS[part]):
            continue
        labels = _read_labels(folder, truth, part, len(listed))
        problems.refuse_any()
        for i, name in enumerate(listed):
            split = "test" if part == "Test" else "val" if name in val else "train"
            words = tuple(CLASSES[c] for c in np.flatnonzero(labels[i]))
            yield ManifestRow(str(pictures / name), words, split, origin=f"{part}Imagelist.txt line {i + 1}")


def _check_concepts(base: Path, truth: Path, problems: Problems) -> None:
    for path in (base / "ConceptsList" / "Concepts81.txt", base / "Concepts81.txt"):
        if path.is_file():
            listed = path.read_text(encoding="utf-8-sig", errors="replace").split()
            strange = sorted(set(listed) ^ set(CLASSES))
            if strange:
                problems.add(path.name, f"and the 81 concepts differ in {', '.join(map(repr, strange[:5]))}")
    for path in sorted(truth.glob("Labels_*_*.txt")):
        concept = path.stem.removeprefix("Labels_").rpartition("_")[0]
        if concept not in CLASSES:
            problems.add(path.name, f"{concept!r} is not one of the 81 concepts")


def _read_list(folder: Folder, path: Path, part: str) -> list[str]:
    problems = folder.problems
    if not path.is_file():
        if folder.asks(*_LISTS[part]):
            problems.add(str(path), "does not exist: unpack ImageList.zip into the folder")
        return []
    names: list[str] = []
    seen: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        where = f"{path.name} line {number}"
        name = inside(line, where, problems)
        if name is None:
            continue
        if name in seen:
            problems.add(where, f"picture {name!r} is listed more than once")
        seen.add(name)
        names.append(name)
    if not names:
        problems.add(path.name, "lists no picture")
    return names


def _read_labels(folder: Folder, truth: Path, part: str, count: int) -> np.ndarray:
    """(R, 81) bool."""
    problems = folder.problems
    labels = np.zeros((count, len(CLASSES)), bool)
    for c, concept in enumerate(CLASSES):
        name = f"Labels_{concept}_{part}.txt"
        try:
            values = np.array((truth / name).read_bytes().removeprefix(BOM_UTF8).split(), dtype="S2")
        except FileNotFoundError:
            problems.add(name, "does not exist: unpack Groundtruth.zip into the folder")
            continue
        except OSError as error:
            problems.add(name, f"cannot be read ({error.strerror})")
            continue
        wrong = np.flatnonzero((values != b"0") & (values != b"1"))
        if len(wrong):
            value = values.tolist()[wrong[0]].decode(errors="replace")
            problems.add(f"{name} line {wrong[0] + 1}", f"is {value!r}, not 0 or 1")
        elif len(values) != count:
            problems.add(name, f"has {len(values)} labels for the {count} pictures of {part}Imagelist.txt")
        else:
            labels[:, c] = values == b"1"
        folder.report(c + 1, len(CLASSES))
    return labels
