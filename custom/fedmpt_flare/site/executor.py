"""The site's half: answers FLARE's tasks by asking the trainer process, and masks what it hands on.

This process must never die: FLARE ends the job for every site when one job process does. So torch lives in a child
(`trainer`), and every failure becomes a reply with a code that drops this site from the phase. The keys of secure
aggregation live here, so that a dead trainer costs the site its update and not its place.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedmpt_core.common.release import RELEASE
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.toml import ConfigError, job_from_dict
from fedmpt_core.federation.site.masked_updates import MaskedUpdates
from fedmpt_core.model.vector import LayoutError, ParameterLayout
from fedmpt_core.privacy.ledger.site_ledger import ledger_copy
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_flare import tasks
from fedmpt_flare.site.trainer import Trainer, TrainerError
from fedmpt_flare.workspace import run_folder, run_id, site_config, site_name, start_up_kit

TRAINER_LOG = "trainer.log"


class FedMPTExecutor(Executor):
    """Serves every task of `tasks.TASKS`.

    Args:
        job: the agreed job in plain values (`JobConfig.to_dict`); nothing in it names a path at the site.
        release: of this program, that exported the job; a site of another one refuses it.
    """

    _always_serialize_args = ("job", "release")

    def __init__(self, job: dict[str, Any], release: str = RELEASE) -> None:
        """Keeps the arguments and does nothing else: a job may build any class that the site allows."""
        super().__init__()
        self.job, self.release = job, release
        self._config: JobConfig | None = None
        self._trainer: Trainer | None = None
        self._prepared: tuple[dict[str, Any], bytes] | None = None
        self._secure: MaskedUpdates | None = None
        self._said: dict[str, Any] = {}  # fields of the update that the site may mask again
        self._run_id = ""
        self._last: dict[str, tuple[object, bytes, Shareable]] = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Starts the trainer with the run and stops it with the run."""
        if event_type == EventType.START_RUN:
            self._run_id = run_id(fl_ctx)  # the same when the trainer is started again: its rounds are one job's
            self._trainer = Trainer(run_folder(fl_ctx) / TRAINER_LOG)
            self._trainer.start()
        elif event_type == EventType.END_RUN and self._trainer:
            self._trainer.stop()

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Answer one task; never raises."""
        answers: dict[str, Callable[[Shareable, FLContext, Signal], Shareable]] = {
            tasks.JOIN: self._join,
            tasks.ADVERTISE: lambda task, *_: self._protocol(self._masks().advertise, task),
            tasks.CONFIRM: lambda task, *_: self._protocol(self._masks().confirm, task),
            tasks.TRAIN: self._train,
            tasks.CONSISTENCY: lambda task, *_: self._protocol(self._masks().consistency, task),
            tasks.UNMASK: self._unmask,
            tasks.VALIDATE: self._validate,
            tasks.LEDGER: self._ledger,
        }
        if task_name not in answers:
            return tasks.refusal(tasks.SITE_REFUSED, f"task '{task_name}' is not one of {', '.join(tasks.TASKS)}")
        # FLARE sends a task again when it did not see the answer: same answer, no second training
        step, content = _step_of(shareable), _content_of(shareable, fl_ctx)
        last = self._last.get(task_name)
        if last and last[:2] == (step, content):
            return last[2]
        if last and last[0] == step and task_name == tasks.TRAIN:
            return tasks.refusal(tasks.SITE_REFUSED, "the same round and attempt came with other content")
        try:
            reply = answers[task_name](shareable, fl_ctx, abort_signal)
        except SecAggError as error:
            return self._left(task_name, error, fl_ctx)
        except (ConfigError, TrainerError, LayoutError) as error:
            return self._failed(task_name, error, fl_ctx, abort_signal)
        except Exception as error:
            # The type only: texts of unforeseen errors can carry paths or values, and error logs travel to the
            # server.
            self.log_error(fl_ctx, f"{task_name} failed: {type(error).__name__}", fire_event=False)
            return tasks.refusal(
                tasks.SITE_FAILED, f"{task_name} failed with {type(error).__name__}; see the site's log"
            )
        self._last[task_name] = step, content, reply
        return reply

    def _join(self, shareable: Shareable, fl_ctx: FLContext, abort: Signal) -> Shareable:
        self._config = job_from_dict({k: v for k, v in self.job.items() if k != "config_type"})
        if self.release != RELEASE:
            raise ConfigError(f"the job was exported with fedmpt {self.release}, this site runs {RELEASE}")
        asked, own = shareable.get_header(tasks.JOB_DIGEST), self._config.digest()
        if asked != own:
            raise ConfigError(
                f"the server's job digest {asked} is not this site's {own}: both must run the same release"
            )
        fields, initial = self._ready(fl_ctx, abort)
        if self._config.secagg.masked and self._secure is None:
            try:
                self._secure = MaskedUpdates(
                    self._config,
                    site_config(fl_ctx),
                    name=site_name(fl_ctx),
                    run_id=self._run_id,
                    kit=start_up_kit(fl_ctx),
                    layout=ParameterLayout.from_json(fields["layout"]),
                    initial=initial,
                    backbone_digest=fields["backbone_digest"],
                )
            except SecAggError as error:
                raise ConfigError(str(error)) from None  # may name files of the site, so it stays in its log
        return tasks.message(fields=fields, vector=initial)

    def _train(self, shareable: Shareable, fl_ctx: FLContext, abort: Signal) -> Shareable:
        number, state = int(shareable.get_header(tasks.ROUND) or 0), shareable[tasks.VECTOR]
        masked = None
        if self._secure:
            masked = self._secure.begin(shareable[tasks.PROTOCOL], number, state)
        if masked:
            return tasks.message(fields=self._said, protocol=masked)
        self._ready(fl_ctx, abort)
        fields, update = self._ask(
            "train",
            state,
            abort,
            round=number,
            attempt=shareable.get_header(tasks.ATTEMPT),
            known_head=shareable[tasks.FIELDS].get(tasks.HEADS, {}).get(site_name(fl_ctx)),
        )
        self.log_info(fl_ctx, f"round {number}: {fields['steps']} steps done")
        self._said = {tasks.PRIVACY: fields[tasks.PRIVACY]}
        if self._secure:
            masked = self._secure.mask(update, fields[tasks.WEIGHT], fields["metrics"])
            return tasks.message(fields=self._said, protocol=masked)
        return tasks.message(fields=self._said | {tasks.WEIGHT: fields[tasks.WEIGHT]}, vector=update)

    def _unmask(self, shareable: Shareable, fl_ctx: FLContext, abort: Signal) -> Shareable:
        return tasks.message(protocol=self._masks().unmask(_for_this_site(fl_ctx)))

    def _validate(self, shareable: Shareable, fl_ctx: FLContext, abort: Signal) -> Shareable:
        self._ready(fl_ctx, abort)
        before_training = shareable.get_header(tasks.ROUND) == 0
        fields = {"zero_shot": before_training}
        try:
            answer, _ = self._ask("validate", shareable[tasks.VECTOR], abort, **fields)
        except TrainerError as error:
            if not error.died:
                raise
            self._ready(fl_ctx, abort)  # costs no privacy, so a new trainer may do it again
            answer, _ = self._ask("validate", shareable[tasks.VECTOR], abort, **fields)
        return tasks.message(fields=answer)

    def _ledger(self, shareable: Shareable, fl_ctx: FLContext, abort: Signal) -> Shareable:
        policy, kit = site_config(fl_ctx).privacy, start_up_kit(fl_ctx)
        if policy is None or not policy.share_ledger:
            return tasks.refusal(tasks.SITE_REFUSED, "this site keeps its ledger to itself (privacy.share_ledger)")
        return tasks.ledger_message(*ledger_copy(policy, kit))

    def _masks(self) -> MaskedUpdates:
        if self._secure is None:
            raise SecAggError(Abort.CTX_MISMATCH, "this site has not joined the job, or the job has no masks")
        return self._secure

    @staticmethod
    def _protocol(step: Callable[[bytes], bytes], shareable: Shareable) -> Shareable:
        return tasks.message(protocol=step(shareable[tasks.PROTOCOL]))

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
        """The protocol refused; its sentences hold no secret, but those about files stay at the site."""
        self._note(task, error, fl_ctx)
        abort = b""
        try:
            abort = self._secure.abort(error) if self._secure else b""
        except SecAggError as again:
            self._note(task, again, fl_ctx)
        sentence = str(error) if error.code != Abort.STORAGE else f"its reason is in this site's {TRAINER_LOG}"
        return tasks.refusal(tasks.SITE_REFUSED, f"{error.code.name}: {sentence}", abort)

    def _failed(
        self, task: str, error: ConfigError | TrainerError | LayoutError, fl_ctx: FLContext, abort: Signal
    ) -> Shareable:
        if abort.triggered:
            return make_reply(ReturnCode.TASK_ABORTED)
        # The sentence stays in the site's own trainer log, as it may name pictures or paths, unless it was made to be
        # read by the submitter: refusals of the privacy policy are.
        self._note(task, error, fl_ctx)
        expected = not isinstance(error, TrainerError) or error.expected
        code = tasks.SITE_REFUSED if expected else tasks.SITE_FAILED
        if isinstance(error, TrainerError) and error.public:
            return tasks.refusal(code, str(error))
        return tasks.refusal(code, f"{task} was refused at the site; the reason is in its {TRAINER_LOG}")

    def _note(self, task: str, error: Exception, fl_ctx: FLContext) -> None:
        place = f"the reason is in this site's {TRAINER_LOG}"
        try:
            with (run_folder(fl_ctx) / TRAINER_LOG).open("a", encoding="utf-8") as log:
                log.write(f"{task}: {error}\n")
        except OSError as full:
            place = f"{TRAINER_LOG} cannot be written ({full.strerror}): `fedmpt site check` says where room is missing"
        self.log_error(fl_ctx, f"{task} refused or failed; {place}", fire_event=False)


def _step_of(shareable: Shareable) -> object:
    return shareable.get_header(tasks.ROUND), shareable.get_header(tasks.ATTEMPT)


def _content_of(shareable: Shareable, fl_ctx: FLContext) -> bytes:
    """Digest of all that a task asks for."""
    digest = hashlib.sha256(repr(sorted(shareable.get(tasks.FIELDS, {}).items())).encode())
    for part in (shareable.get(tasks.VECTOR, b""), shareable.get(tasks.PROTOCOL, b""), _for_this_site(fl_ctx)):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


def _for_this_site(fl_ctx: FLContext) -> bytes:
    peer = fl_ctx.get_peer_context()
    return peer.get_prop(tasks.FOR_YOU, b"") if peer else b""
