"""From a site's settings to its records: one function per split, whatever the pictures come from."""

from typing import Literal

from fedmpt_core.config import JobConfig
from fedmpt_core.data import manifest, partition, voc
from fedmpt_core.data.pictures import Dataset
from fedmpt_core.data.scenes import SceneConfig, scenes
from fedmpt_core.site_config import DataConfig

Split = Literal["train", "val", "test"]


class NoData(ValueError):
    """A site without pictures to train on."""


def load_split(job: JobConfig, data: DataConfig, split: Split, *, verify: bool = False) -> Dataset | None:
    """The records of one split at one site.

    Args:
        job: fixes the classes and the seed of splits and embedded scenes.
        data: the site's settings.
        split: `train`, `val` or `test`.
        verify: decode every picture now, so that an unreadable one is named before any work is spent.

    Returns:
        The records, or None when the site holds none of that split and need not.

    Raises:
        ValueError: the data cannot be used; every problem is named.
        NoData: no training record.
    """
    if split != "train" and not data.evaluate:
        return None
    match data.source:
        case "scenes":
            dataset = _scenes(job, data, split)
        case "voc2007":
            dataset = voc.load_voc(data.path, job.classes, split, verify=verify)
            if split == "train" and data.shares > 1:
                split_by = partition.by_labels if data.partition == "labels" else partition.uniform
                dataset = dataset.take(split_by(dataset, data.shares, job.seed)[data.share - 1])
        case "manifest":
            dataset = manifest.load_manifest(
                data.path,
                job.classes,
                split,
                root=data.root or None,
                on_bad_image=data.on_bad_image,
                verify=verify,
                allow_empty=split != "train",
            )
    if not len(dataset):
        if split == "train":
            raise NoData(
                f"source='{data.source}' path='{data.path}' holds no training picture: a site needs at least one"
            )
        return None
    return dataset


def _scenes(job: JobConfig, data: DataConfig, split: Split) -> Dataset:
    count = {"train": data.train, "val": data.val, "test": data.test}[split]
    config = SceneConfig(seed=job.seed, spurious_strength=data.spurious_strength)
    dataset = scenes(config, site=data.share - 1, sites=data.shares, split=split, count=count)
    if dataset.classes != job.classes:
        missing = sorted(set(dataset.classes) ^ set(job.classes))
        raise ValueError(
            f"classes differ from those of the embedded scenes ({', '.join(missing[:5])} ...): "
            f"a job on source = 'scenes' must list exactly {', '.join(dataset.classes)}, in this order"
        )
    return dataset
