"""The server's rounds against scripted sites: means, dropouts, bad answers, retries and records. No FLARE process."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedmpt_core.common.release import RELEASE
from fedmpt_core.config.job import FederationConfig, JobConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.toml import ConfigError
from fedmpt_core.federation.run.record import load_model
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.privacy.ledger.budget import resolved
from fedmpt_flare import tasks
from fedmpt_flare.server.workflow import FedMPTWorkflow
from tests.kits import write_kit
from tests.settings import UNMASKED, UNPROTECTED

LAYOUT = ParameterLayout(("head.scale",), ((3,),))
INITIAL = np.array([1, 2, 3], np.float32)


class ScriptedSite:
    """Answers like an executor; a script replaces the answer of (task, round)."""

    def __init__(self, name: str, step: float, **script: Callable[[], Any]) -> None:
        self.name, self.step, self.script, self.asked = name, step, script, []

    def answer(self, task: str, data: Shareable) -> Any:
        number = data.get_header(tasks.ROUND, 0)
        self.asked.append((task, number))
        special = self.script.get(f"{task}_{number}")
        if special:
            return special()
        match task:
            case tasks.JOIN:
                fields = {
                    "layout": LAYOUT.to_json(),
                    "evaluates": self.name == "a",
                    "backbone": "fake",
                    "is_stand_in": True,
                    "backbone_digest": "00",
                    "weight": 1,
                    "device": "cpu",
                    "versions": {},
                }
                return tasks.message(fields=fields, vector=LAYOUT.encode(INITIAL))
            case tasks.TRAIN:
                return tasks.message(fields={"weight": 1.0}, vector=LAYOUT.encode(np.full(3, self.step, np.float32)))
            case _:
                state = LAYOUT.decode(data[tasks.VECTOR])
                return tasks.message(fields={"figures": {"mAP": float(state[0]), "gate": [0.5, 0.5]}})


class ScriptedWorkflow(FedMPTWorkflow):
    """The workflow with FLARE's delivery replaced by direct calls."""

    def __init__(self, job: JobConfig, sites: list[ScriptedSite], folder: Path) -> None:
        super().__init__({"config_type": "dict", **job.to_dict()})
        self.sites = {s.name: s for s in sites}
        self.handlers: dict[str, Callable[..., Any]] = {}
        self.abort = Signal()
        engine = SimpleNamespace(
            get_clients=lambda: [SimpleNamespace(name=s.name) for s in sites],
            get_workspace=lambda: SimpleNamespace(
                get_run_dir=lambda job_id: str(folder),
                get_root_dir=lambda: str(folder),
                get_site_config_dir=lambda: str(folder),
                get_startup_kit_dir=lambda: str(folder),
            ),
            register_aux_message_handler=self.handlers.__setitem__,
        )
        self.context = SimpleNamespace(get_engine=lambda: engine, get_job_id=lambda: "job")
        self.warnings: list[str] = []
        self.errors: list[str] = []

    def log_warning(self, fl_ctx: Any, msg: str, *args: Any, **kwargs: Any) -> None:
        self.warnings.append(msg)

    def log_error(self, fl_ctx: Any, msg: str, *args: Any, **kwargs: Any) -> None:
        self.errors.append(msg)

    def log_info(self, fl_ctx: Any, msg: str, *args: Any, **kwargs: Any) -> None:
        pass

    def broadcast_and_wait(self, task: Any, fl_ctx: Any, targets: Any = None, **kwargs: Any) -> None:  # type: ignore[override]
        for name in targets:
            result = self.sites[name].answer(task.name, task.data)
            if result is not None:
                client_task = SimpleNamespace(client=SimpleNamespace(name=name), result=result)
                task.result_received_cb(client_task=client_task, fl_ctx=fl_ctx)

    def run(self) -> None:
        self.start_controller(self.context)  # type: ignore[arg-type]
        self.control_flow(self.abort, self.context)  # type: ignore[arg-type]


def job(rounds: int = 2, **federation: Any) -> JobConfig:
    return JobConfig(
        "w",
        ("cat", "dog"),
        training=TrainingConfig(rounds=rounds),
        privacy=UNPROTECTED,
        secagg=UNMASKED,
        federation=FederationConfig(**{"min_sites": 2, "max_movement": 1e4, **federation}),
    )


def private_job() -> JobConfig:
    return resolved(dataclasses.replace(job(rounds=1), privacy=PrivacyConfig(epsilon=8.0, sample_rate=0.5)))


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_two_rounds_move_the_model_by_the_mean_updates(tmp_path: Path) -> None:
    ScriptedWorkflow(job(), [ScriptedSite("a", 1.0), ScriptedSite("b", 2.0), ScriptedSite("c", 6.0)], tmp_path).run()
    config, layout, state = load_model(tmp_path)
    assert state.tolist() == [7, 8, 9]
    assert (layout, config.name) == (LAYOUT, "w")
    rows = record(tmp_path)["rounds"]
    assert [r["mAP"] for r in rows] == [1, 4, 7]
    assert [r["round"] for r in rows] == [0, 1, 2]
    assert rows[1]["bytes_sent"] == dict.fromkeys("abc", 32 + 12)
    assert record(tmp_path)["outcome"] == "completed"


def nothing() -> None:
    return None


def error() -> Shareable:
    return make_reply(ReturnCode.EXECUTION_EXCEPTION)


def garbage() -> Shareable:
    return tasks.message(fields={"weight": 1.0}, vector=b"\0" * 44)


def not_a_number() -> Shareable:
    bad = bytes.fromhex(LAYOUT.digest()) + np.array([1, np.nan, 1], "<f4").tobytes()
    return tasks.message(fields={"weight": 1.0}, vector=bad)


def no_bytes() -> Shareable:
    answer = tasks.message(fields={"weight": 1.0})
    answer[tasks.VECTOR] = "x" * 44
    return answer


def weight_of_nothing() -> Shareable:
    return tasks.message(fields={"weight": 0.0}, vector=LAYOUT.encode(INITIAL))


def no_fields() -> Shareable:
    answer = garbage()
    answer[tasks.FIELDS] = ["weight"]
    return answer


def no_weight() -> Shareable:
    return tasks.message(fields={}, vector=LAYOUT.encode(INITIAL))


def refused() -> Shareable:
    return tasks.refusal(tasks.SITE_REFUSED, "budget spent")


FAULTS = [nothing, error, garbage, not_a_number, no_bytes, weight_of_nothing, no_fields, no_weight, refused]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_site_that_fails_a_round_costs_only_its_own_contribution(tmp_path: Path, fault: Callable[[], Any]) -> None:
    sites = [ScriptedSite("a", 1.0), ScriptedSite("b", 3.0), ScriptedSite("c", 100.0, train_1=fault)]
    workflow = ScriptedWorkflow(job(rounds=1), sites, tmp_path)
    workflow.run()
    assert load_model(tmp_path)[2].tolist() == [3, 4, 5]
    assert record(tmp_path)["rounds"][1]["sites"] == ["a", "b"]
    assert any("c" in w for w in workflow.warnings)


def test_a_round_with_too_few_sites_is_tried_again_then_the_job_ends(tmp_path: Path) -> None:
    answers = iter([None, None])
    flaky = ScriptedSite(
        "b",
        3.0,
        train_1=lambda: next(answers, tasks.message(fields={"weight": 1.0}, vector=LAYOUT.encode(INITIAL))),
    )
    ScriptedWorkflow(job(rounds=1), [ScriptedSite("a", 1.0), flaky], tmp_path).run()
    assert [t for t, _ in flaky.asked].count(tasks.TRAIN) == 3
    assert record(tmp_path)["outcome"] == "completed"

    never = ScriptedSite("b", 3.0, train_1=nothing)
    workflow = ScriptedWorkflow(job(rounds=1, max_failed_rounds=1), [ScriptedSite("a", 1.0), never], tmp_path)
    with pytest.raises(RuntimeError, match="1 sites answered, min_sites=2"):
        workflow.run()
    assert [t for t, _ in never.asked].count(tasks.TRAIN) == 2
    why = "round 1 failed: train: 1 sites answered, min_sites=2; each site's log says why it did not"
    assert record(tmp_path)["outcome"] == f"failed: {why}"
    assert workflow.errors == [f"the job failed: {why}"]  # FLARE's own line shows the exception's type alone


def test_a_site_with_other_weights_is_left_out(tmp_path: Path) -> None:
    def foreign() -> Shareable:
        answer = ScriptedSite("a", 0).answer(tasks.JOIN, Shareable())
        answer[tasks.FIELDS]["backbone_digest"] = "11"
        return answer

    odd = ScriptedSite("c", 100.0, join_0=foreign)
    ScriptedWorkflow(job(rounds=1), [ScriptedSite("a", 1.0), ScriptedSite("b", 1.0), odd], tmp_path).run()
    assert odd.asked == [(tasks.JOIN, 0)]
    assert load_model(tmp_path)[2].tolist() == [2, 3, 4]


@pytest.mark.parametrize("fault", [nothing, garbage, no_bytes, no_fields])
def test_a_site_that_joins_with_nonsense_is_dropped(tmp_path: Path, fault: Callable[[], Any]) -> None:
    sites = [ScriptedSite("a", 1.0), ScriptedSite("b", 3.0), ScriptedSite("c", 100.0, join_0=fault)]
    ScriptedWorkflow(job(rounds=1), sites, tmp_path).run()
    assert sorted(record(tmp_path)["sites"]) == ["a", "b"]
    assert load_model(tmp_path)[2].tolist() == [3, 4, 5]


def test_no_round_starts_when_too_few_sites_join(tmp_path: Path) -> None:
    sites = [ScriptedSite("a", 1.0), ScriptedSite("b", 1.0, join_0=refused)]
    workflow = ScriptedWorkflow(job(), sites, tmp_path)
    with pytest.raises(RuntimeError, match="join: 1 sites answered"):
        workflow.run()
    why = "join: 1 sites answered, min_sites=2; each site's log says why it did not"
    assert record(tmp_path)["outcome"] == f"failed: {why}"
    assert workflow.errors == [f"the job failed: {why}"]
    assert not [t for s in sites for t, _ in s.asked if t == tasks.TRAIN]
    assert not (tmp_path / "model.safetensors").exists()


def test_a_server_of_another_release_says_so_in_its_log_and_asks_nobody(tmp_path: Path) -> None:
    site = ScriptedSite("a", 1.0)
    workflow = ScriptedWorkflow(job(), [site], tmp_path)
    workflow.release = "0.0.1"
    with pytest.raises(ConfigError):
        workflow.run()
    assert workflow.errors == [f"the job is refused: the job was exported with fedmpt 0.0.1, the server runs {RELEASE}"]
    assert site.asked == []


def test_a_job_that_the_server_cannot_read_is_named_in_its_log(tmp_path: Path) -> None:
    workflow = ScriptedWorkflow(job(), [], tmp_path)
    workflow.job["training"]["rounds"] = -1
    with pytest.raises(ConfigError):
        workflow.run()
    assert len(workflow.errors) == 1
    assert workflow.errors[0].startswith("the job is refused: ")
    assert "rounds=-1" in workflow.errors[0]


def test_a_site_that_cannot_evaluate_leaves_the_round_without_figures(tmp_path: Path) -> None:
    sites = [ScriptedSite("a", 1.0, validate_1=error), ScriptedSite("b", 1.0)]
    ScriptedWorkflow(job(rounds=2), sites, tmp_path).run()
    assert ["mAP" in r for r in record(tmp_path)["rounds"]] == [True, False, True]


def test_records_weigh_when_the_job_says_so(tmp_path: Path) -> None:
    def weighed(weight: float, step: float) -> Callable[[], Shareable]:
        return lambda: tasks.message(fields={"weight": weight}, vector=LAYOUT.encode(np.full(3, step, np.float32)))

    sites = [ScriptedSite("a", 0, train_1=weighed(1.0, 0.0)), ScriptedSite("b", 0, train_1=weighed(3.0, 4.0))]
    ScriptedWorkflow(job(rounds=1, weighting="records"), sites, tmp_path).run()
    assert load_model(tmp_path)[2].tolist() == [4, 5, 6]


def test_evaluation_may_be_rare_but_never_misses_the_last_round(tmp_path: Path) -> None:
    ScriptedWorkflow(job(rounds=5, evaluate_every=3), [ScriptedSite("a", 1.0), ScriptedSite("b", 1.0)], tmp_path).run()
    assert [r["round"] for r in record(tmp_path)["rounds"] if "mAP" in r] == [0, 3, 5]


def test_a_later_job_tells_each_site_the_newest_entry_that_the_server_has_seen_of_it(tmp_path: Path) -> None:
    write_kit(tmp_path, "server", who="server")
    (tmp_path / "rootCA.pem").write_bytes((tmp_path / "server.crt").read_bytes())
    heads = {name: {"seq": seq, "hash": f"{seq:064x}", "sig": "ab"} for name, seq in (("a", 4), ("b", 6))}
    told: list[dict[str, Any]] = []

    class Charged(ScriptedSite):
        def answer(self, task: str, data: Shareable) -> Any:
            if task == tasks.LEDGER:
                return None
            if task != tasks.TRAIN:
                return super().answer(task, data)
            told.append(data[tasks.FIELDS][tasks.HEADS])
            said = {"epsilon": 1.0, "delta": 1e-5, "head": heads[self.name]}
            update = LAYOUT.encode(np.ones(3, np.float32))
            return tasks.message(fields={"weight": 1.0, tasks.PRIVACY: said}, vector=update)

    for _ in range(2):
        ScriptedWorkflow(private_job(), [Charged("a", 1.0), Charged("b", 2.0)], tmp_path).run()
    assert told == [{}, {}, heads, heads]
