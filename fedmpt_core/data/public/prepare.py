"""From a data set's folder to a manifest, with a record of how: what was kept, what was left out, and why.

Two files appear, each whole or not at all: first the manifest, then beside it `NAME.json`, the record. Options that
leave pictures out are off unless asked for, and stand in the record: figures on a filtered set are of another set.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w

from fedmpt_core.common.files import file_digest, whole_file, write_whole
from fedmpt_core.common.progress import Progress
from fedmpt_core.common.release import RELEASE
from fedmpt_core.config.datasets import PublicName
from fedmpt_core.data.layouts import LayoutName, TableOptions, read_layout
from fedmpt_core.data.manifest_rows import SPLITS, ManifestRow, Problems, write_manifest
from fedmpt_core.data.public.folder import FolderOptions, LeftOut, present
from fedmpt_core.data.public.registry import DATASETS, folder_rows

SCHEMA = 1


@dataclass(frozen=True)
class PrepareOptions:
    """What to keep.

    Attributes:
        folder: how the data set is split.
        missing: `refuse` pictures that are not there, or `skip` them.
        test_share: of a lab's own layout that says no splits: share of the pictures that becomes `test`, (0, 1).
        table: of a lab's own table: its columns.
        min_labels: pictures with fewer labels are left out of every split, >= 0. The released FedMPT code does so with
            5 (COCO, NUS-WIDE) and 7 (MLRSNet) without saying it.
    """

    folder: FolderOptions = field(default_factory=FolderOptions)
    missing: Literal["refuse", "skip"] = "refuse"
    min_labels: int = 0
    test_share: float | None = None
    table: TableOptions | None = None


@dataclass(frozen=True)
class PreparedManifest:
    """What a manifest holds.

    Attributes:
        kind: the data set, or the layout.
        classes: its labels.
        pictures: number of pictures by split.
        unlabelled: those of them without any label, by split; they count as all-negative.
        few_labels: pictures left out by `min_labels`, by split.
        missing: listed pictures that are not there and were left out.
        options: that were asked for.
    """

    kind: PublicName | LayoutName
    classes: tuple[str, ...]
    pictures: dict[str, int]
    unlabelled: dict[str, int]
    few_labels: dict[str, int]
    missing: int
    options: PrepareOptions


def prepare(
    kind: PublicName | LayoutName,
    folder: Path,
    out: Path,
    options: PrepareOptions | None = None,
    *,
    on_progress: Progress | None = None,
) -> PreparedManifest:
    """Write the manifest of a data set.

    Args:
        kind: the data set, or how a lab keeps its own.
        folder: where it was unpacked; of a table, the file.
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
    rows, classes, unknown = _source(kind, folder, options, left_out, on_progress)
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

    with whole_file(record_path(out)) as record:
        write_manifest(kept(rows), out, unknown=unknown)
        prepared = PreparedManifest(
            kind,
            classes,
            {split: pictures[split] for split in SPLITS},
            {split: unlabelled[split] for split in SPLITS},
            {split: few[split] for split in SPLITS},
            len(left_out or ()),
            options,
        )
        facts = {"schema": SCHEMA, "release": RELEASE, "manifest": out.name, "sha256": file_digest(out)}
        record.write(json.dumps(facts | asdict(prepared), indent=2).encode() + b"\n")
    return prepared


def _source(
    kind: PublicName | LayoutName,
    folder: Path,
    options: PrepareOptions,
    left_out: LeftOut | None,
    on_progress: Progress | None,
) -> tuple[Iterator[ManifestRow], tuple[str, ...], bool]:
    """Rows, labels, and whether some are unknown."""
    if kind != "folders" and kind != "yolo" and kind != "table":
        rows = folder_rows(kind, folder, SPLITS, options.folder, left_out=left_out, on_progress=on_progress)
        return rows, DATASETS[kind].classes, False
    draw: dict[str, Any] = {
        "val_share": options.folder.val_share,
        "test_share": options.test_share,
        "seed": options.folder.seed,
    }
    layout = read_layout(kind, folder, options.table, **draw)
    problems = Problems(str(folder))

    def there() -> Iterator[ManifestRow]:
        yield from present(layout.rows, problems, left_out)
        problems.refuse_any()

    return there(), layout.classes, layout.has_unknown


def record_path(out: Path) -> Path:
    """Where the record of a manifest lies."""
    return out.with_name(f"{out.name}.json")


@dataclass(frozen=True)
class ClassFile:
    """The lines of a `job.toml` that list the classes, and the file they go to, which replaces no other.

    Attributes:
        path: the file.
        seen: C labels.
        unseen: labels that are scored and never trained, possibly none.
    """

    path: Path
    seen: tuple[str, ...]
    unseen: tuple[str, ...] = ()

    def check(self, out: Path | None = None) -> None:
        """That the file can be written; to be asked before the manifest is made.

        Args:
            out: the manifest that is about to be written.

        Raises:
            ValueError: the file is the manifest or its record, holds something else already, or has no folder.
        """
        if out and self.path.resolve() in (out.resolve(), record_path(out).resolve()):
            raise ValueError(
                f"{str(self.path)!r} is where the manifest or its record goes: name another file for the classes"
            )
        if not self.path.parent.is_dir():
            raise ValueError(f"{str(self.path)!r} cannot be written (its folder does not exist): name another place")
        if (self.path.is_symlink() or self.path.exists()) and not self._is_there():
            raise ValueError(
                f"{str(self.path)!r} exists and holds something else: name a new file for the classes, or move this "
                "one away"
            )

    def write(self) -> None:
        """Write the file, whole or not at all. Raises ValueError as `check` does, or when the disk refuses."""
        self.check()
        write_whole(self.path, self._lines())

    def _is_there(self) -> bool:
        try:
            return self.path.read_bytes() == self._lines()
        except OSError:
            return False

    def _lines(self) -> bytes:
        lists = {"classes": self.seen, "unseen_classes": self.unseen}
        return tomli_w.dumps({name: words for name, words in lists.items() if words}, indent=2).encode()
