"""The site's half of a job where its own disk fails it: an answer all the same, and a sentence in the site's log."""

import errno
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedmpt_core.config.job import JobConfig
from fedmpt_flare import tasks
from fedmpt_flare.site.executor import TRAINER_LOG, FedMPTExecutor


@pytest.fixture
def fl_ctx(tmp_path: Path) -> Any:
    """A job's context at a site whose job folder is `tmp_path`."""
    workspace = SimpleNamespace(get_run_dir=lambda job_id: str(tmp_path))
    return SimpleNamespace(
        get_engine=lambda: SimpleNamespace(get_workspace=lambda: workspace),
        get_job_id=lambda: "job",
        get_peer_context=lambda: None,
        get_prop=lambda *_, **__: None,
        get_identity_name=lambda *_: "site-1",
    )


def refused(fl_ctx: Any) -> Any:
    """The answer to a server that has another job in mind."""
    task = tasks.message(headers={tasks.JOB_DIGEST: "another"})
    executor = FedMPTExecutor(JobConfig("agreed", ("cat", "dog")).to_dict())
    return executor.execute(tasks.JOIN, task, fl_ctx, SimpleNamespace(triggered=False))  # type: ignore[arg-type]


def test_a_full_disk_is_named_in_the_log_and_the_answer_given(
    fl_ctx: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = Path.open

    def full(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if self.name == TRAINER_LOG:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", full)
    with caplog.at_level(logging.ERROR):
        answer = refused(fl_ctx)
    assert answer.get_return_code() == tasks.SITE_REFUSED
    assert "trainer.log cannot be written (No space left on device): `fedmpt site check` says" in caplog.text


def test_with_room_the_reason_stays_in_the_trainer_s_log(
    fl_ctx: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        answer = refused(fl_ctx)
    assert answer.get_return_code() == tasks.SITE_REFUSED
    assert "the reason is in this site's trainer.log" in caplog.text
    assert "job digest another" not in caplog.text + answer.get_header(tasks.REASON)
    assert "job digest another" in (tmp_path / TRAINER_LOG).read_text()
