"""The site's half: answers FLARE's tasks by asking the trainer process.

This process must never die: FLARE ends the job for every site when one job process does. So torch lives in a child
(`trainer`), and every failure becomes a reply with a code that drops this site from the phase.
"""

from dataclasses import asdict
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedmpt_core.config import JobConfig
from fedmpt_core.config_file import ConfigError, job_from_dict
from fedmpt_flare import tasks
from fedmpt_flare.site import default_cache, run_folder, run_id, site_config, site_name, start_up_kit
from fedmpt_flare.trainer import Trainer, TrainerError

TRAINER_LOG = "trainer.log"


class FedMPTExecutor(Executor):
    """Serves `join`, `train` and `validate`.

    Args:
        job: the agreed job in plain values (`JobConfig.to_dict`); nothing in it names a path at the site.
    """

    _always_serialize_args = ("job",)

    def __init__(self, job: dict[str, Any]) -> None:
        """Keeps the argument and does nothing else: a job may build any class that the site allows."""
        super().__init__()
        self.job = job
        self._config: JobConfig | None = None
        self._trainer: Trainer | None = None
        self._prepared: tuple[dict[str, Any], bytes] | None = None
        self._run_id = ""
        self._last: tuple[tuple[object, ...], Shareable] | None = None

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
        request = (task_name, shareable.get_header(tasks.ROUND), shareable.get_header(tasks.ATTEMPT))
        if self._last and self._last[0] == request:
            return self._last[
                1
            ]  # FLARE sends a task again when it did not see the answer: same answer, no second training
        try:
            match task_name:
                case tasks.JOIN:
                    reply = self._join(shareable, fl_ctx, abort_signal)
                case tasks.TRAIN:
                    reply = self._train(shareable, fl_ctx, abort_signal)
                case tasks.VALIDATE:
                    reply = self._validate(shareable, fl_ctx, abort_signal)
                case _:
                    return tasks.refusal(
                        tasks.SITE_REFUSED, f"task '{task_name}' is not one of {', '.join(tasks.TASKS)}"
                    )
        except (ConfigError, TrainerError) as error:
            return self._failed(task_name, error, fl_ctx, abort_signal)
        except Exception as error:
            # The type only: texts of unforeseen errors can carry paths or values, and error logs travel to the
            # server.
            self.log_error(fl_ctx, f"{task_name} failed: {type(error).__name__}", fire_event=False)
            return tasks.refusal(
                tasks.SITE_FAILED, f"{task_name} failed with {type(error).__name__}; see the site's log"
            )
        self._last = request, reply
        return reply

    def _join(self, shareable: Shareable, fl_ctx: FLContext, abort: Signal) -> Shareable:
        self._config = job_from_dict({k: v for k, v in self.job.items() if k != "config_type"})
        asked, own = shareable.get_header(tasks.JOB_DIGEST), self._config.digest()
        if asked != own:
            raise ConfigError(
                f"the server's job digest {asked} is not this site's {own}: both must run the same release"
            )
        fields, initial = self._ready(fl_ctx, abort)
        return tasks.message(fields=fields, vector=initial)

    def _train(self, shareable: Shareable, fl_ctx: FLContext, abort: Signal) -> Shareable:
        self._ready(fl_ctx, abort)
        round_number = shareable.get_header(tasks.ROUND)
        fields, update = self._ask(
            "train",
            shareable[tasks.VECTOR],
            abort,
            round=round_number,
            attempt=shareable.get_header(tasks.ATTEMPT),
            known_head=shareable[tasks.FIELDS].get(tasks.HEADS, {}).get(site_name(fl_ctx)),
        )
        self.log_info(fl_ctx, f"round {round_number}: {fields['steps']} steps done")
        return tasks.message(
            fields={tasks.WEIGHT: fields[tasks.WEIGHT], tasks.PRIVACY: fields[tasks.PRIVACY]}, vector=update
        )

    def _validate(self, shareable: Shareable, fl_ctx: FLContext, abort: Signal) -> Shareable:
        self._ready(fl_ctx, abort)
        before_training = shareable.get_header(tasks.ROUND) == 0
        fields, _ = self._ask("validate", shareable[tasks.VECTOR], abort, zero_shot=before_training)
        return tasks.message(fields=fields)

    def _ready(self, fl_ctx: FLContext, abort: Signal) -> tuple[dict[str, Any], bytes]:
        """A trainer with data and model, started again when the last one died."""
        if self._trainer is None:
            raise TrainerError("the run has not started", expected=False)
        if not self._trainer.alive:
            self._trainer.start()
            self._prepared = None
        if self._prepared is None:
            if self._config is None:
                raise TrainerError("this site has not joined the job", expected=True)
            site, kit = site_config(fl_ctx), start_up_kit(fl_ctx)
            self._prepared = self._ask(
                "prepare",
                b"",
                abort,
                job=self._config.to_dict(),
                site={**asdict(site), "cache_dir": site.cache_dir or str(default_cache())},
                name=site_name(fl_ctx),
                run_id=self._run_id,
                kit=str(kit or ""),
            )
        return self._prepared

    def _ask(self, order: str, block: bytes, abort: Signal, **fields: Any) -> tuple[dict[str, Any], bytes]:
        if self._trainer is None:
            raise TrainerError("the run has not started", expected=False)
        return self._trainer.ask(order, block, abort=abort, **fields)

    def _failed(self, task: str, error: ConfigError | TrainerError, fl_ctx: FLContext, abort: Signal) -> Shareable:
        if abort.triggered:
            return make_reply(ReturnCode.TASK_ABORTED)
        # The sentence stays in the site's own trainer log, as it may name pictures or paths, unless it was made to be
        # read by the submitter: refusals of the privacy policy are.
        self.log_error(
            fl_ctx, f"{task} refused or failed; the reason is in this site's {TRAINER_LOG}", fire_event=False
        )
        run = run_folder(fl_ctx)
        with (run / TRAINER_LOG).open("a", encoding="utf-8") as log:
            log.write(f"{task}: {error}\n")
        expected = isinstance(error, ConfigError) or error.expected
        code = tasks.SITE_REFUSED if expected else tasks.SITE_FAILED
        if isinstance(error, TrainerError) and error.public:
            return tasks.refusal(code, str(error))
        return tasks.refusal(code, f"{task} was refused at the site; the reason is in its {TRAINER_LOG}")
