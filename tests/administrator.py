"""What a person with a kit tells a federation's server: `python -m tests.administrator KIT USER ORDER [ARGUMENT ...]`.

Imports little, as it is started anew for every order.
"""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.fuel.flare_api.flare_api import new_secure_session

LONGEST = 300  # seconds for anything to happen; reached only when something hangs
POLL_SECONDS = 0.2


def _wait_for_sites(session: Any, count: int, since: float) -> None:
    """Until so many have shown a sign of life since then."""
    deadline = time.monotonic() + LONGEST
    while sum(site.last_connect_time > since for site in session.get_system_info().client_info) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{count} sites did not register")
        time.sleep(POLL_SECONDS)


def _ended(session: Any, job_id: str) -> dict[str, Any]:
    session.monitor_job(job_id, timeout=LONGEST, poll_interval=POLL_SECONDS)
    return session.get_job_meta(job_id)


def _result(session: Any, job_id: str) -> dict[str, Any]:
    meta, workspace = _ended(session, job_id), None
    with suppress(Exception):  # a job that never ran has nothing to download
        workspace = str(Path(session.download_job_result(job_id)) / "workspace")
    return {"meta": meta, "workspace": workspace}


def _line_of_detail(session: Any, job_id: str, beginning: str) -> str:
    """A line of what `nvflare job meta` shows as Deployment; some are there soon after the status is."""
    deadline = time.monotonic() + LONGEST
    while True:
        detail = _ended(session, job_id)["job_deploy_detail"]
        if lines := [line for line in detail if line.startswith(beginning)]:
            return lines[0]
        if time.monotonic() > deadline:
            raise TimeoutError(f"no line of {detail} begins with {beginning!r}")
        time.sleep(POLL_SECONDS)


def _administrate(kit: str, who: str, order: str, *arguments: str) -> None:
    session = new_secure_session(username=who, startup_kit_location=kit, timeout=LONGEST)
    try:
        match order:
            case "wait":
                _wait_for_sites(session, int(arguments[0]), float(arguments[1]))
            case "abort":
                session.abort_job(arguments[0])
            case "submit":
                print(json.dumps([session.submit_job(folder) for folder in arguments]))
            case "metas":
                print(json.dumps([_ended(session, job_id) for job_id in arguments], default=str))
            case "results":
                print(json.dumps([_result(session, job_id) for job_id in arguments], default=str))
            case "detail":
                print(json.dumps(_line_of_detail(session, *arguments)))
            case "job":
                print(json.dumps([_result(session, session.submit_job(arguments[0]))], default=str))
    finally:
        session.close()


if __name__ == "__main__":
    _administrate(*sys.argv[1:])
