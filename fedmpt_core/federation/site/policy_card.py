"""What a site tells those who write jobs: its limits and what is charged already. No path, no record, no key."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedmpt_core.config.checks import STRICT
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.secagg import SiteSecAggConfig
from fedmpt_core.config.site import SiteConfig, SitePrivacyConfig
from fedmpt_core.config.toml import ConfigError, build
from fedmpt_core.federation.site.admission import check_limits
from fedmpt_core.privacy.accounting.epsilon import Steps, epsilon
from fedmpt_core.privacy.ledger.budget import Charge, Held, PrivacyRefused, by_job, charges, held, project_charges
from fedmpt_core.privacy.ledger.chain import Entry


@dataclass(frozen=True)
class Charged:
    """Steps of one job with one mechanism: sampling rate, noise multiplier, count, and how many sites share noise."""

    job: str
    sample_rate: float
    noise_multiplier: float
    steps: int
    honest: int = 1

    __pydantic_config__ = STRICT

    @staticmethod
    def of(job: str, steps: Steps) -> "Charged":
        """From what an accountant prices."""
        return Charged(job, steps.sample_rate, steps.noise_multiplier, steps.count, steps.honest)

    @property
    def price(self) -> Steps:
        """What an accountant prices."""
        return Steps(self.sample_rate, self.noise_multiplier, self.steps, self.honest)


@dataclass(frozen=True)
class PolicyCard:
    """One site's policy as it gives it away.

    Attributes:
        site: its name in the federation.
        privacy: its limits, without the ledger's place.
        secagg: what it demands of secure aggregation, without places.
        charged: what its ledger charges, job by job.
        held: what running jobs held when the card was written, job by job; `until` is when that ends at the latest.
    """

    site: str
    privacy: SitePrivacyConfig
    secagg: SiteSecAggConfig
    charged: tuple[Charged, ...] = ()
    held: tuple[Charged, ...] = ()

    __pydantic_config__ = STRICT

    @staticmethod
    def of(name: str, site: SiteConfig, entries: Sequence[Entry]) -> "PolicyCard":
        """A site's card. Raises ConfigError when it has no policy."""
        if site.privacy is None:
            raise ConfigError(f"{name} has no [privacy] table in its site file: write its policy first")
        return PolicyCard(
            name,
            replace(site.privacy, ledger=""),
            replace(site.secagg, roster="", state=""),
            tuple(Charged.of(*charge) for charge in by_job(charges(entries))),
            tuple(Charged.of(*hold) for hold in by_job(held(entries))),
        )

    @staticmethod
    def load(path: Path) -> "PolicyCard":
        """Read a card. Raises ConfigError."""
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file: a site writes its card with `fedmpt site policy`") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: is not a policy card ({error})") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: is not a policy card: a site writes one with `fedmpt site policy`")
        return build(PolicyCard, values, str(path))

    def to_json(self) -> str:
        """What `load` reads."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @property
    def spent(self) -> float:
        """Epsilon of all that is charged, at the site's delta."""
        return epsilon([c.steps for c in self._charges()], self.privacy.delta)

    def check(self, job: JobConfig) -> None:
        """Raises PrivacyRefused with the site's name when it would refuse the job."""
        try:
            check_limits(job, self.privacy, self.secagg)
            if job.privacy.private:
                holds = [Held(c.job, c.price, "") for c in self.held]
                project_charges(job, self.privacy, self._charges(), holds)
        except PrivacyRefused as refused:
            raise PrivacyRefused(f"{self.site} would refuse the job: {refused}") from None

    def _charges(self) -> list[Charge]:
        return [Charge(c.job, c.price) for c in self.charged]
