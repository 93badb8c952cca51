"""Secure aggregation in a job, and what a site demands of it. The stricter of the two holds."""

from typing import Annotated, Literal

from pydantic import Field

from fedmpt_core.config.checks import Once, checked
from fedmpt_core.secagg.policy import LEAST_COHORT

Metric = Literal["loss"]


@checked
class SecAggConfig:
    """How the sites' updates are summed."""

    mechanism: Literal["pairwise-masking", "none"] = "pairwise-masking"
    """`pairwise-masking`: the server learns sums over at least a threshold of sites; or `none`, which runs only at
    sites that allow it (`secagg.allow_unmasked`): the server sees every site's update."""
    colluders: Annotated[int, Field(ge=0, le=1000)] = 1
    """Sites assumed to work with the server; raises the threshold."""
    value_range: Annotated[float, Field(gt=0, le=1e6)] = 16.0
    """Largest absolute value of a number of an update; larger ones are cut off."""
    fraction_bits: Annotated[int, Field(ge=4, le=30)] = 20
    """Bits after the point of a number on its way. `max_sites` times `value_range` times 2^fraction_bits must stay
    below 2^31."""
    rounding: Literal["stochastic", "deterministic"] = "stochastic"
    """`stochastic` keeps the mean of many roundings right, `deterministic` rounds to the nearest."""
    max_sites: Annotated[int, Field(ge=LEAST_COHORT, le=1000)] = 100
    """Most sites that may ever take part."""
    max_weight: Annotated[int | None, Field(ge=1, le=1_000_000_000)] = None
    """With `federation.weighting = "records"`, the largest number of units of any site; a site with more is refused.
    Numbers well above the true largest cost precision."""
    metrics: Once[tuple[Metric, ...]] = ()
    """Figures of training that are summed under the masks with the updates, as far as every site allows
    (`secagg.allow_metrics`): the mean `loss`. Not under differential privacy, which would have to pay for them."""
    phase_timeout: Annotated[int, Field(ge=1, le=604_800)] = 120
    """Seconds for a site's answer in a phase of the protocol other than training."""
    insecure_identities: bool = False
    """Whether sites without a start-up kit, which only a simulation has, may make up their identity. Whoever is in the
    middle can then read everything."""

    @property
    def masked(self) -> bool:
        """Whether the server sees sums only."""
        return self.mechanism != "none"


@checked
class SiteSecAggConfig:
    """What a site demands before it hands on anything, and where it keeps what it must remember."""

    roster: str = ""
    """File with the members' key fingerprints, agreed on outside the network (`fedmpt roster`). A site with a start-up
    kit takes part in no masked job without one."""
    state: str = ""
    """Folder for the record of what was signed, outside every job folder; empty: `secagg` in the folder of the privacy
    ledger."""
    min_cohort: Annotated[int, Field(ge=LEAST_COHORT, le=1000)] = LEAST_COHORT
    """Fewest sites whose updates are summed before anything about this one's is revealed."""
    colluders: Annotated[int, Field(ge=0, le=1000)] = 1
    """Sites that this one assumes to work with the server."""
    allow_unmasked: bool = False
    """Whether jobs that show this site's update to the server may train here."""
    allow_metrics: Once[tuple[Metric, ...]] = ()
    """Figures of training that may join the sums."""
