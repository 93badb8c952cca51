"""What a site checks on FLARE's side, whatever a job says: before a job is deployed, and before an answer leaves.

`BudgetGate` runs in the site's parent process (`app_validator` in `local/resources.json`); its sentence reaches the
submitter of the job. `EgressGuard` is the last result filter of every scope in `local/privacy.json`. Both hold only
while the site runs no code of a job: `byoc: none` in `local/authorization.json` and `tasks.CLASS_ALLOW_LIST` as the
whole `class_allow_list`. The ledger itself is charged where the site trains (`fedmpt_core.privacy.ledger.budget`).

Both read the site's own files anew each time, take no argument, and fail closed: what cannot be checked is refused.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvflare.apis.app_validation import AppValidator
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLContextKey, JobConstants, ReturnCode, WorkspaceConstants
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.fuel.utils.log_utils import get_obj_logger
from nvflare.lighter.tool_consts import NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE

from fedmpt_core.common.release import RELEASE
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SiteConfig, SitePrivacyConfig
from fedmpt_core.config.toml import ConfigError, job_from_dict, load_site
from fedmpt_core.federation.site.admission import check_site
from fedmpt_core.federation.site.latch_file import latch_path, read_latch
from fedmpt_core.model.vector import LayoutError, ParameterLayout
from fedmpt_core.privacy.accounting.epsilon import AccountingError, Steps, epsilon
from fedmpt_core.privacy.ledger.budget import PrivacyRefused, history, project
from fedmpt_core.privacy.ledger.ledger import LedgerHead
from fedmpt_core.privacy.ledger.site_ledger import ledger_copy, read_site_ledger
from fedmpt_core.secagg.messages import kind_of
from fedmpt_flare import tasks
from fedmpt_flare.workspace import SITE_FILE, run_id, site_config, start_up_kit

EXECUTOR = tasks.CLASS_ALLOW_LIST[0]
CLIENT_CONFIG = Path("config", JobConstants.CLIENT_JOB_CONFIG)
SERVER_CONFIG = Path("config", JobConstants.SERVER_JOB_CONFIG)
SIGNATURES = (NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE)
# FLARE resolves names in braces from the other keys of the file, so no other key may be there.
CONFIG_KEYS = {"format_version", "executors", "default_task_fetch_interval"}
EMPTY_KEYS = {"components", "task_data_filters", "task_result_filters"}
JOIN_KINDS = {"layout": str, "evaluates": bool, "backbone": str, "is_stand_in": bool, "backbone_digest": str}
JOIN_KINDS |= {"device": str, "versions": dict}
FIGURES = ("mAP", "CF1", "CF1_macro", "OF1", "threshold", "threshold_from_val", "ece")
FIGURES += ("classes_without_positives", "gate_entropy")
MAX_TEXT = 256  # chosen: characters of a name, a version, a device
MAX_REASON = 2000  # chosen: characters of a refusal
SAME_EPSILON = 1e-9  # the same accountant in another process
PROTOCOL_KINDS = {
    tasks.ADVERTISE: "ADV1",
    tasks.CONFIRM: "CFM1",
    tasks.TRAIN: "MSK1",
    tasks.CONSISTENCY: "CNS1",
    tasks.UNMASK: "UNM1",
}


class BudgetGate(AppValidator):
    """Lets a job be deployed only when the site's policy and what is left of its budget allow all of it."""

    def __init__(self) -> None:
        """Loads the accountant now: that takes seconds, and a server waits only ten for a site to accept a job."""
        super().__init__()
        epsilon([Steps(0.5, 1.0, 1)], 1e-5)

    def validate(self, app_folder: str) -> tuple[str, dict[str, Any]]:
        """Check a deployed app; never raises.

        Args:
            app_folder: `<workspace>/<job id>/app_<site>`, as FLARE's deployer makes it.

        Returns:
            A sentence for the submitter of the job, "" when the job may run here; and no properties.
        """
        try:
            self._check(Path(app_folder).resolve())
        except (PrivacyRefused, AccountingError) as refused:
            return str(refused), {}
        except Exception as error:
            get_obj_logger(self).error(f"the job cannot be checked: {error}")  # stays at the site, may name its paths
            return f"this site cannot check the job against its privacy policy ({type(error).__name__})", {}
        return "", {}

    def _check(self, app: Path) -> None:
        job = deployed_job(app)
        workspace, site_name = app.parents[1], app.name.removeprefix(WorkspaceConstants.APP_PREFIX)
        kit = workspace / WorkspaceConstants.STARTUP_FOLDER_NAME
        site = load_site(workspace / WorkspaceConstants.SITE_FOLDER_NAME / SITE_FILE, site_name)
        has_kit = (kit / "client.key").exists()
        policy = check_site(job, site, has_kit=has_kit)
        if job.privacy.private:
            entries = read_site_ledger(policy, kit if has_kit else None)
            project(job, policy, entries, app.parent.name)


class EgressGuard(Filter):
    """Lets an answer leave the site only when every part of it is one that the protocol names.

    In a masked job an update leaves only inside a message that the site's own record of the run names. Under
    differential privacy the update in it must be one that the site's ledger holds as released by this job. Which round
    it was does not matter: whoever has seen it once learns nothing when it comes again.
    """

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The answer, copied part by part; or a refusal. Never raises, as FLARE would end the job for every site."""
        task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
        try:
            return _checked(task, shareable, fl_ctx)
        except PrivacyRefused as refused:
            reason = str(refused)
        except Exception as error:
            reason = f"it cannot be checked ({type(error).__name__})"
        shown = task if task in tasks.TASKS else "an unknown task"
        self.log_error(fl_ctx, f"the answer to {shown} was held back: {reason}", fire_event=False)
        return tasks.refusal(tasks.SITE_REFUSED, f"this site held back its answer to {shown}: {reason}")


def deployed_job(app: Path) -> JobConfig:
    """The job of a deployed app that holds our executor's configuration and nothing else.

    Raises:
        PrivacyRefused: it holds more, or what it holds is no job; a sentence for its submitter.
    """
    known = {CLIENT_CONFIG, SERVER_CONFIG}
    files = {p.relative_to(app) for p in app.rglob("*") if not p.is_dir() or p.is_symlink()}
    if any(p not in known and p.name not in SIGNATURES for p in files):
        raise PrivacyRefused("the job carries files beside its two configurations: export it again with this release")
    try:
        config = json.loads((app / CLIENT_CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        raise PrivacyRefused(f"the job's {CLIENT_CONFIG} is not JSON: export it again with this release") from None
    if any(config.get(key) for key in EMPTY_KEYS) or set(config) - CONFIG_KEYS - EMPTY_KEYS:
        raise PrivacyRefused("the job configures more than an executor: no component, filter or variable is run here")
    executors = config.get("executors")
    wanted = {"tasks": list(tasks.TASKS), "executor": {"path": EXECUTOR, "args": {"job": None, "release": None}}}
    if not isinstance(executors, list) or len(executors) != 1 or _outline(executors[0]) != wanted:
        raise PrivacyRefused(f"the job must have one executor, {EXECUTOR}, for the tasks {', '.join(tasks.TASKS)}")
    arguments = executors[0]["executor"]["args"]
    if arguments["release"] != RELEASE:
        shown = arguments["release"] if _short(arguments["release"]) else "another release"
        raise PrivacyRefused(
            f"the job was exported with fedmpt {shown}, this site runs {RELEASE}: all must run the same release"
        )
    return _job(arguments["job"])


def _outline(executor: Any) -> Any:
    """All of an executor's definition but the values of its arguments."""
    try:
        inner = executor["executor"]
        return {**executor, "executor": {**inner, "args": dict.fromkeys(dict(inner["args"]))}}
    except (TypeError, KeyError, ValueError):
        return None


def _job(values: Any) -> JobConfig:
    try:
        return job_from_dict({k: v for k, v in dict(values).items() if k != "config_type"})
    except (ConfigError, TypeError, ValueError) as error:
        raise PrivacyRefused(f"the job's configuration is refused: {error}") from None


def _checked(task: Any, answer: Shareable, fl_ctx: FLContext) -> Shareable:
    code = answer.get_return_code()
    if code != ReturnCode.OK:
        return _bare_refusal(code, answer.get_header(tasks.REASON), answer.get_header(tasks.ABORT), fl_ctx)
    if set(answer.get(ReservedHeaderKey.HEADERS) or {}) - {ReservedHeaderKey.RC}:
        raise PrivacyRefused("it has a header of its own")
    parts = {k: v for k, v in answer.items() if k != ReservedHeaderKey.HEADERS}
    # The deployed file is what the gate has seen; the running executor was built from it.
    job = deployed_job(Path(str(fl_ctx.get_prop(FLContextKey.APP_ROOT))))
    if set(parts) != {tasks.FIELDS} | _carried(task, masked=job.secagg.masked):
        raise PrivacyRefused("it has other parts than the protocol names")
    fields, vector, said = parts[tasks.FIELDS], parts.get(tasks.VECTOR), parts.get(tasks.PROTOCOL)
    if type(fields) is not dict or any(type(v) is not bytes for k, v in parts.items() if k != tasks.FIELDS):
        raise PrivacyRefused("its parts are not of the kinds that the protocol names")
    site = site_config(fl_ctx)
    policy = check_site(job, site, has_kit=start_up_kit(fl_ctx) is not None)
    release = _said_release(task, said, site, fl_ctx) if type(said) is bytes else None
    match task:
        case tasks.JOIN:
            _check_join(fields, vector, site)
        case tasks.TRAIN:
            if release is None and type(vector) is bytes:
                release = hashlib.sha256(vector).hexdigest()
                _check_weight(fields, job, policy)
            _check_update(fields, str(release), job, policy, fl_ctx)
        case tasks.VALIDATE:
            _check_figures(fields, job, site)
        case tasks.LEDGER:
            _check_ledger(parts, policy, fl_ctx)
            return tasks.ledger_message(parts[tasks.LEDGER_COPY], parts[tasks.CERTIFICATE])
        case _ if fields:
            raise PrivacyRefused("it has fields beside its message")
    return tasks.message(fields=fields, vector=vector, protocol=said)


def _carried(task: Any, *, masked: bool) -> set[str]:
    """What an answer must hold beside its fields. Raises PrivacyRefused for a task that the job does not have."""
    if task in PROTOCOL_KINDS and masked:
        return {tasks.PROTOCOL}
    carried: dict[str, set[str]] = {tasks.JOIN: {tasks.VECTOR}, tasks.TRAIN: {tasks.VECTOR}, tasks.VALIDATE: set()}
    carried[tasks.LEDGER] = {tasks.LEDGER_COPY, tasks.CERTIFICATE}
    if task not in carried:
        raise PrivacyRefused("the job has no such task")
    return carried[task]


def _said_release(task: Any, said: bytes, site: SiteConfig, fl_ctx: FLContext) -> str:
    """Digest of the update inside the newest masked vector, if `said` is a message of the site's own making."""
    latch = read_latch(latch_path(site, run_id(fl_ctx)))
    if latch is None or not latch.has_said(said) or kind_of(said) != PROTOCOL_KINDS[task]:
        raise PrivacyRefused("its message is not one that this site's record of the run names")
    return latch.release


def _bare_refusal(code: str | None, reason: Any, abort: Any, fl_ctx: FLContext) -> Shareable:
    """Our two codes with their sentence, or that the task was aborted; FLARE's others could end everybody's job."""
    if code == ReturnCode.TASK_ABORTED:
        return make_reply(code)
    if code not in (tasks.SITE_REFUSED, tasks.SITE_FAILED):
        return tasks.refusal(tasks.SITE_FAILED, "the task failed at the site; its log says why")
    readable = isinstance(reason, str) and len(reason) <= MAX_REASON
    return tasks.refusal(
        code, reason if readable else "the reason is in the site's log", _own_abort(abort, fl_ctx) if abort else b""
    )


def _own_abort(abort: Any, fl_ctx: FLContext) -> bytes:
    """The signed reason for leaving if it is one of the site's own making, else nothing."""
    try:
        latch = read_latch(latch_path(site_config(fl_ctx), run_id(fl_ctx)))
        own = type(abort) is bytes and latch is not None and latch.has_said(abort) and kind_of(abort) == "ABR1"
    except ValueError:
        own = False
    return abort if own else b""


def _check_join(fields: dict[str, Any], vector: Any, site: SiteConfig) -> None:
    kinds = {name: type(value) for name, value in fields.items()}
    texts = [v for name, v in fields.items() if type(v) is str and name != "layout"]
    if kinds != JOIN_KINDS or not all(_short(text) for text in (*texts, *fields["versions"])):
        raise PrivacyRefused("its fields are not those of the protocol")
    if not all(_short(version) for version in fields["versions"].values()):
        raise PrivacyRefused("a version in it is no short text")
    if fields["evaluates"] and not site.data.evaluate:
        raise PrivacyRefused("it offers figures, which this site does not give (data.evaluate)")
    try:
        ParameterLayout.from_json(fields["layout"]).decode(vector)
    except LayoutError:
        raise PrivacyRefused("its vector is not of its layout") from None


def _check_weight(fields: dict[str, Any], job: JobConfig, policy: SitePrivacyConfig) -> None:
    """The weight of an unmasked update; under differential privacy it must be the declared one."""
    weight = fields.get(tasks.WEIGHT)
    declared = 1.0 if job.federation.weighting == "equal" else float(policy.units)
    if not _number(weight) or (job.privacy.private and weight != declared):
        raise PrivacyRefused("its fields are not the declared weight and the state of the budget")


def _check_update(
    fields: dict[str, Any], release: str, job: JobConfig, policy: SitePrivacyConfig, fl_ctx: FLContext
) -> None:
    names = {tasks.PRIVACY} if job.secagg.masked else {tasks.PRIVACY, tasks.WEIGHT}
    said = fields.get(tasks.PRIVACY)
    if set(fields) != names or not isinstance(said, dict):
        raise PrivacyRefused("its fields are not the declared weight and the state of the budget")
    if not job.privacy.private:
        if said:
            raise PrivacyRefused("its fields are not those of an update without a budget")
        return
    entries, job_id = read_site_ledger(policy, start_up_kit(fl_ctx)), run_id(fl_ctx)
    if not any(e.kind == "commit" and e.job == job_id and e.release == release for e in entries):
        raise PrivacyRefused("its vector is not a release of this job in the site's ledger")
    own = (job_id, job.resume.job) if job.resume else (job_id,)
    spent = epsilon(history(entries, *own), job.privacy.delta)
    heads = [LedgerHead(e.seq, e.hash, e.sig).to_dict() for e in entries]
    honest = said.keys() == {"epsilon", "delta", "head"} and said["delta"] == job.privacy.delta
    if not honest or said["head"] not in heads or not math.isclose(said["epsilon"], spent, rel_tol=SAME_EPSILON):
        raise PrivacyRefused("what it says of the budget is not what the site's ledger says")


def _check_figures(fields: dict[str, Any], job: JobConfig, site: SiteConfig) -> None:
    if not site.data.evaluate:
        raise PrivacyRefused("this site gives no figures (data.evaluate)")
    if not job.federation.evaluate_every:
        raise PrivacyRefused("the job asks for no figures (federation.evaluate_every)")
    if set(fields) != {"figures"} or not _are_figures(fields["figures"], asdict(job), nested=True):
        raise PrivacyRefused("its fields are not the figures of an evaluation")


def _check_ledger(parts: Mapping[str, Any], policy: SitePrivacyConfig, fl_ctx: FLContext) -> None:
    if parts[tasks.FIELDS]:
        raise PrivacyRefused("it has fields beside the ledger")
    if not policy.share_ledger:
        raise PrivacyRefused("this site keeps its ledger to itself (privacy.share_ledger)")
    ledger, certificate = ledger_copy(policy, start_up_kit(fl_ctx))
    copy = parts[tasks.LEDGER_COPY]
    # other jobs may have appended meanwhile
    if not copy.endswith(b"\n") or not ledger.startswith(copy) or parts[tasks.CERTIFICATE] != certificate:
        raise PrivacyRefused("it is not the site's ledger and certificate")


def _are_figures(figures: Any, job: Mapping[str, Any], *, nested: bool) -> bool:
    if type(figures) is not dict:
        return False
    labels, conditions = len(job["classes"]), len(job["model"]["conditions"])
    longest = {"AP": labels, "share": labels, "gate": conditions}
    for name, value in figures.items():
        if name == "zero_shot" and nested:
            fine = _are_figures(value, job, nested=False)
        elif name in longest:
            fine = type(value) is list and len(value) <= longest[name] and all(_number(v) for v in value)
        else:
            fine = name in FIGURES and _number(value)
        if not fine:
            return False
    return True


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _short(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()
