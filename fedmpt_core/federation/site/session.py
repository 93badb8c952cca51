"""A site's working state during a job: data, features, model and privacy ledger, behind three calls.

`prepare` checks the data and computes missing patch features, `train` answers a round, `evaluate` scores the global
model. The session knows nothing of how it is called; FLARE's trainer process and the tests both use it.

Under differential privacy a round is charged to the site's ledger before its first step, and what it released is
noted there before it is handed on.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from fedmpt_core.common.progress import StageProgress
from fedmpt_core.common.release import package_versions
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.data.pictures import Dataset
from fedmpt_core.data.source import load_split
from fedmpt_core.federation.joined import Joined
from fedmpt_core.federation.site.admission import check_site, weight_of
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.backbone.load import load_backbone
from fedmpt_core.model.device import DeviceFull, device_name, pick_device
from fedmpt_core.model.features.cache import FeatureCache, PatchFeatures
from fedmpt_core.model.fedmpt.fedmpt import zero_shot_model
from fedmpt_core.model.registry import build_model, scoring_model
from fedmpt_core.privacy.charged_training import ChargedTraining, require_apart, units_of
from fedmpt_core.privacy.ledger.chain import LedgerHead
from fedmpt_core.training.evaluation import Split, evaluate
from fedmpt_core.training.local import TrainingRecords, local_update

T = TypeVar("T")


@dataclass(frozen=True)
class SiteRecords:
    """A site's records with their patch features; never leaves the site.

    Attributes:
        train: None for a site that only scores.
        val: records to choose thresholds on, or None.
        test: records to score, or None.
    """

    train: TrainingRecords | None = None
    val: Split | None = None
    test: Split | None = None


@dataclass(frozen=True)
class SiteUpdate:
    """What a site hands on after a round.

    Attributes:
        vector: (d,) float32, local minus global parameters; (d,) uint32 words of a noisy sum where noise is shared.
        block: the same in wire bytes.
        steps: optimiser steps done.
        privacy: `epsilon` of the job so far, its `delta`, and the ledger's `head`; empty without differential
            privacy.
        metrics: figures of training: the mean `loss` over the steps; empty under differential privacy, which does not
            look at it.
    """

    vector: np.ndarray
    block: bytes
    steps: int
    privacy: dict[str, Any]
    metrics: dict[str, float]


class SiteSession:
    """One site in one job.

    Example:
        The demo's second site with eight of its scenes, in its first round. Nothing but the update and what was spent
        leaves it.

        >>> from dataclasses import replace
        >>> from fedmpt_core.config.toml import load_job, load_sites
        >>> from fedmpt_core.federation.site.session import SiteSession
        >>> from fedmpt_core.privacy.ledger.budget import resolved
        >>> from fedmpt_core.privacy.ledger.site_ledger import create_ledger
        >>> job = resolved(load_job("jobs/demo/job.toml"))  # with the noise that its epsilon needs
        >>> site = load_sites("jobs/demo/site.toml")["site-2"]
        >>> policy = replace(site.privacy, ledger="ledgers")
        >>> site = replace(site, data=replace(site.data, train=8), privacy=policy, cache_dir="features")
        >>> ledger = create_ledger(policy, "site-2", kit=None)  # once for all jobs on the data set
        >>> session = SiteSession(job, site, "site-2")
        >>> ready = session.prepare()
        >>> update = session.train(ready.initial, round_number=1)
        >>> update.vector.shape, update.steps, round(update.privacy["epsilon"], 1)
        ((36870,), 8, 3.8)
    """

    def __init__(
        self,
        job: JobConfig,
        site: SiteConfig,
        name: str,
        *,
        run_id: str = "local",
        kit: Path | None = None,
        backbone: Backbone | None = None,
    ) -> None:
        """Asks the site's policy and ledger, then loads the frozen towers and builds the model; touches no picture.

        Args:
            job: the agreed job.
            site: what this site has and allows.
            name: the site's name; makes its batch order its own.
            run_id: name of this run of the job in the ledger.
            kit: folder with `client.key` and `client.crt`, which sign the ledger; None in a simulation.
            backbone: the job's frozen towers, where several sites of one process share them; None loads them.

        Raises:
            PrivacyRefused: the site's policy or what is left of its budget does not allow the job.
            ValueError: the ledger, device, weights, conditions or class names cannot be used.
        """
        self.job, self.site, self.name = job, site, name
        self._policy = check_site(job, site, has_kit=kit is not None)
        self._budget = ChargedTraining.open(job, site, name, run_id, kit) if job.privacy.private else None
        if site.threads:
            torch.set_num_threads(site.threads)
        self.device = pick_device(site.device)
        self.backbone = (backbone or load_backbone(job.backbone)).to(self.device)
        self.model = build_model(self.backbone, job.classes, job.model, job.seed).to(self.device)
        self._judge = scoring_model(self.backbone, job, self.model).to(self.device)
        if self._budget:
            self._budget.test_mechanism(self.model)
        self._data = SiteRecords()

    def load(self, on_progress: StageProgress | None = None) -> SiteRecords:
        """Check the data and compute missing patch features.

        Args:
            on_progress: called with (split, done, total) while features are computed.

        Raises:
            ValueError: the data cannot be used.
        """
        unseen = self.job.unseen_classes
        splits = {s: load_split(self.job, self.site.data, s, unseen=unseen) for s in ("train", "val", "test")}
        train, val, test = splits.values()
        units = None if train is None else units_of(train, self.job.privacy.unit, (val, test))
        features = {s: self._features(d, s, on_progress) for s, d in splits.items() if d is not None}
        if train is not None and self.job.privacy.private:
            known = {s: (d, features[s].digests()) for s, d in (("val", val), ("test", test)) if d is not None}
            require_apart(train, features["train"].digests(), known)
        if test is not None and not (test.targets == 1).any():
            logging.getLogger(__name__).warning("no test picture shows a label of the job: this site gives no figures")
            test = None
        return SiteRecords(
            None if train is None or units is None else TrainingRecords(features["train"], train.targets, units),
            None if val is None else Split(features["val"], val.targets),
            None if test is None else Split(features["test"], test.targets),
        )

    def prepare(self, on_progress: StageProgress | None = None, *, data: SiteRecords | None = None) -> Joined:
        """Take the site's records and describe the model.

        Args:
            on_progress: as in `load`.
            data: the records, if they are loaded already.

        Raises:
            ValueError: the data cannot be used.
        """
        self._data = data or self.load(on_progress)
        if self._data.train and self._budget:
            self._budget.know_records(self._data.train.features.digests())
        return Joined(
            self.model.layout(),
            self.model.vector(),
            self._data.test is not None,
            self.backbone.name,
            self.backbone.is_stand_in,
            self.backbone.digest(),
            device_name(self.device),
            package_versions(),
            weight_of(self.job, self._policy),
        )

    def train(
        self,
        state: np.ndarray,
        round_number: int,
        attempt: int = 0,
        *,
        known_head: Mapping[str, Any] | None = None,
    ) -> SiteUpdate:
        """This site's update for a round.

        Without differential privacy the same state, round and records give the same update; with it, every call draws
        new noise and is charged.

        Args:
            state: (d,) float32 global parameters.
            round_number: from 1.
            attempt: from 0.
            known_head: the newest ledger entry of this site that the server has seen, as `LedgerHead.to_dict` gives it.

        Raises:
            PrivacyRefused: the budget does not allow the round, or the ledger was cut; nothing was trained.
            ValueError: `prepare` was not called, or the ledger cannot be written.
            FloatingPointError: training diverged.
        """
        records = self._data.train
        if records is None:
            raise ValueError("train before prepare: the site's records are not loaded")
        if self._budget:
            budget = self._budget
            if known_head:
                budget.check_head(LedgerHead.from_dict(known_head))
            reservation = budget.reserve(round_number, attempt)
            # one reservation pays for one release: a run that the device broke off is seen by nobody
            update = self._with_room(lambda: budget.train(self.model, records, state=state, round_number=round_number))
            layout = self.model.layout()
            encode = layout.encode_words if self.job.privacy.distributed else layout.encode
            block = encode(update.vector)
            privacy = budget.commit(reservation, block)
            return SiteUpdate(update.vector, block, update.steps, privacy, {})
        update = self._with_room(
            lambda: local_update(
                self.model,
                records.features,
                records.targets,
                state=state,
                round_number=round_number,
                training=self.job.training,
                loss=self.job.loss,
                generator=np.random.default_rng([self.job.seed, round_number, _stable_number(self.name)]),
            )
        )
        metrics = {"loss": float(np.mean(update.losses))}
        return SiteUpdate(update.vector, self.model.layout().encode(update.vector), update.steps, {}, metrics)

    def end(self) -> None:
        """The job asks for no more: what it holds of the site's budget is free for others. Raises LedgerError."""
        if self._budget:
            self._budget.end()

    def weight(self) -> float:
        """This site's weight in the average: 1, or the number of units it declares when the job weighs by records."""
        return float(weight_of(self.job, self._policy))

    def evaluate(self, state: np.ndarray, *, zero_shot: bool = False) -> dict[str, Any] | None:
        """Figures of `state` on this site's test split, or None when it has none.

        With `zero_shot`, also those of the prompt "a photo of a CLASS." on the untouched towers, under that name.
        """
        if self._data.test is None:
            return None
        self._judge.load_vector(state)
        test, val, unseen = self._data.test, self._data.val, len(self.job.unseen_classes)

        def figures() -> dict[str, Any]:
            figures = evaluate(self._judge, test, val, unseen=unseen)
            if zero_shot:
                plain = zero_shot_model(self.backbone, self.job.all_classes, self.job.model).to(self.device)
                figures["zero_shot"] = evaluate(plain, test, val, unseen=unseen)
            return figures

        return self._with_room(figures)

    def _features(self, dataset: Dataset, split: str, on_progress: StageProgress | None) -> PatchFeatures:
        report = partial(on_progress, split) if on_progress else None
        cache = open_cache(self.site)
        return self._with_room(lambda: cache.features(dataset.pictures, self.backbone, on_progress=report))

    def _with_room(self, work: Callable[[], T]) -> T:
        """Do some work, on the CPU from now on when the GPU is full and the site's `device` is `auto`."""
        try:
            return work()
        except DeviceFull:
            if self.device.type == "cpu" or self.site.device != "auto":
                raise
        logging.getLogger(__name__).warning("%s has no room for a single record: on the CPU from now on", self.device)
        self.device = torch.device("cpu")
        self.backbone, self.model = self.backbone.to(self.device), self.model.to(self.device)
        self._judge = self._judge.to(self.device)
        return work()


def open_cache(site: SiteConfig) -> FeatureCache:
    """The site's patch-feature cache."""
    return FeatureCache(site.cache, max_bytes=int(site.cache_max_gib * 2**30))


def _stable_number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
