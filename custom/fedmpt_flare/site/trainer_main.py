"""The trainer process: torch, the towers and the GPU live here, away from FLARE's job process.

Reads orders from standard input and writes replies to what was standard output (which is then pointed at standard
error, so that no library's print can spoil a frame). Ends when the executor closes its side, however that came about.
"""

import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import IO, Any

from fedmpt_core.common.dumps import forbid_dumps
from fedmpt_flare.site.frames import read_frame, write_frame


def main() -> None:
    """Serve orders until the executor goes away."""
    forbid_dumps()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    orders: queue.SimpleQueue[tuple[dict[str, Any], bytes]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, orders), daemon=True).start()
    worker: _Worker | None = None
    while True:
        fields, block = orders.get()
        try:
            worker = worker or _Worker(replies)
            answer, data = worker.answer(fields, block)
            write_frame(replies, {"ok": True, **answer}, data)
        except BrokenPipeError:
            return
        except Exception as error:
            traceback.print_exc()
            write_frame(replies, {"ok": False, **_audience(error), "text": str(error)})


def _audience(error: Exception) -> dict[str, bool | str]:
    """Whether the sentence is meant for people, and what the submitter of the job may read instead of it."""
    if not isinstance(error, ValueError | FloatingPointError):
        return {"expected": False, "public": ""}
    from fedmpt_core.privacy.accounting.epsilon import AccountingError
    from fedmpt_core.privacy.ledger.budget import PrivacyRefused
    from fedmpt_core.privacy.mechanism.self_test import SelfTestFailed

    public = ""
    if isinstance(error, PrivacyRefused):
        public = error.public
    elif isinstance(error, SelfTestFailed):
        public = "the self-test of this site's privacy mechanism failed; the reason is in its trainer.log"
    elif isinstance(error, AccountingError):
        public = "this site's accountants cannot price the job; the reason is in its trainer.log"
    return {"expected": True, "public": public}


def _listen(stream: IO[bytes], orders: "queue.SimpleQueue[tuple[dict[str, Any], bytes]]") -> None:
    # A killed executor cannot stop its child, so the child watches its own input, also in the middle of a round.
    try:
        while True:
            orders.put(read_frame(stream))
    except (EOFError, ValueError):
        os._exit(0)


class _Worker:
    """One session, built by the first order."""

    def __init__(self, replies: IO[bytes]) -> None:
        # Imported here so that a broken torch installation is reported as a reply, not as a dead pipe.
        from fedmpt_core.config.toml import job_from_dict, site_from_dict
        from fedmpt_core.federation.site import session

        self._module, self._job_from_dict, self._site_from_dict = session, job_from_dict, site_from_dict
        self._session: Any = None
        self._prepared: Any = None

    def answer(self, order: dict[str, Any], block: bytes) -> tuple[dict[str, Any], bytes]:
        match order["order"]:
            case "prepare":
                return self._prepare(order)
            case "train":
                state = self._prepared.layout.decode(block)
                update = self._session.train(state, order["round"], order["attempt"], known_head=order["known_head"])
                fields = {"steps": update.steps, "weight": self._session.weight(), "privacy": update.privacy}
                return {**fields, "metrics": update.metrics}, update.block
            case "validate":
                state = self._prepared.layout.decode(block)
                return {"figures": self._session.evaluate(state, zero_shot=order["zero_shot"])}, b""
            case other:
                raise ValueError(f"order={other!r} is unknown to this trainer")

    def _prepare(self, order: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        job, site = self._job_from_dict(order["job"]), self._site_from_dict(order["site"])
        kit = Path(order["kit"]) if order["kit"] else None
        self._session = self._module.SiteSession(job, site, order["name"], run_id=order["run_id"], kit=kit)
        self._prepared = ready = self._session.prepare()
        return ready.fields(), ready.layout.encode(ready.initial)


if __name__ == "__main__":
    main()
