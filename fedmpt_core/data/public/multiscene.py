"""MultiScene-Clean -> manifest rows: the 14,000 aerial pictures with labels that people checked.

    Tra.csv, Test.csv       a header, then name and 36 columns of 0 or 1
    images/NAME.jpg

`test` is the authors' test list; `train` and `val` are `Tra.csv`, of which a seeded tenth is `val`, where thresholds
are chosen. The columns are defined by their order, and copies spell their headers in several ways: one that is another
class than its place says, or like none, is refused. Labels are readable words, since prompts need them.
"""

import difflib
import re
from collections.abc import Iterator, Sequence

from fedmpt_core.data.manifest_rows import ManifestRow, Problems
from fedmpt_core.data.public.classes import names_and_words
from fedmpt_core.data.public.folder import Folder
from fedmpt_core.data.public.label_table import read_table

NAMES, CLASSES = names_and_words("multiscene", lambda name: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())

_LISTS = {"Tra.csv": ("train", "val"), "Test.csv": ("test",)}
_ALIKE = 0.6  # of difflib: from here on two spellings are taken for one name (chosen)


def rows(folder: Folder) -> Iterator[ManifestRow]:
    """One row per picture, with absolute paths, in the order of the lists.

    Raises:
        ManifestError: the folder cannot be used; names every problem.
        ValueError: the share of `val` is out of range.
    """
    problems = folder.problems
    pictures = folder.first(("images", "Images"), "give the folder of MultiScene-Clean")
    tables = {}
    for done, (name, needed) in enumerate(_LISTS.items(), start=1):
        if (folder.base / name).is_file() or folder.asks(*needed):
            tables[name] = read_table(folder.base / name, name, lambda h, n=name: _order(h, n, problems), problems)
        folder.report(done, len(_LISTS))
    listed = {name: {row[0] for row in table} for name, table in tables.items()}
    both = set.intersection(*listed.values()) if len(listed) == 2 else set()
    if both:
        problems.add("Tra.csv", f"shares picture {min(both)!r} with Test.csv")
    problems.refuse_any()
    val = folder.held_out(listed.get("Tra.csv", ()))
    for name, table in tables.items():
        for picture, labels, origin in table:
            split = "test" if name == "Test.csv" else "val" if picture in val else "train"
            file = picture if picture.lower().endswith((".jpg", ".png")) else f"{picture}.jpg"
            yield ManifestRow(str(pictures / file), labels, split, origin=origin)


def _order(header: Sequence[str], where: str, problems: Problems) -> Sequence[str] | None:
    if len(header) != len(NAMES):
        problems.add(where, f"has {len(header)} label columns, MultiScene has {len(NAMES)}")
        return None
    before = problems.count
    spellings = {_plain(s): words for name, words in zip(NAMES, CLASSES, strict=True) for s in (name, words)}
    for cell, name, words in zip(header, NAMES, CLASSES, strict=True):
        known = spellings.get(_plain(cell))
        if known == words:
            continue
        alike = max(difflib.SequenceMatcher(None, _plain(cell), _plain(s)).ratio() for s in (name, words))
        if known or alike < _ALIKE:
            problems.add(f"{where} header", f"column {cell!r} stands where {name!r} belongs: take the original file")
    return CLASSES if problems.count == before else None


def _plain(text: str) -> str:
    return re.sub(r"[^a-z]", "", text.lower())
