"""Round figures in MLflow, read back by MLflow's own client; and what is missing is a sentence in the server's log."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.tracking.client import MlflowClient
from nvflare.apis.analytix import AnalyticsDataType, LogWriterName
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo
from nvflare.private.event import fire_event

from fedmpt_core.config.job import FederationConfig, JobConfig
from fedmpt_core.config.toml import ConfigError, job_from_dict
from fedmpt_flare.job.recipe import FedMPTRecipe
from fedmpt_flare.server.mlflow_receiver import EXPERIMENT, URI, MlflowReceiver
from fedmpt_flare.tasks import TRACKING_CLASSES


def context(receiver: MlflowReceiver, job_id: str = "job-1") -> FLContext:
    """Of a job at a server whose only component is the receiver."""
    engine = SimpleNamespace(fire_event=lambda kind, fl_ctx: fire_event(kind, [receiver], fl_ctx))
    context = FLContext()
    context.set_prop(ReservedKey.ENGINE, engine, private=True)
    context.set_prop(ReservedKey.IDENTITY_NAME, "server")
    context.set_prop(ReservedKey.RUN_NUM, job_id)
    context.set_prop(ReservedKey.JOB_META, {"name": "agreed"}, private=True)
    return context


def say(fl_ctx: FLContext, tag: str, value: float, step: int) -> None:
    """As the workflow does: FLARE carries it to whoever listens."""
    dxo = create_analytic_dxo(tag, value, AnalyticsDataType.METRIC, LogWriterName.MLFLOW, global_step=step)
    send_analytic_dxo(FLComponent(), dxo, fl_ctx)


def test_every_job_is_a_run_with_its_figures(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI, tmp_path.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a server of its own is more than a test needs
    for job_id in ("job-1", "job-2"):
        receiver = MlflowReceiver()
        fl_ctx = context(receiver, job_id)
        fire_event(EventType.START_RUN, [receiver], fl_ctx)
        for step in range(3):
            say(fl_ctx, "global/mAP", 10.0 * step, step)
        fire_event(EventType.END_RUN, [receiver], fl_ctx)
        say(fl_ctx, "global/mAP", 99.0, 3)  # too late, and dropped
    client = MlflowClient(tracking_uri=tmp_path.as_uri())
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(r.data.tags["job_id"] for r in runs) == ["job-1", "job-2"]
    assert {(r.info.run_name, r.info.status) for r in runs} == {("agreed", "FINISHED")}
    history = client.get_metric_history(runs[0].info.run_id, "global/mAP")
    assert [(m.step, m.value) for m in history] == [(0, 0.0), (1, 10.0), (2, 20.0)]


def test_a_server_without_an_address_says_so_and_the_job_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(URI, raising=False)
    receiver = MlflowReceiver()
    fl_ctx = context(receiver)
    with caplog.at_level(logging.ERROR):
        fire_event(EventType.START_RUN, [receiver], fl_ctx)
    assert f"{URI} is not set in the server's environment" in caplog.text
    caplog.clear()
    say(fl_ctx, "global/mAP", 1.0, 1)
    fire_event(EventType.END_RUN, [receiver], fl_ctx)
    assert caplog.text == ""


def exported(tracking: tuple[Any, ...], folder: Any) -> str:
    job = JobConfig("tracked", ("cat", "dog"), federation=FederationConfig(tracking=tracking))
    FedMPTRecipe(job).export(str(folder))
    return (folder / "tracked" / "app" / "config" / "config_fed_server.json").read_text()


def test_a_job_names_the_receivers_that_it_asks_for_and_no_address(tmp_path: Any) -> None:
    both = exported(("tensorboard", "mlflow"), tmp_path / "both")
    assert all(f'"{name}"' in both for name in TRACKING_CLASSES)
    assert "uri" not in both
    none = exported((), tmp_path / "none")
    assert not any(name in none for name in TRACKING_CLASSES)


@pytest.mark.parametrize("tracking", [["wandb"], ["mlflow", "mlflow"], "mlflow"])
def test_what_is_no_tracking_is_a_sentence(tracking: Any) -> None:
    values = JobConfig("tracked", ("cat", "dog")).to_dict()
    values["federation"]["tracking"] = tracking
    with pytest.raises(ConfigError, match="tracking"):
        job_from_dict(values)
