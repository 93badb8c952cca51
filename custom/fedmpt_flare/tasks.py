"""The whole vocabulary between server and sites: task names, message keys, reply codes, classes a site must allow.

Every task and reply is a `Shareable` with a few plain headers and at most one vector of bytes (`fedmpt_core.layout`).
"""

from collections.abc import Mapping
from typing import Any

from nvflare.apis.shareable import Shareable, make_reply

JOIN = "join"
TRAIN = "train"
VALIDATE = "validate"
TASKS = (JOIN, TRAIN, VALIDATE)

# Sites and server must list these two, and need list nothing else, to run our jobs.
CLASS_ALLOW_LIST = ("fedmpt_flare.executor.FedMPTExecutor", "fedmpt_flare.workflow.FedMPTWorkflow")

# headers and keys
ROUND = "fedmpt_round"
ATTEMPT = "fedmpt_attempt"
JOB_DIGEST = "fedmpt_job_digest"
VECTOR = "vector"
FIELDS = "fields"

# fields
WEIGHT = "weight"
PRIVACY = "privacy"  # of a `train` reply: epsilon and delta of the job so far, head of the site's ledger
HEADS = "heads"  # of a `train` task: by site, the head that the server saw last

# A reply code outside FLARE's own set drops this site from the phase and leaves the job running (FLARE aborts the
# whole job on UNSAFE_JOB, TASK_UNKNOWN and RUN_MISMATCH only).
SITE_REFUSED = "FEDMPT_SITE_REFUSED"
SITE_FAILED = "FEDMPT_SITE_FAILED"
REASON = "fedmpt_reason"


def message(
    fields: Mapping[str, Any] | None = None, vector: bytes | None = None, headers: Mapping[str, Any] | None = None
) -> Shareable:
    """A task or an OK reply."""
    shareable = Shareable()
    shareable[FIELDS] = dict(fields or {})
    if vector is not None:
        shareable[VECTOR] = vector
    for key, value in (headers or {}).items():
        shareable.set_header(key, value)
    return shareable


def refusal(code: str, reason: str) -> Shareable:
    """A reply that drops this site from the phase; `reason` is shown to whoever submitted the job."""
    return make_reply(code, headers={REASON: reason})
