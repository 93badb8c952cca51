"""MLRSNet -> manifest rows: 109,161 aerial pictures of 46 scene categories with 60 labels.

    Labels/CATEGORY.csv                        a header, then name and 60 columns of 0 or 1; or labels/
    Images/CATEGORY/CATEGORY_00001.jpg ..      or images/

The data set comes without a split. Ours (`random`) is seeded: within each category half of the pictures are `test`, and
of the other half a tenth is `val`, where thresholds are chosen. `scenes` is the split that the released FedMPT code
describes: the first 23 categories by name are trained, the last 23 tested, so that test pictures show scenes of kinds
never seen in training. A tenth of the training pictures is `val` there too.
"""

from collections.abc import Iterator, Sequence

from fedmpt_core.data.manifest_rows import ManifestRow, Problems
from fedmpt_core.data.public.classes import LISTED, names_and_words
from fedmpt_core.data.public.folder import Folder, FolderOptions
from fedmpt_core.data.public.label_table import read_table
from fedmpt_core.data.public.splits import VAL_SHARE, drawn

NAMES, CLASSES = names_and_words("mlrsnet")
CATEGORIES = tuple(LISTED["mlrsnet"]["categories"])
"""The 46 scene categories by name, as the files spell them."""

TEST_SHARE = 0.5
"""Of each category's pictures, in the `random` split (chosen)."""


def rows(folder: Folder) -> Iterator[ManifestRow]:
    """One row per picture, with absolute paths, by category and name; all files are needed in any case.

    Raises:
        ManifestError: the folder cannot be used; names every problem.
        ValueError: the share of `val` is out of range.
    """
    problems = folder.problems
    labels = folder.first(("Labels", "labels"), "take them from the data set's archive")
    pictures = folder.first(("Images", "images"), "unpack all categories' archives there")
    for path in sorted(labels.glob("*.csv")):
        if path.stem not in CATEGORIES:
            problems.add(f"{labels.name}/{path.name}", f"{path.stem!r} is not one of the 46 categories")
    tables = {}
    for done, category in enumerate(CATEGORIES, start=1):
        where = f"{labels.name}/{category}.csv"
        path = labels / f"{category}.csv"
        tables[category] = read_table(path, where, lambda h, w=where: _order(h, w, problems), problems)
        folder.report(done, len(CATEGORIES))
    problems.refuse_any()
    for category, table in tables.items():
        split_of = _splits([name for name, *_ in table], category, folder.options)
        for name, words, origin in table:
            yield ManifestRow(str(pictures / category / name), words, split_of[name], origin=origin)


def _splits(names: list[str], category: str, options: FolderOptions) -> dict[str, str]:
    """Split of every picture of a category."""
    if options.test_split == "scenes":
        tested = CATEGORIES.index(category) >= len(CATEGORIES) // 2
        test = frozenset(names) if tested else frozenset[str]()
    else:
        test = drawn(names, TEST_SHARE, options.seed) if len(names) > 1 else frozenset[str]()
    rest = [name for name in names if name not in test]
    share = VAL_SHARE if options.val_share is None else options.val_share
    val = drawn(rest, share, options.seed + 1) if len(rest) > 1 else frozenset[str]()
    return {name: "test" if name in test else "val" if name in val else "train" for name in names}


def _order(header: Sequence[str], where: str, problems: Problems) -> Sequence[str] | None:
    words = dict(zip(NAMES, CLASSES, strict=True))
    strange = sorted(set(header) ^ set(NAMES))
    if strange or len(header) != len(NAMES):
        problems.add(f"{where} header", f"and the 60 labels differ in {', '.join(map(repr, strange[:5])) or 'number'}")
        return None
    return [words[name] for name in header]
