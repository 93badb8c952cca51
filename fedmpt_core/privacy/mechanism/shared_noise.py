"""How the noise of a sum is shared out among the sites in it, so that the sum alone is as noisy as it must be.

Example: three sites, one of which may work with the server. Each adds 1/sqrt(2) of the noise that the job names, so
that any two honest ones together add all of it: 1.22 times as much in the sum of three, instead of 1.73 times where
each adds the whole.

Every site rounds its share to whole steps of a grid, and what leaves it are integers modulo 2^32 under masks. Each
site's sum is cut off at `limit` before the noise, which no unit's influence grows by, so that a sum of `max_sites`
sites never runs over 2^31; after the noise nothing is cut off and nothing rounded, since a sum of cut-off noisy numbers
is no function of the noisy sum. docs/privacy.md has the lemma: such a sum of rounded shares is as private as the
continuous Gaussian, where a share is at least `LEAST_STEPS` wide.

Needs neither torch nor numpy.
"""

from dataclasses import dataclass
from math import ceil, floor, log, log2, sqrt
from typing import Self

from fedmpt_core.config.job import JobConfig

LEAST_STEPS = 64  # of the grid, in the standard deviation of a share
MOST_BITS = 20
# A coarser grid adds more than 7 % to the noise of 73,734 numbers: rather cut off sums of units that all point one way.
GOOD_BITS = 12
REACH = 12.2  # standard deviations; a `Keystream`'s normals end at sqrt(2 ln 2^106) = 12.13
TRUE_OVER_DECLARED = 2.0  # declared units are the true ones, rounded
MOST_NUMBERS = 2**22  # of an update


@dataclass(frozen=True)
class SharedNoise:
    """Public numbers of the job, equal at all sites.

    Attributes:
        min_sites: fewest sites in a sum.
        colluders: sites whose shares do not count, since they may work with the server or be broken; at least 1.
        max_sites: most sites in a sum.
        bits: numbers lie on a grid of 2^-bits of the clip bound.
        limit: largest absolute value of a site's own sum, in steps of the grid.
    """

    min_sites: int
    colluders: int
    max_sites: int
    bits: int
    limit: int

    @classmethod
    def of(cls, job: JobConfig) -> Self:
        """A job's.

        Raises:
            ValueError: a share is too narrow for its grid, or `max_sites` sums have no room in 32 bits.
        """
        privacy, sites = job.privacy, job.secagg.max_sites
        if privacy.noise_multiplier is None:
            raise ValueError("privacy.noise_multiplier is not worked out: nothing may be trained with this job")
        share = privacy.noise_multiplier / sqrt(job.honest)
        spread = share * sqrt(len(privacy.group_norms) or 1)
        room = (2**31 - 1) // sites
        full = largest_batch(privacy.sample_rate, job.secagg.max_weight or 1)
        bits = min(MOST_BITS, max(_bits(room, spread, full), min(GOOD_BITS, _bits(room, spread, 16))))
        if bits < 0:
            raise ValueError(
                f"privacy.noise='distributed': sums of secagg.max_sites={sites} sites have no room in 32 bits beside "
                f"noise of privacy.noise_multiplier={privacy.noise_multiplier}: lower max_sites to the sites you have"
            )
        if share * 2**bits < LEAST_STEPS:
            raise ValueError(
                f"privacy.noise='distributed': a share of privacy.noise_multiplier={privacy.noise_multiplier} is "
                f"{share * 2**bits:.3g} steps wide on the finest grid for secagg.max_sites={sites}, at least "
                f"{LEAST_STEPS} are needed: raise it, or lower max_sites to the sites you have"
            )
        limit = room - ceil(REACH * spread * (2**bits + sqrt(MOST_NUMBERS))) - 1
        return cls(job.federation.min_sites, job.secagg.colluders, sites, bits, limit)

    @property
    def honest(self) -> int:
        """Sites whose shares make up the noise that is claimed."""
        return self.min_sites - self.colluders

    @property
    def room(self) -> int:
        """Largest absolute value of what one site sends, in steps of the grid: `max_sites` times it is below 2^31."""
        return (2**31 - 1) // self.max_sites


def largest_batch(sample_rate: float, declared: float, failure: float = 1e-12) -> float:
    """Most units of a site in one step, but for a probability of `failure`.

    True units are taken to be at most twice the declared; a binomial passes its mean by Bernstein's bound.
    """
    tail, mean = -log(failure), TRUE_OVER_DECLARED * sample_rate * declared
    return min(mean / sample_rate, mean + tail / 3 + sqrt(tail**2 / 9 + 2 * mean * tail))


def _bits(room: int, spread: float, batch: float) -> int:
    """Finest grid on which a site's room holds so many units that all point one way, and its noise; may be below 0."""
    left = room - 2 - REACH * spread * sqrt(MOST_NUMBERS)
    return floor(log2(left / (batch + REACH * spread))) if left > 0 else -1
