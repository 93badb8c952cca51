"""What a site refused and why, in full, for its custodian alone: one line each in a file of the site's own folder.

What travels to the server is the public sentence; this one may name pictures, paths and what is spent.
"""

import time
from contextlib import suppress
from pathlib import Path

from fedmpt_core.common.files import append, locked
from fedmpt_core.common.text import shown

REFUSALS = "refusals.log"
MOST_BYTES = 1 << 20  # chosen: then the file becomes refusals.log.1, and the one before goes
MOST_TEXT = 4000  # chosen: characters of a sentence
WAIT_SECONDS = 2.0


def note_refusal(workspace: Path, job_id: str, what: str, sentence: object) -> None:
    """Add a line; where it cannot be written, the job's own log at the site still has it.

    Args:
        workspace: the site's folder, beside `startup` and `local`.
        job_id: FLARE's name of the job.
        what: was asked.
        sentence: why not.
    """
    path = workspace / REFUSALS
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = f"{now} {shown(job_id)} {shown(what)}: {shown(sentence, MOST_TEXT)}\n"
    with suppress(OSError):
        path.touch(mode=0o600)
        path.chmod(0o600)
        with locked(path, write=True, timeout=WAIT_SECONDS) as file:
            full = path.stat().st_size > MOST_BYTES
            if full:
                path.replace(path.with_name(f"{REFUSALS}.1"))
            else:
                append(file, line.encode())
        if full:
            note_refusal(workspace, job_id, what, sentence)
