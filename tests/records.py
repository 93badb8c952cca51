"""Records as a site loads them, and the lines of a manifest."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmpt_core.config.datasets import PublicName
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import DataConfig
from fedmpt_core.data.manifest import load_rows
from fedmpt_core.data.manifest_rows import ManifestRow, Problems, parse
from fedmpt_core.data.pictures import Dataset
from fedmpt_core.data.source import whole_split


def load_manifest(path: Path, classes: Sequence[str], split: str, root: Path | None = None, **options: Any) -> Dataset:
    problems = Problems(path.name)
    rows = parse(path, problems)
    return load_rows(rows, classes, split, root=root or path.parent, problems=problems, **options)


def read_rows(path: Path) -> list[ManifestRow]:
    problems = Problems(path.name)
    rows = parse(path, problems)
    problems.refuse_any()
    return rows


def load_folder(kind: PublicName, folder: Path, classes: Sequence[str], split: Any, *, verify: bool = False) -> Dataset:
    job, data = JobConfig("x", tuple(classes)), DataConfig(source=kind, path=str(folder))
    return whole_split(job, data, split, verify=verify)
