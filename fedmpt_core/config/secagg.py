"""Secure aggregation in a job, and what a site demands of it. The stricter of the two holds."""

from dataclasses import dataclass
from typing import Literal

from fedmpt_core.config.checks import STRICT, check_range, check_unique
from fedmpt_core.secagg.encoding import headroom
from fedmpt_core.secagg.policy import LEAST_COHORT

Metric = Literal["loss"]


@dataclass(frozen=True)
class SecAggConfig:
    """How the sites' updates are summed.

    Attributes:
        mechanism: `pairwise-masking`: the server learns sums over at least a threshold of sites; or `none`, which
            runs only at sites that allow it (`secagg.allow_unmasked`): the server sees every site's update.
        colluders: sites assumed to work with the server; raises the threshold, 0..1000.
        value_range: largest absolute value of a number of an update; larger ones are cut off, (0, 1e6].
        fraction_bits: bits after the point of a number on its way, 4..30. `max_sites` times `value_range` times
            2^fraction_bits must stay below 2^31.
        rounding: `stochastic` keeps the mean of many roundings right, `deterministic` rounds to the nearest.
        max_sites: most sites that may ever take part, 3..1000.
        max_weight: with `federation.weighting = "records"`, the largest number of units of any site; a site with
            more is refused. Numbers well above the true largest cost precision.
        metrics: figures of training that are summed under the masks with the updates, as far as every site allows
            (`secagg.allow_metrics`): the mean `loss`. Not under differential privacy, which would have to pay for them.
        phase_timeout: seconds for a site's answer in a phase of the protocol other than training, 1..604800.
        insecure_identities: whether sites without a start-up kit, which only a simulation has, may make up their
            identity. Whoever is in the middle can then read everything.
    """

    mechanism: Literal["pairwise-masking", "none"] = "pairwise-masking"
    colluders: int = 1
    value_range: float = 16.0
    fraction_bits: int = 20
    rounding: Literal["stochastic", "deterministic"] = "stochastic"
    max_sites: int = 100
    max_weight: int | None = None
    metrics: tuple[Metric, ...] = ()
    phase_timeout: int = 120
    insecure_identities: bool = False

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is out of range, or sums could run over."""
        check_range(self, "colluders", 0, 1000)
        check_range(self, "value_range", 0, 1e6, open_low=True)
        check_range(self, "fraction_bits", 4, 30)
        check_range(self, "max_sites", LEAST_COHORT, 1000)
        check_range(self, "phase_timeout", 1, 604_800)
        check_unique(self, "metrics")
        if self.max_weight is not None:
            check_range(self, "max_weight", 1, 1_000_000_000)
        if self.masked:
            headroom(self.max_sites, self.value_range, self.fraction_bits)

    @property
    def masked(self) -> bool:
        """Whether the server sees sums only."""
        return self.mechanism != "none"


@dataclass(frozen=True)
class SiteSecAggConfig:
    """What a site demands before it hands on anything, and where it keeps what it must remember.

    Attributes:
        roster: file with the members' key fingerprints, agreed on outside the network (`fedmpt roster`). A site with
            a start-up kit takes part in no masked job without one.
        state: folder for the record of what was signed, outside every job folder; empty: `secagg` in the folder of
            the privacy ledger.
        min_cohort: fewest sites whose updates are summed before anything about this one's is revealed, 3..1000.
        colluders: sites that this one assumes to work with the server, 0..1000.
        allow_unmasked: whether jobs that show this site's update to the server may train here.
        allow_metrics: figures of training that may join the sums.
    """

    roster: str = ""
    state: str = ""
    min_cohort: int = LEAST_COHORT
    colluders: int = 1
    allow_unmasked: bool = False
    allow_metrics: tuple[Metric, ...] = ()

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is out of range."""
        check_range(self, "min_cohort", LEAST_COHORT, 1000)
        check_range(self, "colluders", 0, 1000)
        check_unique(self, "allow_metrics")
