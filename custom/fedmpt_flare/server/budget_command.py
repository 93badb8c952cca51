"""The console command `privacy_budget [SITE ...]`: what each site has spent, what is left, where its ledger ends.

FLARE has no public way to add a command of its own, so this module uses private ones of FLARE 2.9; the site's half is
`fedmpt_flare.site.budget_report`. It is named by the server's `local/fedmpt__p_resources.json` and lives in the parent
process: the command works while no job runs. A site answers only what its own file allows (`privacy.show_budget`), and
only whom its `authorization.json` gives the right `privacy_budget`.
"""

import json
from typing import Any

from nvflare.apis.fl_component import FLComponent
from nvflare.fuel.hci.conn import Connection
from nvflare.fuel.hci.reg import CommandModule, CommandModuleSpec, CommandSpec
from nvflare.private.fed.server.admin import new_message
from nvflare.private.fed.server.cmd_utils import CommandUtil
from nvflare.private.fed.server.server_cmd_modules import ServerCommandModules

from fedmpt_core.common.text import shown
from fedmpt_flare.tasks import BUDGET_TOPIC

COMMAND = "privacy_budget"
COLUMNS = [
    "site",
    "data set",
    "epsilon spent",
    "with what jobs hold",
    "cap",
    "if masks fail",
    "delta",
    "unit",
    "entries",
    "ledger head",
]


class BudgetCommand(FLComponent):
    """Building it adds the command to the console."""

    def __init__(self) -> None:
        """Adds the command."""
        super().__init__()
        ServerCommandModules.register_cmd_module(_BudgetModule())


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
        request = new_message(conn, topic=BUDGET_TOPIC, body="", require_authz=True)
        replies = self.send_request_to_clients(conn, request)
        if not replies:
            conn.append_error("no site answered: none is connected")
            return
        table = conn.append_table(COLUMNS)
        for reply in sorted(replies, key=lambda r: r.client_name):
            table.add_row(budget_row(reply.client_name, getattr(reply.reply, "body", None)))


def budget_row(site: str, body: object) -> list[str]:
    """A site's row of the table.

    Args:
        site: its name.
        body: what it answered; it may be anything, and goes to a terminal.
    """
    budget = _budget_in(body)
    if "refused" in budget:
        return [site, _plain(budget["refused"]), *[""] * (len(COLUMNS) - 2)]
    forms = {"dataset": "", "epsilon": ".3f", "reach": ".3f", "cap": "g", "if_masks_fail": ".3f", "delta": "g"}
    forms |= {"unit": "", "entries": ""}
    return [site, *(_plain(budget.get(key, ""), form) for key, form in forms.items()), _plain(budget.get("head"))[:16]]


def _budget_in(body: object) -> dict[str, Any]:
    try:
        answer = json.loads(body)  # type: ignore[arg-type]
        return answer if isinstance(answer, dict) else {"refused": str(answer)}
    except (TypeError, ValueError):
        return {"refused": str(body or "no answer")}


def _plain(value: Any, form: str = "") -> str:
    return shown(format(value, form) if isinstance(value, int | float) else value, 80)
