"""What a site tells of its privacy budget when an administrator asks with `privacy_budget`.

The site's half of `fedmpt_flare.server.budget_command`, on private ways of FLARE 2.9 as that is. It is named by the
site's `local/fedmpt__p_resources.json` and lives in the parent process, so it answers while no job runs.
"""

import json
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey, WorkspaceConstants
from nvflare.private.admin_defs import Message, ok_reply
from nvflare.private.fed.client.admin import RequestProcessor

from fedmpt_core.config.toml import load_site
from fedmpt_core.privacy.ledger.site_ledger import read_site_ledger
from fedmpt_flare.tasks import BUDGET_TOPIC
from fedmpt_flare.workspace import SITE_FILE


class BudgetReport(RequestProcessor):
    """Answers what the site's file allows."""

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
    from fedmpt_core.privacy.accounting.epsilon import epsilon
    from fedmpt_core.privacy.ledger.budget import history

    kit = workspace / WorkspaceConstants.STARTUP_FOLDER_NAME
    entries = read_site_ledger(site.privacy, kit)
    return {
        "dataset": site.privacy.dataset,
        "epsilon": epsilon(history(entries), site.privacy.delta),
        "cap": site.privacy.epsilon,
        "delta": site.privacy.delta,
        "unit": site.privacy.unit,
        "entries": len(entries),
        "head": entries[-1].hash,
    }
