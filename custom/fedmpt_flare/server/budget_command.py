"""The console command `privacy_budget [SITE ...]`: what each site has spent, what is left, where its ledger ends.

FLARE has no public way to add a command of its own, so this module alone uses private ones of FLARE 2.9. Both classes
are named by `local/fedmpt__p_resources.json`, the server's and the site's, and live in the parent processes: the
command works while no job runs. A site answers only what its own file allows (`privacy.show_budget`), and only whom
its `authorization.json` gives the right `privacy_budget`.
"""

import json
from pathlib import Path
from typing import Any

from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, WorkspaceConstants
from nvflare.fuel.hci.conn import Connection
from nvflare.fuel.hci.reg import CommandModule, CommandModuleSpec, CommandSpec
from nvflare.private.admin_defs import Message, ok_reply
from nvflare.private.fed.client.admin import RequestProcessor
from nvflare.private.fed.server.admin import new_message
from nvflare.private.fed.server.cmd_utils import CommandUtil
from nvflare.private.fed.server.server_cmd_modules import ServerCommandModules

from fedmpt_core.common.text import shown
from fedmpt_core.config.toml import load_site
from fedmpt_core.privacy.ledger.site_ledger import read_site_ledger
from fedmpt_flare.workspace import SITE_FILE

COMMAND = "privacy_budget"
TOPIC = "fedmpt.privacy_budget"
COLUMNS = ["site", "data set", "epsilon spent", "cap", "delta", "unit", "entries", "ledger head"]


class BudgetReport(RequestProcessor):
    """The site's half."""

    def get_topics(self) -> list[str]:
        """What it answers."""
        return [TOPIC]

    def process(self, req: Message, app_ctx: Any) -> Message:
        """The budget, or why there is none to show; never raises, and names no file."""
        try:
            workspace = Path(app_ctx.new_context().get_prop(FLContextKey.WORKSPACE_ROOT))
            answer = budget_of(workspace, str(app_ctx.get_client_name()))
        except Exception as error:
            answer = {"refused": f"this site cannot read its budget ({type(error).__name__}); its log may say why"}
        return ok_reply(topic=f"reply_{req.topic}", body=json.dumps(answer))


class BudgetCommand(FLComponent):
    """The server's half; building it adds the command to the console."""

    def __init__(self) -> None:
        """Adds the command."""
        super().__init__()
        ServerCommandModules.register_cmd_module(_BudgetModule())


def budget_of(workspace: Path, name: str) -> dict[str, Any]:
    """What a site says of its budget.

    Args:
        workspace: of the site.
        name: of the site.

    Returns:
        The fields of the table, or `refused` with a sentence.

    Raises:
        ValueError: the site's file or ledger cannot be read.
    """
    site = load_site(workspace / WorkspaceConstants.SITE_FOLDER_NAME / SITE_FILE, name)
    if site.privacy is None or not site.privacy.show_budget:
        return {"refused": "this site does not show its budget (privacy.show_budget)"}
    # the server has no accountant
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


class _BudgetModule(CommandModule, CommandUtil):
    def get_spec(self) -> CommandModuleSpec:
        return CommandModuleSpec(
            name="fedmpt",
            cmd_specs=[
                CommandSpec(
                    name=COMMAND,
                    description="what each site has spent of its privacy budget",
                    usage=f"{COMMAND} [site ...]",
                    handler_func=self.report,
                    authz_func=self.authorize_client_operation,
                    visible=True,
                )
            ],
        )

    def report(self, conn: Connection, args: list[str]) -> None:
        replies = self.send_request_to_clients(conn, new_message(conn, topic=TOPIC, body="", require_authz=True))
        if not replies:
            conn.append_error("no site answered: none is connected")
            return
        table = conn.append_table(COLUMNS)
        for reply in sorted(replies, key=lambda r: r.client_name):
            table.add_row(_row(reply.client_name, _read(reply.reply)))


def _read(reply: Any) -> dict[str, Any]:
    """A site's answer; it may be anything, and goes to a terminal."""
    try:
        said = json.loads(reply.body)
        return said if isinstance(said, dict) else {"refused": str(said)}
    except (AttributeError, TypeError, ValueError):
        return {"refused": str(getattr(reply, "body", None) or "no answer")}


def _row(site: str, said: dict[str, Any]) -> list[str]:
    def plain(value: Any, form: str = "") -> str:
        return shown(format(value, form) if isinstance(value, int | float) else value, 80)

    if "refused" in said:
        return [site, plain(said["refused"]), "", "", "", "", "", ""]
    fields = (plain(said.get("dataset")), plain(said.get("epsilon"), ".3f"), plain(said.get("cap"), "g"))
    rest = (plain(said.get("delta"), "g"), plain(said.get("unit")), plain(said.get("entries")))
    return [site, *fields, *rest, plain(said.get("head"))[:16]]
