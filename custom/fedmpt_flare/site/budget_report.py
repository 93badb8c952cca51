"""A site's budget in its parent process: what administrators are told of it, and that dead jobs hold none of it.

`privacy_budget` is answered by private ways of FLARE, as `fedmpt_flare.server.budget_command` asks it. It is named
by the site's `local/fedmpt__p_resources.json` and lives in the parent process: it answers while no job runs.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, WorkspaceConstants
from nvflare.apis.fl_context import FLContext
from nvflare.private.admin_defs import Message, ok_reply
from nvflare.private.fed.client.admin import RequestProcessor

from fedmpt_core.config.toml import load_site
from fedmpt_core.privacy.ledger.site_ledger import open_ledger, read_site_ledger
from fedmpt_flare.tasks import BUDGET_TOPIC
from fedmpt_flare.workspace import SITE_FILE


class BudgetReport(FLComponent, RequestProcessor):
    """Answers what the site's file allows, and frees what a job held whose process was killed."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """A job's process has ended, however that came about; never raises."""
        if event_type != EventType.JOB_COMPLETED:
            return
        job_id, name = (str(fl_ctx.get_prop(key)) for key in (FLContextKey.CURRENT_JOB_ID, FLContextKey.CLIENT_NAME))
        try:
            engine: Any = fl_ctx.get_engine()
            workspace = Path(engine.new_context().get_prop(FLContextKey.WORKSPACE_ROOT))
            policy = load_site(workspace / WorkspaceConstants.SITE_FOLDER_NAME / SITE_FILE, name).privacy
            if policy and policy.ledger:
                open_ledger(policy, name, workspace / WorkspaceConstants.STARTUP_FOLDER_NAME).free(job_id)
        except Exception as error:  # it runs out by itself
            with suppress(Exception):
                self.log_error(
                    fl_ctx, f"what job {job_id} held of the budget is not free yet: {error}", fire_event=False
                )

    def get_topics(self) -> list[str]:
        """What it answers."""
        return [BUDGET_TOPIC]

    def process(self, req: Message, app_ctx: Any) -> Message:
        """The budget, or why there is none to show; never raises, and names no file."""
        try:
            workspace = Path(app_ctx.new_context().get_prop(FLContextKey.WORKSPACE_ROOT))
            answer = budget_of(workspace, str(app_ctx.get_client_name()))
        except Exception as error:
            answer = {"refused": f"this site cannot read its budget ({type(error).__name__}); its log may say why"}
        return ok_reply(topic=f"reply_{req.topic}", body=json.dumps(answer))


def budget_of(workspace: Path, name: str) -> dict[str, Any]:
    """What a site says of its budget.

    Args:
        workspace: of the site.
        name: of the site.

    Returns:
        The fields of the console's table, or `refused` with a sentence.

    Raises:
        ValueError: the site's file or ledger cannot be read.
    """
    site = load_site(workspace / WorkspaceConstants.SITE_FOLDER_NAME / SITE_FILE, name)
    if site.privacy is None or not site.privacy.show_budget:
        return {"refused": "this site does not show its budget (privacy.show_budget)"}
    # slow to import, and a parent process of FLARE may never be asked
    from fedmpt_core.privacy.accounting.epsilon import epsilon, epsilon_alone
    from fedmpt_core.privacy.ledger.budget import held, history

    kit = workspace / WorkspaceConstants.STARTUP_FOLDER_NAME
    entries = read_site_ledger(site.privacy, kit)
    spent = history(entries)
    reach = [*spent, *(h.steps for h in held(entries))]
    return {
        "dataset": site.privacy.dataset,
        "epsilon": epsilon(spent, site.privacy.delta),
        "reach": epsilon(reach, site.privacy.delta),
        "if_masks_fail": epsilon_alone(reach, site.privacy.delta),
        "cap": site.privacy.epsilon,
        "delta": site.privacy.delta,
        "unit": site.privacy.unit,
        "entries": len(entries),
        "head": entries[-1].hash,
    }
