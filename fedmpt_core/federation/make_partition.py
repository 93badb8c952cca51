"""Making a partition once, for all simulated sites and all runs: by what pictures look like, or by their labels.

For simulation only: it needs all records of a data set in one place.
"""

import numpy as np

from fedmpt_core.common.progress import Progress
from fedmpt_core.config.datasets import Division
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.data import partition
from fedmpt_core.data.partition_file import Partition
from fedmpt_core.data.pictures import Dataset
from fedmpt_core.data.source import NoData, whole_split
from fedmpt_core.federation.site.session import open_cache
from fedmpt_core.model.backbone.load import load_backbone
from fedmpt_core.model.device import pick_device
from fedmpt_core.model.features.cache import PatchFeatures


def divide(
    job: JobConfig,
    site: SiteConfig,
    kind: Division,
    sites: int,
    *,
    alpha: float = 0.5,
    on_progress: Progress | None = None,
) -> tuple[Partition, Dataset]:
    """Divide a data set's training records.

    Args:
        job: its seed fixes the partition; its backbone's features are clustered where `kind` says so.
        site: one of the simulated sites; its data set, device and feature cache.
        kind: how to divide.
        sites: number of parts.
        alpha: for `dirichlet`.
        on_progress: called with (pictures done, pictures in all) while features are computed.

    Returns:
        The partition and the records that it divides.

    Raises:
        ValueError: the data cannot be used or divided so.
    """
    if site.data.source == "scenes":
        raise ValueError("source='scenes': every site composes scenes of its own, there is nothing to divide")
    dataset = whole_split(job, site.data, "train")
    if not len(dataset):
        raise NoData(f"source='{site.data.source}' path='{site.data.path}' holds no training picture")
    vectors, digest = None, ""
    if kind == "features":
        backbone = load_backbone(job.backbone).to(pick_device(site.device))
        vectors = mean_features(open_cache(site).features(dataset.pictures, backbone, on_progress=on_progress))
        digest = backbone.digest()
    parts = partition.divide(dataset, kind, sites, job.seed, alpha=alpha, vectors=vectors)
    return Partition(kind, job.seed, parts, alpha if kind == "dirichlet" else None, digest), dataset


def mean_features(features: PatchFeatures, batch_size: int = 256) -> np.ndarray:
    """(R, D) float32 means over the patches of R records."""
    rows = [features.batch(range(i, min(i + batch_size, len(features)))) for i in range(0, len(features), batch_size)]
    return np.concatenate([batch.mean(1).numpy() for batch in rows])
