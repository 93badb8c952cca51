"""The server's half: join, then rounds of training and evaluation. Needs neither torch nor the model's weights.

A site that dies, hangs, refuses or errs leaves the phase; the round goes on while `min_sites` answered, otherwise the
round (not the job) failed and is tried again. Every round's outcome is on disk before the next one starts.
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedmpt_core.aggregation import apply, average
from fedmpt_core.config import JobConfig
from fedmpt_core.config_file import job_from_dict
from fedmpt_core.layout import LayoutError, ParameterLayout
from fedmpt_core.privacy.ledger import Head, LedgerError
from fedmpt_core.result import RunRecord, mean_figures
from fedmpt_flare import tasks
from fedmpt_flare.artifacts import RunFolder
from fedmpt_flare.site import run_folder


class RoundFailed(Exception):
    """Too few sites answered a phase; the round may be tried again."""


class FedMPTWorkflow(Controller):
    """Federated averaging of FedMPT's trained parameters.

    Args:
        job: the agreed job in plain values (`JobConfig.to_dict`).
    """

    _always_serialize_args = ("job",)

    def __init__(self, job: dict[str, Any]) -> None:
        """Keeps the argument and does nothing else."""
        super().__init__(task_check_period=0.1)
        self.job = job

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Checks the job and opens the run's records."""
        self._config: JobConfig = job_from_dict({k: v for k, v in self.job.items() if k != "config_type"})
        self._folder = RunFolder(run_folder(fl_ctx))
        self._record = RunRecord.start(self._config)
        self._failed_attempts = 0
        self._privacy: dict[str, dict[str, Any]] = {}

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """The whole job; an exception here ends it as failed."""
        try:
            self._run(abort_signal, fl_ctx)
        except Exception as error:
            self._record = self._record.ended_as(f"failed: {error}")
            self._folder.write_record(self._record)
            self._folder.event("failed", reason=str(error))
            raise
        self._record = self._record.ended_as("completed")
        self._folder.write_record(self._record)
        self._folder.event("completed")

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing is left to do: every round was written when it ended."""

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """A late answer is dropped."""
        self.log_warning(fl_ctx, f"late answer from {client.name} for {task_name}: dropped")

    def _run(self, abort: Signal, fl_ctx: FLContext) -> None:
        federation, training = self._config.federation, self._config.training
        sites, layout, state = self._join(abort, fl_ctx)
        evaluating = [s for s, f in sites.items() if f["evaluates"] and federation.evaluate_every]
        self._evaluate(0, state, layout, evaluating, time.monotonic(), {}, abort, fl_ctx)
        done = attempt = 0
        while done < training.rounds:
            start = time.monotonic()
            try:
                updates, weights = self._train(done + 1, attempt, state, layout, sorted(sites), abort, fl_ctx)
            except RoundFailed as error:
                attempt += 1
                self._failed_attempts += 1
                self._folder.event("round_failed", round=done + 1, reason=str(error))
                if abort.triggered or self._failed_attempts > federation.max_failed_rounds:
                    raise RuntimeError(f"round {done + 1} failed: {error}") from error
                continue
            state = apply(state, average(updates, weights))
            done, attempt = done + 1, 0
            self._folder.write_model(layout, state)
            if done == training.rounds or done % (federation.evaluate_every or training.rounds) == 0:
                self._evaluate(done, state, layout, evaluating, start, updates, abort, fl_ctx)
            else:
                self._round_done(done, start, layout, updates, {}, fl_ctx)

    def _join(self, abort: Signal, fl_ctx: FLContext) -> tuple[dict[str, dict[str, Any]], ParameterLayout, Any]:
        """Who takes part, and with which layout and initial parameters.

        Sites must agree byte for byte on the initial parameters and on the frozen weights; one that differs from the
        majority is left out.
        """
        engine: Any = fl_ctx.get_engine()
        invited = sorted(c.name for c in engine.get_clients())
        self._folder.event("joining", sites=invited)
        data = tasks.message(headers={tasks.JOB_DIGEST: self._config.digest()})
        answers = self._phase(tasks.JOIN, data, invited, self._config.federation.join_timeout, abort, fl_ctx)
        keys = {s: (a[tasks.FIELDS]["backbone_digest"], a[tasks.VECTOR]) for s, a in answers.items()}
        common = Counter(keys.values()).most_common(1)[0][0]
        odd = sorted(s for s, key in keys.items() if key != common)
        if odd:
            self.log_warning(fl_ctx, f"{', '.join(odd)} start from other weights than the rest and are left out")
            self._folder.event("left_out", sites=odd, reason="other backbone weights or initial parameters")
        fields = {s: answers[s][tasks.FIELDS] for s in sorted(answers) if s not in odd}
        self._need(len(fields), "join")
        layout = ParameterLayout.from_json(next(iter(fields.values()))["layout"])
        self._record = self._record.joined(fields)
        self._folder.event(
            "joined", sites=list(fields), backbone=self._record.backbone, stand_in=self._record.is_stand_in
        )
        return fields, layout, layout.decode(common[1])

    def _train(
        self,
        number: int,
        attempt: int,
        state: Any,
        layout: ParameterLayout,
        sites: list[str],
        abort: Signal,
        fl_ctx: FLContext,
    ) -> tuple[dict[str, Any], dict[str, float]]:
        headers = {tasks.ROUND: number, tasks.ATTEMPT: attempt}
        self._folder.event("training", round=number, sites=sites)
        heads = {site: p["head"] for site, p in self._privacy.items()}
        data = tasks.message(fields={tasks.HEADS: heads}, vector=layout.encode(state), headers=headers)
        answers = self._phase(tasks.TRAIN, data, sites, self._config.federation.round_timeout, abort, fl_ctx)
        updates, weights = {}, {}
        for site, answer in answers.items():
            try:
                updates[site] = layout.decode(answer[tasks.VECTOR])
                weights[site] = float(answer[tasks.FIELDS][tasks.WEIGHT])
                self._note_privacy(site, answer[tasks.FIELDS])
            except (LayoutError, LedgerError, KeyError, TypeError, ValueError) as error:
                updates.pop(site, None)
                weights.pop(site, None)
                self.log_warning(fl_ctx, f"round {number}: the answer of {site} is not used: {error}")
        self._need(len(updates), f"round {number}")
        return updates, weights

    def _note_privacy(self, site: str, fields: Mapping[str, Any]) -> None:
        """Keep what a site says of its budget, the head of its ledger above all. Raises when it says nothing."""
        if not self._config.privacy.private:
            return
        said = fields[tasks.PRIVACY]
        head = Head.from_dict(said["head"])
        self._privacy[site] = {
            "epsilon": float(said["epsilon"]),
            "delta": float(said["delta"]),
            "head": head.to_dict(),
        }

    def _evaluate(
        self,
        number: int,
        state: Any,
        layout: ParameterLayout,
        sites: list[str],
        start: float,
        updates: Mapping[str, Any],
        abort: Signal,
        fl_ctx: FLContext,
    ) -> None:
        figures: dict[str, Any] = {}
        if sites:
            self._folder.event("evaluating", round=number, sites=sites)
            data = tasks.message(vector=layout.encode(state), headers={tasks.ROUND: number})
            answers = self._phase(
                tasks.VALIDATE, data, sites, self._config.federation.round_timeout, abort, fl_ctx, at_least=0
            )
            figures = mean_figures([a[tasks.FIELDS]["figures"] for a in answers.values()])
        self._round_done(number, start, layout, updates, figures, fl_ctx)

    def _round_done(
        self,
        number: int,
        start: float,
        layout: ParameterLayout,
        updates: Mapping[str, Any],
        figures: Mapping[str, Any],
        fl_ctx: FLContext,
    ) -> None:
        sent = dict.fromkeys(sorted(updates), 32 + 4 * layout.size)
        self._record = self._record.with_round(
            number, time.monotonic() - start, sent, figures, {s: self._privacy[s] for s in sent if s in self._privacy}
        )
        self._folder.write_record(self._record)
        self._folder.event("round", **self._record.rounds[-1])
        self.log_info(fl_ctx, f"round {number}: sites={len(sent)} mAP={figures.get('mAP')}")

    def _phase(
        self,
        name: str,
        data: Shareable,
        sites: list[str],
        timeout: int,
        abort: Signal,
        fl_ctx: FLContext,
        *,
        at_least: int | None = None,
    ) -> dict[str, Shareable]:
        """Send one task to all `sites`, wait for each or the timeout, and return the OK answers by site."""
        answers: dict[str, Shareable] = {}
        lock = threading.Lock()

        # FLARE passes both by keyword, and an exception in here would end the phase.
        def received(client_task: ClientTask, fl_ctx: FLContext) -> None:
            site, answer = client_task.client.name, client_task.result
            client_task.result = None  # one copy of each update is enough
            if answer is None or answer.get_return_code() != ReturnCode.OK:
                code = answer.get_return_code() if answer is not None else "nothing"
                reason = answer.get_header(tasks.REASON, code) if answer is not None else code
                self.log_warning(fl_ctx, f"{name}: {site} answered {code}: {reason}")
                self._folder.event("dropped", site=site, phase=name, reason=str(reason))
                return
            with lock:
                answers[site] = answer
            self._folder.event("answered", site=site, phase=name)

        task = Task(name, data, timeout=timeout, result_received_cb=received)
        # min_responses=0 waits for every site; error answers count as responses, so the OK ones are counted here
        self.broadcast_and_wait(task, fl_ctx, targets=list(sites), min_responses=0, abort_signal=abort)
        if abort.triggered:
            raise RoundFailed("the job was aborted")
        for site in sorted(set(sites) - set(answers)):
            self.log_warning(fl_ctx, f"{name}: no usable answer from {site}")
        if at_least is None:
            self._need(len(answers), name)
        return answers

    def _need(self, answered: int, phase: str) -> None:
        if answered < self._config.federation.min_sites:
            raise RoundFailed(
                f"{phase}: {answered} sites answered, min_sites={self._config.federation.min_sites}; "
                "each site's log says why it did not"
            )
