"""The site's half: answers FLARE's tasks by asking the trainer process, and masks what it hands on.

This process must never die: FLARE ends the job for every site when one job process does. So torch lives in a child
(`trainer`), and every failure becomes a reply with a code that drops this site from the phase. The keys of secure
aggregation live here, so that a dead trainer costs the site its update and not its place.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedmpt_core.common.dumps import forbid_dumps
from fedmpt_core.common.release import RELEASE
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.toml import ConfigError, job_from_dict
from fedmpt_core.federation.site.masked_updates import MaskedUpdates
from fedmpt_core.federation.site.states import StateRefused, States
from fedmpt_core.model.vector import LayoutError, ParameterLayout
from fedmpt_core.privacy.ledger.site_ledger import ledger_copy, open_ledger
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_flare import tasks
from fedmpt_flare.site.egress_guard import EgressGuard
from fedmpt_flare.site.refusals import note_refusal
from fedmpt_flare.site.request import PROTOCOL_TASKS, Request, RequestError
from fedmpt_flare.site.trainer import Trainer, TrainerError, own_log
from fedmpt_flare.workspace import run_folder, run_id, site_config, site_folder, site_name, start_up_kit

TRAINER_LOG = "trainer.log"
CLAMPED = "numbers of this site's update were beyond secagg.value_range and were cut off: lower training.learning_rate"


class FedMPTExecutor(Executor):
    """Serves every task of `tasks.TASKS`.

    Args:
        job: the agreed job in plain values (`JobConfig.to_dict`); nothing in it names a path at the site.
        release: of this program, that exported the job; a site of another one refuses it.
    """

    _always_serialize_args = ("job", "release")
    trainer: Callable[[Path], Trainer] = Trainer
    """Makes the process that trains, from the place of its log; a test puts one here that does not."""

    def __init__(self, job: dict[str, Any], release: str = RELEASE) -> None:
        """Keeps the arguments and does nothing else: a job may build any class that the site allows."""
        super().__init__()
        self.job, self.release = job, release
        self._config: JobConfig | None = None
        self._joined = False  # whether the newest join was agreed to
        self._trainer: Trainer | None = None
        self._prepared: tuple[dict[str, Any], bytes] | None = None
        self._secure: MaskedUpdates | None = None
        self._states: States | None = None
        self._said: dict[str, Any] = {}  # fields of the update that the site may mask again
        self._run_id = ""
        self._last: dict[str, tuple[tuple[int | None, int | None], bytes, Shareable]] = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Starts the trainer with the run and stops it with the run."""
        if event_type == EventType.START_RUN:
            forbid_dumps()
            self._run_id = run_id(fl_ctx)  # the same when the trainer is started again: its rounds are one job's
            self._trainer = type(self).trainer(run_folder(fl_ctx) / TRAINER_LOG)
            self._trainer.start()
        elif event_type in (EventType.ABORT_TASK, EventType.END_RUN):
            self._end_round()
            if event_type == EventType.ABORT_TASK and fl_ctx.get_prop(FLContextKey.RUN_ABORT_REQUESTED):
                self._hand_over(fl_ctx)
            if event_type == EventType.END_RUN and self._trainer:
                self._trainer.stop()
                self._free(fl_ctx)

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Answer one task; never raises, whatever came."""
        try:
            return self._answer(Request.read(task_name, shareable, fl_ctx, site_name(fl_ctx)), fl_ctx, abort_signal)
        except RequestError as error:
            with suppress(Exception):
                self._note("a task", error, fl_ctx)
            return tasks.refusal(tasks.SITE_REFUSED, str(error))
        except Exception as error:
            # The type only: texts of unforeseen errors can carry paths or values, and error logs travel to the
            # server.
            with suppress(Exception):
                note_refusal(site_folder(fl_ctx), self._run_id, "a task failed", repr(error))
                self.log_error(fl_ctx, f"a task failed: {type(error).__name__}", fire_event=False)
            return tasks.refusal(tasks.SITE_FAILED, "the task failed at the site; its log says why")

    def _answer(self, asked: Request, fl_ctx: FLContext, abort: Signal) -> Shareable:
        # FLARE sends a task again when it did not see the answer: same answer, no second training
        content = asked.content()
        last = self._last.get(asked.task)
        if last and last[:2] == (asked.step, content):
            return last[2]
        if last and last[0] == asked.step and asked.task == tasks.TRAIN:
            raise RequestError("the same round and attempt came with other content")
        if asked.task not in (tasks.TRAIN, *PROTOCOL_TASKS):
            self._end_round()
        try:
            if asked.task == tasks.JOIN:
                reply = self._join(asked, fl_ctx, abort)
            else:
                reply = self._serve(asked, self._agreed(), fl_ctx, abort)
        except SecAggError as error:
            return self._left(asked.task, error, fl_ctx)
        except StateRefused as error:
            raise RequestError(str(error)) from None
        except (ConfigError, TrainerError, LayoutError) as error:
            return self._failed(asked.task, error, fl_ctx, abort)
        self._last[asked.task] = asked.step, content, reply
        return reply

    def _serve(self, asked: Request, job: JobConfig, fl_ctx: FLContext, abort: Signal) -> Shareable:
        asked.check(job)
        steps: dict[str, Callable[[MaskedUpdates, bytes], bytes]] = {
            tasks.ADVERTISE: MaskedUpdates.advertise,
            tasks.DEAL: MaskedUpdates.deal,
            tasks.CONFIRM: MaskedUpdates.confirm,
            tasks.SHOW: MaskedUpdates.show,
            tasks.MASK: MaskedUpdates.mask,
            tasks.OPEN: MaskedUpdates.open,
        }
        if step := steps.get(asked.task):
            return tasks.message(protocol=step(self._masks(), asked.protocol or b""))
        if asked.task == tasks.LEDGER:
            return self._ledger(fl_ctx)
        answers = {tasks.TRAIN: self._train, tasks.VALIDATE: self._validate}
        return answers[asked.task](asked, job, fl_ctx, abort)

    def _free(self, fl_ctx: FLContext) -> None:
        """What the job held of the budget is free for others; where that fails, it runs out."""
        try:
            policy = site_config(fl_ctx).privacy
            if policy and policy.ledger and self.job.get("privacy", {}).get("mechanism") != "none":
                open_ledger(policy, site_name(fl_ctx), start_up_kit(fl_ctx)).free(self._run_id)
        except Exception as error:  # a run that has ended must end
            with suppress(Exception):
                self._note("the end of the run", f"what it held of the budget is not free yet: {error}", fl_ctx)

    def _join(self, asked: Request, fl_ctx: FLContext, abort: Signal) -> Shareable:
        self._joined = False  # until every check has passed
        self._last.clear()
        if self.release != RELEASE:
            raise ConfigError(f"the job was exported with fedmpt {self.release}, this site runs {RELEASE}")
        job = job_from_dict({k: v for k, v in self.job.items() if k != "config_type"})
        if asked.job_digest != job.digest():
            raise ConfigError(
                f"the server's job digest {asked.job_digest!r:.70} is not this site's {job.digest()}: both must run "
                "the same release"
            )
        if asked.protocol is not None:
            raise RequestError(f"{tasks.JOIN} came with a message of the protocol, which it does not have")
        self._config = job
        fields, initial = self._ready(fl_ctx, abort)
        if job.secagg.masked and self._secure is None:
            try:
                self._secure = MaskedUpdates(
                    job,
                    site_config(fl_ctx),
                    name=site_name(fl_ctx),
                    run_id=self._run_id,
                    kit=start_up_kit(fl_ctx),
                    layout=ParameterLayout.from_json(fields["layout"]),
                    initial=initial,
                    backbone_digest=fields["backbone_digest"],
                )
            except SecAggError as error:
                if error.code == Abort.ROSTER:
                    self._note(asked.task, error, fl_ctx)
                    raise RequestError(
                        "its own key is not the one in its roster, or its roster cannot be used: if the key was "
                        "renewed, every site must collect the roster anew"
                    ) from None
                raise ConfigError(str(error)) from None  # may name files of the site, so it stays in its log
        layout = ParameterLayout.from_json(fields["layout"])
        self._states = self._secure.states if self._secure else self._states or States(job, layout, initial)
        self._joined = True
        return tasks.message(fields=fields, vector=initial)

    def _agreed(self) -> JobConfig:
        if not self._joined or self._config is None:
            raise RequestError("this site has not joined the job: nothing is done before a join that it agreed to")
        return self._config

    def _train(self, asked: Request, job: JobConfig, fl_ctx: FLContext, abort: Signal) -> Shareable:
        number, state = asked.round or 0, asked.vector or b""
        if job.secagg.masked:
            ready = self._masks().begin(asked.protocol or b"", number, state)
            if ready:
                return tasks.message(fields=self._said, protocol=ready)
        else:
            self._known().before(number, state)
        self._ready(fl_ctx, abort)
        fields, update = self._ask("train", state, abort, round=number, attempt=asked.attempt, known_head=asked.head)
        self.log_info(fl_ctx, f"round {number}: {fields['steps']} steps done")
        self._said = {tasks.PRIVACY: fields[tasks.PRIVACY]}
        if job.secagg.masked:
            ready = self._masks().hold(update, fields[tasks.WEIGHT], fields["metrics"])
            if clamped := self._masks().clamped:
                self._note(tasks.TRAIN, f"round {number}: {clamped} {CLAMPED}", fl_ctx)
            return tasks.message(fields=self._said, protocol=ready)
        return tasks.message(fields=self._said | {tasks.WEIGHT: fields[tasks.WEIGHT]}, vector=update)

    def _validate(self, asked: Request, job: JobConfig, fl_ctx: FLContext, abort: Signal) -> Shareable:
        state, fields = asked.vector or b"", {"zero_shot": asked.round == 0}
        self._known().after(asked.round or 0, state)
        self._ready(fl_ctx, abort)
        try:
            answer, _ = self._ask("validate", state, abort, **fields)
        except TrainerError as error:
            if not error.died:
                raise
            self._ready(fl_ctx, abort)  # costs no privacy, so a new trainer may do it again
            answer, _ = self._ask("validate", state, abort, **fields)
        return tasks.message(fields=answer)

    def _ledger(self, fl_ctx: FLContext) -> Shareable:
        policy, kit = site_config(fl_ctx).privacy, start_up_kit(fl_ctx)
        if policy is None or not policy.share_ledger:
            raise RequestError("this site keeps its ledger to itself (privacy.share_ledger)")
        return tasks.ledger_message(*ledger_copy(policy, kit))

    def _hand_over(self, fl_ctx: FLContext) -> None:
        """An aborted job can ask for nothing more, so the ledger goes to the server unasked, if the guard lets it."""
        try:
            if not self._agreed().privacy.private:
                return
            fl_ctx.set_prop(FLContextKey.TASK_NAME, tasks.LEDGER, private=True, sticky=False)
            engine: Any = fl_ctx.get_engine()
            answer = EgressGuard().process(self._ledger(fl_ctx), fl_ctx)
            if answer.get_return_code() == ReturnCode.OK:
                engine.fire_and_forget_aux_request(tasks.LEDGER_TOPIC, answer, fl_ctx, optional=True)
        except Exception as error:
            with suppress(Exception):
                reason = error if isinstance(error, RequestError) else type(error).__name__
                self.log_info(fl_ctx, f"no ledger goes with the aborted job: {reason}", fire_event=False)

    def _masks(self) -> MaskedUpdates:
        if self._secure is None:
            raise SecAggError(Abort.POLICY, "the job has masks, and this site's keys are not set up: nothing is sent")
        return self._secure

    def _end_round(self) -> None:
        """What could open a mask of the round is forgotten, also where nobody asked this site to open the sum."""
        if self._secure:
            self._secure.leave()

    def _known(self) -> States:
        if self._states is None:
            raise StateRefused("this site knows no parameters of the run, so it takes none")
        return self._states

    def _ready(self, fl_ctx: FLContext, abort: Signal) -> tuple[dict[str, Any], bytes]:
        """A trainer with data and model, started again when the last one died."""
        try:
            return self._prepare(fl_ctx, abort)
        except TrainerError as error:
            if not error.died:
                raise
            return self._prepare(fl_ctx, abort)

    def _prepare(self, fl_ctx: FLContext, abort: Signal) -> tuple[dict[str, Any], bytes]:
        if self._trainer is None:
            raise TrainerError("the run has not started", expected=False)
        if not self._trainer.alive:
            self._trainer.start()
            self._prepared = None
        if self._prepared is None:
            if self._config is None:
                raise TrainerError("this site has not joined the job", expected=True)
            kit = start_up_kit(fl_ctx)
            self._prepared = self._ask(
                "prepare",
                b"",
                abort,
                job=self._config.to_dict(),
                site=asdict(site_config(fl_ctx)),
                name=site_name(fl_ctx),
                run_id=self._run_id,
                kit=str(kit or ""),
            )
        return self._prepared

    def _ask(self, order: str, block: bytes, abort: Signal, **fields: Any) -> tuple[dict[str, Any], bytes]:
        if self._trainer is None or self._config is None:
            raise TrainerError("the run has not started", expected=False)
        times = self._config.federation
        timeout = times.join_timeout if order == "prepare" else times.round_timeout
        return self._trainer.ask(order, block, abort=abort, timeout=timeout, **fields)

    def _left(self, task: str, error: SecAggError, fl_ctx: FLContext) -> Shareable:
        """The protocol refused; its sentence may name files and members, so a code and a member's number travel."""
        self._note(task, error, fl_ctx)
        abort = b""
        try:
            abort = self._secure.abort(error) if self._secure else b""
        except SecAggError as again:
            self._note(task, again, fl_ctx)
        culprit = "" if error.culprit is None else f"member {error.culprit}, "
        return tasks.refusal(
            tasks.SITE_REFUSED, f"{error.code.name}: {culprit}the reason is in this site's {TRAINER_LOG}", abort
        )

    def _failed(
        self, task: str, error: ConfigError | TrainerError | LayoutError, fl_ctx: FLContext, abort: Signal
    ) -> Shareable:
        if abort.triggered:
            return make_reply(ReturnCode.TASK_ABORTED)
        # the sentence may name pictures, paths or what is spent, so it stays in the site's own log
        self._note(task, error, fl_ctx)
        expected = not isinstance(error, TrainerError) or error.expected
        code = tasks.SITE_REFUSED if expected else tasks.SITE_FAILED
        if isinstance(error, TrainerError) and error.public:
            return tasks.refusal(code, error.public)
        return tasks.refusal(code, f"{task} was refused at the site; the reason is in its {TRAINER_LOG}")

    def _note(self, task: str, sentence: Exception | str, fl_ctx: FLContext) -> None:
        place = f"the reason is in this site's {TRAINER_LOG}"
        try:
            with own_log(run_folder(fl_ctx) / TRAINER_LOG).open("a", encoding="utf-8") as log:
                log.write(f"{task}: {sentence}\n")
        except OSError as full:
            place = f"{TRAINER_LOG} cannot be written ({full.strerror}): `fedmpt site check` says where room is missing"
        note_refusal(site_folder(fl_ctx), self._run_id, task, sentence)
        self.log_error(fl_ctx, f"{task} refused or failed; {place}", fire_event=False)
