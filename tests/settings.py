"""Settings that tests share: jobs and sites without differential privacy, and a policy that allows a job with it."""

from fedmpt_core.config.job import PrivacyConfig
from fedmpt_core.config.secagg import SecAggConfig, SiteSecAggConfig
from fedmpt_core.config.site import SitePrivacyConfig

UNPROTECTED = PrivacyConfig(mechanism="none")
"""A job's `privacy`: plain training, which repeats exactly."""

POLICY = SitePrivacyConfig("pictures", units=10, epsilon=50.0, delta=1e-5, allow_unprotected=True)
"""A site's `privacy`: everything within reason."""

UNMASKED = SecAggConfig(mechanism="none")
"""A job's `secagg`: every update is shown to the server."""

REHEARSED = SecAggConfig(insecure_identities=True, phase_timeout=60)
"""A job's `secagg`: with masks, in a simulation."""

OPEN = SiteSecAggConfig(allow_unmasked=True, allow_metrics=("loss",))
"""A site's `secagg`: everything within reason."""
