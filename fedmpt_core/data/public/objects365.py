"""Objects365 version 2 -> manifest rows: the official annotations and pictures.

    annotations/zhiyuan_objv2_train.json, zhiyuan_objv2_val.json          or in train/ and val/
    train/patch0/*.jpg .., val/patch0/*.jpg ..                            or train/images/v1/patch0/*.jpg ..

`test` is the official val list. `train` and `val` are the official train list, of which a seeded tenth is `val`, where
thresholds are chosen. Some names in the official files are misspelt, shortened or end in a blank: both that spelling
and the corrected one are accepted, and labels are the corrected words in lower case, since prompts need words.
Version 1 has other classes and is refused.

The train file holds 25 million annotations; it is streamed. Three pictures of it are known to be missing from the
archives: leave missing pictures out explicitly.
"""

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from fedmpt_core.data.manifest_rows import ManifestError, ManifestRow, Problems
from fedmpt_core.data.public.classes import names_and_words
from fedmpt_core.data.public.folder import Folder
from fedmpt_core.data.public.instances import Instances, read_instances

NAMES, CLASSES = names_and_words("objects365", lambda name: name.lower().replace("/", " or "))

_COLUMNS = {spelling.casefold(): c for c, pair in enumerate(zip(NAMES, CLASSES, strict=True)) for spelling in pair}


def rows(folder: Folder) -> Iterator[ManifestRow]:
    """One row per picture, with absolute paths, train before test, by id; good only once the iterator has ended.

    Raises:
        ManifestError: the folder cannot be used; names every problem.
        ValueError: the share of `val` is out of range.
    """
    names: set[str] = set()
    for part, needed in (("train", ("train", "val")), ("val", ("test",))):
        if not folder.asks(*needed):
            continue
        instances = _read(folder, part)
        own = {PurePosixPath(name).name for name in instances.files}
        if len(own) < len(instances.files) or own & names:
            folder.problems.add(instances.source, "lists a picture that this file or the train file lists too")
        names |= own
        path_of = _paths(folder.base / part, instances, folder.problems)
        yield from instances.rows(CLASSES, path_of, folder, test=part == "val")


def _read(folder: Folder, part: str) -> Instances:
    name = f"zhiyuan_objv2_{part}.json"
    places = [folder.base / "annotations" / name, folder.base / part / name]
    path = next((place for place in places if place.is_file()), places[0])
    hint = f"unpack {name} there, or into {folder.base / part}"
    instances = read_instances(path, _COLUMNS, hint, folder.problems, folder.on_progress)
    if instances is None:
        raise ManifestError(folder.problems)
    return instances


def _paths(pictures: Path, instances: Instances, problems: Problems) -> Callable[[str], str]:
    """From `images/v1/patch8/NAME.jpg` to where such a picture lies: at that path below the folder, or in `patch8`."""
    as_listed = bool(instances.files) and (pictures / PurePosixPath(instances.files[0]).parts[0]).is_dir()
    if not pictures.is_dir():
        problems.add(str(pictures), "does not exist: unpack the patches there")
        raise ManifestError(problems)

    def path_of(name: str) -> str:
        path = PurePosixPath(name)
        return str(pictures / path if as_listed else pictures / path.parent.name / path.name)

    return path_of
