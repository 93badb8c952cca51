"""What a site checks before an answer leaves, whatever the job says.

`EgressGuard` is the last result filter of every scope in `local/privacy.json`. It holds only while the site runs no
code of a job, as `budget_gate` does. It reads the site's own files anew for every answer, takes no argument, and fails
closed: what cannot be checked is held back.
"""

import hashlib
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply

from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SiteConfig, SitePrivacyConfig
from fedmpt_core.federation.figures import are_figures, is_number
from fedmpt_core.federation.site.admission import check_site, weight_of
from fedmpt_core.federation.site.latch_file import latch_path, read_latch
from fedmpt_core.model.vector import LayoutError, ParameterLayout
from fedmpt_core.privacy.accounting.epsilon import epsilon
from fedmpt_core.privacy.ledger.budget import JobRefused, PrivacyRefused, history
from fedmpt_core.privacy.ledger.chain import LedgerHead
from fedmpt_core.privacy.ledger.site_ledger import ledger_copy, read_site_ledger
from fedmpt_core.secagg.wire import kind_of
from fedmpt_flare import tasks
from fedmpt_flare.site.deployed_job import deployed_job, is_short_text
from fedmpt_flare.site.refusals import note_refusal
from fedmpt_flare.workspace import run_id, site_config, site_folder, start_up_kit

JOIN_KINDS = {"layout": str, "evaluates": bool, "backbone": str, "is_stand_in": bool, "backbone_digest": str}
JOIN_KINDS |= {"device": str, "versions": dict, "weight": int}
SAME_EPSILON = 1e-9  # the same accountant in another process
PROTOCOL_KINDS = {
    tasks.ADVERTISE: "ADV1",
    tasks.DEAL: "DEA1",
    tasks.CONFIRM: "CFM1",
    tasks.SHOW: "SHO1",
    tasks.TRAIN: "RDY1",
    tasks.MASK: "MSK1",
    tasks.OPEN: "OPN1",
}


class HeldBack(JobRefused):
    """The answer is none that the protocol names. The sentence holds nothing of it."""


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
            if shareable.get_return_code() != ReturnCode.OK:
                return _bare_refusal(shareable, fl_ctx)
            return _checked(task, shareable, _Rules.of(fl_ctx))
        except PrivacyRefused as refused:
            reason, own = refused.public, str(refused)
        except Exception as error:
            reason = own = f"it cannot be checked ({type(error).__name__})"
        known = task if type(task) is str and task in tasks.TASKS else "an unknown task"
        with suppress(Exception):  # FLARE's line about a context can fail by what is in it
            note_refusal(site_folder(fl_ctx), run_id(fl_ctx), f"the answer to {known}, held back", own)
            self.log_error(fl_ctx, f"the answer to {known} was held back: {own}", fire_event=False)
        return tasks.refusal(tasks.SITE_REFUSED, f"this site held back its answer to {known}: {reason}")


@dataclass(frozen=True)
class _Rules:
    """What an answer is held against: the deployed job, and the site's own files as they are now."""

    job: JobConfig
    site: SiteConfig
    policy: SitePrivacyConfig
    run_id: str
    kit: Path | None

    @staticmethod
    def of(fl_ctx: FLContext) -> "_Rules":
        # The deployed file is what the gate has seen; the running executor was built from it.
        job = deployed_job(Path(str(fl_ctx.get_prop(FLContextKey.APP_ROOT))))
        site, kit = site_config(fl_ctx), start_up_kit(fl_ctx)
        return _Rules(job, site, check_site(job, site, has_kit=kit is not None), run_id(fl_ctx), kit)


def _checked(task: Any, answer: Shareable, rules: _Rules) -> Shareable:
    """The answer, copied part by part. Raises HeldBack."""
    parts = _parts(task, answer, masked=rules.job.secagg.masked)
    fields, vector, protocol = parts[tasks.FIELDS], parts.get(tasks.VECTOR), parts.get(tasks.PROTOCOL)
    masked = _masked_release(task, protocol, rules) if protocol is not None else ""
    match task:
        case tasks.JOIN:
            _check_join(fields, vector, rules)
        case tasks.TRAIN:
            if vector is not None:
                _check_weight(fields, rules)
                _check_release(hashlib.sha256(vector).hexdigest(), rules)
            _check_budget(fields, rules)
        case tasks.VALIDATE:
            _check_figures(fields, rules)
        case tasks.LEDGER:
            _check_ledger(parts, rules)
            return tasks.ledger_message(parts[tasks.LEDGER_COPY], parts[tasks.CERTIFICATE])
        case _ if fields:
            raise HeldBack("it has fields beside its message")
        case tasks.MASK:
            _check_release(masked, rules)
    return tasks.message(fields=fields, vector=vector, protocol=protocol)


def _parts(task: Any, answer: Shareable, *, masked: bool) -> dict[str, Any]:
    """The answer's parts: a table of fields, and bytes. Raises HeldBack when they are others."""
    if set(answer.get(ReservedHeaderKey.HEADERS) or {}) - {ReservedHeaderKey.RC}:
        raise HeldBack("it has a header of its own")
    parts = {k: v for k, v in answer.items() if k != ReservedHeaderKey.HEADERS}
    if set(parts) != {tasks.FIELDS} | _carried(task, masked=masked):
        raise HeldBack("it has other parts than the protocol names")
    if any(type(part) is not (dict if name == tasks.FIELDS else bytes) for name, part in parts.items()):
        raise HeldBack("its parts are not of the kinds that the protocol names")
    return parts


def _carried(task: Any, *, masked: bool) -> set[str]:
    """What an answer must hold beside its fields. Raises HeldBack for a task that the job does not have."""
    if task in PROTOCOL_KINDS and masked:
        return {tasks.PROTOCOL}
    carried: dict[str, set[str]] = {tasks.JOIN: {tasks.VECTOR}, tasks.TRAIN: {tasks.VECTOR}, tasks.VALIDATE: set()}
    carried[tasks.LEDGER] = {tasks.LEDGER_COPY, tasks.CERTIFICATE}
    if task not in carried:
        raise HeldBack("the job has no such task")
    return carried[task]


def _masked_release(task: Any, message: bytes, rules: _Rules) -> str:
    """Digest of the update inside the newest masked vector, if `message` is one of the site's own making."""
    latch = read_latch(latch_path(rules.site, rules.run_id))
    if latch is None or not latch.has_said(message) or kind_of(message) != PROTOCOL_KINDS[task]:
        raise HeldBack("its message is not one that this site's record of the run names")
    return latch.release


def _bare_refusal(answer: Shareable, fl_ctx: FLContext) -> Shareable:
    """Our two codes with their sentence, or that the task was aborted; FLARE's others could end everybody's job."""
    code, reason, abort = answer.get_return_code(), answer.get_header(tasks.REASON), answer.get_header(tasks.ABORT)
    if code == ReturnCode.TASK_ABORTED:
        return make_reply(code)
    if code not in (tasks.SITE_REFUSED, tasks.SITE_FAILED):
        return tasks.refusal(tasks.SITE_FAILED, "the task failed at the site; its log says why")
    if not isinstance(reason, str) or reason != tasks.short(reason):
        reason = "the reason is in the site's log"
    return tasks.refusal(code, reason, _own_abort(abort, fl_ctx) if abort else b"")


def _own_abort(abort: Any, fl_ctx: FLContext) -> bytes:
    """The signed reason for leaving if it is one of the site's own making, else nothing."""
    try:
        latch = read_latch(latch_path(site_config(fl_ctx), run_id(fl_ctx)))
        own = type(abort) is bytes and latch is not None and latch.has_said(abort) and kind_of(abort) == "ABR1"
    except ValueError:
        own = False
    return abort if own else b""


def _check_join(fields: dict[str, Any], vector: Any, rules: _Rules) -> None:
    kinds = {name: type(value) for name, value in fields.items()}
    texts = [v for name, v in fields.items() if type(v) is str and name != "layout"]
    if kinds != JOIN_KINDS or not all(is_short_text(text) for text in (*texts, *fields["versions"])):
        raise HeldBack("its fields are not those of the protocol")
    if not all(is_short_text(version) for version in fields["versions"].values()):
        raise HeldBack("a version in it is no short text")
    if fields["evaluates"] and not rules.site.data.evaluate:
        raise HeldBack("it offers figures, which this site does not give (data.evaluate)")
    if fields["weight"] != weight_of(rules.job, rules.policy):
        raise HeldBack("its weight is not the declared one")
    try:
        ParameterLayout.from_json(fields["layout"]).decode(vector)
    except LayoutError:
        raise HeldBack("its vector is not of its layout") from None


def _check_weight(fields: dict[str, Any], rules: _Rules) -> None:
    """The weight of an unmasked update: the declared one."""
    weight = fields.get(tasks.WEIGHT)
    if not is_number(weight) or weight != weight_of(rules.job, rules.policy):
        raise HeldBack("its fields are not the declared weight and the state of the budget")


def _check_release(release: str, rules: _Rules) -> None:
    """That an update, or the one under a mask, is one that the site's ledger holds as released by this job."""
    if not rules.job.privacy.private:
        return
    entries = read_site_ledger(rules.policy, rules.kit)
    if not any(e.kind == "commit" and e.job == rules.run_id and e.release == release for e in entries):
        raise HeldBack("its vector is not a release of this job in the site's ledger")


def _check_budget(fields: dict[str, Any], rules: _Rules) -> None:
    job = rules.job
    names = {tasks.PRIVACY} if job.secagg.masked else {tasks.PRIVACY, tasks.WEIGHT}
    state = fields.get(tasks.PRIVACY)
    if set(fields) != names or not isinstance(state, dict):
        raise HeldBack("its fields are not the declared weight and the state of the budget")
    if not job.privacy.private:
        if state:
            raise HeldBack("its fields are not those of an update without a budget")
        return
    entries = read_site_ledger(rules.policy, rules.kit)
    spent = epsilon(history(entries, rules.run_id, *job.continued), job.privacy.delta)
    heads = [LedgerHead(e.seq, e.hash, e.sig).to_dict() for e in entries]
    honest = state.keys() == {"epsilon", "delta", "head"} and state["delta"] == job.privacy.delta
    if not honest or state["head"] not in heads or not math.isclose(state["epsilon"], spent, rel_tol=SAME_EPSILON):
        raise HeldBack("what it says of the budget is not what the site's ledger says")


def _check_figures(fields: dict[str, Any], rules: _Rules) -> None:
    if not rules.site.data.evaluate:
        raise HeldBack("this site gives no figures (data.evaluate)")
    if not rules.job.federation.evaluate_every:
        raise HeldBack("the job asks for no figures (federation.evaluate_every)")
    if set(fields) != {"figures"} or not are_figures(fields["figures"], rules.job):
        raise HeldBack("its fields are not the figures of an evaluation")


def _check_ledger(parts: Mapping[str, Any], rules: _Rules) -> None:
    if parts[tasks.FIELDS]:
        raise HeldBack("it has fields beside the ledger")
    if not rules.policy.share_ledger:
        raise HeldBack("this site keeps its ledger to itself (privacy.share_ledger)")
    ledger, certificate = ledger_copy(rules.policy, rules.kit)
    copy = parts[tasks.LEDGER_COPY]
    # other jobs may have appended meanwhile
    if not copy.endswith(b"\n") or not ledger.startswith(copy) or parts[tasks.CERTIFICATE] != certificate:
        raise HeldBack("it is not the site's ledger and certificate")
