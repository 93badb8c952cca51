"""The guard without FLARE's processes: what an honest job needs leaves, and every single change is held back."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply

from fedmpt_core.federation.site.latch_file import latch_path
from fedmpt_core.privacy.ledger.budget import Budget
from fedmpt_core.privacy.ledger.site_ledger import ledger_copy, open_ledger
from fedmpt_flare import tasks
from tests.guarded_site import ABORT, BROKEN, JOB, JOB_ID, LAYOUT, MASKED_JOB, MESSAGES, SITE, SPENT, UPDATE, Site
from tests.settings import UNPROTECTED

# ---- the answers that pass -----------------------------------------------------------------------------------------


def train_answer(site: Site, **released: Any) -> Shareable:
    return tasks.message(fields={"weight": 1.0, "privacy": site.release(**released)}, vector=UPDATE)


def join_answer() -> Shareable:
    fields = {"layout": LAYOUT.to_json(), "evaluates": False, "backbone": "stand-in", "is_stand_in": True}
    fields |= {"backbone_digest": "ab" * 32, "device": "cpu (x86_64, 1 threads)", "versions": {"torch": "2.9"}}
    fields |= {"weight": 1}
    return tasks.message(fields=fields, vector=UPDATE)


def figures_answer() -> Shareable:
    figures = {"mAP": 51.5, "AP": [50.0, -1.0, 53.0], "gate": [0.5, 0.5], "gate_entropy": 0.69}
    return tasks.message(fields={"figures": {**figures, "zero_shot": figures}})


def test_a_committed_update_leaves_as_it_is_in_a_message_of_its_own(site: Site) -> None:
    answer = train_answer(site)
    passed = site.guard("train", answer)
    assert passed == answer
    assert passed is not answer  # FLARE writes headers into what it is handed, and the executor keeps its answer


def test_a_late_round_of_the_job_is_judged_by_the_ledger_of_then(site: Site) -> None:
    site.release(LAYOUT.encode(np.ones(6, np.float32)))
    answer = train_answer(site)
    assert answer["fields"]["privacy"]["epsilon"] > SPENT
    assert site.guard("train", answer) == answer


def test_weights_by_records_are_the_declared_units(site: Site) -> None:
    site.deploy(replace(JOB, federation=replace(JOB.federation, weighting="records")))
    answer = train_answer(site)
    answer["fields"]["weight"] = 10.0
    assert site.guard("train", answer) == answer
    answer["fields"]["weight"] = 9.0
    assert site.guard("train", answer).get_return_code() == tasks.SITE_REFUSED


def test_a_join_leaves(site: Site) -> None:
    assert site.guard("join", join_answer()) == join_answer()


def handed_over(site: Site) -> Shareable:
    site.release()
    return tasks.ledger_message(*ledger_copy(site.policy, site.root / "startup"))


def test_a_copy_of_the_ledger_leaves_for_auditors(site: Site) -> None:
    answer = handed_over(site)
    assert answer[tasks.LEDGER_COPY] == site.ledger.read_bytes()
    assert answer[tasks.CERTIFICATE] == (site.root / "startup" / "client.crt").read_bytes()
    left = site.guard(tasks.LEDGER, answer)
    assert dict(left) == dict(answer)
    assert left is not answer
    site.release(job_id="another")  # what other jobs append meanwhile does no harm
    assert site.guard(tasks.LEDGER, answer).get_return_code() == ReturnCode.OK


HANDED: dict[str, Callable[[Shareable], Any]] = {
    "a line less at the front": lambda a: a.update(ledger_copy=a[tasks.LEDGER_COPY].split(b"\n", 1)[1]),
    "a torn line": lambda a: a.update(ledger_copy=a[tasks.LEDGER_COPY][:-1]),
    "other bytes": lambda a: a.update(ledger_copy=b"pictures\n"),
    "nothing": lambda a: a.update(ledger_copy=b""),
    "text": lambda a: a.update(ledger_copy=a[tasks.LEDGER_COPY].decode()),
    "another certificate": lambda a: a.update(certificate=b"private"),
    "a field": lambda a: a.update(fields={"labels": 1}),
    "a vector": lambda a: a.update(vector=b"1234"),
    "no certificate": lambda a: a.pop(tasks.CERTIFICATE),
    "a header": lambda a: a.set_header("private", 1),
}


@pytest.mark.parametrize("change", HANDED.values(), ids=HANDED)
def test_a_ledger_changed_in_one_place_is_held_back(site: Site, change: Callable[[Shareable], Any]) -> None:
    answer = handed_over(site)
    change(answer)
    assert reason(site.guard(tasks.LEDGER, answer))


def test_a_site_that_keeps_its_ledger_hands_none_over(site: Site) -> None:
    answer = handed_over(site)
    site.settle(share_ledger=False)
    assert reason(site.guard(tasks.LEDGER, answer))


def test_figures_leave_a_site_that_evaluates(site: Site) -> None:
    site.settle(evaluate=True)
    assert site.guard("validate", figures_answer()) == figures_answer()


def test_every_figure_of_an_evaluation_may_leave(site: Site) -> None:
    from fedmpt_core.training.evaluation import Scores, figures

    scores = Scores(np.random.default_rng(0).random((8, 3)), np.full((8, 2), 0.5))
    judged = figures(scores, np.eye(8, 3), 0.5, from_val=True)
    answer = tasks.message(fields={"figures": {**judged, "zero_shot": judged}})
    site.settle(evaluate=True)
    assert site.guard("validate", answer) == answer


def test_an_unprotected_update_leaves_where_the_site_allows_it(site: Site) -> None:
    site.deploy(replace(JOB, privacy=UNPROTECTED))
    answer = tasks.message(fields={"weight": 1.0, "privacy": {}}, vector=UPDATE)
    assert "without differential privacy" in reason(site.guard("train", answer))
    site.settle(allow_unprotected=True)
    assert site.guard("train", answer) == answer
    assert reason(site.guard("train", tasks.message(fields={"weight": 1.0, "privacy": {}, "loss": 1.0}, vector=UPDATE)))
    for weight in (9.0, 10.0, math.nan, "1", None):
        other = tasks.message(fields={"weight": weight, "privacy": {}}, vector=UPDATE)
        assert "not the declared weight" in reason(site.guard("train", other))


# ---- the answers that do not ---------------------------------------------------------------------------------------


def reason(answer: Shareable) -> str:
    """Why a whole answer was held back; nothing else is in it."""
    assert set(answer) == {ReservedHeaderKey.HEADERS}
    assert set(answer[ReservedHeaderKey.HEADERS]) == {ReservedHeaderKey.RC, tasks.REASON}
    assert answer.get_return_code() == tasks.SITE_REFUSED
    return str(answer.get_header(tasks.REASON))


UPDATE_CHANGES: dict[str, tuple[Callable[[Shareable], Any], str]] = {
    "another vector": (lambda a: a.update(vector=UPDATE[:-1] + b"\1"), "not a release of this job"),
    "no vector": (lambda a: a.pop("vector"), "other parts"),
    "vector of another kind": (lambda a: a.update(vector=bytearray(UPDATE)), "not of the kinds"),
    "further part": (lambda a: a.update(gradients=b"x"), "other parts"),
    "further header": (lambda a: a.set_header("loss", 0.25), "header of its own"),
    "cookie": (lambda a: a.add_cookie("loss", 0.25), "header of its own"),
    "further field": (lambda a: a["fields"].update(loss=0.25), "not the declared weight"),
    "true number of records": (lambda a: a["fields"].update(weight=9.0), "not the declared weight"),
    "no privacy": (lambda a: a["fields"].pop("privacy"), "not the declared weight"),
    "privacy no table": (lambda a: a["fields"].update(privacy=[1]), "not the declared weight"),
    "less epsilon": (lambda a: a["fields"]["privacy"].update(epsilon=0.5), "not what the site's ledger says"),
    "other delta": (lambda a: a["fields"]["privacy"].update(delta=1e-6), "not what the site's ledger says"),
    "further number": (lambda a: a["fields"]["privacy"].update(batch=3), "not what the site's ledger says"),
    "other head": (lambda a: a["fields"]["privacy"]["head"].update(hash="0" * 64), "not what the site's ledger says"),
    "later head": (lambda a: a["fields"]["privacy"]["head"].update(seq=9), "not what the site's ledger says"),
}


@pytest.mark.parametrize(("change", "expected"), UPDATE_CHANGES.values(), ids=UPDATE_CHANGES)
def test_an_update_changed_in_one_place_is_held_back(
    site: Site, change: Callable[[Shareable], Any], expected: str
) -> None:
    answer = train_answer(site)
    change(answer)
    assert expected in reason(site.guard("train", answer))


def test_the_release_of_another_job_is_held_back(site: Site) -> None:
    assert "not a release of this job" in reason(site.guard("train", train_answer(site, job_id="another")))


def test_a_reserved_update_that_was_not_committed_is_held_back(site: Site) -> None:
    budget = Budget(JOB, site.settings, open_ledger(site.policy, SITE, site.root / "startup"), JOB_ID)
    budget.reserve(1, 0, {})
    state = {"epsilon": budget.spent(), "delta": 1e-5, "head": budget.head().to_dict()}
    answer = tasks.message(fields={"weight": 1.0, "privacy": state}, vector=UPDATE)
    assert "not a release of this job" in reason(site.guard("train", answer))


JOIN_CHANGES: dict[str, Callable[[Shareable], Any]] = {
    "further field": lambda a: a["fields"].update(records=10),
    "true number of records": lambda a: a["fields"].update(weight=9),
    "weight no number": lambda a: a["fields"].update(weight="1"),
    "missing field": lambda a: a["fields"].pop("device"),
    "number for text": lambda a: a["fields"].update(device=3),
    "long text": lambda a: a["fields"].update(device="x" * 300),
    "lines": lambda a: a["fields"].update(backbone="a\nb"),
    "version no text": lambda a: a["fields"].update(versions={"torch": [1]}),
    "version of a number": lambda a: a["fields"].update(versions={3: "x"}),
    "offers figures": lambda a: a["fields"].update(evaluates=True),
    "vector of another layout": lambda a: a.update(vector=bytes(len(UPDATE))),
    "longer vector": lambda a: a.update(vector=UPDATE + b"data"),
    "layout no json": lambda a: a["fields"].update(layout="{"),
    "further part": lambda a: a.update(pictures=b"x"),
    "further header": lambda a: a.set_header("records", 10),
}


@pytest.mark.parametrize("change", JOIN_CHANGES.values(), ids=JOIN_CHANGES)
def test_a_join_changed_in_one_place_is_held_back(site: Site, change: Callable[[Shareable], Any]) -> None:
    answer = join_answer()
    change(answer)
    assert reason(site.guard("join", answer)).startswith("this site held back its answer to join: ")
    assert f"{JOB_ID} the answer to join, held back: " in (site.root / "refusals.log").read_text()


FIGURE_CHANGES: dict[str, Callable[[Shareable], Any]] = {
    "scores": lambda a: a["fields"]["figures"].update(scores=[0.1]),
    "hidden in zero-shot": lambda a: a["fields"]["figures"]["zero_shot"].update(scores=[0.1]),
    "nested twice": lambda a: a["fields"]["figures"]["zero_shot"].update(zero_shot={}),
    "a value for each picture": lambda a: a["fields"]["figures"].update(AP=[0.1] * 28),
    "text": lambda a: a["fields"]["figures"].update(mAP="51"),
    "not a number": lambda a: a["fields"]["figures"].update(mAP=math.nan),
    "no figures": lambda a: a["fields"].update(figures=None),
    "further field": lambda a: a["fields"].update(names=["a.png"]),
    "vector": lambda a: a.update(vector=UPDATE),
}


@pytest.mark.parametrize("change", FIGURE_CHANGES.values(), ids=FIGURE_CHANGES)
def test_figures_changed_in_one_place_are_held_back(site: Site, change: Callable[[Shareable], Any]) -> None:
    site.settle(evaluate=True)
    answer = figures_answer()
    change(answer)
    assert reason(site.guard("validate", answer))


def test_figures_do_not_leave_a_site_that_does_not_evaluate(site: Site) -> None:
    assert "gives no figures" in reason(site.guard("validate", figures_answer()))


def test_figures_do_not_leave_for_a_job_that_asks_for_none(site: Site) -> None:
    site.settle(evaluate=True)
    site.deploy(replace(JOB, federation=replace(JOB.federation, evaluate_every=0)))
    assert "asks for no figures" in reason(site.guard("validate", figures_answer()))


@pytest.mark.parametrize("task", ["dump", "", None, [], np.zeros(2), {}])
def test_no_other_task_is_answered(site: Site, task: Any) -> None:
    assert "an unknown task" in reason(site.guard(task, train_answer(site)))


def test_a_refusal_leaves_with_its_sentence_and_nothing_else(site: Site) -> None:
    answer = tasks.refusal(tasks.SITE_REFUSED, "privacy budget: the cap is 3")
    answer["vector"] = UPDATE
    answer.set_header("loss", 0.25)
    assert reason(site.guard("train", answer)) == "privacy budget: the cap is 3"


@pytest.mark.parametrize("text", ["x" * 501, "two\nlines", 7, None, {"loss": 0.25}])
def test_a_reason_that_is_no_sentence_stays(site: Site, text: Any) -> None:
    answer = make_reply(tasks.SITE_FAILED, headers={tasks.REASON: text})
    passed = site.guard("train", answer)
    assert passed.get_return_code() == tasks.SITE_FAILED
    assert passed.get_header(tasks.REASON) == "the reason is in the site's log"


@pytest.mark.parametrize(
    "code", [ReturnCode.UNSAFE_JOB, ReturnCode.TASK_UNKNOWN, ReturnCode.RUN_MISMATCH, "loss=0.25", ""]
)
def test_a_code_that_could_end_everybody_s_job_or_carry_a_value_does_not_leave(site: Site, code: str) -> None:
    passed = site.guard("train", make_reply(code))
    assert passed.get_return_code() == tasks.SITE_FAILED
    assert set(passed) == {ReservedHeaderKey.HEADERS}


def test_an_aborted_task_stays_one(site: Site) -> None:
    assert site.guard("train", make_reply(ReturnCode.TASK_ABORTED)).get_return_code() == ReturnCode.TASK_ABORTED


@pytest.mark.parametrize("name", [n for n in BROKEN if n != "no certificate"])
def test_an_update_that_cannot_be_checked_is_held_back_without_a_path(site: Site, name: str) -> None:
    answer = train_answer(site)
    breaks, kind = BROKEN[name]
    breaks(site)
    assert reason(site.guard("train", answer)).endswith(f"it cannot be checked ({kind})")


def test_a_job_changed_after_deployment_gets_no_answer(site: Site) -> None:
    answer = train_answer(site)
    site.edit(lambda p: p["components"].append({"id": "log", "path": "nvflare.x.JobLogStreamer"}))
    assert "configures more than an executor" in reason(site.guard("train", answer))


@pytest.mark.parametrize("answer", [None, {}, {"fields": {}}, 1, "x", {"__headers__": 3}, {"__headers__": {"rc": []}}])
def test_the_guard_never_raises(site: Site, answer: Any) -> None:
    assert reason(site.guard("train", answer))


# ---- answers of a masked job -------------------------------------------------------------------------------------


def masked_answer(site: Site, task: str) -> Shareable:
    spent = site.release(job=MASKED_JOB) if task in (tasks.TRAIN, tasks.MASK) else {}
    return tasks.message(fields={tasks.PRIVACY: spent} if task == tasks.TRAIN else {}, protocol=MESSAGES[task])


@pytest.mark.parametrize("task", list(MESSAGES))
def test_messages_of_the_site_s_own_making_leave(masked: Site, task: str) -> None:
    answer = masked_answer(masked, task)
    assert masked.guard(task, answer) == answer


@pytest.mark.parametrize("task", list(MESSAGES))
@pytest.mark.parametrize("change", ["bytes", "kind", "field", "vector", "no record", "damaged record"])
def test_a_protocol_message_changed_in_one_place_is_held_back(masked: Site, task: str, change: str) -> None:
    answer = masked_answer(masked, task)
    path = latch_path(masked.settings, JOB_ID)
    match change:
        case "bytes":
            answer[tasks.PROTOCOL] += b"!"
        case "kind":
            answer[tasks.PROTOCOL] = MESSAGES[tasks.TRAIN if task != tasks.TRAIN else tasks.OPEN]
        case "field":
            answer[tasks.FIELDS]["loss"] = 0.25
        case "vector":
            answer[tasks.VECTOR] = UPDATE
        case "no record":
            path.unlink()
        case _:
            path.write_text("{}")
    held = masked.guard(task, answer)
    assert held.get_return_code() == tasks.SITE_REFUSED
    assert set(held) == {ReservedHeaderKey.HEADERS}
    assert str(masked.root) not in reason(held)


def test_a_plain_update_never_leaves_in_a_masked_job(masked: Site) -> None:
    fields = {tasks.WEIGHT: 1.0, tasks.PRIVACY: masked.release(job=MASKED_JOB)}
    assert "other parts" in reason(masked.guard(tasks.TRAIN, tasks.message(fields=fields, vector=UPDATE)))


def test_a_masked_update_that_the_ledger_lacks_is_held_back(masked: Site) -> None:
    masked.release(LAYOUT.encode(np.ones(6, np.float32)), job=MASKED_JOB)
    held = masked.guard(tasks.MASK, tasks.message(protocol=MESSAGES[tasks.MASK]))
    assert "not a release of this job" in reason(held)


def test_masks_have_no_place_in_a_job_without(site: Site) -> None:
    for task, message in MESSAGES.items():
        assert site.guard(task, tasks.message(protocol=message)).get_return_code() == tasks.SITE_REFUSED


def test_only_the_site_s_own_reason_for_leaving_goes_with_a_refusal(masked: Site) -> None:
    for abort, kept in ((ABORT, ABORT), (ABORT + b"!", None), (MESSAGES[tasks.TRAIN], None), ("text", None)):
        held = masked.guard(tasks.OPEN, tasks.refusal(tasks.SITE_REFUSED, "no", abort))  # type: ignore[arg-type]
        assert held.get_header(tasks.ABORT) == kept
        assert (set(held), held.get_header(tasks.REASON)) == ({ReservedHeaderKey.HEADERS}, "no")


def test_the_guards_need_no_torch() -> None:
    """They live in processes that must stay small and must not die."""
    modules = "fedmpt_flare.site.egress_guard, fedmpt_flare.site.budget_gate as gate"
    code = f"import sys, {modules}; gate.BudgetGate(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
