"""One phase after another: a task goes to some sites, and each answers, refuses, errs or lets the time pass."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedmpt_core.federation.run.record import ABORTED
from fedmpt_core.federation.server.rounds import RoundFailed
from fedmpt_flare import tasks
from fedmpt_flare.server.run_folder import RunFolder

Take = Callable[[str, Shareable], None]
"""What is done with a site's OK answer; an error of its kinds for bad values drops the site from the phase."""

# what reading a message raises that holds something else than it should
_UNUSABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Phase:
    """A task for some sites.

    Attributes:
        task: its name.
        data: its content.
        sites: who gets it.
        timeout: seconds to wait for answers.
        private: by site, a message that only this site gets.
    """

    task: str
    data: Shareable
    sites: list[str]
    timeout: int
    private: Mapping[str, bytes] = field(default_factory=dict)


class Phases:
    """Carries phases over FLARE's tasks and notes who answered.

    Attributes:
        silent: who did not answer the last task that it was given.
    """

    def __init__(self, controller: Controller, folder: RunFolder, context: FLContext, abort: Signal) -> None:
        """Sends nothing.

        Args:
            controller: the job's.
            folder: takes the events.
            context: of the job.
            abort: whether somebody has ended the job.
        """
        self._controller, self._folder, self._context, self._abort = controller, folder, context, abort
        self.silent: set[str] = set()

    @property
    def stopped(self) -> bool:
        """Whether somebody has ended the job."""
        return bool(self._abort.triggered)

    def leave_out(self, site: str, reason: str) -> None:
        """Say in log and events that nothing goes on with a site in this run."""
        self._controller.log_warning(self._context, f"{site} is left out: {reason}")
        self._folder.event("left_out", sites=[site], reason=reason)

    def run(self, phase: Phase, take: Take, refused: Callable[[str, Shareable], str] | None = None) -> list[str]:
        """Send a task to all its sites and wait for each, or the timeout.

        Args:
            phase: the task.
            take: called with every OK answer, one at a time.
            refused: called with every other answer; what it returns is added to the reason.

        Returns:
            Names of the sites whose answer was taken, sorted.

        Raises:
            RoundFailed: the job was aborted.
        """
        taken: set[str] = set()
        self.silent |= set(phase.sites)
        lock = threading.Lock()
        self._folder.event("phase", phase=phase.task, sites=phase.sites)

        # FLARE passes both by keyword, and an exception in here would end the phase.
        def received(client_task: ClientTask, fl_ctx: FLContext) -> None:
            site, answer = client_task.client.name, client_task.result
            if answer is not None:
                self.silent.discard(site)
            client_task.result = None  # an update is kept nowhere
            reason = refusal_of(answer)
            if answer is not None and reason:
                reason += refused(site, answer) if refused else ""
            elif answer is not None:
                try:
                    with lock:
                        take(site, answer)
                        taken.add(site)
                except _UNUSABLE as error:
                    reason = f"its answer is not used: {error}"
            if reason:
                self._controller.log_warning(fl_ctx, f"{phase.task}: {site}: {reason}")
                self._folder.event("dropped", site=site, phase=phase.task, reason=reason)
            else:
                self._folder.event("answered", site=site, phase=phase.task)

        # A broadcast has one content for all; what one site alone may read travels beside it.
        def before_sent(client_task: ClientTask, fl_ctx: FLContext) -> None:
            own = phase.private.get(client_task.client.name, b"")
            fl_ctx.set_prop(tasks.FOR_YOU, own, private=False, sticky=False)

        task = Task(
            phase.task,
            phase.data,
            timeout=phase.timeout,
            before_task_sent_cb=before_sent if phase.private else None,
            result_received_cb=received,
        )
        # min_responses=0 waits for every site; error answers count as responses, so the OK ones are counted here
        self._controller.broadcast_and_wait(
            task, self._context, targets=list(phase.sites), min_responses=0, abort_signal=self._abort
        )
        if self.stopped:
            raise RoundFailed(ABORTED)
        for site in sorted(set(phase.sites) - taken):
            self._controller.log_warning(self._context, f"{phase.task}: no usable answer from {site}")
        return sorted(taken)


def refusal_of(answer: Shareable | None) -> str:
    """Why an answer is none, in one short line whatever the site wrote; '' for an OK one."""
    if answer is None:
        return "it answered nothing"
    code = answer.get_return_code()
    return "" if code == ReturnCode.OK else tasks.short(str(answer.get_header(tasks.REASON, code)))
