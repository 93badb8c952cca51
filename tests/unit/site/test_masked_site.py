"""Sites in a masked job, over the bytes that travel: keys of a round are gone when it is over, figures of it stay."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable

from fedmpt_core.federation.terms import secure_terms
from fedmpt_core.secagg.context import model_digest
from fedmpt_core.secagg.identity import ChainCheck
from fedmpt_core.secagg.server import SecAggServer
from fedmpt_flare import tasks
from tests.running_site import INITIAL, LAYOUT, RunningSite, reason
from tests.unit.site.test_executor import MASKED

NAMES = ("a", "b", "c")


class Round:
    """Three sites and an honest server that has their masked vectors and asks for nothing more."""

    def __init__(self, folder: Path, *, step: float = 0.25) -> None:
        self.sites = {name: RunningSite(folder / name, MASKED, name) for name in NAMES}
        terms, _ = secure_terms(MASKED, "job", LAYOUT, "0" * 64)
        self.server = server = SecAggServer(terms, ChainCheck(None))
        for site in self.sites.values():
            assert site.join().get_return_code() == ReturnCode.OK
            site.trainer.update = np.full(LAYOUT.size, step, np.float32)
        self.ask(tasks.ADVERTISE, server.open_epoch(1), server.take_advertisement)
        self.ask(tasks.DEAL, server.directory(), server.take_deal)
        for name, deals in server.deals().items():
            server.take_confirm(name, self.sites[name].ask(tasks.CONFIRM, tasks.message(), deals)[tasks.PROTOCOL])
        self.begin = server.open_round(1, 0, model_digest(LAYOUT.split(INITIAL)))
        for name, site in self.sites.items():
            self.answer = site.train(protocol=self.begin)
            server.take_ready(name, self.answer[tasks.PROTOCOL])
        self.ask(tasks.MASK, server.mask_request(()), server.take_masked)
        self.open = server.open_request()

    def ask(self, task: str, request: bytes, take: Callable[[str, bytes], None]) -> None:
        for name, site in self.sites.items():
            take(name, site.ask(task, tasks.message(protocol=request))[tasks.PROTOCOL])

    def opened(self, name: str = "a") -> Shareable:
        return self.sites[name].ask(tasks.OPEN, tasks.message(protocol=self.open))


@pytest.fixture
def masked(tmp_path: Path) -> Round:
    return Round(tmp_path)


def test_a_site_that_is_asked_in_time_opens_the_sum(masked: Round) -> None:
    assert masked.opened().get_return_code() == ReturnCode.OK


@pytest.mark.parametrize("task", [tasks.VALIDATE, tasks.LEDGER, tasks.JOIN])
def test_after_a_task_that_ends_the_round_nobody_gets_its_shares(masked: Round, task: str) -> None:
    site = masked.sites["a"]
    if task == tasks.VALIDATE:
        assert site.validate(1).get_return_code() == ReturnCode.OK
    elif task == tasks.LEDGER:
        site.ask(task, tasks.message())
    else:
        site.join("another")
        assert site.join().get_return_code() == ReturnCode.OK
    reason(masked.opened())
    assert masked.opened("b").get_return_code() == ReturnCode.OK


@pytest.mark.parametrize("event", [EventType.ABORT_TASK, EventType.END_RUN])
def test_after_the_end_of_the_run_nobody_gets_its_shares(masked: Round, event: str) -> None:
    site = masked.sites["a"]
    site.executor.handle_event(event, site.context())
    reason(masked.opened())


def test_the_start_of_a_round_that_is_over_trains_nobody_again(masked: Round) -> None:
    """Not even after a new join, which forgets what was answered: a round is charged once."""
    site, again = masked.sites["a"], masked.begin
    assert masked.opened().get_return_code() == ReturnCode.OK
    site.join("another")
    assert site.join().get_return_code() == ReturnCode.OK
    for _ in range(2):
        assert "LATCHED" in reason(site.train(protocol=again))
    assert site.trained == 1


def test_a_task_that_came_before_ends_no_round(masked: Round) -> None:
    site = masked.sites["a"]
    site.join()  # FLARE asks again when it has not seen the answer
    assert masked.opened().get_return_code() == ReturnCode.OK


@pytest.mark.parametrize(("step", "logged"), [(16.0, False), (16.5, True), (-1e6, True)])
def test_what_was_cut_off_is_told_to_the_site_s_owner_alone(tmp_path: Path, step: float, logged: bool) -> None:
    began = Round(tmp_path, step=step)
    sentence = f"round 1: {LAYOUT.size} numbers of this site's update were beyond secagg.value_range"
    for site in began.sites.values():
        assert (sentence in site.log) is logged
    assert set(began.answer[tasks.FIELDS]) == {tasks.PRIVACY}
