"""Whether a site takes part in a job at all: its privacy policy and what it demands of secure aggregation."""

from fedmpt_core.config import JobConfig
from fedmpt_core.privacy.budget import PrivacyRefused, check_policy
from fedmpt_core.secagg.policy import Floors
from fedmpt_core.secagg_config import SiteSecAggConfig
from fedmpt_core.site_config import SiteConfig, SitePrivacyConfig


def check_site(job: JobConfig, site: SiteConfig, *, has_kit: bool | None) -> SitePrivacyConfig:
    """Compare a job with all that a site demands.

    Args:
        job: the agreed job.
        site: what the site has and allows.
        has_kit: whether the site has a FLARE start-up kit, that is, keys; None where that is not known yet.

    Returns:
        The site's privacy policy.

    Raises:
        PrivacyRefused: the job asks for more than the site allows. The submitter of the job may read the sentence.
    """
    check_policy(job, site.privacy)
    _check_aggregation(job, site.secagg, has_kit=has_kit)
    if site.privacy is None:
        raise PrivacyRefused("this site has no privacy policy")
    return site.privacy


def floors_of(job: JobConfig) -> Floors:
    """The least protection that a job with masks gives a member."""
    return Floors(job.federation.min_sites, job.secagg.colluders)


def _check_aggregation(job: JobConfig, site: SiteSecAggConfig, *, has_kit: bool | None) -> None:
    secagg = job.secagg
    if not secagg.masked:
        if not site.allow_unmasked:
            raise PrivacyRefused("the job shows this site's updates to the server, which this site does not allow")
        return
    own = Floors(site.min_cohort, site.colluders)
    if not own.admits(floors_of(job)):
        raise PrivacyRefused(
            f"federation.min_sites={job.federation.min_sites} and secagg.colluders={secagg.colluders} of the job are "
            f"below this site's min_cohort={site.min_cohort} and colluders={site.colluders}"
        )
    refused = sorted(set(secagg.metrics) - set(site.allow_metrics))
    if refused:
        raise PrivacyRefused(f"the job sums figures of training that this site does not give: {', '.join(refused)}")
    if has_kit and secagg.insecure_identities:
        raise PrivacyRefused("secagg.insecure_identities = true is for simulations: this site has a start-up kit")
    if has_kit and not site.roster:
        raise PrivacyRefused("this site has no roster of the members' keys (secagg.roster in its site file)")
    if has_kit is False and not secagg.insecure_identities:
        raise PrivacyRefused(
            "this site has no start-up kit, so no keys: a simulation must say secagg.insecure_identities = true"
        )
