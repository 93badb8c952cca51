"""What several manifests hold between them: labels, and for each site what a first job must know of it."""

import os
from collections.abc import Sequence
from pathlib import Path

from fedmpt_core.config.starter import SiteStart
from fedmpt_core.data.manifest_rows import ManifestRow, Problems, parse


def survey(manifests: Sequence[Path]) -> tuple[list[SiteStart], tuple[str, ...]]:
    """The sites, named by their manifests' folders (or the files where those are alike), and all labels, sorted.

    Args:
        manifests: one for each site, at least one.

    Raises:
        ManifestError: one cannot be read; names every problem.
        ValueError: fewer than two labels.
    """
    folders = [path.absolute().parent.name for path in manifests]
    own = folders if len(set(folders)) == len(folders) else [path.stem for path in manifests]
    names = [_site_name(name) for name in own]
    if len(set(names)) < len(names):
        names = [f"site-{number}" for number in range(1, len(names) + 1)]
    sites, labels = [], set[str]()
    for name, path in zip(names, manifests, strict=True):
        problems = Problems(str(path))
        rows = parse(path, problems)
        problems.refuse_any()
        labels |= {label for row in rows for label in (*row.labels, *row.unknown) if label}
        train = sum(row.split == "train" for row in rows)
        judges = any(row.split == "test" for row in rows)
        sites.append(SiteStart(name, str(path.absolute()), _root(path, rows), train, judges))
    if len(labels) < 2:
        raise ValueError(f"the manifests name {len(labels)} labels: a job needs at least two")
    return sites, tuple(sorted(labels))


def _site_name(text: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "-" for c in text).strip("-") or "site"


def _root(path: Path, rows: Sequence[ManifestRow]) -> str:
    """The folder that holds manifest and pictures where a relative path leads out of the manifest's; or nothing."""
    folder = os.path.realpath(path.parent)
    relative = [os.path.realpath(Path(folder, row.path)) for row in rows if not Path(row.path).is_absolute()]
    if all(Path(place).is_relative_to(folder) for place in relative):
        return ""
    return os.path.commonpath([folder, *(os.path.dirname(place) for place in relative)])  # noqa: PTH120 - of strings
