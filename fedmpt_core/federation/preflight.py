"""What can be known before any work is spent: data of every site, frozen towers, size of a round, privacy spent.

Used by the command line before a simulation and by `fedmpt check`. Raises on the first site whose data cannot be
used, with every problem of that site named.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
from fedmpt_core.model.words import indistinct
from fedmpt_core.privacy.accounting.epsilon import Epsilons, cross_checked
from fedmpt_core.privacy.charged_training import require_apart, units_of
from fedmpt_core.privacy.ledger.budget import PrivacyRefused, Projection, planned_steps, project
from fedmpt_core.privacy.ledger.site_ledger import read_site_ledger
from fedmpt_core.privacy.mechanism.machinery import REAL, clip_groups
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from fedmpt_core.training.local import make_optimizer

LISTED = 5  # things of a kind that a warning names


@dataclass(frozen=True)
class SiteCounts:
    """A site's records. Shown locally, never sent.

    Attributes:
        train: training records; `val` and `test` likewise.
        units: training records, or groups of them where those are protected.
        positives: (C,) training records per label.
        unlabelled: training records without any label.
        pictures: of all splits.
        judged: by split of val and test, where it has records, (C,) records per label, unseen ones too.
        digests: by split, SHA-256 and name of each picture; empty for pictures that are composed.
    """

    train: int
    val: int
    test: int
    units: int
    positives: np.ndarray
    unlabelled: int
    pictures: tuple[Picture, ...]
    judged: dict[str, np.ndarray]
    digests: dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class ModelSize:
    """What is trained, on which towers.

    Attributes:
        groups: trained floats by group (`contexts`, `adapters`, `gate`, `head`).
        released: numbers that get noise in every step, for each choice of `model.trained`.
        backbone: the frozen towers' name.
        is_stand_in: whether they only stand in for CLIP.
        indistinct: labels and conditions that the towers cannot tell apart, a sentence for each pair.
    """

    groups: dict[str, int]
    released: dict[str, int]
    backbone: str
    is_stand_in: bool
    indistinct: tuple[str, ...]

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
            counted[name] = _count(job, site)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if job.federation.evaluate_every and not any(d.judged["test"].any() for d in counted.values() if d.test):
        held = (
            "test pictures that show a label of the job" if any(d.test for d in counted.values()) else "test pictures"
        )
        raise ValueError(
            f"no site holds {held}: give one site a test split and evaluate = true, or the run could not be "
            "judged; federation.evaluate_every = 0 asks for no judgement"
        )
    return counted


def _count(job: JobConfig, site: SiteConfig) -> SiteCounts:
    unseen = job.unseen_classes
    loaded = {s: load_split(job, site.data, s, unseen=unseen, verify=True) for s in ("train", "val", "test")}
    train = loaded["train"]
    units = 0 if train is None else units_of(train, job.privacy.unit, (loaded["val"], loaded["test"])).max() + 1
    splits = {s: d for s, d in loaded.items() if d is not None}
    composed = site.data.source == "scenes"  # anew, each one another
    digests = {} if composed else {s: [(p.digest(), p.name) for p in d.pictures] for s, d in splits.items()}
    if job.privacy.private and not composed:
        known = {s: (splits[s], [digest for digest, _ in digests[s]]) for s in digests}
        require_apart(*known.pop("train"), known)
    shown = train.targets == 1 if train else np.zeros((0, len(job.classes)), bool)
    return SiteCounts(
        **{s: len(d) if d else 0 for s, d in loaded.items()},
        units=int(units),
        positives=shown.sum(0),
        unlabelled=int((~shown.any(1)).sum()),
        pictures=tuple(p for d in splits.values() for p in d.pictures),
        judged={s: (d.targets == 1).sum(0) for s, d in splits.items() if s != "train"},
        digests=digests,
    )


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
    same = [*indistinct(backbone, "class", job.all_classes), *indistinct(backbone, "condition", job.model.conditions)]
    return ModelSize(groups, released, backbone.name, backbone.is_stand_in, tuple(same))


def warnings_of(job: JobConfig, size: ModelSize, data: Mapping[str, SiteCounts]) -> list[str]:
    """What is allowed and seldom meant, a sentence each."""
    warnings = list(size.indistinct)
    if job.privacy.private and not job.federation.max_failed_rounds:
        warnings.append(
            "federation.max_failed_rounds = 0: the first round that fails ends the job, and to go on costs more than "
            "the job's epsilon, as the failed round was charged: allow 1 or more"
        )
    if job.federation.evaluate_every:
        warnings += [f"{site}: {sentence}" for site, counts in data.items() for sentence in _unscored(job, counts)]
    return [*warnings, *_copies(data)]


def _unscored(job: JobConfig, counts: SiteCounts) -> Iterator[str]:
    """What of a site's held-out pictures gives no figure."""
    seen, labels = len(job.classes), job.all_classes
    for split, shown in counts.judged.items():
        without = [label for label, times in zip(labels, shown, strict=True) if not times]
        if not shown.any():
            what = "the threshold is 0.5" if split == "val" else "it gives no figures"
            yield f"its {split} split is without a positive, no picture in it shows any label: {what}"
        elif split == "val" and not shown[:seen].any():
            yield "its val split is without a positive of the labels that are trained: the threshold is 0.5"
        elif split == "test" and without:
            for part, one in (("seen", shown[:seen]), ("unseen", shown[seen:])):
                if len(one) and not one.any():
                    yield f"its test split is without a positive of the {part} labels: it gives no figures of them"
            yield f"its test split is without a positive of {_some(without)}: no figure of these labels comes from it"


def _copies(data: Mapping[str, SiteCounts]) -> Iterator[str]:
    """Pictures that are, byte for byte, trained on more than once, or trained on and judged."""
    trained: dict[str, str] = {}
    doubled, leaked = [], []
    for site, counts in data.items():
        for digest, name in counts.digests.get("train", ()):
            where = f"{name} (train of {site})"
            first = trained.setdefault(digest, where)
            doubled += [f"{first} is {where}"] if first is not where else []
    for site, counts in data.items():
        for split in counts.judged:
            held = counts.digests.get(split, ())
            leaked += [f"{trained[digest]} is {name} ({split} of {site})" for digest, name in held if digest in trained]
    if leaked:
        yield (
            f"{len(leaked)} pictures are trained on and, byte for byte, judged, so that figures are too good: "
            f"{_some(leaked)}; take them out of one split"
        )
    if doubled:
        yield (
            f"{len(doubled)} pictures are, byte for byte, trained on more than once, and epsilon holds for each copy "
            f"alone: {_some(doubled)}; take the copies out"
        )


def _some(things: Sequence[str]) -> str:
    more = f" and {len(things) - LISTED} more" if len(things) > LISTED else ""
    return ", ".join(things[:LISTED]) + more


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
