"""What one site has and allows: its pictures, its machine and its privacy policy. Read at the site, never sent.
The server's own settings are here too.

Same strictness as `job`; reading and writing files is `toml`.
"""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fedmpt_core.config.checks import checked, pattern
from fedmpt_core.config.datasets import Division, PublicName
from fedmpt_core.config.secagg import SiteSecAggConfig


@checked
class DataConfig:
    """Where a site's pictures come from."""

    source: Literal["manifest", PublicName, "scenes"] = "manifest"
    """`manifest` (a site's own pictures, or a prepared data set), a public data set's folder by its name, or `scenes`
    (the embedded scenes)."""
    path: str = ""
    """Manifest file or folder. Unused for scenes."""
    root: str = ""
    """Folder that relative paths of a manifest start from; empty means the manifest's own folder."""
    evaluate: bool = False
    """Whether this site scores the global model on its `val` and `test` pictures and tells the server the exact
    figures. No privacy mechanism covers these pictures: say true only for ones that need none."""
    on_bad_image: Literal["refuse", "skip"] = "refuse"
    """`refuse`, or `skip` pictures that cannot be decoded."""
    share: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Which part of `shares` parts this site takes of a data set that several simulated sites split; from 1."""
    shares: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Number of parts; 1 means the whole set."""
    partition: Division = "labels"
    """How a split data set is divided: by clusters of label sets (`labels`) or of the frozen towers' `features`, by
    `dirichlet` draws, or uniformly."""
    dirichlet_alpha: Annotated[float, Field(ge=0.01, le=1000)] = 0.5
    """Concentration of these draws, small means uneven."""
    partition_file: str = ""
    """A division made before with `fedmpt partition`, so that all runs share it; must be of the kind that `partition`
    says. Empty: every simulated site works it out from the job's seed; not for `features`."""
    drop_positives: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the training labels that are dropped, as if nobody had written them down."""
    dropped: Literal["negative", "unknown"] = "negative"
    """What such a label becomes: `negative`, or `unknown`, which training leaves out."""
    train: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    """Scenes to train on (scenes only)."""
    val: Annotated[int, Field(ge=0, le=1_000_000)] = 100
    """Scenes to choose thresholds on (scenes only)."""
    test: Annotated[int, Field(ge=0, le=1_000_000)] = 300
    """Scenes to test on (scenes only)."""
    spurious_strength: Annotated[float, Field(ge=0, le=1)] = 0.9
    """How firmly the site's own pairs of labels occur together (scenes only)."""

    def __post_init__(self) -> None:
        """Raises ValueError when the source lacks its path, or the share does not exist."""
        if self.source != "scenes" and not self.path:
            raise ValueError(f"path='' : source='{self.source}' needs the path of the manifest or folder")
        if self.share > self.shares:
            raise ValueError(f"share={self.share} is not one of the {self.shares} shares: use 1 to {self.shares}")
        if self.partition == "features" and not self.partition_file:
            raise ValueError("partition='features' needs partition_file: make it once with `fedmpt partition`")


@checked
class SitePrivacyConfig:
    """What a site's policy allows; a job can neither read nor change it, and the stricter of job and site holds."""

    dataset: Annotated[str, pattern("^[A-Za-z0-9_.-]+$", "use letters, digits, '_', '-' and '.'")]
    """Name of the data set in the site's ledger; the same pictures must always go by the same name: a job is refused
    where one of them was trained on by another."""
    units: Annotated[int, Field(ge=1, le=1_000_000_000)]
    """Declared number of training units (records, or groups), rounded and written once; it is what is public of the
    true number."""
    epsilon: Annotated[float, Field(gt=0, le=1000)]
    """Most that all jobs together may ever spend on the data set."""
    delta: Annotated[float, Field(gt=0, le=0.1)]
    """The delta of that cap, below 1 / units."""
    epsilon_alone: Annotated[float | None, Field(gt=0, le=1000)] = None
    """Most that all jobs together may spend if the masks of secure aggregation fail; not given refuses jobs whose sites
    share their noise (`privacy.noise = "distributed"`), which are the only ones where it is more."""
    unit: Literal["record", "group"] = "record"
    """What one neighbour differs in: a `record`, or a `group` of records (a patient); jobs must protect the same."""
    ledger: str = ""
    """Folder of the ledger, outside every job folder. Empty only in a simulation, which then keeps the ledger of that
    one run."""
    min_noise_multiplier: Annotated[float, Field(ge=0, le=10_000)] = 0.3
    """Least noise that a job may use."""
    min_share_multiplier: Annotated[float, Field(ge=0, le=10_000)] = 0.3
    """Least noise that this site itself may add, where sites share it."""
    max_sample_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Largest sampling probability."""
    max_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 1_000_000
    """Most noisy steps in a round."""
    min_sites: Annotated[int, Field(ge=1, le=1000)] = 2
    """Fewest sites (`federation.min_sites`) that a job must wait for."""
    allow_unprotected: bool = False
    """Whether jobs without differential privacy may train here."""
    show_budget: bool = False
    """Whether administrators who ask (`privacy_budget`) are told what is spent and what is left."""
    share_ledger: bool = True
    """Whether a copy of the ledger is handed to the server when a job ends, for auditors. It names every job on the
    data set and holds nothing of a record."""

    def __post_init__(self) -> None:
        """Raises ValueError when delta is no protection."""
        if self.delta >= 1 / self.units:
            raise ValueError(
                f"delta={self.delta:g} must be below 1 / units = {1 / self.units:g}: "
                "otherwise publishing one record outright would be allowed"
            )


@checked
class SiteConfig:
    """What one site has and allows; read from `local/fedmpt_site.toml`, never sent."""

    data: DataConfig
    """The site's pictures."""
    privacy: SitePrivacyConfig | None = None
    """The site's policy; a site without one trains in no job."""
    secagg: SiteSecAggConfig = field(default_factory=SiteSecAggConfig)
    """What the site demands of secure aggregation."""
    cache_dir: str = ""
    """Folder of the patch-feature cache, as private as the pictures; empty means the user's cache folder. The site also
    notes there how far each of its ledgers went (`ledger-heads`), so keep it outside the ledgers' folder."""
    cache_max_gib: Annotated[float, Field(gt=0, le=100_000)] = 20.0
    """Bound on that folder, in GiB."""
    device: Annotated[str, pattern("^(auto|cpu|mps|cuda.*)$", "use 'auto', 'cpu', 'cuda' or 'cuda:N'")] = "auto"
    """`auto` (a GPU where there is one), `cpu`, or a torch device such as `cuda:1`."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads of the trainer; 0 means torch's own choice."""
    micro_batch: Annotated[int, Field(ge=1, le=65536)] = 64
    """Most records whose gradients are held at once under differential privacy: fewer take less memory, and no number
    of them changes a result but by rounding."""

    @property
    def cache(self) -> Path:
        """Folder of the patch-feature cache."""
        return Path(self.cache_dir) if self.cache_dir else default_cache()


def default_cache() -> Path:
    """Where patch features go when the site names no folder."""
    return Path.home() / ".cache" / "fedmpt" / "features"


@checked
class ServerConfig:
    """What the server's own file `local/fedmpt_server.toml` may say."""

    checkpoints: str = ""
    """Folder for a checkpoint of every run; empty means `fedmpt_checkpoints` in the server's workspace."""
