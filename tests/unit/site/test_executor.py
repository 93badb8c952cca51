"""The site's half of a job: what the job says decides, and an answer always comes."""

import errno
import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import ReservedHeaderKey, Shareable

from fedmpt_core.config.job import JobConfig, TrainingConfig
from fedmpt_flare import tasks
from fedmpt_flare.site.executor import TRAINER_LOG
from fedmpt_flare.site.request import MOST
from fedmpt_flare.site.trainer import TrainerError
from tests.running_site import INITIAL, LAYOUT, RunningSite, reason, train_task
from tests.settings import REHEARSED, UNMASKED, UNPROTECTED

MASKED = JobConfig(
    "agreed", ("cat", "dog"), training=TrainingConfig(rounds=4, local_steps=1), privacy=UNPROTECTED, secagg=REHEARSED
)
PLAIN = replace(MASKED, secagg=UNMASKED)
MESSAGE = b"FLARE-SA/1 RND1"


@pytest.fixture
def masked(tmp_path: Path) -> RunningSite:
    return RunningSite(tmp_path / "masked", MASKED)


@pytest.fixture
def plain(tmp_path: Path) -> RunningSite:
    return RunningSite(tmp_path / "plain", PLAIN)


def wrong_digest(site: RunningSite) -> Shareable:
    return site.join("another")


def damaged_record(site: RunningSite) -> Shareable:
    folder = Path(site.settings.secagg.state)
    folder.mkdir()
    (folder / "job.json").write_text("{")
    return site.join()


def unreadable_record(site: RunningSite) -> Shareable:
    (Path(site.settings.secagg.state) / "job.json").mkdir(parents=True)
    return site.join()


def missing_roster(site: RunningSite) -> Shareable:
    (site.root / "startup" / "client.key").write_text("")
    return site.join()


def other_release(site: RunningSite) -> Shareable:
    site.executor.release = "0.0"
    return site.join()


def refused_by_policy(site: RunningSite) -> Shareable:
    site.trainer.refusals["prepare"] = TrainerError("no", expected=True)
    return site.join()


@pytest.mark.parametrize(
    "join", [wrong_digest, damaged_record, unreadable_record, missing_roster, other_release, refused_by_policy]
)
@pytest.mark.parametrize("task", [t for t in tasks.TASKS if t != tasks.JOIN])
def test_after_a_refused_join_nothing_is_done(masked: RunningSite, join: Any, task: str) -> None:
    assert join(masked).get_return_code() in (tasks.SITE_REFUSED, tasks.SITE_FAILED)
    for protocol in (None, MESSAGE):
        answer = masked.ask(task, train_task(protocol=protocol), private=MESSAGE)
        assert "has not joined" in reason(answer)
    assert not masked.trained


def test_a_second_join_that_is_refused_ends_what_the_first_began(plain: RunningSite) -> None:
    assert plain.join().get_return_code() == ReturnCode.OK
    assert plain.train().get_return_code() == ReturnCode.OK
    wrong_digest(plain)
    assert "has not joined" in reason(plain.train())
    assert plain.join().get_return_code() == ReturnCode.OK
    assert plain.train().get_return_code() == ReturnCode.OK


def test_a_masked_job_never_gives_a_plain_update(masked: RunningSite) -> None:
    assert masked.join().get_return_code() == ReturnCode.OK
    for protocol in (None, "", b"", MESSAGE, b"x" * 200):
        reason(masked.ask(tasks.TRAIN, train_task(protocol=protocol)))
    assert not masked.trained


@pytest.mark.parametrize(
    "task", [tasks.JOIN, tasks.TRAIN, tasks.VALIDATE, tasks.LEDGER, tasks.ADVERTISE, tasks.CONFIRM]
)
def test_a_job_without_masks_takes_no_message_of_them(plain: RunningSite, task: str) -> None:
    plain.join()
    data = train_task(protocol=MESSAGE)
    data.set_header(tasks.JOB_DIGEST, PLAIN.digest())
    assert "message of" in reason(plain.ask(task, data, private=MESSAGE))
    assert not plain.trained


@pytest.mark.parametrize("task", [tasks.ADVERTISE, tasks.DEAL, tasks.CONFIRM, tasks.SHOW, tasks.MASK, tasks.OPEN])
def test_a_job_without_masks_has_no_task_of_them(plain: RunningSite, task: str) -> None:
    plain.join()
    assert "no masks" in reason(plain.ask(task, tasks.message()))


@pytest.mark.parametrize("job", [PLAIN, MASKED])
@pytest.mark.parametrize("number", [0, -1, 5, 2**31, 2**200, 1.0, "1", None, True, [1], np.int64(1)])
def test_a_round_that_the_job_does_not_have_is_not_trained(tmp_path: Path, job: JobConfig, number: Any) -> None:
    site = RunningSite(tmp_path / "site", job)
    site.join()
    assert "round" in reason(site.train(number, protocol=MESSAGE if job.secagg.masked else None))
    assert not site.trained


@pytest.mark.parametrize("attempt", [-1, 3, 2**31, None, 0.0, True])
def test_an_attempt_that_the_job_does_not_have_is_not_trained(plain: RunningSite, attempt: Any) -> None:
    plain.join()
    assert "attempt" in reason(plain.train(attempt=attempt))
    assert not plain.trained


@pytest.mark.parametrize(
    "vector", [b"", LAYOUT.encode(INITIAL)[:-1], LAYOUT.encode(INITIAL)[:-4] + b"\x00\x00\xc0\x7f"]
)
@pytest.mark.parametrize("task", [tasks.TRAIN, tasks.VALIDATE])
def test_parameters_that_are_none_reach_no_trainer(plain: RunningSite, vector: bytes, task: str) -> None:
    plain.join()
    reason(plain.ask(task, train_task(vector=vector)))
    assert [order for order, _ in plain.trainer.orders] == ["prepare"]


def test_the_same_task_gets_the_same_answer_and_other_content_none(plain: RunningSite) -> None:
    plain.join()
    assert plain.train() is plain.train()
    data = train_task()
    data[tasks.FIELDS][tasks.HEADS] = {"site-1": {"seq": 0, "hash": "0" * 64, "sig": ""}}
    assert "other content" in reason(plain.ask(tasks.TRAIN, data))
    assert plain.trained == 1


@pytest.mark.parametrize(("every", "number"), [(0, 0), (0, 4), (3, 1), (3, 2)])
def test_figures_that_the_job_does_not_ask_for_are_not_worked_out(tmp_path: Path, every: int, number: int) -> None:
    job = replace(PLAIN, federation=replace(PLAIN.federation, evaluate_every=every))
    site = RunningSite(tmp_path / "site", job)
    site.join()
    assert "asks for no figures" in reason(site.validate(number))
    assert [order for order, _ in site.trainer.orders] == ["prepare"]
    assert every == 0 or site.validate(3).get_return_code() == ReturnCode.OK


@pytest.mark.parametrize("job", [PLAIN, MASKED])
def test_a_job_without_differential_privacy_gets_no_ledger(tmp_path: Path, job: JobConfig) -> None:
    """The site shares its ledger with jobs that are charged to it."""
    site = RunningSite(tmp_path / "site", job)
    site.join()
    assert "no differential privacy" in reason(site.ask(tasks.LEDGER, tasks.message()))


class Hostile:
    """Raises at every touch."""

    def __repr__(self) -> str:
        raise RuntimeError("touched")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("touched")

    def __hash__(self) -> int:
        raise RuntimeError("touched")

    def __len__(self) -> int:
        raise RuntimeError("touched")


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, MOST, 2**400, np.int64(1), np.zeros(3), np.float32(1), object(), 1j, ...])
    | st.builds(Hostile)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=50)
    | st.sampled_from([LAYOUT.encode(INITIAL), MESSAGE, MASKED.digest(), PLAIN.digest(), bytearray(b"x")])
)
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))
PARTS = st.dictionaries(st.sampled_from([tasks.VECTOR, tasks.PROTOCOL, tasks.FIELDS]), VALUES)
HEADERS = st.dictionaries(st.sampled_from([tasks.ROUND, tasks.ATTEMPT, tasks.JOB_DIGEST, ReservedHeaderKey.RC]), VALUES)


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> list[RunningSite]:
    sites = [RunningSite(tmp_path_factory.mktemp("fuzzed") / str(i), job) for i, job in enumerate((PLAIN, MASKED))]
    for site in sites:
        assert site.join().get_return_code() == ReturnCode.OK
    return sites


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(tasks.TASKS) | VALUES,
    PARTS,
    HEADERS | VALUES,
    VALUES,
    st.sampled_from([{}, {tasks.HEADS: {}}]) | VALUES,
)
def test_whatever_comes_an_answer_goes(
    joined: list[RunningSite], task: Any, parts: dict[str, Any], headers: Any, private: Any, fields: Any
) -> None:
    for site in joined:
        data = Shareable()
        data.update({tasks.FIELDS: fields, **parts})
        data[ReservedHeaderKey.HEADERS] = headers
        answer = site.ask(task, data, private)
        assert isinstance(answer, Shareable)
        assert answer.get_return_code() in (ReturnCode.OK, tasks.SITE_REFUSED, tasks.SITE_FAILED)
    assert not joined[1].trained


@pytest.mark.parametrize("head", [1, "x", {}, {"seq": 0}, {"seq": -1, "hash": "0" * 64, "sig": ""}, Hostile(), [0]])
def test_a_ledger_head_that_is_none_is_refused(plain: RunningSite, head: Any) -> None:
    plain.join()
    data = train_task()
    data[tasks.FIELDS][tasks.HEADS] = {"site-1": head}
    assert "head" in reason(plain.ask(tasks.TRAIN, data))
    assert not plain.trained


def test_a_context_that_fails_is_answered_too(plain: RunningSite) -> None:
    plain.join()
    assert plain.executor.execute(tasks.TRAIN, train_task(), None, None).get_return_code() == tasks.SITE_FAILED  # type: ignore[arg-type]
    assert plain.executor.execute(tasks.TRAIN, None, None, None).get_return_code() == tasks.SITE_FAILED  # type: ignore[arg-type]


def test_a_full_disk_is_named_in_the_log_and_the_answer_given(
    plain: RunningSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = Path.open

    def full(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if self.name == TRAINER_LOG:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", full)
    with caplog.at_level(logging.ERROR):
        answer = plain.join("another")
    assert answer.get_return_code() == tasks.SITE_REFUSED
    assert "trainer.log cannot be written (No space left on device): `fedmpt site check` says" in caplog.text
    assert "job digest 'another'" in plain.refusals  # there may be room in the site's folder


def test_with_room_the_reason_stays_in_the_trainer_s_log(plain: RunningSite, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        answer = plain.join("another")
    assert answer.get_return_code() == tasks.SITE_REFUSED
    assert "the reason is in this site's trainer.log" in caplog.text
    assert "job digest 'another'" not in caplog.text + reason(answer)
    assert "job digest 'another'" in plain.log


# ---- what leaves by a refusal --------------------------------------------------------------------------------------

OWN = "data set 'ward-7' would reach epsilon 7.531; 6.125 is spent, the cap is 7.25; see /srv/pictures/a.png"
PUBLIC = "privacy budget: what is left at this site does not suffice for the job"


@pytest.mark.parametrize("order", ["prepare", "train", "validate"])
@pytest.mark.parametrize("public", ["", PUBLIC])
@pytest.mark.parametrize("expected", [True, False])
def test_of_a_refusal_its_public_sentence_travels_and_the_site_has_the_whole(
    plain: RunningSite, caplog: pytest.LogCaptureFixture, order: str, public: str, expected: bool
) -> None:
    if order != "prepare":
        plain.join()
    plain.trainer.refusals[order] = TrainerError(OWN, expected=expected, public=public)
    answer = {"prepare": plain.join, "train": plain.train, "validate": lambda: plain.validate(0)}[order]()
    sentence = reason(answer, tasks.SITE_REFUSED if expected else tasks.SITE_FAILED)
    assert sentence == public or (not public and "the reason is in its trainer.log" in sentence)
    assert OWN in plain.log
    assert OWN in plain.refusals
    assert "ward-7" not in caplog.text


def test_of_the_protocol_s_refusals_a_code_travels(masked: RunningSite) -> None:
    masked.join()
    for task in (tasks.ADVERTISE, tasks.DEAL, tasks.CONFIRM, tasks.SHOW, tasks.TRAIN, tasks.MASK, tasks.OPEN):
        sentence = reason(masked.ask(task, train_task(protocol=MESSAGE), private=MESSAGE))
        assert re.fullmatch(r"[A-Z_]+: (member \d+, )?the reason is in this site's trainer\.log", sentence)


def test_a_reason_is_one_short_line() -> None:
    sentence = tasks.refusal(tasks.SITE_FAILED, "a\nb\x00\u202e" + "x" * 10_000).get_header(tasks.REASON)
    assert sentence == ("a b  " + "x" * 10_000)[: tasks.MAX_REASON]
