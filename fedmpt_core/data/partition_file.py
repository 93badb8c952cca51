"""A partition as a file, so that all runs and methods split a data set alike.

    {"schema": 1, "kind": "features", "seed": 0, "alpha": null, "backbone": "9f..", "records": R, "digest": "a3..",
     "sites": [[0, 3, ..], [1, 2, ..], ..]}

`digest` names the list of records: every picture's path below the folder that all of them share, in order, and its
group. So the file fits the same list on another machine, and nothing else. Must never be applied to another list:
indices would silently mean other records.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from fedmpt_core.common.files import write_whole
from fedmpt_core.config.datasets import Division
from fedmpt_core.data.pictures import Dataset

SCHEMA = 1
_KEYS = ("schema", "kind", "seed", "alpha", "backbone", "records", "digest", "sites")


class PartitionError(ValueError):
    """A partition that cannot be used: damaged, of another list of records, or for another number of sites."""


@dataclass(frozen=True)
class Partition:
    """Which site has which records, and how that came about.

    Attributes:
        kind: how the records were divided.
        seed: that fixed it.
        parts: K arrays of ascending int64 indices, none empty, every record in exactly one.
        alpha: concentration of the Dirichlet distribution; None for the other kinds.
        backbone: digest of the frozen towers whose features were clustered; empty for the other kinds.
    """

    kind: Division
    seed: int
    parts: tuple[np.ndarray, ...]
    alpha: float | None = None
    backbone: str = ""


def save_partition(partition: Partition, dataset: Dataset, path: Path) -> None:
    """Write the file, whole or not at all; one that is there is replaced.

    Raises:
        PartitionError: the parts do not fit the records.
        ValueError: the file cannot be written.
    """
    _check(partition.parts, dataset, path.name)
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": partition.kind,
        "seed": partition.seed,
        "alpha": partition.alpha,
        "backbone": partition.backbone,
        "records": len(dataset),
        "digest": record_list_digest(dataset),
        "sites": [part.tolist() for part in partition.parts],
    }
    write_whole(path, json.dumps(values).encode() + b"\n")


def load_partition(path: Path, dataset: Dataset) -> Partition:
    """Read a partition of exactly these records.

    Raises:
        PartitionError: the file is missing, damaged, of a later release or of another list of records.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PartitionError(f"{path}: no such file: make it with `fedmpt partition`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PartitionError(f"{path}: cannot be read ({error}): make it again with `fedmpt partition`") from None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA or set(values) != set(_KEYS):
        raise PartitionError(f"{path}: is not a partition of schema {SCHEMA}: make it again with `fedmpt partition`")
    if values["records"] != len(dataset) or values["digest"] != record_list_digest(dataset):
        raise PartitionError(
            f"{path}: was made of another list of {values['records']} training records, here are {len(dataset)}: make "
            "one of this list with `fedmpt partition`"
        )
    alpha = values["alpha"]
    fits = (
        values["kind"] in get_args(Division)
        and type(values["seed"]) is int
        and (alpha is None or type(alpha) in (int, float))
        and type(values["backbone"]) is str
        and isinstance(values["sites"], list)
        and all(isinstance(site, list) and all(type(i) is int for i in site) for site in values["sites"])
    )
    if not fits:
        raise PartitionError(f"{path}: a value has the wrong type: make it again with `fedmpt partition`")
    parts = tuple(np.array(site, np.int64) for site in values["sites"])
    _check(parts, dataset, str(path))
    return Partition(values["kind"], values["seed"], parts, alpha, values["backbone"])


def record_list_digest(dataset: Dataset) -> str:
    """SHA-256 hex of the pictures' paths below their common folder, and their groups, in order."""
    names = [picture.name for picture in dataset.pictures]
    folder = os.path.commonpath([str(Path(name).parent) for name in names]) if names else ""
    groups = dataset.groups or ("",) * len(names)
    lines = [json.dumps([os.path.relpath(n, folder or "."), g]) for n, g in zip(names, groups, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check(parts: tuple[np.ndarray, ...], dataset: Dataset, where: str) -> None:
    flat = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    if not parts or any(not len(part) for part in parts) or not np.array_equal(np.sort(flat), np.arange(len(dataset))):
        raise PartitionError(f"{where}: does not give every record to exactly one site, and every site some")
    if dataset.groups is not None:
        owner: dict[str, int] = {}
        for site, part in enumerate(parts):
            for i in part:
                if owner.setdefault(dataset.groups[i], site) != site:
                    raise PartitionError(
                        f"{where}: gives the records of group {dataset.groups[i]!r} to two sites: groups stay together"
                    )
