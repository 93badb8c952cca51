"""What the server checks before a job is deployed, so that no site is asked for one that cannot run.

`JobGate` runs in the server's parent process (`app_validator` in `local/resources.json`). FLARE writes its sentence
into the job's record, where `nvflare job meta` shows it.
"""

import json
from pathlib import Path
from typing import Any

from nvflare.apis.app_validation import AppValidator
from nvflare.apis.fl_constant import JobConstants, WorkspaceConstants

from fedmpt_core.federation.server.checkpoint import checkpoint_for
from fedmpt_flare.server.workflow import agreed_job
from fedmpt_flare.tasks import CLASS_ALLOW_LIST, short
from fedmpt_flare.workspace import checkpoints_of


class JobGate(AppValidator):
    """Refuses a job of another release, and one that continues a run otherwise than it was left."""

    def validate(self, app_folder: str) -> tuple[str, dict[str, Any]]:
        """Check a deployed app; never raises.

        Args:
            app_folder: `<workspace>/<job id>/app_server`, as FLARE's deployer makes it.

        Returns:
            A sentence for the submitter of the job, "" when the job may run; and no properties.
        """
        try:
            _check(Path(app_folder).resolve())
        except ValueError as error:
            return short(f"the job is refused: {error}"), {}
        except Exception as error:
            return f"the server cannot check the job ({type(error).__name__})", {}
        return "", {}


def _check(app: Path) -> None:
    config = json.loads((app / "config" / JobConstants.SERVER_JOB_CONFIG).read_text(encoding="utf-8"))
    workspace = app.parents[1]
    for workflow in config["workflows"]:
        if workflow.get("path") == CLASS_ALLOW_LIST[1]:  # what others there are, FLARE's list of classes refuses
            job = agreed_job(workflow["args"]["job"], workflow["args"]["release"])
            checkpoint_for(job, checkpoints_of(workspace / WorkspaceConstants.SITE_FOLDER_NAME, workspace))
