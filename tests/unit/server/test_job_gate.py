"""What the server says of a job before any site is asked, and of one that failed: in the job's record."""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext

from fedmpt_core.common.release import RELEASE
from fedmpt_core.config.federation import ResumeConfig
from fedmpt_core.config.job import JobConfig, PrivacyConfig
from fedmpt_core.federation.run.record import RunRecord
from fedmpt_core.federation.server.checkpoint import Checkpoint
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_flare.server.job_gate import JobGate
from fedmpt_flare.server.outcome import OutcomeInMeta
from fedmpt_flare.tasks import CLASS_ALLOW_LIST

JOB = JobConfig("agreed", ("cat", "dog"), privacy=PrivacyConfig(noise_multiplier=1.5))
LAYOUT = ParameterLayout(("head.scale",), ((1,),))
ON = replace(JOB, resume=ResumeConfig("run-1", 2))


@pytest.fixture
def deployed(tmp_path: Path) -> Callable[..., Path]:
    """The server's folder with a checkpoint of run-1 after round 2, and a job deployed in it."""
    Checkpoint("run-1", JOB, 2, LAYOUT, np.ones(1, np.float32), RunRecord.start(JOB, "run-1"), {}).save(
        tmp_path / "kept"
    )
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "fedmpt_server.toml").write_text('checkpoints = "../kept"\n')

    def deploy(job: JobConfig, path: str = CLASS_ALLOW_LIST[1], **changes: Any) -> Path:
        app = tmp_path / "0f9a1c42-job" / "app_server"
        (app / "config").mkdir(parents=True)
        arguments = {"job": {"config_type": "dict", **job.to_dict()}, "release": RELEASE, **changes}
        config = {"format_version": 2, "workflows": [{"id": "fedmpt", "path": path, "args": arguments}]}
        (app / "config" / "config_fed_server.json").write_text(json.dumps(config))
        return app

    return deploy


@pytest.mark.parametrize("job", [JOB, ON, replace(ON, federation=replace(JOB.federation, max_failed_rounds=9))])
def test_a_job_that_can_run_passes(deployed: Callable[..., Path], job: JobConfig) -> None:
    assert JobGate().validate(str(deployed(job))) == ("", {})


@pytest.mark.parametrize(
    ("job", "says"),
    [
        (replace(ON, resume=ResumeConfig("run-1", 1)), "run 'run-1' is of round 2: set resume.round = 2"),
        (replace(ON, resume=ResumeConfig("run-1", 3)), "run 'run-1' is of round 2: set resume.round = 2"),
        (replace(ON, resume=ResumeConfig("run-7", 2)), "there is no checkpoint of run 'run-7'"),
        (replace(ON, seed=9), "run 'run-1' was of another job: seed differ"),
        (replace(ON, privacy=replace(JOB.privacy, noise_multiplier=1.4)), "noise_multiplier=1.4: run 'run-1' trained"),
    ],
)
def test_a_job_that_continues_a_run_otherwise_than_it_was_left_is_refused_before_any_site_is_asked(
    deployed: Callable[..., Path], tmp_path: Path, job: JobConfig, says: str
) -> None:
    sentence, properties = JobGate().validate(str(deployed(job)))
    assert sentence.startswith("the job is refused: ")
    assert says in sentence
    assert str(tmp_path) not in sentence
    assert properties == {}


def test_a_job_of_another_release_or_that_is_none_is_refused(deployed: Callable[..., Path]) -> None:
    app = deployed(JOB, release="0.0.1")
    assert f"exported with fedmpt 0.0.1, the server runs {RELEASE}" in JobGate().validate(str(app))[0]
    config = app / "config" / "config_fed_server.json"
    for broken in ("{", "{}", json.dumps({"workflows": [{"path": CLASS_ALLOW_LIST[1]}]})):
        config.write_text(broken)
        assert JobGate().validate(str(app))[0]
    config.write_text('{"workflows": [{"path": "another.Workflow"}]}')  # FLARE's own list of classes refuses it
    assert JobGate().validate(str(app))[0] == ""


class Jobs:
    """FLARE's store of jobs, with one that has ended."""

    def __init__(self, record: dict[str, Any] | None) -> None:
        self.meta: dict[str, Any] = {"job_deploy_detail": ["server: OK", "site-1: OK"]}
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as files:
            files.writestr("workspace/fl_app.txt", "app")
            if record is not None:
                files.writestr("workspace/result.json", json.dumps(record))
        self.archive = archive.getvalue()

    def get_storage_component(self, job_id: str, component: str, fl_ctx: FLContext) -> bytes:
        assert (job_id, component) == ("job-1", "workspace")
        return self.archive

    def get_job(self, job_id: str, fl_ctx: FLContext) -> Any:
        return SimpleNamespace(meta=self.meta)

    def update_meta(self, job_id: str, meta: dict[str, Any], fl_ctx: FLContext) -> None:
        self.meta |= meta


@pytest.mark.parametrize(
    ("record", "added"),
    [
        ({"outcome": "failed: round 2 failed: train: 1 sites answered, min_sites=3", "rounds": []}, None),
        ({"outcome": "failed: a\nb", "rounds": []}, ["job: failed: a b"]),
        (
            {"outcome": "running", "rounds": [{"round": 0}, {"round": 3}]},
            ["job: failed: the server's process of the job died; its last complete round is 3"],
        ),
        ({"outcome": "completed", "rounds": []}, []),
        (None, []),
        ({"rounds": []}, []),
    ],
)
def test_why_a_job_failed_is_in_its_record(record: dict[str, Any] | None, added: list[str] | None) -> None:
    jobs, context = Jobs(record), FLContext()
    engine = SimpleNamespace(get_component=lambda name: jobs)
    context.set_prop(ReservedKey.ENGINE, engine, private=True)
    context.set_prop(FLContextKey.EVENT_DATA, {"job_id": "job-1"}, private=True, sticky=False)
    OutcomeInMeta().handle_event(EventType.JOB_STARTED, context)
    assert len(jobs.meta["job_deploy_detail"]) == 2
    OutcomeInMeta().handle_event(EventType.JOB_COMPLETED, context)
    expected = [f"job: {record['outcome']}"] if added is None and record else added
    assert jobs.meta["job_deploy_detail"] == ["server: OK", "site-1: OK", *(expected or [])]
