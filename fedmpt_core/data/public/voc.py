"""PASCAL VOC2007 -> manifest rows: a folder as it comes out of the two archives, trainval and test.

Ids come from `ImageSets/Main/{train,val,trainval,test}.txt`, labels from every object of
`Annotations/ID.xml`. The labels of a picture are the classes with an object that is not marked `difficult`.
VOC's own evaluation leaves a picture out for a class of which it shows difficult objects only; targets here
are 0 or 1, so that such a class counts as absent, or, with `include_difficult`, as present. Figures can
differ from the devkit's by that.

Standard splits: `train` 2,501, `val` 2,510 (thresholds are chosen there), `test` 4,952 pictures. With
`val_share` the 5,011 pictures of `trainval` are pooled and a fixed, seeded share of them is `val`.

Must never lose pictures in silence: every id of a list becomes a row with labels from its own annotation, or
an error; lists that overlap or contradict each other are refused.
"""

import re
from collections.abc import Iterator
from pathlib import Path

# Parses documents without a document type only, see `_parse`.
from xml.etree import ElementTree

from fedmpt_core.data.manifest_rows import ManifestError, ManifestRow, Problems
from fedmpt_core.data.public.classes import names_and_words
from fedmpt_core.data.public.folder import Folder

NAMES, CLASSES = names_and_words("voc2007")
"""VOC's object names, and the words used as labels: prompts need words, not `tvmonitor`."""

_MAX_ANNOTATION_BYTES = 1 << 20  # the largest of VOC2007 has some ten thousand (chosen)


def rows(folder: Folder) -> Iterator[ManifestRow]:
    """One row per picture, with absolute paths, by split and id.

    Raises:
        ManifestError: the folder cannot be used; names every problem.
        ValueError: the share of `val` is out of range.
    """
    base = _find(folder.base, folder.problems)
    lists = _ids(folder, base)
    wanted = [(split, name) for split in folder.splits for name in lists[split]]
    for done, (split, name) in enumerate(wanted, start=1):
        labels = _labels(base, name, folder.options.include_difficult, folder.problems)
        folder.report(done, len(wanted))
        yield ManifestRow(str(base / "JPEGImages" / f"{name}.jpg"), labels, split, origin=f"VOC2007 {split} {name}")


def _find(folder: Path, problems: Problems) -> Path:
    for base in (folder, folder / "VOC2007", folder / "VOCdevkit" / "VOC2007"):
        if (base / "ImageSets" / "Main").is_dir():
            missing = [name for name in ("Annotations", "JPEGImages") if not (base / name).is_dir()]
            if not missing:
                return base.absolute()
            problems.add(str(base), f"lacks the folder {' and '.join(missing)}: unpack the archives again")
            raise ManifestError(problems)
    problems.add(
        str(folder),
        "is not a VOC2007 folder: give VOCdevkit, or VOCdevkit/VOC2007 with ImageSets/Main, Annotations and JPEGImages",
    )
    raise ManifestError(problems)


def _ids(folder: Folder, base: Path) -> dict[str, list[str]]:
    """The ids of every split asked for, once all lists that are there agree with each other."""
    problems, pooled = folder.problems, folder.options.val_share is not None
    lists: dict[str, list[str]] = {}
    for name in ("train", "val", "trainval", "test"):
        path = base / "ImageSets" / "Main" / f"{name}.txt"
        if path.is_file():
            lists[name] = _read_list(path, problems)
    needed = {"test": "test"} | {s: "trainval" if pooled else s for s in ("train", "val")}
    for name in sorted({needed[split] for split in folder.splits} - set(lists)):
        archive = "VOCtest_06-Nov-2007.tar" if name == "test" else "VOCtrainval_06-Nov-2007.tar"
        problems.add(f"ImageSets/Main/{name}.txt", f"does not exist: unpack {archive} into the same folder")
    _check_lists(lists, problems)
    problems.refuse_any()
    if pooled and "trainval" in lists:
        val = folder.held_out(lists["trainval"])
        lists["val"] = sorted(val)
        lists["train"] = [name for name in lists["trainval"] if name not in val]
    return lists


def _read_list(path: Path, problems: Problems) -> list[str]:
    ids = path.read_text(encoding="utf-8-sig", errors="replace").split()
    where = f"ImageSets/Main/{path.name}"
    for name in ids:
        if not re.fullmatch(r"[0-9]{6}", name):
            problems.add(where, f"id {name!r} is not one of VOC2007, which have six digits")
    if len(set(ids)) != len(ids):
        problems.add(where, "lists an id more than once")
    if not ids:
        problems.add(where, "is empty")
    return sorted(ids)


def _check_lists(lists: dict[str, list[str]], problems: Problems) -> None:
    sets = {name: set(ids) for name, ids in lists.items()}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test"), ("trainval", "test")):
        shared = sorted(sets.get(one, set()) & sets.get(other, set()))
        if shared:
            problems.add(f"ImageSets/Main/{one}.txt", f"shares id {shared[0]} with {other}.txt")
    if {"train", "val", "trainval"} <= set(sets) and sets["train"] | sets["val"] != sets["trainval"]:
        problems.add("ImageSets/Main/trainval.txt", "does not hold exactly the ids of train.txt and val.txt")


def _labels(base: Path, name: str, include_difficult: bool, problems: Problems) -> tuple[str, ...]:
    """Labels of one picture in VOC's order; what is wrong with its annotation is added to `problems`."""
    where = f"Annotations/{name}.xml"
    try:
        root = _parse(base / "Annotations" / f"{name}.xml")
    except FileNotFoundError:
        problems.add(where, "does not exist: unpack the archive again")
        return ()
    except (OSError, ValueError, ElementTree.ParseError) as error:
        problems.add(where, f"cannot be read ({error})")
        return ()
    if root.tag != "annotation":
        problems.add(where, f"starts with <{root.tag}>, not with <annotation>")
        return ()
    filename = _text(root, "filename")
    if filename != f"{name}.jpg":
        problems.add(where, f"describes {filename!r}, not '{name}.jpg'")
    shown = set()
    # Children only: parts of an object, such as a person's head, have names too.
    for item in root.findall("object"):
        label, difficult = _text(item, "name"), _text(item, "difficult") or "0"
        if label not in NAMES:
            problems.add(where, f"object {label!r} is not one of VOC2007's 20 classes")
        elif difficult not in ("0", "1"):
            problems.add(where, f"difficult={difficult!r} is neither 0 nor 1")
        elif include_difficult or difficult == "0":
            shown.add(label)
    return tuple(words for label, words in zip(NAMES, CLASSES, strict=True) if label in shown)


def _text(element: ElementTree.Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _parse(path: Path) -> ElementTree.Element:
    """The root of a small UTF-8 document without a document type, hence without entities of its own."""
    with path.open("rb") as file:
        raw = file.read(_MAX_ANNOTATION_BYTES + 1)
    if len(raw) > _MAX_ANNOTATION_BYTES:
        raise ValueError(f"more than {_MAX_ANNOTATION_BYTES} bytes")
    text = raw.decode("utf-8-sig")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("a document type or entity is declared, which no annotation of VOC has")
    return ElementTree.fromstring(text)  # noqa: S314 - entities, what the rule is about, were refused above
