"""The executor's handle on its trainer process, whose death is an exception here and never the end of the job."""

import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from nvflare.apis.signal import Signal

from fedmpt_flare.site.frames import read_frame, write_frame

_POLL_SECONDS = 0.2


class TrainerError(Exception):
    """The trainer refused or failed.

    Attributes:
        expected: whether its sentence is meant for people.
        public: what whoever submitted the job may read of it: public numbers of the job alone; may be empty.
        died: whether the process is gone, so that starting it again may help.
    """

    def __init__(self, text: str, *, expected: bool, public: str = "", died: bool = False) -> None:
        super().__init__(text)
        self.expected, self.public, self.died = expected, public, died


def own_log(path: Path) -> Path:
    """The log, which names pictures and paths, for its owner alone, and its folder as far as that is the owner's.

    Raises:
        OSError: the file cannot be made, or belongs to somebody else.
    """
    with contextlib.suppress(PermissionError):  # a folder that a volume brings
        path.parent.chmod(0o700)
    path.touch(mode=0o600)
    path.chmod(0o600)
    return path


class Trainer:
    """A disposable child process. Started early, so that importing torch overlaps with FLARE's own start."""

    def __init__(self, log: Path) -> None:
        """Remembers where the child's standard error goes; starts nothing."""
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._replies: SimpleQueue[tuple[dict[str, Any], bytes] | None] = SimpleQueue()

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Process id of the child, for tests that kill it."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the child; it waits for orders. One that died before is cleared away first."""
        self.stop()
        with own_log(self._log).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fedmpt_flare.site.trainer_main"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._replies = SimpleQueue()
        threading.Thread(target=self._listen, args=(self._process, self._replies), daemon=True).start()

    def ask(
        self, order: str, block: bytes = b"", *, abort: Signal, timeout: float, **fields: Any
    ) -> tuple[dict[str, Any], bytes]:
        """Give an order and wait for the answer.

        Raises:
            TrainerError: it refused, failed or died; or the job was aborted or `timeout` seconds went by, and it was
                stopped.
        """
        if not self.alive or self._process is None or self._process.stdin is None:
            raise TrainerError("the trainer process is not running", expected=False, died=True)
        deadline = time.monotonic() + timeout
        try:
            write_frame(self._process.stdin, {"order": order, **fields}, block)
        except OSError:
            raise TrainerError(self._death(), expected=False, died=True) from None
        while True:
            if abort.triggered:
                self.stop()
                raise TrainerError("the job was aborted", expected=False)
            if time.monotonic() > deadline:
                self.stop()
                raise TrainerError(f"the trainer gave no answer to {order} in {timeout:g} s", expected=False)
            try:
                reply = self._replies.get(timeout=_POLL_SECONDS)
            except Empty:
                continue
            if reply is None:
                raise TrainerError(self._death(), expected=False, died=True)
            answer, data = reply
            if not answer.pop("ok"):
                raise TrainerError(answer["text"], expected=answer["expected"], public=answer["public"])
            return answer, data

    def stop(self) -> None:
        """End the child."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                with contextlib.suppress(OSError):  # what is still unsent has nobody to go to
                    stream.close()

    def _death(self) -> str:
        code = self._process.wait() if self._process else None
        return f"the trainer process ended with exit code {code}; see {self._log.name} at the site"

    @staticmethod
    def _listen(
        process: "subprocess.Popen[bytes]", replies: "SimpleQueue[tuple[dict[str, Any], bytes] | None]"
    ) -> None:
        try:
            while process.stdout:
                replies.put(read_frame(process.stdout))
        except (EOFError, ValueError, OSError):
            replies.put(None)
