"""What one site has and allows: its pictures, its machine and its privacy policy. Read at the site, never sent.
The server's own settings are here too.

Same strictness as `config`; reading and writing files is `config_file`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedmpt_core.config.checks import STRICT, check_range
from fedmpt_core.config.secagg import SiteSecAggConfig


@dataclass(frozen=True)
class DataConfig:
    """Where a site's pictures come from.

    Attributes:
        source: `manifest` (a site's own pictures, or a prepared data set), a data set's folder (`voc2007`, `coco2014`,
            `nuswide`, `objects365`, `multiscene`, `mlrsnet`), or `scenes` (the embedded scenes).
        path: manifest file or folder. Unused for scenes.
        root: folder that relative paths of a manifest start from; empty means the manifest's own folder.
        evaluate: whether this site scores the global model on its `val` and `test` pictures and tells the server the
            exact figures. No privacy mechanism covers these pictures: say true only for ones that need none.
        on_bad_image: `refuse`, or `skip` pictures that cannot be decoded.
        share: which part of `shares` parts this site takes of a data set that several simulated sites split; from 1.
        shares: number of parts; 1 means the whole set.
        partition: how a split data set is divided: by clusters of label sets (`labels`) or of the frozen towers'
            `features`, by `dirichlet` draws, or uniformly.
        dirichlet_alpha: concentration of these draws, small means uneven, [0.01, 1000].
        partition_file: a division made before with `fedmpt partition`, so that all runs share it; must be of the kind
            that `partition` says. Empty: every simulated site works it out from the job's seed; not for `features`.
        drop_positives: share of the training labels that are dropped, as if nobody had written them down, [0, 1].
        dropped: what such a label becomes: `negative`, or `unknown`, which training leaves out.
        train: scenes to train on (scenes only), 1..1000000.
        val: scenes to choose thresholds on (scenes only), 0..1000000.
        test: scenes to test on (scenes only), 0..1000000.
        spurious_strength: how firmly the site's own pairs of labels occur together (scenes only), [0, 1].
    """

    source: Literal["manifest", "voc2007", "coco2014", "nuswide", "objects365", "multiscene", "mlrsnet", "scenes"] = (
        "manifest"
    )
    path: str = ""
    root: str = ""
    evaluate: bool = False
    on_bad_image: Literal["refuse", "skip"] = "refuse"
    share: int = 1
    shares: int = 1
    partition: Literal["labels", "features", "dirichlet", "uniform"] = "labels"
    dirichlet_alpha: float = 0.5
    partition_file: str = ""
    drop_positives: float = 0.0
    dropped: Literal["negative", "unknown"] = "negative"
    train: int = 200
    val: int = 100
    test: int = 300
    spurious_strength: float = 0.9

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is out of range or the source lacks its path."""
        if self.source != "scenes" and not self.path:
            raise ValueError(f"path='' : source='{self.source}' needs the path of the manifest or folder")
        check_range(self, "shares", 1, 10_000)
        if not 1 <= self.share <= self.shares:
            raise ValueError(f"share={self.share} is not one of the {self.shares} shares: use 1 to {self.shares}")
        if self.partition == "features" and not self.partition_file:
            raise ValueError("partition='features' needs partition_file: make it once with `fedmpt partition`")
        check_range(self, "dirichlet_alpha", 0.01, 1000)
        check_range(self, "drop_positives", 0, 1)
        check_range(self, "train", 1, 1_000_000)
        check_range(self, "val", 0, 1_000_000)
        check_range(self, "test", 0, 1_000_000)
        check_range(self, "spurious_strength", 0, 1)


@dataclass(frozen=True)
class SitePrivacyConfig:
    """What a site's policy allows; a job can neither read nor change it, and the stricter of job and site holds.

    Attributes:
        dataset: name of the data set in the site's ledger; the same pictures must always go by the same name.
        unit: what one neighbour differs in: a `record`, or a `group` of records (a patient); jobs must protect the
            same.
        units: declared number of training units (records, or groups), rounded and written once; it is what is public
            of the true number, 1..1e9.
        epsilon: most that all jobs together may ever spend on the data set, (0, 1000].
        delta: the delta of that cap, (0, 0.1], below 1 / units.
        ledger: folder of the ledger, outside every job folder. Empty only in a simulation, which then keeps the
            ledger of that one run.
        min_noise_multiplier: least noise that a job may use, [0, 10000].
        max_sample_rate: largest sampling probability, (0, 1].
        max_steps: most noisy steps in a round, 1..1000000.
        min_sites: fewest sites (`federation.min_sites`) that a job must wait for, 1..1000.
        allow_unprotected: whether jobs without differential privacy may train here.
        show_budget: whether administrators who ask (`privacy_budget`) are told what is spent and what is left.
        share_ledger: whether a copy of the ledger is handed to the server when a job ends, for auditors. It names every
            job on the data set and holds nothing of a record.
    """

    dataset: str
    units: int
    epsilon: float
    delta: float
    unit: Literal["record", "group"] = "record"
    ledger: str = ""
    min_noise_multiplier: float = 0.3
    max_sample_rate: float = 1.0
    max_steps: int = 1_000_000
    min_sites: int = 2
    allow_unprotected: bool = False
    show_budget: bool = False
    share_ledger: bool = True

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is out of range."""
        if not self.dataset or not all(c.isascii() and (c.isalnum() or c in "_-.") for c in self.dataset):
            raise ValueError(f"dataset={self.dataset!r}: use letters, digits, '_', '-' and '.'")
        check_range(self, "units", 1, 1_000_000_000)
        check_range(self, "epsilon", 0, 1000, open_low=True)
        check_range(self, "delta", 0, 0.1, open_low=True)
        if self.delta >= 1 / self.units:
            raise ValueError(
                f"delta={self.delta:g} must be below 1 / units = {1 / self.units:g}: "
                "otherwise publishing one record outright would be allowed"
            )
        check_range(self, "min_noise_multiplier", 0, 10_000)
        check_range(self, "max_sample_rate", 0, 1, open_low=True)
        check_range(self, "max_steps", 1, 1_000_000)
        check_range(self, "min_sites", 1, 1000)


@dataclass(frozen=True)
class SiteConfig:
    """What one site has and allows; read from `local/fedmpt_site.toml`, never sent.

    Attributes:
        data: the site's pictures.
        privacy: the site's policy; a site without one trains in no job.
        secagg: what the site demands of secure aggregation.
        cache_dir: folder of the patch-feature cache, as private as the pictures; empty means the user's cache folder.
        cache_max_gib: bound on that folder, (0, 100000].
        device: `auto` (a GPU where there is one), `cpu`, or a torch device such as `cuda:1`.
        threads: CPU threads of the trainer; 0 means torch's own choice, 0..1024.
    """

    data: DataConfig
    privacy: SitePrivacyConfig | None = None
    secagg: SiteSecAggConfig = field(default_factory=SiteSecAggConfig)
    cache_dir: str = ""
    cache_max_gib: float = 20.0
    device: str = "auto"
    threads: int = 0

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is out of range."""
        check_range(self, "cache_max_gib", 0, 100_000, open_low=True)
        check_range(self, "threads", 0, 1024)
        if self.device not in ("auto", "cpu", "mps") and not self.device.startswith("cuda"):
            raise ValueError(f"device={self.device!r}: use 'auto', 'cpu', 'cuda' or 'cuda:N'")

    @property
    def cache(self) -> Path:
        """Folder of the patch-feature cache."""
        return Path(self.cache_dir) if self.cache_dir else default_cache()


def default_cache() -> Path:
    """Where patch features go when the site names no folder."""
    return Path.home() / ".cache" / "fedmpt" / "features"


@dataclass(frozen=True)
class ServerConfig:
    """What the server's own file `local/fedmpt_server.toml` may say.

    Attributes:
        checkpoints: folder for a checkpoint of every run; empty means `fedmpt_checkpoints` in the server's workspace.
    """

    checkpoints: str = ""

    __pydantic_config__ = STRICT
