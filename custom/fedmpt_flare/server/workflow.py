"""The server's half over FLARE's tasks: join, then rounds of training and evaluation, then what is left of the run.

What is asked and what becomes of the answers is `fedmpt_core.federation.server.rounds`; here is how the sites are
reached. A site that dies, hangs, refuses or errs leaves the phase. Needs neither torch nor the model's weights.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from nvflare.apis.analytix import AnalyticsDataType, LogWriterName
from nvflare.apis.client import Client
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo
from nvflare.apis.wf_comm_spec import WFCommSpec

from fedmpt_core.common.dumps import forbid_dumps
from fedmpt_core.common.release import RELEASE
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.toml import ConfigError, job_from_dict
from fedmpt_core.federation.joined import Joined
from fedmpt_core.federation.run.record import ABORTED
from fedmpt_core.federation.run.tracking import scalars
from fedmpt_core.federation.server.checkpoint import checkpoint_for
from fedmpt_core.federation.server.heads import LedgerHeads
from fedmpt_core.federation.server.rounds import Evaluation, RoundFailed, Rounds, Training
from fedmpt_flare import tasks
from fedmpt_flare.server.masked_rounds import MaskedRounds
from fedmpt_flare.server.phases import Phase, Phases, refusal_of
from fedmpt_flare.server.run_folder import RunFolder
from fedmpt_flare.server.unasked_ledgers import GRACE, UnaskedLedgers
from fedmpt_flare.workspace import checkpoint_folder, run_folder, run_id, start_up_kit

CHECK_SECONDS = 0.05  # FLARE's own 0.2 s is paid twice in every phase


def agreed_job(values: Mapping[str, Any], release: str) -> JobConfig:
    """The job that a workflow was built for. Raises ConfigError when it is none, or of another release."""
    if release != RELEASE:
        raise ConfigError(f"the job was exported with fedmpt {release}, the server runs {RELEASE}")
    return job_from_dict({k: v for k, v in values.items() if k != "config_type"})


class FedMPTWorkflow(Controller):
    """Federated averaging of FedMPT's trained parameters.

    Args:
        job: the agreed job in plain values (`JobConfig.to_dict`).
        release: of this program, that exported the job; a server of another one refuses it.
    """

    _always_serialize_args = ("job", "release")
    grace = GRACE
    """Seconds for the ledgers of an aborted job; a test waits for none."""

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
        forbid_dumps()  # updates and the server's key are here
        try:
            self._config = agreed_job(self.job, self.release)
            self._checkpoints = checkpoint_folder(fl_ctx)
        except ConfigError as error:
            # nothing to record it in yet, and FLARE's secure logging shows of an exception its type alone
            self.log_error(fl_ctx, f"the job is refused: {error}", fire_event=False)
            raise
        self._folder = RunFolder(run_folder(fl_ctx), self._checkpoints)
        self._run_id = run_id(fl_ctx)
        self._rounds = Rounds(self._config, self._run_id, self._folder)
        # a simulation's ledgers live as long as the simulation
        self._heads = LedgerHeads(self._checkpoints) if start_up_kit(fl_ctx) else None
        self._masks: MaskedRounds | None = None
        engine: Any = fl_ctx.get_engine()
        self._unasked = UnaskedLedgers(start_up_kit(fl_ctx))
        engine.register_aux_message_handler(tasks.LEDGER_TOPIC, self._unasked.take)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """The whole job; an exception here ends it as failed."""
        self._context = fl_ctx
        self._phases = Phases(self, self._folder, fl_ctx, abort_signal)
        try:
            # before any site is asked: a checkpoint that does not fit should cost nobody anything
            if kept := checkpoint_for(self._config, self._checkpoints):
                self._rounds.resume(kept)
            self._join()
            for row in self._rounds.run(self):
                self._track(row)
        except Exception as error:
            reason = str(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {error}"
            # FLARE's secure logging shows of an exception its type alone
            self.log_error(fl_ctx, f"the job failed: {reason}", fire_event=False)
            self._end(f"failed: {reason}")
            self._folder.event("failed", reason=reason)
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

    @property
    def stopped(self) -> bool:
        """Whether somebody has ended the job (`Carriage`)."""
        return self._phases.stopped

    def train(self, training: Training) -> None:
        """One attempt at a round, with masks if the job has them (`Carriage`)."""
        before = self._heads.of(training.sites) if self._heads else {}
        try:
            self._train(training, before | training.heads)
        finally:
            if self._heads:
                self._heads.note(training.privacy)

    def _train(self, training: Training, heads: dict[str, dict[str, Any]]) -> None:
        task = tasks.message(
            fields={tasks.HEADS: heads},
            vector=training.vector(),
            headers={tasks.ROUND: training.round, tasks.ATTEMPT: training.attempt},
        )
        timeout = self._config.federation.round_timeout
        if self._masks:
            self._masks.train(training, task, timeout)
            return

        def take(site: str, answer: Shareable) -> None:
            fields = answer[tasks.FIELDS]
            training.take(site, answer[tasks.VECTOR], fields[tasks.WEIGHT], fields.get(tasks.PRIVACY))

        self._phases.run(Phase(tasks.TRAIN, task, training.sites, timeout), take)

    def evaluate(self, evaluation: Evaluation) -> None:
        """One evaluation (`Carriage`)."""
        task = tasks.message(vector=evaluation.vector(), headers={tasks.ROUND: evaluation.round})
        self._phases.run(
            Phase(tasks.VALIDATE, task, evaluation.sites, self._config.federation.round_timeout),
            lambda site, answer: evaluation.take(site, answer[tasks.FIELDS]["figures"]),
        )

    def _join(self) -> None:
        engine: Any = self._context.get_engine()
        invited = sorted(c.name for c in engine.get_clients())
        self._folder.event("joining", sites=invited)
        task = tasks.message(headers={tasks.JOB_DIGEST: self._config.digest()})
        answers: dict[str, Joined] = {}
        absent = dict.fromkeys(invited, "it did not answer")

        def refused(site: str, answer: Shareable) -> str:
            absent[site] = refusal_of(answer)
            return ""

        def take(site: str, answer: Shareable) -> None:
            absent[site] = "its answer could not be used"
            answers[site] = Joined.from_message(answer[tasks.FIELDS], answer[tasks.VECTOR])

        self._phases.run(Phase(tasks.JOIN, task, invited, self._config.federation.join_timeout), take, refused)
        self._rounds.join(answers, {site: why for site, why in absent.items() if site not in answers})
        if self._config.secagg.masked:
            kit = start_up_kit(self._context)
            digest = next(iter(self._rounds.sites.values())).backbone_digest
            self._masks = MaskedRounds(self._config, self._run_id, self._rounds.layout, digest, kit, self._phases)

    def _track(self, row: dict[str, Any]) -> None:
        """A finished round, for the log and, where the job asks for it, for TensorBoard and MLflow."""
        if self._config.federation.tracking:
            for tag, value in scalars(row).items():
                dxo = create_analytic_dxo(
                    tag, value, AnalyticsDataType.METRIC, LogWriterName.MLFLOW, global_step=row["round"]
                )
                send_analytic_dxo(self, dxo, self._context)
        self.log_info(self._context, f"round {row['round']}: sites={len(row['sites'])} mAP={row.get('mAP')}")

    def _end(self, outcome: str) -> None:
        """The sites' ledgers, the record's last state and the manifest."""
        ledgers = self._ledgers()
        self._rounds.end(outcome)
        self._folder.write_manifest(self._rounds.record, ledgers, start_up_kit(self._context))

    def _ledgers(self) -> dict[str, dict[str, str]]:
        """By site, where the copy of its ledger is, or why there is none."""
        sites = sorted(self._rounds.sites)
        if not self._config.privacy.private:
            return {site: {"kept": "the job has no differential privacy, so no ledger"} for site in sites}
        asked = [site for site in sites if site not in self._phases.silent]
        ledgers = {site: {"kept": "the site did not answer any more"} for site in sites}
        ledgers |= {site: {"kept": "the site gave none"} for site in asked}

        def take(site: str, answer: Shareable) -> None:
            copy, certificate = answer[tasks.LEDGER_COPY], answer[tasks.CERTIFICATE]
            if type(copy) is not bytes or type(certificate) is not bytes:
                raise ValueError("it is no ledger")
            ledgers[site] = self._folder.write_ledger(site, copy, certificate)

        if asked and not self.stopped:
            with suppress(RoundFailed):  # aborted meanwhile
                self._phases.run(Phase(tasks.LEDGER, tasks.message(), asked, self._config.secagg.phase_timeout), take)
        if self.stopped:
            missing = {site for site in sites if "file" not in ledgers[site]}
            ledgers |= {site: {"kept": f"{ABORTED}, and the site handed over none"} for site in missing}
            for site, (copy, certificate) in self._unasked.wait_for(missing, self.grace).items():
                ledgers[site] = self._folder.write_ledger(site, copy, certificate)
        return ledgers
