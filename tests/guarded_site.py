"""A site with kit, policy, ledger and one deployed job, for tests of its guards; FLARE's processes are left out."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tomli_w
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.workspace import Workspace

from fedmpt_core.common.release import RELEASE
from fedmpt_core.config.job import FederationConfig, JobConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.secagg import SecAggConfig
from fedmpt_core.config.site import SiteConfig, SitePrivacyConfig
from fedmpt_core.config.toml import without_none
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.privacy.accounting.epsilon import Steps, epsilon
from fedmpt_core.privacy.ledger.budget import Budget
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, ledger_path, open_ledger
from fedmpt_flare import tasks
from fedmpt_flare.site.deployed_job import EXECUTOR
from fedmpt_flare.site.egress_guard import EgressGuard
from fedmpt_flare.workspace import SITE_FILE
from tests.kits import write_kit
from tests.settings import UNMASKED

JOB_ID, SITE = "0f9a1c42-job", "site-1"
PRIVACY = PrivacyConfig(epsilon=8.0, delta=1e-5, sample_rate=0.5, noise_multiplier=1.5)
JOB = JobConfig(
    "agreed",
    ("bus", "dog", "cat"),
    training=TrainingConfig(rounds=2, local_steps=2),
    privacy=PRIVACY,
    secagg=UNMASKED,
    federation=FederationConfig(min_sites=2, max_failed_rounds=0),
)
LAYOUT = ParameterLayout(("contexts",), ((2, 3),))
UPDATE = LAYOUT.encode(np.arange(6, dtype=np.float32))
SPENT = epsilon([Steps(0.5, 1.5, 2)], 1e-5)  # one round

MASKED_JOB = replace(JOB, secagg=SecAggConfig(), federation=FederationConfig(max_failed_rounds=0))
MESSAGES = {
    tasks.ADVERTISE: b"\xffADV1 keys",
    tasks.DEAL: b"\xffDEA1 shares",
    tasks.CONFIRM: b"\xffCFM1 signature",
    tasks.SHOW: b"\xffSHO1 rows",
    tasks.TRAIN: b"\xffRDY1 signature",
    tasks.MASK: b"\xffMSK1 masked words",
    tasks.OPEN: b"\xffOPN1 shares",
}
ABORT = b"\xffABR1 reason"


@dataclass
class Site:
    """A site's workspace with kit, policy, ledger and one deployed job."""

    root: Path
    settings: SiteConfig

    @property
    def app(self) -> Path:
        return self.root / JOB_ID / f"app_{SITE}"

    @property
    def config(self) -> Path:
        return self.app / "config" / "config_fed_client.json"

    @property
    def policy(self) -> SitePrivacyConfig:
        assert self.settings.privacy is not None
        return self.settings.privacy

    @property
    def ledger(self) -> Path:
        return ledger_path(self.policy)

    def deploy(self, job: JobConfig = JOB) -> None:
        executor = {
            "path": EXECUTOR,
            "args": {"job": {"config_type": "dict", **job.to_dict()}, "release": RELEASE},
        }
        plain = {
            "format_version": 2,
            "executors": [{"tasks": list(tasks.TASKS), "executor": executor}],
            "components": [],
            "task_data_filters": [],
            "task_result_filters": [],
            "default_task_fetch_interval": 0.1,
        }
        self.config.parent.mkdir(parents=True, exist_ok=True)
        self.config.write_text(json.dumps(plain))
        self.config.with_name("config_fed_server.json").write_text("{}")
        (self.app / ".__nvfl_sig.json").write_text("{}")

    def edit(self, change: Callable[[dict[str, Any]], Any]) -> None:
        plain = json.loads(self.config.read_text())
        change(plain)
        self.config.write_text(json.dumps(plain))

    def settle(self, *, evaluate: bool = False, **policy: Any) -> None:
        data = replace(self.settings.data, evaluate=evaluate)
        privacy = replace(self.policy, **policy)
        self.settings = replace(self.settings, data=data, privacy=privacy)
        (self.root / "local" / SITE_FILE).write_text(tomli_w.dumps(without_none(asdict(self.settings))))

    def release(self, block: bytes = UPDATE, *, job_id: str = JOB_ID, job: JobConfig = JOB) -> dict[str, Any]:
        """Reserve and commit a round, as the trainer does; what it then says of the budget."""
        budget = Budget(job, self.settings, open_ledger(self.policy, SITE, self.root / "startup"), job_id)
        budget.commit(budget.reserve(1, 0, {}), hashlib.sha256(block).hexdigest())
        return {"epsilon": budget.spent(), "delta": job.privacy.delta, "head": budget.head().to_dict()}

    def context(self, task: str) -> FLContext:
        context = FLContext()
        workspace = Workspace(str(self.root), SITE, "config")
        context.set_prop(ReservedKey.ENGINE, SimpleNamespace(get_workspace=lambda: workspace), private=True)
        context.set_prop(ReservedKey.IDENTITY_NAME, SITE)
        context.set_prop(ReservedKey.RUN_NUM, JOB_ID)
        context.set_prop(FLContextKey.APP_ROOT, str(self.app))
        context.set_prop(FLContextKey.TASK_NAME, task)
        return context

    def guard(self, task: str, answer: Shareable) -> Shareable:
        return EgressGuard().process(answer, self.context(task))


def _other_key(site: Site) -> None:
    site.ledger.unlink()
    write_kit(site.root / "other", SITE)
    create_ledger(site.policy, SITE, site.root / "other")


def _unsigned(site: Site) -> None:
    site.ledger.unlink()
    create_ledger(site.policy, SITE, None)


BROKEN: dict[str, tuple[Callable[[Site], Any], str]] = {
    "no site file": (lambda s: (s.root / "local" / SITE_FILE).unlink(), "ConfigError"),
    "bad site file": (lambda s: (s.root / "local" / SITE_FILE).write_text("privacy = 1"), "ConfigError"),
    "no ledger": (lambda s: s.ledger.unlink(), "LedgerError"),
    "changed ledger": (lambda s: s.ledger.write_bytes(s.ledger.read_bytes().replace(b"pict", b"pikt")), "LedgerError"),
    "ledger of another key": (_other_key, "LedgerError"),
    "unsigned ledger": (_unsigned, "LedgerError"),
    "no certificate": (lambda s: (s.root / "startup" / "client.crt").unlink(), "SigningError"),
    "no client configuration": (lambda s: s.config.unlink(), "FileNotFoundError"),
}
