"""MLRSNet -> manifest rows: 109,161 aerial pictures of 46 scene categories with 60 labels.

    Labels/CATEGORY.csv                        a header, then name and 60 columns of 0 or 1; or labels/
    Images/CATEGORY/CATEGORY_00001.jpg ..      or images/

The data set comes without a split. Ours (`random`) is seeded: within each category half of the pictures are `test`, and
of the other half a tenth is `val`, where thresholds are chosen. `scenes` is the split that the released FedMPT code
describes: the first 23 categories by name are trained, the last 23 tested, so that test pictures show scenes of kinds
never seen in training. A tenth of the training pictures is `val` there too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fedmpt_core.data.manifest_rows import SPLITS, ManifestRow, Problems
from fedmpt_core.data.public.folder_checks import LeftOut, Progress, first_folder, present
from fedmpt_core.data.public.label_table import read_table
from fedmpt_core.data.public.splits import VAL_SHARE, drawn

TestSplit = Literal["random", "scenes"]

NAMES = (
    *("airplane", "airport", "bare soil", "baseball diamond", "basketball court", "beach", "bridge", "buildings"),
    *("cars", "chaparral", "cloud", "containers", "crosswalk", "dense residential area", "desert", "dock", "factory"),
    *("field", "football field", "forest", "freeway", "golf course", "grass", "greenhouse", "gully", "habor"),
    *("intersection", "island", "lake", "mobile home", "mountain", "overpass", "park", "parking lot", "parkway"),
    *("pavement", "railway", "railway station", "river", "road", "roundabout", "runway", "sand", "sea", "ships"),
    *("snow", "snowberg", "sparse residential area", "stadium", "swimming pool", "tanks", "tennis court", "terrace"),
    *("track", "trail", "transmission tower", "trees", "water", "wetland", "wind turbine"),
)
"""The 60 columns as the files spell them."""

CLASSES = tuple("harbor" if name == "habor" else name for name in NAMES)

CATEGORIES = (
    *("airplane", "airport", "bareland", "baseball_diamond", "basketball_court", "beach", "bridge", "chaparral"),
    *("cloud", "commercial_area", "dense_residential_area", "desert", "eroded_farmland", "farmland", "forest"),
    *("freeway", "golf_course", "ground_track_field", "harbor&port", "industrial_area", "intersection", "island"),
    *("lake", "meadow", "mobile_home_park", "mountain", "overpass", "park", "parking_lot", "parkway", "railway"),
    *("railway_station", "river", "roundabout", "shipping_yard", "snowberg", "sparse_residential_area", "stadium"),
    *("storage_tank", "swimmimg_pool", "tennis_court", "terrace", "transmission_tower", "vegetable_greenhouse"),
    *("wetland", "wind_turbine"),
)
"""The 46 scene categories by name, as the files spell them."""

TEST_SHARE = 0.5
"""Of each category's pictures, in the `random` split (chosen)."""


def mlrsnet_rows(
    folder: str | Path,
    splits: Sequence[str] = SPLITS,
    *,
    test_split: TestSplit = "random",
    val_share: float = VAL_SHARE,
    seed: int = 0,
    left_out: LeftOut | None = None,
    on_progress: Progress | None = None,
) -> list[ManifestRow]:
    """One row per picture, with absolute paths, by category and name.

    Args:
        folder: the folder that holds `Images` and `Labels`.
        splits: which of `train`, `val`, `test` to return; all files are needed in any case.
        test_split: `random` or `scenes`, see above.
        val_share: share of the training half that becomes `val`, (0, 1).
        seed: which pictures become `val`, and, in the `random` split, `test`.
        left_out: as in `folder_checks.present`.
        on_progress: called with (categories done, categories in all).

    Returns:
        The rows, their labels in the order of their file's columns.

    Raises:
        ManifestError: the folder cannot be used; names every problem.
        ValueError: an argument is out of range.
    """
    problems = Problems("the MLRSNet folder")
    base = Path(folder).absolute()
    labels = first_folder(base, ("Labels", "labels"), "take them from the data set's archive", problems)
    pictures = first_folder(base, ("Images", "images"), "unpack all categories' archives there", problems)
    for path in sorted(labels.glob("*.csv")):
        if path.stem not in CATEGORIES:
            problems.add(f"{labels.name}/{path.name}", f"{path.stem!r} is not one of the 46 categories")
    rows: list[ManifestRow] = []
    for done, category in enumerate(CATEGORIES, start=1):
        where = f"{labels.name}/{category}.csv"
        table = read_table(labels / f"{category}.csv", where, lambda h, w=where: _order(h, w, problems), problems)
        split_of = _splits([name for name, *_ in table], category, test_split, val_share, seed)
        for name, words, origin in table:
            if split_of[name] in splits:
                rows.append(ManifestRow(str(pictures / category / name), words, split_of[name], origin=origin))
        if on_progress:
            on_progress(done, len(CATEGORIES))
    problems.refuse_any()
    found = list(present(rows, problems, left_out))
    problems.refuse_any()
    return found


def _splits(names: list[str], category: str, test_split: TestSplit, val_share: float, seed: int) -> dict[str, str]:
    """Split of every picture of a category."""
    if test_split == "scenes":
        tested = CATEGORIES.index(category) >= len(CATEGORIES) // 2
        test = frozenset(names) if tested else frozenset[str]()
    else:
        test = drawn(names, TEST_SHARE, seed) if len(names) > 1 else frozenset[str]()
    rest = [name for name in names if name not in test]
    val = drawn(rest, val_share, seed + 1) if len(rest) > 1 else frozenset[str]()
    return {name: "test" if name in test else "val" if name in val else "train" for name in names}


def _order(header: Sequence[str], where: str, problems: Problems) -> Sequence[str] | None:
    words = dict(zip(NAMES, CLASSES, strict=True))
    strange = sorted(set(header) ^ set(NAMES))
    if strange or len(header) != len(NAMES):
        problems.add(f"{where} header", f"and the 60 labels differ in {', '.join(map(repr, strange[:5])) or 'number'}")
        return None
    return [words[name] for name in header]
