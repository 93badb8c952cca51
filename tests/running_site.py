"""A site's executor in a running job, with a trainer that writes down what it is asked; without FLARE's processes."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tomli_w
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.apis.workspace import Workspace

from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.secagg import SiteSecAggConfig
from fedmpt_core.config.site import DataConfig, SiteConfig
from fedmpt_core.config.toml import without_none
from fedmpt_core.federation.joined import Joined
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_flare import tasks
from fedmpt_flare.site.executor import TRAINER_LOG, FedMPTExecutor
from fedmpt_flare.site.refusals import REFUSALS
from fedmpt_flare.site.trainer import Trainer
from fedmpt_flare.workspace import SITE_FILE
from tests.settings import POLICY

LAYOUT = ParameterLayout(("contexts", "gate"), ((2, 3), (4,)))
INITIAL = np.linspace(-1, 1, LAYOUT.size, dtype=np.float32)
STEP = np.full(LAYOUT.size, 0.25, np.float32)
SETTINGS = SiteConfig(DataConfig("scenes"), privacy=POLICY, secagg=SiteSecAggConfig(allow_unmasked=True))


class NotedTrainer(Trainer):
    """Trains nothing. Every order is in `orders`; `refusals` raises instead of answering one."""

    def __init__(self, log: Path) -> None:
        super().__init__(log)
        self.orders: list[tuple[str, dict[str, Any]]] = []
        self.refusals: dict[str, Exception] = {}
        self.update = STEP

    @property
    def alive(self) -> bool:
        return True

    def start(self) -> None:
        pass

    def ask(
        self, order: str, block: bytes = b"", *, abort: Signal, timeout: float, **fields: Any
    ) -> tuple[dict[str, Any], bytes]:
        self.orders.append((order, fields))
        if order in self.refusals:
            raise self.refusals[order]
        match order:
            case "prepare":
                joined = Joined(LAYOUT, INITIAL, True, "fake", True, "0" * 64, "cpu", {})
                return joined.fields(), LAYOUT.encode(INITIAL)
            case "train":
                return {"steps": 1, "weight": 1.0, "privacy": {}, "metrics": {"loss": 1.0}}, LAYOUT.encode(self.update)
            case _:
                return {"figures": {"mAP": 50.0}}, b""


class RunningSite:
    """One site and its executor after START_RUN."""

    def __init__(self, root: Path, job: JobConfig, name: str = "site-1", settings: SiteConfig = SETTINGS) -> None:
        self.root, self.job, self.name = root, job, name
        for folder in ("startup", "local", "job"):
            (root / folder).mkdir(parents=True)
        settings = SiteConfig(**{**vars(settings), "secagg": SiteSecAggConfig(**_secagg(settings, root))})
        self.settings = settings
        (root / "local" / SITE_FILE).write_text(tomli_w.dumps(without_none(asdict(settings))))
        self.trainers: list[NotedTrainer] = []

        class Executor(FedMPTExecutor):
            trainer = staticmethod(self._trainer)

        self.executor = Executor({"config_type": "dict", **job.to_dict()})
        self.executor.handle_event(EventType.START_RUN, self.context())

    def _trainer(self, log: Path) -> NotedTrainer:
        self.trainers.append(NotedTrainer(log))
        return self.trainers[-1]

    @property
    def trainer(self) -> NotedTrainer:
        return self.trainers[-1]

    @property
    def trained(self) -> int:
        """Rounds that the trainer was asked for."""
        return sum(order == "train" for order, _ in self.trainer.orders)

    @property
    def log(self) -> str:
        """What the site's owner can read."""
        path = self.root / "job" / TRAINER_LOG
        return path.read_text() if path.exists() else ""

    @property
    def refusals(self) -> str:
        """The site's own list of what it refused."""
        return (self.root / REFUSALS).read_text()

    def context(self, private: Any = None) -> FLContext:
        context = FLContext()
        workspace = Workspace(str(self.root), self.name, "config")
        context.set_prop(ReservedKey.ENGINE, SimpleNamespace(get_workspace=lambda: workspace), private=True)
        context.set_prop(ReservedKey.IDENTITY_NAME, self.name)
        context.set_prop(ReservedKey.RUN_NUM, "job")
        if private is not None:
            peer = FLContext()
            peer.set_prop(tasks.FOR_YOU, private)
            context.set_peer_context(peer)
        return context

    def ask(self, task: Any, data: Shareable, private: Any = None) -> Shareable:
        """What the executor answers."""
        return self.executor.execute(task, data, self.context(private), Signal())

    def join(self, digest: Any = None) -> Shareable:
        return self.ask(tasks.JOIN, tasks.message(headers={tasks.JOB_DIGEST: digest or self.job.digest()}))

    def train(
        self, number: Any = 1, state: np.ndarray = INITIAL, *, attempt: Any = 0, protocol: Any = None
    ) -> Shareable:
        return self.ask(tasks.TRAIN, train_task(number, LAYOUT.encode(state), attempt, protocol))

    def validate(self, number: Any, state: np.ndarray = INITIAL) -> Shareable:
        return self.ask(tasks.VALIDATE, tasks.message(vector=LAYOUT.encode(state), headers={tasks.ROUND: number}))


def train_task(number: Any = 1, vector: Any = None, attempt: Any = 0, protocol: Any = None) -> Shareable:
    """A `train` task."""
    headers = {tasks.ROUND: number, tasks.ATTEMPT: attempt}
    vector = LAYOUT.encode(INITIAL) if vector is None else vector
    return tasks.message(fields={tasks.HEADS: {}}, vector=vector, headers=headers, protocol=protocol)


def reason(answer: Shareable, code: str = tasks.SITE_REFUSED) -> str:
    """Why an answer is none; nothing but code, reason and the signed one is in it."""
    assert answer.get_return_code() == code, answer
    assert tasks.VECTOR not in answer
    assert tasks.PROTOCOL not in answer
    assert tasks.FIELDS not in answer
    return str(answer.get_header(tasks.REASON))


def _secagg(settings: SiteConfig, root: Path) -> dict[str, Any]:
    return {**vars(settings.secagg), "state": settings.secagg.state or str(root / "said")}
