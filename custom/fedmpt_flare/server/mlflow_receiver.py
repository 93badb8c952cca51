"""Each round's figures in MLflow. FLARE's own receiver keeps a run per site and knows none of the server, which alone
speaks here.
"""

import os
import time
from typing import Any

from nvflare.apis.analytix import AnalyticsData, LogWriterName
from nvflare.apis.dxo import from_shareable
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.shareable import Shareable
from nvflare.app_common.widgets.streaming import AnalyticsReceiver

URI = "MLFLOW_TRACKING_URI"
EXPERIMENT = "fedmpt"


class MlflowReceiver(AnalyticsReceiver):
    """One MLflow run per job, at the tracking server that the FLARE server's environment names.

    A job chooses no address: the server's operator does. What fails is logged at the server and ends no job.
    """

    def __init__(self) -> None:
        """Connects nowhere."""
        super().__init__()
        self._client: Any = None
        self._run = ""

    def initialize(self, fl_ctx: FLContext) -> None:
        """Opens the run. Raises ValueError, which FLARE logs, when there is nowhere to write to."""
        if not os.environ.get(URI):
            raise ValueError(f"{URI} is not set in the server's environment, so nothing is written to MLflow")
        try:
            from mlflow.tracking.client import MlflowClient
        except ImportError:
            raise ValueError("MLflow is not installed at the server: pip install 'fedmpt[tracking]'") from None
        self._client = MlflowClient()
        known = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = known.experiment_id if known else self._client.create_experiment(EXPERIMENT)
        job_id, meta = str(fl_ctx.get_job_id()), fl_ctx.get_prop(ReservedKey.JOB_META) or {}
        name = str(meta.get(JobMetaKey.JOB_NAME.value, "simulation"))
        self._run = self._client.create_run(experiment, run_name=name, tags={"job_id": job_id}).info.run_id

    def save(self, fl_ctx: FLContext, shareable: Shareable, record_origin: str) -> None:
        """Writes one figure of one round."""
        data = AnalyticsData.from_dxo(from_shareable(shareable), receiver=LogWriterName.MLFLOW)
        if data:
            self._client.log_metric(self._run, data.tag, data.value, int(time.time() * 1000), data.step or 0)

    def finalize(self, fl_ctx: FLContext) -> None:
        """Closes the run."""
        self._client.set_terminated(self._run)
