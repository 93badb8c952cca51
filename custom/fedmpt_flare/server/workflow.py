"""The server's half: join, then rounds of training and evaluation. Needs neither torch nor the model's weights.

A site that dies, hangs, refuses or errs leaves the phase; the round goes on while enough sites answered, otherwise the
round (not the job) failed and is tried again. Every round's outcome is on disk before the next one starts, also in a
checkpoint outside the run's folder, from which another job can go on.
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from nvflare.apis.analytix import AnalyticsDataType, LogWriterName
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo
from nvflare.apis.wf_comm_spec import WFCommSpec

from fedmpt_core.common.release import RELEASE
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.toml import ConfigError, job_from_dict
from fedmpt_core.federation.run.record import RunRecord, mean_figures
from fedmpt_core.federation.run.tracking import scalars
from fedmpt_core.federation.server.averaging import apply, average
from fedmpt_core.federation.server.checkpoint import Checkpoint, load_checkpoint
from fedmpt_core.federation.server.participation import participants
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.privacy.ledger.ledger import LedgerHead
from fedmpt_core.secagg.server import RoundLost
from fedmpt_flare import tasks
from fedmpt_flare.server.masked_rounds import SecureRounds, Take
from fedmpt_flare.server.run_folder import RunFolder
from fedmpt_flare.workspace import checkpoint_folder, run_folder, run_id, start_up_kit

CHECK_SECONDS = 0.05  # FLARE's own 0.2 s is paid twice in every phase


class RoundFailed(Exception):
    """Too few sites answered a phase; the round may be tried again."""


class FedMPTWorkflow(Controller):
    """Federated averaging of FedMPT's trained parameters.

    Args:
        job: the agreed job in plain values (`JobConfig.to_dict`).
        release: of this program, that exported the job; a server of another one refuses it.
    """

    _always_serialize_args = ("job", "release")

    def __init__(self, job: dict[str, Any], release: str = RELEASE) -> None:
        """Keeps the arguments and does nothing else."""
        super().__init__(task_check_period=CHECK_SECONDS)
        self.job, self.release = job, release

    def set_communicator(self, communicator: WFCommSpec) -> None:
        """As FLARE does, and with the controller's period, which FLARE 2.9 notes under a name that it never reads."""
        super().set_communicator(communicator)
        vars(communicator)["_task_check_period"] = CHECK_SECONDS

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Checks the job and opens the run's records."""
        try:
            if self.release != RELEASE:
                raise ConfigError(f"the job was exported with fedmpt {self.release}, the server runs {RELEASE}")
            self._config: JobConfig = job_from_dict({k: v for k, v in self.job.items() if k != "config_type"})
            self._checkpoints = checkpoint_folder(fl_ctx)
        except ConfigError as error:
            # nothing to record it in yet, and FLARE's secure logging shows of an exception its type alone
            self.log_error(fl_ctx, f"the job is refused: {error}", fire_event=False)
            raise
        self._folder = RunFolder(run_folder(fl_ctx))
        self._run_id = run_id(fl_ctx)
        self._record = RunRecord.start(self._config, self._run_id)
        self._failed_attempts = 0
        self._privacy: dict[str, dict[str, Any]] = {}
        self._secure: SecureRounds | None = None
        self._silent: set[str] = set()  # who did not answer the last task that it was given

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """The whole job; an exception here ends it as failed."""
        self._context, self._abort = fl_ctx, abort_signal
        try:
            self._run()
        except Exception as error:
            self._end(f"failed: {error}")
            self._folder.event("failed", reason=str(error))
            raise
        self._end("completed")
        self._folder.event("completed")

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing is left to do: every round was written when it ended."""

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """A late answer is dropped."""
        self.log_warning(fl_ctx, f"late answer from {client.name} for {task_name}: dropped")

    def _run(self) -> None:
        federation, training = self._config.federation, self._config.training
        # before any site is asked: a checkpoint that does not fit should cost nobody anything
        resumed = self._resumed()
        sites, layout, state = self._join()
        if resumed:
            if resumed.layout != layout:
                raise RuntimeError("the checkpoint has another layout than the sites: both must be of one release")
            state, self._privacy = resumed.state, dict(resumed.privacy)
            self._record = self._record.continuing(resumed.record)
        evaluating = [s for s, f in sites.items() if f["evaluates"] and federation.evaluate_every]
        if not resumed:
            self._evaluate(0, state, layout, evaluating, time.monotonic(), {}, {})
        done, attempt = self._config.first_round - 1, 0
        while done < training.rounds:
            start = time.monotonic()
            try:
                asked = self._asked(sites, done + 1, attempt)
                mean, sent, facts = self._train(done + 1, attempt, state, layout, asked)
            except (RoundFailed, RoundLost) as error:
                attempt += 1
                self._failed_attempts += 1
                self._folder.event("round_failed", round=done + 1, reason=str(error))
                if self._abort.triggered or self._failed_attempts > federation.max_failed_rounds:
                    raise RuntimeError(f"round {done + 1} failed: {error}") from error
                continue
            state = apply(state, mean)
            done, attempt = done + 1, 0
            self._folder.write_model(layout, state)
            if done == training.rounds or done % (federation.evaluate_every or training.rounds) == 0:
                self._evaluate(done, state, layout, evaluating, start, sent, facts)
            else:
                self._round_done(done, start, sent, facts, {})
            self._checkpoint(done, layout, state)

    def _asked(self, sites: Mapping[str, Any], number: int, attempt: int) -> list[str]:
        federation = self._config.federation
        return participants(
            list(sites),
            federation.participation,
            least=federation.min_sites,
            seed=self._config.seed,
            round_number=number,
            attempt=attempt,
        )

    def _end(self, outcome: str) -> None:
        """The record's last state, the sites' ledgers and the manifest."""
        ledgers = self._ledgers()
        self._record = self._record.ended_as(outcome)
        self._folder.write_record(self._record)
        self._folder.write_manifest(self._record, ledgers, start_up_kit(self._context))

    def _ledgers(self) -> dict[str, dict[str, str]]:
        """By site, where the copy of its ledger is, or why there is none."""
        sites = sorted(self._record.sites or {})
        if not self._config.privacy.private:
            return {site: {"kept": "the job has no differential privacy, so no ledger"} for site in sites}
        lost = {site: {"kept": "the site did not answer any more"} for site in sites if site in self._silent}
        sites = [site for site in sites if site not in lost]
        found = {**lost, **{site: {"kept": "the site gave none"} for site in sites}}

        def take(site: str, answer: Shareable) -> None:
            copy, certificate = answer[tasks.LEDGER_COPY], answer[tasks.CERTIFICATE]
            if type(copy) is not bytes or type(certificate) is not bytes:
                raise ValueError("it is no ledger")
            found[site] = self._folder.write_ledger(site, copy, certificate)

        if sites and not self._abort.triggered:
            with suppress(RoundFailed):  # aborted meanwhile
                self._phase(tasks.LEDGER, tasks.message(), sites, self._config.secagg.phase_timeout, take)
        return found

    def _resumed(self) -> Checkpoint | None:
        """The checkpoint to go on from, if the job says so. Raises CheckpointError when it does not fit."""
        if self._config.resume is None:
            return None
        found = load_checkpoint(self._checkpoints, self._config.resume.job)
        found.check(self._config)
        return found

    def _checkpoint(self, done: int, layout: ParameterLayout, state: Any) -> None:
        kept = Checkpoint(self._run_id, self._config, done, layout, state, self._record, self._privacy)
        kept.save(self._checkpoints)

    def _join(self) -> tuple[dict[str, dict[str, Any]], ParameterLayout, Any]:
        """Who takes part, and with which layout and initial parameters.

        Sites must agree byte for byte on the initial parameters and on the frozen weights; one that differs from the
        majority is left out.
        """
        engine: Any = self._context.get_engine()
        invited = sorted(c.name for c in engine.get_clients())
        self._folder.event("joining", sites=invited)
        data = tasks.message(headers={tasks.JOB_DIGEST: self._config.digest()})
        answers: dict[str, Shareable] = {}

        def take(site: str, answer: Shareable) -> None:
            answers[site] = answer

        self._phase(tasks.JOIN, data, invited, self._config.federation.join_timeout, take)
        self._need(len(answers), tasks.JOIN)
        keys = {s: (a[tasks.FIELDS]["backbone_digest"], a[tasks.VECTOR]) for s, a in answers.items()}
        common = Counter(keys.values()).most_common(1)[0][0]
        odd = sorted(s for s, key in keys.items() if key != common)
        if odd:
            self.log_warning(self._context, f"{', '.join(odd)} start from other weights than the rest and are left out")
            self._folder.event("left_out", sites=odd, reason="other backbone weights or initial parameters")
        fields = {s: answers[s][tasks.FIELDS] for s in sorted(answers) if s not in odd}
        self._need(len(fields), tasks.JOIN)
        layout = ParameterLayout.from_json(next(iter(fields.values()))["layout"])
        self._record = self._record.joined(fields)
        self._folder.event(
            "joined", sites=list(fields), backbone=self._record.backbone, stand_in=self._record.is_stand_in
        )
        if self._config.secagg.masked:
            kit = start_up_kit(self._context)
            self._secure = SecureRounds(self._config, self._run_id, layout, common[0], kit, self._phase)
        return fields, layout, layout.decode(common[1])

    def _train(
        self, number: int, attempt: int, state: Any, layout: ParameterLayout, sites: list[str]
    ) -> tuple[Any, dict[str, int], dict[str, Any]]:
        """The mean update of a round, bytes sent by site, and what the record says of the masks."""
        self._folder.event("training", round=number, sites=sites)
        data = tasks.message(
            fields={tasks.HEADS: {site: p["head"] for site, p in self._privacy.items()}},
            vector=layout.encode(state),
            headers={tasks.ROUND: number, tasks.ATTEMPT: attempt},
        )
        timeout = self._config.federation.round_timeout
        if self._secure:
            found = self._secure.round(sites, data, state, timeout, self._note_privacy)
            sent = {site: found.sent[site] for site in found.survivors}
            return found.mean.mean, sent, found.facts | {"metrics": found.mean.metrics}
        updates: dict[str, Any] = {}
        weights: dict[str, float] = {}

        def take(site: str, answer: Shareable) -> None:
            update, weight = layout.decode(answer[tasks.VECTOR]), float(answer[tasks.FIELDS][tasks.WEIGHT])
            self._note_privacy(site, answer)
            updates[site], weights[site] = update, weight

        self._phase(tasks.TRAIN, data, sites, timeout, take)
        self._need(len(updates), tasks.TRAIN)
        return average(updates, weights), dict.fromkeys(sorted(updates), 32 + 4 * layout.size), {}

    def _note_privacy(self, site: str, answer: Shareable) -> None:
        """Keep what a site says of its budget, the head of its ledger above all. Raises when it says nothing."""
        if not self._config.privacy.private:
            return
        said = answer[tasks.FIELDS][tasks.PRIVACY]
        self._privacy[site] = {
            "epsilon": float(said["epsilon"]),
            "delta": float(said["delta"]),
            "head": LedgerHead.from_dict(said["head"]).to_dict(),
        }

    def _evaluate(
        self,
        number: int,
        state: Any,
        layout: ParameterLayout,
        sites: list[str],
        start: float,
        sent: Mapping[str, int],
        facts: Mapping[str, Any],
    ) -> None:
        reports: dict[str, Any] = {}
        if sites:
            self._folder.event("evaluating", round=number, sites=sites)
            data = tasks.message(vector=layout.encode(state), headers={tasks.ROUND: number})

            def take(site: str, answer: Shareable) -> None:
                reports[site] = answer[tasks.FIELDS]["figures"]

            self._phase(tasks.VALIDATE, data, sites, self._config.federation.round_timeout, take)
        self._round_done(number, start, sent, facts, mean_figures([reports[s] for s in sorted(reports)]))

    def _round_done(
        self, number: int, start: float, sent: Mapping[str, int], facts: Mapping[str, Any], figures: Mapping[str, Any]
    ) -> None:
        privacy = {s: self._privacy[s] for s in sent if s in self._privacy}
        self._record = self._record.with_round(number, time.monotonic() - start, sent, figures, privacy, facts)
        self._folder.write_record(self._record)
        self._folder.event("round", **self._record.rounds[-1])
        if self._config.federation.tracking:
            for tag, value in scalars(self._record.rounds[-1]).items():
                dxo = create_analytic_dxo(
                    tag, value, AnalyticsDataType.METRIC, LogWriterName.MLFLOW, global_step=number
                )
                send_analytic_dxo(self, dxo, self._context)
        self.log_info(self._context, f"round {number}: sites={len(sent)} mAP={figures.get('mAP')}")

    def _phase(
        self,
        name: str,
        data: Shareable,
        sites: list[str],
        timeout: int,
        take: Take,
        *,
        private: Mapping[str, bytes] | None = None,
    ) -> list[str]:
        """Send one task to all `sites` and wait for each or the timeout.

        Args:
            name: of the task.
            data: the task.
            sites: who gets it.
            timeout: seconds.
            take: called with every OK answer; what it raises drops the site from the phase.
            private: by site, a message that only this site gets.

        Returns:
            Names of the sites whose answer was taken.
        """
        taken: set[str] = set()
        self._silent |= set(sites)
        lock = threading.Lock()
        self._folder.event("phase", phase=name, sites=sites)

        # FLARE passes both by keyword, and an exception in here would end the phase.
        def received(client_task: ClientTask, fl_ctx: FLContext) -> None:
            site, answer = client_task.client.name, client_task.result
            if answer is not None:
                self._silent.discard(site)
            client_task.result = None  # an update is kept nowhere
            reason = _refused(answer)
            if answer is not None and reason:
                reason += self._blamed(site, answer)
            elif answer is not None:
                try:
                    with lock:
                        take(site, answer)
                        taken.add(site)
                except (ValueError, KeyError, TypeError) as error:
                    reason = f"its answer is not used: {error}"
            if reason:
                self.log_warning(fl_ctx, f"{name}: {site}: {reason}")
                self._folder.event("dropped", site=site, phase=name, reason=reason)
            else:
                self._folder.event("answered", site=site, phase=name)

        # A broadcast has one content for all; what one site alone may read travels beside it.
        def before_sent(client_task: ClientTask, fl_ctx: FLContext) -> None:
            own = (private or {}).get(client_task.client.name, b"")
            fl_ctx.set_prop(tasks.FOR_YOU, own, private=False, sticky=False)

        task = Task(
            name,
            data,
            timeout=timeout,
            before_task_sent_cb=before_sent if private else None,
            result_received_cb=received,
        )
        # min_responses=0 waits for every site; error answers count as responses, so the OK ones are counted here
        self.broadcast_and_wait(task, self._context, targets=list(sites), min_responses=0, abort_signal=self._abort)
        if self._abort.triggered:
            raise RoundFailed("the job was aborted")
        for site in sorted(set(sites) - taken):
            self.log_warning(self._context, f"{name}: no usable answer from {site}")
        return sorted(taken)

    def _blamed(self, site: str, answer: Shareable) -> str:
        abort = answer.get_header(tasks.ABORT)
        culprit = self._secure.blame(site, abort) if self._secure and type(abort) is bytes else ""
        return f" (it blames {culprit})" if culprit else ""

    def _need(self, answered: int, phase: str) -> None:
        if answered < self._config.federation.min_sites:
            raise RoundFailed(
                f"{phase}: {answered} sites answered, min_sites={self._config.federation.min_sites}; "
                "each site's log says why it did not"
            )


def _refused(answer: Shareable | None) -> str:
    """Why an answer is none; '' for an OK one."""
    if answer is None:
        return "it answered nothing"
    code = answer.get_return_code()
    return "" if code == ReturnCode.OK else str(answer.get_header(tasks.REASON, code))
