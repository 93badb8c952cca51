"""The whole vocabulary between server and sites: task names, message keys, reply codes, classes a site must allow.

Every task and reply is a `Shareable` with a few plain headers, a few plain fields, at most one vector of bytes
(`fedmpt_core.model.vector`) and at most one message of the secure-aggregation protocol (`fedmpt_core.secagg.messages`);
the reply to `ledger` holds a copy of the site's ledger and its certificate instead.
"""

from collections.abc import Mapping
from typing import Any

from nvflare.apis.shareable import Shareable, make_reply

JOIN = "join"
ADVERTISE = "secagg_advertise"
DEAL = "secagg_deal"
CONFIRM = "secagg_confirm"
SHOW = "secagg_show"
TRAIN = "train"
MASK = "secagg_mask"
OPEN = "secagg_open"
VALIDATE = "validate"
LEDGER = "ledger"
TASKS = (JOIN, ADVERTISE, DEAL, CONFIRM, SHOW, TRAIN, MASK, OPEN, VALIDATE, LEDGER)

# Sites and server must list these two, and need list nothing else, to run our jobs.
CLASS_ALLOW_LIST = ("fedmpt_flare.site.executor.FedMPTExecutor", "fedmpt_flare.server.workflow.FedMPTWorkflow")
# A server lists these too where it lets jobs track their figures.
TRACKING_CLASSES = (
    "nvflare.app_opt.tracking.tb.tb_receiver.TBAnalyticsReceiver",
    "fedmpt_flare.server.mlflow_receiver.MlflowReceiver",
)

# headers and keys
ROUND = "fedmpt_round"
ATTEMPT = "fedmpt_attempt"
JOB_DIGEST = "fedmpt_job_digest"
VECTOR = "vector"
FIELDS = "fields"
PROTOCOL = "protocol"
LEDGER_COPY = "ledger_copy"  # of a `ledger` reply: the file, and the certificate whose key signed it
CERTIFICATE = "certificate"
FOR_YOU = "fedmpt_for_you"  # context property with a protocol message for one site; FLARE broadcasts one task to all

# fields
WEIGHT = "weight"
PRIVACY = "privacy"  # of a `train` reply: epsilon and delta of the job so far, head of the site's ledger
HEADS = "heads"  # of a `train` task: by site, the head that the server saw last

# Topic of the ledger that a site hands over unasked when its job is aborted: FLARE ends the sites' tasks first.
LEDGER_TOPIC = "fedmpt.ledger"

# Topic of what an administrator asks of a site outside all jobs (`privacy_budget`).
BUDGET_TOPIC = "fedmpt.privacy_budget"

# A reply code outside FLARE's own set drops this site from the phase and leaves the job running (FLARE aborts the
# whole job on UNSAFE_JOB, TASK_UNKNOWN and RUN_MISMATCH only).
SITE_REFUSED = "FEDMPT_SITE_REFUSED"
SITE_FAILED = "FEDMPT_SITE_FAILED"
REASON = "fedmpt_reason"
ABORT = "fedmpt_abort"  # signed message of the protocol that says why a site left
MAX_REASON = 500  # chosen: characters of a refusal


def message(
    fields: Mapping[str, Any] | None = None,
    vector: bytes | None = None,
    headers: Mapping[str, Any] | None = None,
    protocol: bytes | None = None,
) -> Shareable:
    """A task or an OK reply."""
    shareable = Shareable()
    shareable[FIELDS] = dict(fields or {})
    if vector is not None:
        shareable[VECTOR] = vector
    if protocol is not None:
        shareable[PROTOCOL] = protocol
    for key, value in (headers or {}).items():
        shareable.set_header(key, value)
    return shareable


def ledger_message(ledger: bytes, certificate: bytes) -> Shareable:
    """The OK reply to `ledger`."""
    shareable = message()
    shareable[LEDGER_COPY], shareable[CERTIFICATE] = ledger, certificate
    return shareable


def short(text: str) -> str:
    """A text as it may stand in a refusal: one line of printable characters, at most `MAX_REASON`."""
    return "".join(c if c.isprintable() else " " for c in text[:MAX_REASON])


def refusal(code: str, reason: str, abort: bytes = b"") -> Shareable:
    """A reply that drops this site from the phase; `reason` is shown to whoever submitted the job."""
    return make_reply(code, headers={REASON: short(reason)} | ({ABORT: abort} if abort else {}))
