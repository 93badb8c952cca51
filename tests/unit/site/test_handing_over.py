"""An aborted job's site hands its ledger over unasked, where its guard and policy let it, and in no other case."""

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedmpt_flare import tasks
from fedmpt_flare.site.executor import FedMPTExecutor
from tests.guarded_site import JOB, Site
from tests.running_site import NotedTrainer


class Executor(FedMPTExecutor):
    trainer = NotedTrainer


def handed_over(site: Site, *, aborted: bool = True, joined: bool = True, broken: bool = False) -> list[Shareable]:
    """What goes to the server when the job ends."""
    sent: list[Shareable] = []

    def fire(topic: str, request: Shareable, fl_ctx: Any, optional: bool = False) -> None:
        assert (topic, optional) == (tasks.LEDGER_TOPIC, True)
        if broken:
            raise ConnectionError("gone")
        sent.append(request)

    executor = Executor({"config_type": "dict", **JOB.to_dict()})
    context = site.context("train")
    known: Any = context.get_prop(ReservedKey.ENGINE)
    workspace = known.get_workspace()
    engine = SimpleNamespace(get_workspace=lambda: workspace, fire_and_forget_aux_request=fire)
    context.set_prop(ReservedKey.ENGINE, engine, private=True)
    executor.handle_event(EventType.START_RUN, context)
    if joined:
        join = tasks.message(headers={tasks.JOB_DIGEST: JOB.digest()})
        assert executor.execute(tasks.JOIN, join, context, Signal()).get_return_code() == ReturnCode.OK
    context.remove_prop(FLContextKey.TASK_NAME, force_removal=True)  # no task goes on when a run ends
    context.set_prop(FLContextKey.RUN_ABORT_REQUESTED, aborted, private=True, sticky=False)
    executor.handle_event(EventType.ABORT_TASK, context)
    executor.handle_event(EventType.END_RUN, context)
    return sent


def test_the_ledger_of_an_aborted_job_goes_to_the_server(site: Site) -> None:
    site.release()
    (sent,) = handed_over(site)
    assert sent[tasks.LEDGER_COPY] == site.ledger.read_bytes()
    assert sent[tasks.CERTIFICATE] == (site.root / "startup" / "client.crt").read_bytes()


def test_nothing_goes_that_the_site_keeps_or_that_nobody_aborted(site: Site) -> None:
    assert handed_over(site, aborted=False) == []
    assert handed_over(site, joined=False) == []
    assert handed_over(site, broken=True) == []  # and nothing is raised into FLARE
    site.settle(share_ledger=False)
    assert handed_over(site) == []


@pytest.mark.parametrize("lost", ["ledger", "deployed job"])
def test_a_site_that_cannot_check_sends_nothing(site: Site, lost: str) -> None:
    site.ledger.unlink() if lost == "ledger" else shutil.rmtree(site.app)
    assert handed_over(site) == []
