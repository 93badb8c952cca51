"""From a site's settings to its records: one function per split, whatever the pictures come from.

Training records alone are split over simulated sites and have labels dropped; `val` and `test` keep every label that
the data set gives them. Classes that a job leaves unseen are in no training target.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import DataConfig
from fedmpt_core.data import manifest, partition
from fedmpt_core.data.manifest_rows import Problems, parse
from fedmpt_core.data.masks import drop_positives
from fedmpt_core.data.partition_file import PartitionError, load_partition
from fedmpt_core.data.pictures import Dataset
from fedmpt_core.data.public import registry
from fedmpt_core.data.scenes import SceneConfig, scenes

Split = Literal["train", "val", "test"]


class NoData(ValueError):
    """A site without pictures to train on."""


def load_split(
    job: JobConfig, data: DataConfig, split: Split, *, unseen: Sequence[str] = (), verify: bool = False
) -> Dataset | None:
    """The records of one split at one site.

    Args:
        job: fixes the classes and the seed of partitions, dropped labels and embedded scenes.
        data: the site's settings.
        split: `train`, `val` or `test`.
        unseen: classes beside the job's that are only scored: `val` and `test` have a column for each behind those of
            the job's classes, `train` has none.
        verify: decode every picture now, so that an unreadable one is named before any work is spent.

    Returns:
        The records, or None when the site holds none of that split and need not.

    Raises:
        ValueError: the data cannot be used; every problem is named.
        NoData: no training record.
    """
    if split != "train" and not data.evaluate:
        return None
    dataset = whole_split(job, data, split, unseen=unseen, verify=verify)
    if _shared_out(data, split) and len(dataset):
        dataset = dataset.take(_parts(job, data, dataset)[data.share - 1])
        if verify or data.on_bad_image == "skip":
            dataset = manifest.verified(dataset, data.path, on_bad_image=data.on_bad_image)
    if not len(dataset):
        if split == "train":
            raise NoData(
                f"source='{data.source}' path='{data.path}' holds no training picture: a site needs at least one"
            )
        return None
    if split == "train":
        dataset = drop_positives(dataset, data.drop_positives, job.seed, become=data.dropped)
    return dataset


def whole_split(
    job: JobConfig, data: DataConfig, split: Split, *, unseen: Sequence[str] = (), verify: bool = False
) -> Dataset:
    """The records of one split before they are shared out, all labels in place; possibly none.

    Args:
        job: as in `load_split`.
        data: as in `load_split`.
        split: as in `load_split`.
        unseen: as in `load_split`.
        verify: as in `load_split`. Records that will be shared out are neither verified nor skipped here: all sites
            must share out the same list, and each looks at its own pictures only.

    Raises:
        ValueError: the data cannot be used; every problem is named.
    """
    classes = (*job.classes, *unseen)
    shared = _shared_out(data, split)
    if data.source == "scenes":
        dataset = _scenes(job, data, split, classes)
    else:
        path = Path(data.path)
        if data.source == "manifest":
            problems, root, start = Problems(path.name), data.root or path.parent, path.parent
            rows = parse(path, problems)
        else:
            registry.require_classes(data.source, classes)
            problems, root, start = Problems(f"the {data.source} folder"), path, path
            rows = registry.folder_rows(data.source, path, (split,))
        dataset = manifest.load_rows(
            rows,
            classes,
            split,
            root=root,
            start=start,
            problems=problems,
            on_bad_image="refuse" if shared else data.on_bad_image,
            verify=verify and not shared,
            allow_empty=data.source == "manifest" and split != "train",
        )
    return dataset.of(job.classes) if split == "train" and unseen else dataset


def _shared_out(data: DataConfig, split: Split) -> bool:
    return split == "train" and data.shares > 1 and data.source != "scenes"


def _parts(job: JobConfig, data: DataConfig, dataset: Dataset) -> partition.Parts:
    if not data.partition_file:
        return partition.divide(dataset, data.partition, data.shares, job.seed, alpha=data.dirichlet_alpha)
    division = load_partition(Path(data.partition_file), dataset)
    if division.kind != data.partition:
        raise PartitionError(
            f"{data.partition_file}: divides by {division.kind}, the site's file says partition='{data.partition}': "
            "correct one of them"
        )
    if len(division.parts) != data.shares:
        raise PartitionError(
            f"{data.partition_file}: is for {len(division.parts)} sites, the site's file says shares={data.shares}: "
            "make another with `fedmpt partition`"
        )
    return division.parts


def _scenes(job: JobConfig, data: DataConfig, split: Split, classes: Sequence[str]) -> Dataset:
    count = {"train": data.train, "val": data.val, "test": data.test}[split]
    config = SceneConfig(seed=job.seed, spurious_strength=data.spurious_strength)
    dataset = scenes(config, site=data.share - 1, sites=data.shares, split=split, count=count)
    if set(dataset.classes) != set(classes):
        missing = sorted(set(dataset.classes) ^ set(classes))
        raise ValueError(
            f"classes differ from those of the embedded scenes ({', '.join(missing[:5])} ...): "
            f"a job on source = 'scenes' must list exactly {', '.join(dataset.classes)}"
        )
    return dataset.of(classes)
