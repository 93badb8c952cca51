"""What can be known before any work is spent: data of every site, frozen towers, size of a round, privacy spent.

Used by the command line before a simulation and by `fedmpt check`. Raises on the first site whose data cannot be
used, with every problem of that site named.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np

from fedmpt_core.common.progress import Progress
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.data.pictures import Picture
from fedmpt_core.data.source import load_split
from fedmpt_core.federation.site.admission import check_site
from fedmpt_core.federation.site.session import open_cache
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.base import TRAINED
from fedmpt_core.model.device import pick_device
from fedmpt_core.model.registry import build_model, scoring_model
from fedmpt_core.privacy.accounting.epsilon import Epsilons, cross_checked
from fedmpt_core.privacy.charged_training import require_apart, units_of
from fedmpt_core.privacy.ledger.budget import PrivacyRefused, Projection, planned_steps, project
from fedmpt_core.privacy.ledger.site_ledger import read_site_ledger
from fedmpt_core.privacy.mechanism.machinery import REAL, clip_groups
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from fedmpt_core.training.local import make_optimizer


@dataclass(frozen=True)
class SiteCounts:
    """A site's records per split. Shown locally, never sent.

    Attributes:
        units: training records, or groups of them where those are protected.
        positives: (C,) training records per label.
        unlabelled: training records without any label.
    """

    train: int
    val: int
    test: int
    units: int
    positives: np.ndarray
    unlabelled: int
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class ModelSize:
    """What is trained, on which towers.

    Attributes:
        groups: trained floats by group (`contexts`, `adapters`, `gate`, `head`).
        released: numbers that get noise in every step, for each choice of `model.trained`.
        backbone: the frozen towers' name.
        is_stand_in: whether they only stand in for CLIP.
    """

    groups: dict[str, int]
    released: dict[str, int]
    backbone: str
    is_stand_in: bool

    @property
    def floats(self) -> int:
        """All trained floats."""
        return sum(self.groups.values())

    @property
    def mib_per_update(self) -> float:
        """Payload of one update in MiB."""
        return self.floats * 4 / 2**20


def check_data(job: JobConfig, sites: Mapping[str, SiteConfig]) -> dict[str, SiteCounts]:
    """Load every site's records and decode every picture file.

    Raises:
        ValueError: a site's data cannot be used, with the site's name.
    """
    counted = {}
    for name, site in sites.items():
        try:
            unseen = job.unseen_classes
            splits = {s: load_split(job, site.data, s, unseen=unseen, verify=True) for s in ("train", "val", "test")}
            units = 0
            if splits["train"] is not None:
                units = units_of(splits["train"], job.privacy.unit, (splits["val"], splits["test"])).max() + 1
            if job.privacy.private and site.data.source != "scenes":  # composed anew, each one other
                known = {s: (d, [p.digest() for p in d.pictures]) for s, d in splits.items() if d is not None}
                require_apart(*known.pop("train"), known)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        counts = {s: len(d) if d else 0 for s, d in splits.items()}
        pictures = tuple(p for d in splits.values() if d for p in d.pictures)
        train = splits["train"]
        shown = train.targets == 1 if train else np.zeros((0, len(job.classes)), bool)
        rest = {"positives": shown.sum(0), "unlabelled": int((~shown.any(1)).sum()), "pictures": pictures}
        counted[name] = SiteCounts(**counts, units=int(units), **rest)
    if job.federation.evaluate_every and not any(d.test for d in counted.values()):
        raise ValueError(
            "no site holds test pictures: give one site a test split and evaluate = true, or the run could not be "
            "judged; federation.evaluate_every = 0 asks for no judgement"
        )
    return counted


def check_model(job: JobConfig, backbone: Backbone) -> ModelSize:
    """Build the model once, on the job's towers.

    Raises:
        ValueError: a condition or class that no prompt can be made of, or settings that do not fit what is trained.
    """
    model = build_model(backbone, job.classes, job.model, job.seed)
    groups = Counter[str]()
    for name, parameter in model.trainable_parameters().items():
        groups[name.split(".")[0]] += parameter.numel()
    text = model.text_features()  # also finds prompts that do not fit the tower's context
    make_optimizer(model, job.training, 1)  # finds rates that do not fit the trained groups
    scoring_model(backbone, job, model)  # finds unseen classes where numbers are trained per class
    if job.privacy.private:
        mechanism = Mechanism.of(job)
        private = REAL.gradients(mechanism, model, job).private
        clip_groups(private, mechanism)  # finds bounds that do not fit the trained groups
    sizes = model.group_sizes()
    if job.privacy.engine == "feature_space" and sizes["contexts."]:
        sizes["contexts."] = text.numel()
    choices = TRAINED if job.model.method == "fedmpt" else {"all": TRAINED["all"]}
    released = {choice: sum(sizes.get(part, 0) for part in parts) for choice, parts in choices.items()}
    return ModelSize(groups, released, backbone.name, backbone.is_stand_in)


def warnings_of(job: JobConfig) -> list[str]:
    """What is allowed and seldom meant, a sentence each."""
    if job.privacy.private and not job.federation.max_failed_rounds:
        return [
            "federation.max_failed_rounds = 0: the first round that fails ends the job, and to go on costs more than "
            "the job's epsilon, as the failed round was charged: allow 1 or more"
        ]
    return []


@dataclass(frozen=True)
class SitePlan:
    """What a job does to one site's budget.

    Attributes:
        projection: epsilon of the job, and of the data set with everything before it, against the cap.
        signal_to_noise: for each choice of `model.trained` the best case of one step: the norm of the clipped sum,
            were all gradients of an expected batch aligned, over the norm of the noise.
        units: that the site declares, from which that was worked out.
    """

    projection: Projection
    signal_to_noise: dict[str, float]
    units: int


@dataclass(frozen=True)
class PrivacyPlan:
    """What a job spends in all, `steps` steps with failed attempts, by several accountants; and by site."""

    steps: int
    epsilons: Epsilons
    sites: dict[str, SitePlan]


def check_privacy(job: JobConfig, sites: Mapping[str, SiteConfig], size: ModelSize) -> PrivacyPlan | None:
    """Hold a job against every site's policy and ledger; None when it trains without differential privacy.

    Raises:
        PrivacyRefused: a site would refuse the job, with the site's name.
        ValueError: a ledger cannot be read, or the accountants disagree.
    """
    plans: dict[str, SitePlan] = {}
    for name, site in sites.items():
        try:
            check_site(job, site, has_kit=None)
            if site.privacy is None or not job.privacy.private:
                continue
            entries = read_site_ledger(site.privacy, None) if site.privacy.ledger else ()
            projection = project(job, site.privacy, entries, "planned")
        except PrivacyRefused as error:
            raise PrivacyRefused(f"{name}: {error}") from None
        noise = job.privacy.noise_multiplier or 0.0
        batch = job.privacy.sample_rate * site.privacy.units
        ratios = {choice: batch / (noise * sqrt(d)) for choice, d in size.released.items() if d}
        plans[name] = SitePlan(projection, ratios, site.privacy.units)
    if not job.privacy.private:
        return None
    plan = Mechanism.of(job).steps(planned_steps(job))
    return PrivacyPlan(plan.count, cross_checked([plan], job.privacy.delta), plans)


def prepare_features(
    backbone: Backbone, sites: Mapping[str, SiteConfig], data: Mapping[str, SiteCounts], on_progress: Progress
) -> None:
    """Compute the patch features that no cache holds yet, for all sites of this machine together.

    Args:
        backbone: the job's towers, which go to each site's device.
        sites: by name, as `check_data` was given them.
        data: what `check_data` found.
        on_progress: called with (done, total) pictures.
    """
    total, done = sum(len(d.pictures) for d in data.values()), 0
    for name, site in sites.items():
        backbone, start = backbone.to(pick_device(site.device)), done
        open_cache(site).features(
            data[name].pictures, backbone, on_progress=lambda n, _, start=start: on_progress(start + n, total)
        )
        done += len(data[name].pictures)
        on_progress(done, total)
