"""From a data set's folder to a manifest, with a record of how: what was kept, what was left out, and why.

Two files appear, each whole or not at all: the manifest, and beside it `NAME.json`, the record. Options that leave
pictures out are off unless asked for, and stand in the record: figures on a filtered set are of another set.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedmpt_core.data.folder import LeftOut, Progress
from fedmpt_core.data.folders import FolderKind, FolderOptions, classes_of, folder_rows
from fedmpt_core.data.manifest_file import SPLITS, ManifestRow, write_manifest
from fedmpt_core.data.whole_file import replacing
from fedmpt_core.packages import RELEASE

SCHEMA = 1


@dataclass(frozen=True)
class PrepareOptions:
    """What to keep.

    Attributes:
        folder: how the data set is split.
        missing: `refuse` pictures that are not there, or `skip` them.
        min_labels: pictures with fewer labels are left out of every split, >= 0. The released FedMPT code does so with
            5 (COCO, NUS-WIDE) and 7 (MLRSNet) without saying it.
    """

    folder: FolderOptions = field(default_factory=FolderOptions)
    missing: Literal["refuse", "skip"] = "refuse"
    min_labels: int = 0


@dataclass(frozen=True)
class Prepared:
    """What a manifest holds.

    Attributes:
        kind: the data set.
        classes: its labels.
        pictures: number of pictures by split.
        unlabelled: those of them without any label, by split; they count as all-negative.
        few_labels: pictures left out by `min_labels`, by split.
        missing: listed pictures that are not there and were left out.
        options: that were asked for.
    """

    kind: FolderKind
    classes: tuple[str, ...]
    pictures: dict[str, int]
    unlabelled: dict[str, int]
    few_labels: dict[str, int]
    missing: int
    options: PrepareOptions

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def prepare(
    kind: FolderKind,
    folder: Path,
    out: Path,
    options: PrepareOptions | None = None,
    *,
    on_progress: Progress | None = None,
) -> Prepared:
    """Write the manifest of a data set.

    Args:
        kind: the data set.
        folder: where it was unpacked.
        out: the manifest, `.csv` or `.parquet`; a file that is there is replaced.
        options: what to keep.
        on_progress: as in `folder_rows`.

    Returns:
        What was written.

    Raises:
        ManifestError: the folder cannot be used; names every problem.
        ValueError: an option is out of range, leaves a split empty, or the files cannot be written.
    """
    options = options or PrepareOptions()
    if options.min_labels < 0:
        raise ValueError(f"min_labels={options.min_labels} is negative: 0 keeps every picture")
    left_out: LeftOut | None = [] if options.missing == "skip" else None
    rows = folder_rows(kind, str(folder), SPLITS, options.folder, left_out=left_out, on_progress=on_progress)
    pictures, unlabelled, few = Counter[str](), Counter[str](), Counter[str]()

    def kept(rows: Iterable[ManifestRow]) -> Iterator[ManifestRow]:
        for row in rows:
            if len(row.labels) < options.min_labels:
                few[row.split] += 1
                continue
            pictures[row.split] += 1
            unlabelled[row.split] += not row.labels
            yield row
        empty = [split for split in SPLITS if not pictures[split]]
        if empty:
            kept_by = f"min_labels={options.min_labels}, missing='{options.missing}'"
            raise ValueError(f"{kept_by}: no picture is left in split '{empty[0]}': leave out fewer")

    with replacing(record_path(out)) as record:
        write_manifest(kept(rows), out)
        found = Prepared(
            kind,
            classes_of(kind),
            {split: pictures[split] for split in SPLITS},
            {split: unlabelled[split] for split in SPLITS},
            {split: few[split] for split in SPLITS},
            len(left_out or ()),
            options,
        )
        with out.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        values = {"schema": SCHEMA, "release": RELEASE, "manifest": out.name, "sha256": digest, **found.to_dict()}
        record.write(json.dumps(values, indent=2).encode() + b"\n")
    return found


def record_path(out: Path) -> Path:
    """Where the record of a manifest lies."""
    return out.with_name(f"{out.name}.json")


def write_classes(classes: Iterable[str], unseen: Iterable[str], path: Path) -> None:
    """Write the lines of a `job.toml` that list the classes. Raises ValueError when the file cannot be written."""
    lines = [_toml_list("classes", classes)]
    unseen = list(unseen)
    if unseen:
        lines.append(_toml_list("unseen_classes", unseen))
    with replacing(path) as file:
        file.write("".join(lines).encode())


def _toml_list(name: str, words: Iterable[str]) -> str:
    return f"{name} = [\n" + "".join(f"  {json.dumps(word)},\n" for word in words) + "]\n"
