"""From an agreed job to a FLARE job: configuration only, no code travels."""

from typing import Any

from nvflare.job_config.api import FedJob
from nvflare.recipe.spec import Recipe

from fedmpt_core.config.job import JobConfig
from fedmpt_core.privacy.ledger.budget import resolved
from fedmpt_flare.server.workflow import FedMPTWorkflow
from fedmpt_flare.site.executor import FedMPTExecutor
from fedmpt_flare.tasks import TASKS

TENSORBOARD = "tensorboard"  # folder below the job's at the server
POLL_SECONDS = 0.1  # FLARE's default of 2 s is paid once per phase


class FedMPTRecipe(Recipe):
    """A FedMPT job as a FLARE recipe: `execute(env)` runs it, `export(folder)` writes the job folder."""

    def __init__(self, job: JobConfig) -> None:
        """Builds the FLARE job.

        Args:
            job: the agreed job; its noise multiplier is worked out if it gives none. `federation.gpus` becomes FLARE's
                resource request of every site.
        """
        job = resolved(job)
        gpus = job.federation.gpus
        meta = {"resource_spec": {"@default": {"num_of_gpus": gpus}}} if gpus else None
        flare = FedJob(name=job.name, min_clients=job.federation.min_sites, meta_props=meta)
        flare.to_server(FedMPTWorkflow(_argument(job)), id="fedmpt")
        for name in job.federation.tracking:
            flare.to_server(_receiver(name), id=name)
        flare.to_server({"server": {"task_request_interval": POLL_SECONDS}})
        flare.to_clients(FedMPTExecutor(_argument(job)), tasks=list(TASKS))
        flare.to_clients({"default_task_fetch_interval": POLL_SECONDS})
        flare.set_app_packages(["fedmpt_flare", "fedmpt_core"])
        super().__init__(flare)


def _argument(job: JobConfig) -> dict[str, Any]:
    # Without the type FLARE would try to build a component from a dict that has a "name".
    return {"config_type": "dict", **job.to_dict()}


def _receiver(name: str) -> Any:
    """A component of the server that hears the workflow's analytics events."""
    if name == "mlflow":
        from fedmpt_flare.server.mlflow_receiver import MlflowReceiver

        return MlflowReceiver()
    from nvflare.app_opt.tracking.tb.tb_receiver import TBAnalyticsReceiver

    return TBAnalyticsReceiver(tb_folder=TENSORBOARD)
