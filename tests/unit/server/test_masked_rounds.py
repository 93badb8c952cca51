"""The workflow's masked rounds against real site halves: dropouts, retries, liars, checkpoints. No FLARE process."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedmpt_core.config.job import FederationConfig, JobConfig, PrivacyConfig, ResumeConfig, TrainingConfig
from fedmpt_core.config.site import DataConfig, SiteConfig
from fedmpt_core.federation.run.record import load_model
from fedmpt_core.federation.server.checkpoint import load_checkpoint
from fedmpt_core.federation.server.rounds import MeanUpdate, RoundFailed, Training
from fedmpt_core.federation.site.masked_updates import MaskedUpdates
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.secagg.dealing import Dealing, deal
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.identity import SiteIdentity
from fedmpt_core.secagg.keys import PairwiseKeys
from fedmpt_flare import tasks
from fedmpt_flare.server.masked_rounds import MaskedRounds
from fedmpt_flare.server.phases import Phases
from fedmpt_flare.server.run_folder import RunFolder
from fedmpt_flare.server.workflow import FedMPTWorkflow
from fedmpt_flare.workspace import CHECKPOINTS
from tests.secagg import identity
from tests.settings import REHEARSED, UNPROTECTED

LAYOUT = ParameterLayout(("head.scale",), ((3,),))
INITIAL = np.array([1, 2, 3], np.float32)
NAMES = ("a", "b", "c", "d", "e")
Fault = Callable[[Shareable], Shareable | None]


def lost(answer: Shareable) -> None:
    """The site dies or hangs."""
    return


def refused(answer: Shareable) -> Shareable:
    return tasks.refusal(tasks.SITE_REFUSED, "no")


def garbage(answer: Shareable) -> Shareable:
    return tasks.message(fields=answer[tasks.FIELDS], protocol=b"\xffMSK1" + bytes(50))


def no_message(answer: Shareable) -> Shareable:
    return tasks.message(fields=answer[tasks.FIELDS], vector=LAYOUT.encode(INITIAL))


FALSE = "the shares that it dealt do not fit, or it did not show them"
FAULTS: list[Fault] = [lost, refused, garbage, no_message]


class Site:
    """A site's half of the protocol and an update that says which training it came from."""

    def __init__(
        self, name: str, job: JobConfig, folder: Path, run_id: str, step: float, clock: Callable[[], float]
    ) -> None:
        site = SiteConfig(
            DataConfig(path="x"),
            secagg=dataclasses.replace(SiteConfig(DataConfig(path="x")).secagg, state=str(folder / name)),
        )
        self.name, self.step, self.trained, self.asked = name, step, 0, list[str]()
        self.spent: Any = {}
        self.faults: dict[tuple[str, int], Fault] = {}
        self._count: dict[str, int] = {}
        self.secure = MaskedUpdates(
            job,
            site,
            name=name,
            run_id=run_id,
            kit=None,
            layout=LAYOUT,
            initial=LAYOUT.encode(INITIAL),
            backbone_digest="00",
            clock=clock,
        )

    def answer(self, task: str, data: Shareable, private: bytes) -> Shareable | None:
        self.asked.append(task)
        self._count[task] = self._count.get(task, 0) + 1
        try:
            answer = self._answer(task, data, private)
        except SecAggError as error:
            return tasks.refusal(tasks.SITE_REFUSED, f"{error.code.name}: {error}", self.secure.abort(error))
        fault = self.faults.get((task, self._count[task]))
        return fault(answer) if fault else answer

    def _answer(self, task: str, data: Shareable, private: bytes) -> Shareable:
        match task:
            case tasks.JOIN:
                fields = {"layout": LAYOUT.to_json(), "evaluates": False, "backbone": "fake", "is_stand_in": True}
                fields |= {"backbone_digest": "00", "device": "cpu", "versions": {}, "weight": 1}
                return tasks.message(fields=fields, vector=LAYOUT.encode(INITIAL))
            case tasks.TRAIN:
                number: Any = data.get_header(tasks.ROUND)
                ready = self.secure.begin(data[tasks.PROTOCOL], number, data[tasks.VECTOR])
                if ready is None:
                    self.trained += 1
                    ready = self.secure.hold(LAYOUT.encode(np.full(3, self.step, np.float32)), 1.0, {})
                return tasks.message(fields={tasks.PRIVACY: self.spent}, protocol=ready)
            case tasks.LEDGER:
                return tasks.refusal(tasks.SITE_REFUSED, "it keeps it")
            case tasks.CONFIRM | tasks.SHOW:
                step = self.secure.confirm if task == tasks.CONFIRM else self.secure.show
                return tasks.message(protocol=step(private))
        step = {
            tasks.ADVERTISE: self.secure.advertise,
            tasks.DEAL: self.secure.deal,
            tasks.MASK: self.secure.mask,
            tasks.OPEN: self.secure.open,
        }[task]
        return tasks.message(protocol=step(data[tasks.PROTOCOL]))


class Workflow(FedMPTWorkflow):
    """The workflow with FLARE's delivery replaced by direct calls."""

    def __init__(
        self, job: JobConfig, folder: Path, run_id: str = "run-1", clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__({"config_type": "dict", **job.to_dict()})
        folder.mkdir(exist_ok=True)
        self.sites = {n: Site(n, job, folder, run_id, s, clock) for s, n in enumerate(NAMES, start=1)}
        run = folder / run_id
        run.mkdir(exist_ok=True)
        engine = SimpleNamespace(
            get_clients=lambda: [SimpleNamespace(name=n) for n in self.sites],
            get_workspace=lambda: SimpleNamespace(
                get_run_dir=lambda job_id: str(run),
                get_root_dir=lambda: str(folder),
                get_site_config_dir=lambda: str(folder),
                get_startup_kit_dir=lambda: str(folder),
            ),
            register_aux_message_handler=lambda topic, handler: None,
        )
        self.context = SimpleNamespace(get_engine=lambda: engine, get_job_id=lambda: run_id)
        self.run_folder = run
        self.warnings: list[str] = []

    def log_warning(self, fl_ctx: Any, msg: str, *args: Any, **kwargs: Any) -> None:
        self.warnings.append(msg)

    def log_error(self, fl_ctx: Any, msg: str, *args: Any, **kwargs: Any) -> None:
        pass

    def log_info(self, fl_ctx: Any, msg: str, *args: Any, **kwargs: Any) -> None:
        pass

    def broadcast_and_wait(self, task: Any, fl_ctx: Any, targets: Any = None, **kwargs: Any) -> None:  # type: ignore[override]
        for name in targets:
            private: dict[str, bytes] = {}
            client_task = SimpleNamespace(client=SimpleNamespace(name=name), result=None)
            if task.before_task_sent_cb:
                context = SimpleNamespace(set_prop=lambda key, value, into=private, **_: into.update({key: value}))
                task.before_task_sent_cb(client_task=client_task, fl_ctx=context)
            client_task.result = self.sites[name].answer(task.name, task.data, private.get(tasks.FOR_YOU, b""))
            if client_task.result is not None:
                task.result_received_cb(client_task=client_task, fl_ctx=fl_ctx)

    def run(self) -> list[dict[str, Any]]:
        """The record's rounds."""
        self.start_controller(self.context)  # type: ignore[arg-type]
        self.control_flow(Signal(), self.context)  # type: ignore[arg-type]
        return self.record["rounds"]

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.run_folder / "result.json").read_text())

    @property
    def state(self) -> np.ndarray:
        return load_model(self.run_folder)[2]


@pytest.fixture(autouse=True)
def quick_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SiteIdentity, "ephemeral", staticmethod(identity))


def job(rounds: int = 1, sites: int = 3, failures: int = 2, **changes: Any) -> JobConfig:
    return JobConfig(
        "m",
        ("cat", "dog"),
        training=TrainingConfig(rounds=rounds),
        privacy=UNPROTECTED,
        secagg=dataclasses.replace(REHEARSED, rounding="deterministic"),
        federation=FederationConfig(min_sites=sites, evaluate_every=0, max_failed_rounds=failures, max_movement=16.0),
        **changes,
    )


def test_rounds_move_the_model_by_the_mean_and_keep_the_protocol_s_facts(tmp_path: Path) -> None:
    workflow = Workflow(job(rounds=3), tmp_path)
    rows = workflow.run()
    assert workflow.state.tolist() == [10, 11, 12]  # three means of 3
    facts = rows[1]["secagg"]
    assert [r["secagg"]["epoch"] for r in rows[1:]] == [1, 1, 1]
    assert len({r["secagg"]["transcript"] for r in rows[1:]}) == 3
    assert (facts["threshold"], facts["cohort"], facts["left_out"], facts["faults"]) == (4, list(NAMES), {}, {})
    assert facts["beyond"] == 0
    assert workflow.record["aggregation"] == "masked"
    assert workflow.sites["a"].asked.count(tasks.ADVERTISE) == 1


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("task", [tasks.ADVERTISE, tasks.DEAL, tasks.CONFIRM, tasks.TRAIN, tasks.MASK])
def test_a_site_lost_before_the_sum_costs_its_contribution_and_nobody_a_second_training(
    tmp_path: Path, task: str, fault: Fault
) -> None:
    workflow = Workflow(job(), tmp_path)
    workflow.sites["e"].faults[task, 1] = fault
    rows = workflow.run()
    assert rows[1]["sites"] == ["a", "b", "c", "d"]
    assert tasks.OPEN not in workflow.sites["e"].asked  # nobody waits for a site that is gone
    assert workflow.state.tolist() == [3.5, 4.5, 5.5]
    assert rows[1]["secagg"]["attempt"] == 0
    assert list(rows[1]["secagg"]["left_out"]) == ["e"]
    assert {workflow.sites[n].trained for n in "abcd"} == {1}
    assert any("e" in w for w in workflow.warnings)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_site_lost_after_it_masked_is_in_the_sum(tmp_path: Path, fault: Fault) -> None:
    workflow = Workflow(job(), tmp_path)
    workflow.sites["e"].faults[tasks.OPEN, 1] = fault
    rows = workflow.run()
    assert rows[1]["sites"] == list(NAMES)
    assert workflow.state.tolist() == [4, 5, 6]


@pytest.mark.parametrize("task", [tasks.DEAL, tasks.CONFIRM, tasks.TRAIN])
def test_an_attempt_with_too_few_sites_is_made_again_and_costs_no_second_training(tmp_path: Path, task: str) -> None:
    workflow = Workflow(job(), tmp_path)
    for name in ("d", "e"):
        workflow.sites[name].faults[task, 1] = lost
    rows = workflow.run()
    assert (rows[1]["secagg"]["attempt"], rows[1]["secagg"]["epoch"]) == (1, 2)
    assert rows[1]["sites"] == list(NAMES)
    assert workflow.state.tolist() == [4, 5, 6]
    assert {s.trained for s in workflow.sites.values()} == {1}
    assert "3 of 5 sites" in str(events(workflow, "round_failed"))


def test_a_round_that_was_to_be_opened_and_was_not_is_used_up(tmp_path: Path) -> None:
    """The sum of the next round is another one, of other updates; the record says which round is missing."""
    workflow = Workflow(job(rounds=3), tmp_path)
    for name in ("d", "e"):
        workflow.sites[name].faults[tasks.OPEN, 1] = lost
    rows = workflow.run()
    assert [r["round"] for r in rows] == [0, 2, 3]
    assert "3 of 5 sites sent their shares, the threshold is 4" in workflow.record["lost"]["1"]
    assert {s.trained for s in workflow.sites.values()} == {3}
    assert workflow.state.tolist() == [7, 8, 9]


def test_a_round_whose_vectors_are_masked_is_not_masked_again_under_other_keys(tmp_path: Path) -> None:
    """Sites d and e fail after all have masked: with fresh keys a to c refuse the round, and the next one is taken."""
    workflow = Workflow(job(rounds=2), tmp_path)
    for name in ("d", "e"):
        workflow.sites[name].faults[tasks.MASK, 1] = lost
    rows = workflow.run()
    assert [r["round"] for r in rows] == [0, 2]
    assert list(workflow.record["lost"]) == ["1"]
    assert workflow.state.tolist() == [4, 5, 6]


def test_a_job_with_too_few_sites_ends_with_a_sentence_and_without_a_model(tmp_path: Path) -> None:
    workflow = Workflow(job(failures=1), tmp_path)
    for name in ("d", "e"):
        for attempt in (1, 2):
            workflow.sites[name].faults[tasks.TRAIN, attempt] = lost
    with pytest.raises(RuntimeError, match="round 1 failed: 3 of 5 sites have an update, the threshold is 4"):
        workflow.run()
    assert workflow.record["outcome"].startswith("failed: round 1 failed: ")
    assert not (workflow.run_folder / "model.safetensors").exists()


@pytest.mark.parametrize("spent", [{}, None, {"epsilon": 1.0, "delta": 1e-5}, {"epsilon": 1, "delta": 1, "head": []}])
def test_a_site_that_does_not_say_what_it_has_spent_is_in_no_sum(tmp_path: Path, spent: Any) -> None:
    """Its ledger's head would be missing from the record, and the audit would find the run of all others at fault."""
    private = dataclasses.replace(job(), privacy=PrivacyConfig(noise_multiplier=4.0))
    workflow = Workflow(private, tmp_path)
    for number, site in enumerate(workflow.sites.values()):
        site.spent = {"epsilon": 1.0, "delta": 1e-5, "head": {"seq": 2, "hash": f"{number}" * 64, "sig": ""}}
    workflow.sites["e"].spent = spent
    rows = workflow.run()
    assert rows[1]["sites"] == list(rows[1]["privacy"]) == ["a", "b", "c", "d"]
    assert list(rows[1]["secagg"]["left_out"]) == ["e"]


@pytest.mark.parametrize("task", [tasks.JOIN, tasks.TRAIN])
def test_what_a_site_writes_into_its_refusal_is_one_short_line_in_log_and_record(tmp_path: Path, task: str) -> None:
    def wordy(answer: Shareable) -> Shareable:
        return make_reply(tasks.SITE_REFUSED, headers={tasks.REASON: "\x1b[2Jno\n" + "x" * 100_000})

    workflow = Workflow(job(), tmp_path)
    workflow.sites["e"].faults[task, 1] = wordy
    rows = workflow.run()
    record = workflow.record
    noted = record["absent"]["e"] if task == tasks.JOIN else rows[1]["secagg"]["left_out"]["e"]
    for line in (noted, *(w for w in workflow.warnings if "xxx" in w)):
        assert line.isprintable()
        assert len(line) <= tasks.MAX_REASON + 50
    assert "xxx" in noted


def steeper(secrets: Any, threshold: int, recipients: int, label: bytes) -> tuple[Dealing, list[bytes]]:
    """Shares of which one more than the threshold is needed; all else is as it should be."""
    dealing, rows = deal(secrets, threshold + 1, recipients, label)
    return dataclasses.replace(dealing, combination=dealing.combination[:-1]), rows


def test_a_dealer_of_false_shares_is_named_before_anybody_trains(tmp_path: Path) -> None:
    workflow = Workflow(job(rounds=2), tmp_path)
    honest = workflow.sites["e"].secure.deal

    def dealing(request: bytes) -> bytes:
        with mock.patch("fedmpt_core.secagg.key_exchange.deal", steeper):
            return honest(request)

    workflow.sites["e"].secure.deal = dealing  # type: ignore[method-assign]
    rows = workflow.run()
    assert [r["sites"] for r in rows[1:]] == [["a", "b", "c", "d"]] * 2
    assert rows[1]["secagg"]["left_out"] == {"e": FALSE}
    assert [(e["sites"], e["reason"]) for e in events(workflow, "left_out")] == [(["e"], FALSE)]
    assert rows[1]["secagg"]["attempt"] == 0
    assert [workflow.sites[n].trained for n in "abcde"] == [2, 2, 2, 2, 0]


@pytest.mark.parametrize(
    ("task", "code", "why"),
    [
        (tasks.DEAL, Abort.ROSTER, "refuses the advert of b"),
        (tasks.CONFIRM, Abort.BAD_SHARE, "in state READY"),
    ],
    ids=["key", "shares"],
)
def test_a_complaint_against_an_honest_site_costs_who_makes_it_its_place(
    tmp_path: Path, task: str, code: Abort, why: str
) -> None:
    workflow = Workflow(job(rounds=1), tmp_path)

    def complaining(answer: Shareable) -> Shareable:
        abort = workflow.sites["e"].secure.abort(SecAggError(code, "", culprit=1))
        return tasks.refusal(tasks.SITE_REFUSED, "b is at fault", abort)

    workflow.sites["e"].faults[task, 1] = complaining
    rows = workflow.run()
    assert rows[1]["sites"] == ["a", "b", "c", "d"]
    assert list(rows[1]["secagg"]["left_out"]) == ["e"]
    assert why in rows[1]["secagg"]["left_out"]["e"]


def test_a_row_that_was_sealed_as_garbage_is_shown_and_costs_nobody_its_place(tmp_path: Path) -> None:
    workflow = Workflow(job(rounds=1), tmp_path)
    seal, honest = PairwiseKeys.seal, workflow.sites["e"].secure.deal

    def sealing(keys: PairwiseKeys, recipient: int, row: bytes) -> bytes:
        return bytes(len(row) + 16) if recipient == 0 else seal(keys, recipient, row)

    def dealing(request: bytes) -> bytes:
        with mock.patch.object(PairwiseKeys, "seal", sealing):
            return honest(request)

    workflow.sites["e"].secure.deal = dealing  # type: ignore[method-assign]
    rows = workflow.run()
    assert rows[1]["sites"] == list(NAMES)
    assert (rows[1]["secagg"]["left_out"], rows[1]["secagg"]["faults"], rows[1]["secagg"]["epoch"]) == ({}, {}, 1)
    assert [workflow.sites[n].asked.count(tasks.CONFIRM) for n in NAMES] == [2, 1, 1, 1, 1]
    assert "it blames e" in str(workflow.warnings)


def test_a_server_that_sends_other_parameters_than_it_can_have_is_refused(tmp_path: Path) -> None:
    agreed = job(rounds=2)
    workflow = Workflow(agreed, tmp_path)
    sites = workflow.sites.values()
    masks = masks_over(workflow, agreed)
    with pytest.raises(RoundFailed, match="0 of 5 sites have an update"):
        train(masks, 1, 0, INITIAL + np.float32(1e-3))
    assert {s.trained for s in sites} == {0}
    assert "moved by 0.001 since round 1, at most 0 can be" in str(workflow.warnings)
    with pytest.raises(RoundFailed, match="0 of 5 sites have an update"):
        train(masks, 2, 0, INITIAL + np.float32(16.1))
    train(masks, 2, 1, INITIAL + np.float32(15.9))
    assert {s.trained for s in sites} == {1}


def test_a_run_goes_on_from_its_checkpoint_with_fresh_keys(tmp_path: Path) -> None:
    first = Workflow(job(rounds=4, failures=0), tmp_path)
    for site in first.sites.values():
        site.faults[tasks.TRAIN, 3] = lost
    with pytest.raises(RuntimeError, match="round 3 failed"):
        first.run()
    kept = load_checkpoint(tmp_path / CHECKPOINTS, "run-1")
    assert (kept.round, kept.state.tolist()) == (2, [7, 8, 9])

    second = Workflow(job(rounds=4, resume=ResumeConfig("run-1", 2)), tmp_path, "run-2")
    rows = second.run()
    assert [r["round"] for r in rows] == [0, 1, 2, 3, 4]
    assert second.state.tolist() == [13, 14, 15]
    assert second.record["resumed"] == {"job": "run-1", "round": 2, "state": "", "before": []}
    assert load_checkpoint(tmp_path / CHECKPOINTS, "run-2").round == 4


@pytest.mark.parametrize(
    ("resume", "changes", "sentence"),
    [
        (ResumeConfig("run-9", 1), {}, "no checkpoint of run 'run-9': it ended before its first round"),
        (ResumeConfig("run-1", 2), {}, "is of round 1: set resume.round = 1"),
        (ResumeConfig("run-1", 1), {"seed": 9}, "was of another job: seed differ"),
    ],
)
def test_a_checkpoint_that_does_not_fit_costs_nobody_anything(
    tmp_path: Path, resume: ResumeConfig, changes: dict[str, Any], sentence: str
) -> None:
    Workflow(job(rounds=1), tmp_path).run()
    kept = tmp_path / CHECKPOINTS / "run-1" / "checkpoint.safetensors"
    again = job(rounds=3, resume=resume)
    if not changes:
        kept_job = dataclasses.replace(load_checkpoint(tmp_path / CHECKPOINTS, "run-1"), job=job(rounds=3))
        kept_job.save(tmp_path / CHECKPOINTS)
    else:
        again = dataclasses.replace(again, training=TrainingConfig(rounds=3), **changes)
        dataclasses.replace(load_checkpoint(kept.parents[1], "run-1"), job=job(rounds=3)).save(kept.parents[1])
    workflow = Workflow(again, tmp_path, "run-2")
    with pytest.raises(ValueError, match=sentence):
        workflow.run()
    assert all(site.asked == [] for site in workflow.sites.values())


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    Workflow(job(rounds=1), tmp_path).run()
    path = tmp_path / CHECKPOINTS / "run-1" / "checkpoint.safetensors"
    data = path.read_bytes()
    for broken in (data[:100], b"", data.replace(b'"round', b'"rounb', 1), data[:-3]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="the checkpoint of run 'run-1' is damaged, or of another release"):
            load_checkpoint(tmp_path / CHECKPOINTS, "run-1")


def test_sessions_are_renewed_before_they_run_out(tmp_path: Path) -> None:
    now = time.time()
    agreed = job(rounds=3)
    masks = masks_over(Workflow(agreed, tmp_path, clock=lambda: now), agreed, clock=lambda: now)
    epochs = [train(masks, 1, 0, INITIAL).facts["epoch"], train(masks, 2, 0, INITIAL).facts["epoch"]]
    now += 21 * 3600
    assert [*epochs, train(masks, 3, 0, INITIAL).facts["epoch"]] == [1, 1, 2]


def masks_over(workflow: Workflow, agreed: JobConfig, **options: Any) -> MaskedRounds:
    """The protocol alone, over the workflow's delivery to its sites."""
    folder = RunFolder(workflow.run_folder, workflow.run_folder)
    phases = Phases(workflow, folder, workflow.context, Signal())  # type: ignore[arg-type]
    return MaskedRounds(agreed, "run-1", LAYOUT, "00", None, phases, **options)


def train(masks: MaskedRounds, number: int, attempt: int, state: np.ndarray) -> MeanUpdate:
    """One attempt at a round of training."""
    training = Training(number, list(NAMES), LAYOUT, state, attempt, {}, dict.fromkeys(NAMES, 1.0), private=False)
    headers = {tasks.ROUND: number, tasks.ATTEMPT: attempt}
    masks.train(training, tasks.message(vector=training.vector(), headers=headers), 60)
    return training.mean(3)


def events(workflow: Workflow, kind: str) -> list[dict[str, Any]]:
    lines = (workflow.run_folder / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]
