"""What can be known before any work is spent: the data of every site, the frozen towers, the size of a round.

Used by the command line before a simulation and by `fedmpt check`. Raises on the first site whose data cannot be used,
with every problem of that site named.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fedmpt_core.backbone.load import load_backbone
from fedmpt_core.config import JobConfig, SiteConfig
from fedmpt_core.data.pictures import Picture
from fedmpt_core.data.source import load_split
from fedmpt_core.model import FedMPT
from fedmpt_core.session import open_cache, pick_device

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SiteData:
    """A site's records per split; `positives` is (C,) training records per label. Shown locally, never sent."""

    train: int
    val: int
    test: int
    positives: np.ndarray
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class ModelSize:
    """Trained floats by group (`contexts`, `adapters`, `gate`, `head`), and the frozen towers' name."""

    groups: dict[str, int]
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


def check_data(job: JobConfig, sites: Mapping[str, SiteConfig], *, verify: bool = True) -> dict[str, SiteData]:
    """Load every site's records; with `verify`, decode every picture file.

    Raises:
        ValueError: a site's data cannot be used, with the site's name.
    """
    found = {}
    for name, site in sites.items():
        try:
            splits = {s: load_split(job, site.data, s, verify=verify) for s in ("train", "val", "test")}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        counts = {s: len(d) if d else 0 for s, d in splits.items()}
        pictures = tuple(p for d in splits.values() if d for p in d.pictures)
        train = splits["train"]
        positives = train.targets.sum(0) if train else np.zeros(len(job.classes), int)
        found[name] = SiteData(counts["train"], counts["val"], counts["test"], positives, pictures)
    if not any(d.test for d in found.values()):
        raise ValueError(
            "no site holds test pictures: give one site a test split and evaluate = true, "
            "or the run could not be judged"
        )
    return found


def check_model(job: JobConfig) -> ModelSize:
    """Build the towers and the model once.

    Raises:
        ValueError: unknown or missing weights, a condition or class that no prompt can be made of.
    """
    backbone = load_backbone(job.backbone)
    model = FedMPT(backbone, job.classes, job.model.conditions, job.model, job.seed)
    groups: dict[str, int] = {}
    for name, parameter in model.trainable_parameters().items():
        group = name.split(".")[0]
        groups[group] = groups.get(group, 0) + parameter.numel()
    model.text_features()  # also finds prompts that do not fit the tower's context
    return ModelSize(groups, backbone.name, backbone.is_stand_in)


def prepare_features(
    job: JobConfig, sites: Mapping[str, SiteConfig], data: Mapping[str, SiteData], on_progress: Progress
) -> None:
    """Compute the patch features that no cache holds yet, for all sites of this machine together."""
    total, done = sum(len(d.pictures) for d in data.values()), 0
    backbone = None
    for name, site in sites.items():
        if backbone is None:
            backbone = load_backbone(job.backbone).to(pick_device(site.device))
        start = done
        open_cache(site).features(
            data[name].pictures, backbone, on_progress=lambda n, _, start=start: on_progress(start + n, total)
        )
        done += len(data[name].pictures)
        on_progress(done, total)
