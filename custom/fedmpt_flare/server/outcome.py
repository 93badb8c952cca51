"""Why a job failed, in its record at the server, where `nvflare job meta` shows it.

FLARE's secure logging shows of an exception its type alone. The job's own process cannot write into the record, so this
component of the parent process (`local/fedmpt__p_resources.json`) reads the outcome from what the job left.
"""

import io
import json
import zipfile
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, SystemComponents
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.storage import WORKSPACE

from fedmpt_core.federation.run.record import RESULT
from fedmpt_flare.tasks import short

COMPLETED, RUNNING = "completed", "running"


class OutcomeInMeta(FLComponent):
    """Adds a line to what `nvflare job meta` shows as the job's deployment."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """When a job has ended, with whatever outcome."""
        if event_type != EventType.JOB_COMPLETED:
            return
        try:
            engine: Any = fl_ctx.get_engine()
            jobs = engine.get_component(SystemComponents.JOB_MANAGER)
            data: Any = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
            job_id = data[JobMetaKey.JOB_ID.value]
            outcome = outcome_in(jobs.get_storage_component(job_id, WORKSPACE, fl_ctx))
            if outcome != COMPLETED:
                key = JobMetaKey.JOB_DEPLOY_DETAIL.value
                before = jobs.get_job(job_id, fl_ctx).meta.get(key) or []
                jobs.update_meta(job_id, {key: [*before, f"job: {outcome}"]}, fl_ctx)
        except Exception as error:
            self.log_warning(fl_ctx, f"a job's outcome is not in its record ({type(error).__name__})", fire_event=False)


def outcome_in(archive: bytes) -> str:
    """The outcome in a job's saved workspace. Raises ValueError, KeyError or BadZipFile when there is none."""
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        name = min((n for n in files.namelist() if n.rpartition("/")[2] == RESULT), key=len)
        record = json.loads(files.read(name))
    if record["outcome"] == RUNNING:
        last = max((row["round"] for row in record["rounds"]), default=0)
        return f"failed: the server's process of the job died; its last complete round is {last}"
    return short(str(record["outcome"]))
