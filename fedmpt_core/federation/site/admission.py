"""Whether a site takes part in a job at all: its privacy policy and what it demands of secure aggregation."""

from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.secagg import SiteSecAggConfig
from fedmpt_core.config.site import SiteConfig, SitePrivacyConfig
from fedmpt_core.federation.terms import floors_of
from fedmpt_core.privacy.ledger.budget import JobRefused, PrivacyRefused, check_policy
from fedmpt_core.secagg.policy import Floors


def check_site(job: JobConfig, site: SiteConfig, *, has_kit: bool | None) -> SitePrivacyConfig:
    """Compare a job with all that a site demands.

    Args:
        job: the agreed job.
        site: what the site has and allows.
        has_kit: whether the site has a FLARE start-up kit, that is, keys; None where that is not known yet.

    Returns:
        The site's privacy policy.

    Raises:
        PrivacyRefused: the job asks for more than the site allows.
    """
    check_limits(job, site.privacy, site.secagg)
    if job.secagg.masked:
        _check_identity(job, site.secagg, has_kit=has_kit)
    if site.privacy is None:
        raise JobRefused("this site has no privacy policy")
    return site.privacy


def check_limits(job: JobConfig, policy: SitePrivacyConfig | None, secagg: SiteSecAggConfig) -> None:
    """The part of `check_site` that needs nothing but what a site may tell others. Raises PrivacyRefused."""
    check_policy(job, policy)
    if policy is not None:
        _check_units(job, policy)
    if not job.secagg.masked:
        if not secagg.allow_unmasked:
            raise JobRefused(
                "the job shows this site's updates to the server (secagg.mechanism = 'none'), which this site does not "
                "allow: it would need [secagg] allow_unmasked = true in the site's own file (fedmpt_site.toml; of a "
                "simulation, site.toml)"
            )
        return
    if not Floors(secagg.min_cohort, secagg.colluders).admits(floors_of(job)):
        public = (
            f"federation.min_sites={job.federation.min_sites} and secagg.colluders={job.secagg.colluders} of the job "
            "are below this site's"
        )
        raise PrivacyRefused(f"{public} min_cohort={secagg.min_cohort} and colluders={secagg.colluders}", public)
    refused = sorted(set(job.secagg.metrics) - set(secagg.allow_metrics))
    if refused:
        raise JobRefused(f"the job sums figures of training that this site does not give: {', '.join(refused)}")


def weight_of(job: JobConfig, policy: SitePrivacyConfig) -> int:
    """A site's weight in the mean: 1, or the units that it declares. Public, and never the true number of records."""
    return 1 if job.federation.weighting == "equal" else policy.units


def _check_units(job: JobConfig, policy: SitePrivacyConfig) -> None:
    least, most = job.federation.min_units, job.secagg.max_weight
    if policy.units < least:
        public = f"this site declares fewer units than federation.min_units={least} of the job"
        raise PrivacyRefused(f"{public}: {policy.units}", public)
    if job.secagg.masked and most is not None and weight_of(job, policy) > most:
        public = f"this site declares more units than secagg.max_weight={most} of the job"
        raise PrivacyRefused(f"{public}: {policy.units}", public)


def _check_identity(job: JobConfig, site: SiteSecAggConfig, *, has_kit: bool | None) -> None:
    made_up = job.secagg.insecure_identities
    if has_kit and made_up:
        raise JobRefused("secagg.insecure_identities = true is for simulations: this site has a start-up kit")
    if has_kit and not site.roster:
        raise JobRefused("this site has no roster of the members' keys (secagg.roster in its site file)")
    if has_kit is False and not made_up:
        raise JobRefused(
            "this site has no start-up kit, so no keys: a simulation must say secagg.insecure_identities = true"
        )
