"""What a site checks before a job is deployed, whatever the job says.

`BudgetGate` runs in the site's parent process (`app_validator` in `local/resources.json`). Its sentence reaches the
submitter of the job, so it holds public numbers of the job alone; the rest is in the site's log. It holds only while
the site runs no code of a job: `byoc: none` in `local/authorization.json` and `tasks.CLASS_ALLOW_LIST` as the whole
`class_allow_list`. A job that may run holds its whole plan in the ledger from here on, so that of two jobs that fit
alone and not together the second is refused; it is charged where the site trains (`fedmpt_core.privacy.ledger.budget`).

It reads the site's own files anew each time, takes no argument, and fails closed: what cannot be checked is refused.
"""

from pathlib import Path
from typing import Any

from nvflare.apis.app_validation import AppValidator
from nvflare.apis.fl_constant import WorkspaceConstants
from nvflare.fuel.utils.log_utils import get_obj_logger

from fedmpt_core.common.dumps import forbid_dumps
from fedmpt_core.config.toml import load_site
from fedmpt_core.federation.site.admission import check_site
from fedmpt_core.privacy.accounting.epsilon import AccountingError, Steps, epsilon
from fedmpt_core.privacy.ledger.budget import STARTING, Budget, PrivacyRefused
from fedmpt_core.privacy.ledger.chain import LedgerError
from fedmpt_core.privacy.ledger.site_ledger import open_ledger
from fedmpt_flare.site.deployed_job import deployed_job
from fedmpt_flare.site.refusals import REFUSALS, note_refusal
from fedmpt_flare.tasks import short
from fedmpt_flare.workspace import SITE_FILE


class BudgetGate(AppValidator):
    """Lets a job be deployed only when the site's policy and what is left of its budget allow all of it."""

    def __init__(self) -> None:
        """Loads the accountant now: that takes seconds, and a server waits only ten for a site to accept a job."""
        super().__init__()
        forbid_dumps()  # the site's parent process holds its key
        epsilon([Steps(0.5, 1.0, 1)], 1e-5)

    def validate(self, app_folder: str) -> tuple[str, dict[str, Any]]:
        """Check a deployed app; never raises.

        Args:
            app_folder: `<workspace>/<job id>/app_<site>`, as FLARE's deployer makes it.

        Returns:
            A sentence for the submitter of the job, "" when the job may run here; and no properties.
        """
        app = Path(app_folder).resolve()
        try:
            _check(app)
        except PrivacyRefused as refused:
            self._note(app, f"the job is refused: {refused}")
            return short(refused.public), {}
        except AccountingError as error:
            self._note(app, f"the job cannot be priced: {error}")
            return f"this site's accountants cannot price the job; its {REFUSALS} says why", {}
        except LedgerError as error:
            self._note(app, f"the job is refused, as this site cannot charge it: {error}")
            return f"this site's privacy ledger cannot be used (LedgerError); its {REFUSALS} says why", {}
        except Exception as error:
            self._note(app, f"the job cannot be checked: {error}")
            return f"this site cannot check the job against its privacy policy ({type(error).__name__})", {}
        return "", {}

    def _note(self, app: Path, sentence: str) -> None:
        """For the site's owner alone: it may name paths and what is spent."""
        get_obj_logger(self).error(sentence)
        note_refusal(app.parents[1], app.parent.name, "deployment", sentence)


def _check(app: Path) -> None:
    job = deployed_job(app)
    workspace, site_name = app.parents[1], app.name.removeprefix(WorkspaceConstants.APP_PREFIX)
    kit = workspace / WorkspaceConstants.STARTUP_FOLDER_NAME
    site = load_site(workspace / WorkspaceConstants.SITE_FOLDER_NAME / SITE_FILE, site_name)
    has_kit = (kit / "client.key").exists()
    policy = check_site(job, site, has_kit=has_kit)
    if job.privacy.private:
        ledger = open_ledger(policy, site_name, kit if has_kit else None)
        Budget(job, site, ledger, app.parent.name).hold(STARTING)
