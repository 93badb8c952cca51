"""Towers and records of a series of runs: loaded once, shared by all sites and by all runs on the same pictures.

A federation of many simulated sites then costs its patch features once, and one pair of towers. The records of the last
seed and setting are kept, so run what shares them one after the other.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fedmpt_core.benchmark.judging import HeldOut
from fedmpt_core.benchmark.spurious import spurious_pairs
from fedmpt_core.common.progress import StageProgress
from fedmpt_core.config.job import BackboneConfig, JobConfig
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.data.masks import drop_positives
from fedmpt_core.data.partition import divide, sites_for
from fedmpt_core.data.pictures import Dataset
from fedmpt_core.data.scenes import CLASSES, SceneConfig, co_occurrence, scenes
from fedmpt_core.data.source import load_split
from fedmpt_core.federation.site.session import SiteRecords
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.backbone.load import load_backbone
from fedmpt_core.model.device import pick_device
from fedmpt_core.model.features.cache import FeatureCache, PatchFeatures
from fedmpt_core.privacy.charged_training import units_of
from fedmpt_core.training.evaluation import Split
from fedmpt_core.training.local import TrainingRecords

_MAX_BYTES = 2**40  # the bound is the disk's here; a site's own is in its file


@dataclass(frozen=True)
class Records:
    """One federation's records.

    Attributes:
        sites: what each site has and allows; where records were shared out anew, the sites that got them.
        data: their training records.
        held_out: what models are judged on.
    """

    sites: dict[str, SiteConfig]
    data: dict[str, SiteRecords]
    held_out: HeldOut


class SharedRecords:
    """Everything of a benchmark that is the same in several runs."""

    def __init__(
        self,
        cache: Path,
        on_progress: StageProgress | None = None,
        *,
        threads: int = 1,
        load: Callable[[BackboneConfig], Backbone] = load_backbone,
    ) -> None:
        """Opens the cache.

        Args:
            cache: folder of patch features.
            on_progress: called with (what, done, total) while features are computed.
            threads: CPU threads of everything that runs here, >= 1.
            load: makes a job's frozen towers.
        """
        torch.set_num_threads(threads)
        self.device = pick_device("auto")
        self._cache, self._progress = FeatureCache(cache, max_bytes=_MAX_BYTES), on_progress
        self._load_backbone = load
        self._backbone: tuple[BackboneConfig, Backbone] | None = None
        self._kept: tuple[object, Records] | None = None

    def backbone(self, config: BackboneConfig) -> Backbone:
        """The frozen towers. Raises ValueError when they cannot be built."""
        if self._backbone is None or self._backbone[0] != config:
            self._backbone = config, self._load_backbone(config).to(self.device)
        return self._backbone[1]

    def records(self, job: JobConfig, sites: Mapping[str, SiteConfig], heterogeneity: float | None = None) -> Records:
        """Training records by site, and what models are judged on.

        Args:
            job: classes, seed and towers.
            sites: where their pictures come from.
            heterogeneity: t in (0, 1]: the records of all sites are pooled and shared out again to round(t C) sites by
                clusters of their labels (the paper's heterogeneity ratio); None leaves them where they are.

        Raises:
            ValueError: data that cannot be used, or no site that scores.
        """
        key = (job.classes, job.seed, job.backbone, job.privacy.unit, dict(sites), heterogeneity)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._load(job, dict(sites), heterogeneity)
        return self._kept[1]

    def _load(self, job: JobConfig, sites: dict[str, SiteConfig], heterogeneity: float | None) -> Records:
        whole = {name: dataclasses.replace(site.data, drop_positives=0.0) for name, site in sites.items()}
        train = {name: _present(load_split(job, data, "train")) for name, data in whole.items()}
        judges = [name for name, data in whole.items() if data.evaluate]
        if not judges:
            raise ValueError("no site scores: give one site a test split and evaluate = true")
        drop = sites[judges[0]].data
        if len({(s.data.drop_positives, s.data.dropped) for s in sites.values()}) > 1:
            raise ValueError("drop_positives differs between sites: a benchmark drops the same share everywhere")
        held_out = self._held_out(job, sites, judges[0], train)
        pictures = [picture for dataset in train.values() for picture in dataset.pictures]
        features = self._features(job, "train", pictures)
        starts = np.cumsum([0, *(len(d) for d in train.values())])
        parts = {n: np.arange(a, b) for n, a, b in zip(train, starts[:-1], starts[1:], strict=True)}
        pool = _joined(job.classes, list(train.values()))
        if heterogeneity is not None:
            clusters = divide(pool, "labels", sites_for(heterogeneity, len(job.classes)), job.seed)
            parts = {f"cluster-{k + 1}": part for k, part in enumerate(clusters)}
            judge, policy = sites[judges[0]], sites[judges[0]].privacy
            sites = {  # each declares the number of records it was dealt
                name: dataclasses.replace(judge, privacy=policy and dataclasses.replace(policy, units=len(part)))
                for name, part in parts.items()
            }
        pool = drop_positives(pool, drop.drop_positives, job.seed, become=drop.dropped)
        data = {}
        for name, part in parts.items():
            mine = pool.take(part)
            units = units_of(mine, job.privacy.unit, ())
            data[name] = SiteRecords(TrainingRecords(features.take(part), mine.targets, units))
        placed = {n: dataclasses.replace(s, device=str(self.device), threads=0) for n, s in sites.items()}
        return Records(placed, data, held_out)

    def _held_out(
        self, job: JobConfig, sites: Mapping[str, SiteConfig], judge: str, train: Mapping[str, Dataset]
    ) -> HeldOut:
        val, test = (load_split(job, sites[judge].data, split) for split in ("val", "test"))
        test = _present(test)
        correlated, pairs = None, spurious_pairs([dataset.targets for dataset in train.values()], test.targets)
        if all(site.data.source == "scenes" for site in sites.values()):
            column = [job.classes.index(c) for c in CLASSES]
            drawn, together = [], []
            for site in sites.values():
                data = site.data
                config = SceneConfig(seed=job.seed, spurious_strength=data.spurious_strength)
                count = sites[judge].data.test // len(sites)
                own = scenes(config, site=data.share - 1, sites=data.shares, split="correlated", count=count)
                drawn.append(own.of(job.classes))
                together.append(np.argwhere(np.triu(co_occurrence(config, data.share - 1))))
            correlated = self._split(job, "correlated test", _joined(job.classes, drawn))
            pairs = np.array(column)[np.concatenate(together)]
        return HeldOut(
            None if val is None else self._split(job, "val", val),
            self._split(job, "test", test),
            correlated,
            pairs,
        )

    def _split(self, job: JobConfig, name: str, dataset: Dataset) -> Split:
        return Split(self._features(job, name, dataset.pictures), dataset.targets)

    def _features(self, job: JobConfig, name: str, pictures: Sequence) -> PatchFeatures:
        report = partial(self._progress, name) if self._progress else None
        return self._cache.features(pictures, self.backbone(job.backbone), on_progress=report)


def _joined(classes: Sequence[str], datasets: Sequence[Dataset]) -> Dataset:
    grouped = all(d.groups is not None for d in datasets)
    return Dataset(
        tuple(classes),
        tuple(p for d in datasets for p in d.pictures),
        np.concatenate([d.targets for d in datasets]),
        tuple(g for d in datasets for g in d.groups or ()) if grouped else None,
    )


def _present(dataset: Dataset | None) -> Dataset:
    if dataset is None:
        raise ValueError("a split is empty: every site needs training pictures, the one that scores test pictures")
    return dataset
