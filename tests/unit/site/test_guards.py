"""The site's guards without FLARE's processes: what an honest job needs passes, and every single change is refused."""

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tomli_w
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.apis.workspace import Workspace

from fedmpt_core.common.release import RELEASE
from fedmpt_core.config.job import FederationConfig, JobConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.secagg import SecAggConfig, SiteSecAggConfig
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.config.toml import without_none
from fedmpt_core.federation.site.latch_file import latch_path, write_latch
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.privacy.accounting.epsilon import Steps, epsilon
from fedmpt_core.privacy.ledger.budget import Budget
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, ledger_copy, ledger_path, open_ledger
from fedmpt_core.secagg.latch import Latch, digest_of
from fedmpt_flare import tasks
from fedmpt_flare.site import egress_guard as guards
from fedmpt_flare.site.egress_guard import BudgetGate, EgressGuard
from fedmpt_flare.workspace import SITE_FILE
from tests.kits import write_kit
from tests.settings import OPEN, UNMASKED, UNPROTECTED

JOB_ID, SITE = "0f9a1c42-job", "site-1"
PRIVACY = PrivacyConfig(epsilon=8.0, delta=1e-5, sample_rate=0.5, noise_multiplier=1.5)
JOB = JobConfig(
    "agreed",
    ("bus", "dog", "cat"),
    training=TrainingConfig(rounds=2, local_steps=2),
    privacy=PRIVACY,
    secagg=UNMASKED,
    federation=FederationConfig(min_sites=2, max_failed_rounds=0),
)
LAYOUT = ParameterLayout(("contexts",), ((2, 3),))
UPDATE = LAYOUT.encode(np.arange(6, dtype=np.float32))
SPENT = epsilon([Steps(0.5, 1.5, 2)], 1e-5)  # one round


@dataclass
class Site:
    """A site's workspace with kit, policy, ledger and one deployed job."""

    root: Path
    settings: SiteConfig

    @property
    def app(self) -> Path:
        return self.root / JOB_ID / f"app_{SITE}"

    @property
    def config(self) -> Path:
        return self.app / "config" / "config_fed_client.json"

    @property
    def policy(self) -> SitePrivacyConfig:
        assert self.settings.privacy is not None
        return self.settings.privacy

    @property
    def ledger(self) -> Path:
        return ledger_path(self.policy)

    def deploy(self, job: JobConfig = JOB) -> None:
        executor = {
            "path": guards.EXECUTOR,
            "args": {"job": {"config_type": "dict", **job.to_dict()}, "release": RELEASE},
        }
        plain = {
            "format_version": 2,
            "executors": [{"tasks": list(tasks.TASKS), "executor": executor}],
            "components": [],
            "task_data_filters": [],
            "task_result_filters": [],
            "default_task_fetch_interval": 0.1,
        }
        self.config.parent.mkdir(parents=True, exist_ok=True)
        self.config.write_text(json.dumps(plain))
        self.config.with_name("config_fed_server.json").write_text("{}")
        (self.app / ".__nvfl_sig.json").write_text("{}")

    def edit(self, change: Callable[[dict[str, Any]], Any]) -> None:
        plain = json.loads(self.config.read_text())
        change(plain)
        self.config.write_text(json.dumps(plain))

    def settle(self, *, evaluate: bool = False, **policy: Any) -> None:
        data = replace(self.settings.data, evaluate=evaluate)
        privacy = replace(self.policy, **policy)
        self.settings = replace(self.settings, data=data, privacy=privacy)
        (self.root / "local" / SITE_FILE).write_text(tomli_w.dumps(without_none(asdict(self.settings))))

    def release(self, block: bytes = UPDATE, *, job_id: str = JOB_ID, job: JobConfig = JOB) -> dict[str, Any]:
        """Reserve and commit a round, as the trainer does; what it then says of the budget."""
        budget = Budget(job, self.settings, open_ledger(self.policy, SITE, self.root / "startup"), job_id)
        budget.commit(budget.reserve(1, 0, {}), hashlib.sha256(block).hexdigest())
        return {"epsilon": budget.spent(), "delta": job.privacy.delta, "head": budget.head().to_dict()}

    def context(self, task: str) -> FLContext:
        found = FLContext()
        workspace = Workspace(str(self.root), SITE, "config")
        found.set_prop(ReservedKey.ENGINE, SimpleNamespace(get_workspace=lambda: workspace), private=True)
        found.set_prop(ReservedKey.IDENTITY_NAME, SITE)
        found.set_prop(ReservedKey.RUN_NUM, JOB_ID)
        found.set_prop(FLContextKey.APP_ROOT, str(self.app))
        found.set_prop(FLContextKey.TASK_NAME, task)
        return found

    def guard(self, task: str, answer: Shareable) -> Shareable:
        return EgressGuard().process(answer, self.context(task))


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    write_kit(folder, SITE)
    return folder


@pytest.fixture
def site(tmp_path: Path, kit: Path) -> Site:
    root = tmp_path / "a-secret-path"
    for folder in ("startup", "local"):
        (root / folder).mkdir(parents=True)
    for file in kit.iterdir():
        (root / "startup" / file.name).write_bytes(file.read_bytes())
    policy = SitePrivacyConfig("pictures", units=10, epsilon=5.0, delta=1e-5, ledger=str(root / "ledgers"))
    found = Site(root, SiteConfig(DataConfig(path="/nowhere/manifest.csv"), privacy=policy, secagg=OPEN))
    found.settle()
    create_ledger(policy, SITE, root / "startup")
    found.deploy()
    return found


@pytest.fixture(scope="module")
def gate() -> BudgetGate:
    return BudgetGate()


# ---- the gate ----------------------------------------------------------------------------------------------------


def test_an_agreed_job_may_be_deployed_and_nothing_is_charged(gate: BudgetGate, site: Site) -> None:
    before = site.ledger.read_bytes()
    assert gate.validate(str(site.app)) == ("", {})
    assert site.ledger.read_bytes() == before


def _executor(plain: dict[str, Any]) -> dict[str, Any]:
    return plain["executors"][0]["executor"]


MORE_THAN_OURS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "component": lambda p: p["components"].append({"id": "x", "path": "nvflare.widgets.widget.Widget"}),
    "result filter": lambda p: p["task_result_filters"].append({"tasks": ["train"], "filters": []}),
    "data filter": lambda p: p["task_data_filters"].append({"tasks": ["train"], "filters": []}),
    "variable": lambda p: p.update(noise=0.1),
    "parameterized item": lambda p: p.update({"@executors": []}),
    "second executor": lambda p: p["executors"].append(p["executors"][0]),
    "no executor": lambda p: p.update(executors=[]),
    "executors no list": lambda p: p.update(executors={"a": 1}),
    "other class": lambda p: _executor(p).update(path="nvflare.app_common.executors.statistics.Statistics"),
    "class by name": lambda p: _executor(p).update(name="FedMPTExecutor"),
    "further argument": lambda p: _executor(p)["args"].update(site="x"),
    "no job": lambda p: _executor(p)["args"].pop("job"),
    "further task": lambda p: p["executors"][0]["tasks"].append("dump"),
    "all tasks": lambda p: p["executors"][0].update(tasks=["*"]),
    "job no table": lambda p: _executor(p)["args"].update(job="x"),
    "unknown key in the job": lambda p: _executor(p)["args"]["job"].update(path="/etc/passwd"),
    "no noise": lambda p: _executor(p)["args"]["job"]["privacy"].update(noise_multiplier=0.0),
    "noise as text": lambda p: _executor(p)["args"]["job"]["privacy"].update(noise_multiplier="{noise}"),
    "not a table": lambda p: p.clear(),
}


@pytest.mark.parametrize("change", MORE_THAN_OURS.values(), ids=MORE_THAN_OURS)
def test_a_job_that_is_not_ours_alone_is_refused(
    gate: BudgetGate, site: Site, change: Callable[[dict[str, Any]], Any]
) -> None:
    site.edit(change)
    sentence, properties = gate.validate(str(site.app))
    assert sentence.startswith("the job")
    assert "secret" not in sentence
    assert properties == {}


@pytest.mark.parametrize(
    "name", ["custom/code.py", "config/config_fed_client.conf", "config/log_config.json", "sub/config_fed_client.json"]
)
def test_a_job_that_brings_further_files_is_refused(gate: BudgetGate, site: Site, name: str) -> None:
    (site.app / name).parent.mkdir(exist_ok=True)
    (site.app / name).write_text("{}")
    assert "carries files beside its two configurations" in gate.validate(str(site.app))[0]


def test_a_link_to_a_folder_is_a_further_file(gate: BudgetGate, site: Site) -> None:
    (site.app / "custom").symlink_to(site.root)
    assert "carries files beside its two configurations" in gate.validate(str(site.app))[0]


@pytest.mark.parametrize(
    ("policy", "job", "sentence"),
    [
        ({"epsilon": 3.7}, JOB, "would reach epsilon 3.738 (delta 1e-05); 0.000 is spent and the cap is 3.7"),
        ({"min_noise_multiplier": 2.0}, JOB, "privacy.noise_multiplier=1.5 is below this site's least of 2.0"),
        ({}, replace(JOB, privacy=replace(PRIVACY, noise_multiplier=None)), "the job gives no noise multiplier"),
        ({}, replace(JOB, privacy=replace(PRIVACY, epsilon=3.0)), "declares epsilon=3 and plans 3.738"),
        ({}, replace(JOB, privacy=UNPROTECTED), "without differential privacy, which this site does not allow"),
        ({"min_sites": 3}, JOB, "federation.min_sites=2 of the job is below this site's min_sites=3"),
    ],
    ids=["cap", "noise", "no noise", "declares less", "unprotected", "few sites"],
)
def test_a_job_beyond_the_policy_is_refused_with_its_numbers(
    gate: BudgetGate, site: Site, policy: dict[str, Any], job: JobConfig, sentence: str
) -> None:
    site.settle(**policy)
    site.deploy(job)
    assert sentence in gate.validate(str(site.app))[0]


def test_what_other_jobs_spent_counts(gate: BudgetGate, site: Site) -> None:
    site.settle(epsilon=4.0)
    assert gate.validate(str(site.app)) == ("", {})
    site.release(job_id="another", job=replace(JOB, training=replace(JOB.training, rounds=1)))
    sentence = gate.validate(str(site.app))[0]
    assert f"{SPENT:.3f} is spent and the cap is 4" in sentence


@pytest.mark.parametrize(
    ("release", "sentence"),
    [("0.0.1", "exported with fedmpt 0.0.1"), ("x" * 999, "with fedmpt another release"), (None, "another release")],
)
def test_a_job_of_another_release_is_refused(gate: BudgetGate, site: Site, release: Any, sentence: str) -> None:
    site.edit(lambda p: _executor(p)["args"].update(release=release))
    said = gate.validate(str(site.app))[0]
    assert sentence in said
    assert f"this site runs {RELEASE}: all must run the same release" in said


def test_an_unprotected_job_may_be_deployed_where_the_site_allows_it(gate: BudgetGate, site: Site) -> None:
    site.settle(allow_unprotected=True)
    site.deploy(replace(JOB, privacy=UNPROTECTED))
    assert gate.validate(str(site.app)) == ("", {})


def test_a_site_without_a_policy_takes_no_job(gate: BudgetGate, site: Site) -> None:
    site.settings = replace(site.settings, privacy=None)
    (site.root / "local" / SITE_FILE).write_text(tomli_w.dumps(without_none(asdict(site.settings))))
    assert "no privacy policy" in gate.validate(str(site.app))[0]


def _other_key(site: Site) -> None:
    site.ledger.unlink()
    write_kit(site.root / "other", SITE)
    create_ledger(site.policy, SITE, site.root / "other")


def _unsigned(site: Site) -> None:
    site.ledger.unlink()
    create_ledger(site.policy, SITE, None)


BROKEN: dict[str, tuple[Callable[[Site], Any], str]] = {
    "no site file": (lambda s: (s.root / "local" / SITE_FILE).unlink(), "ConfigError"),
    "bad site file": (lambda s: (s.root / "local" / SITE_FILE).write_text("privacy = 1"), "ConfigError"),
    "no ledger": (lambda s: s.ledger.unlink(), "LedgerError"),
    "changed ledger": (lambda s: s.ledger.write_bytes(s.ledger.read_bytes().replace(b"pict", b"pikt")), "LedgerError"),
    "ledger of another key": (_other_key, "LedgerError"),
    "unsigned ledger": (_unsigned, "LedgerError"),
    "no certificate": (lambda s: (s.root / "startup" / "client.crt").unlink(), "SigningError"),
    "no client configuration": (lambda s: s.config.unlink(), "FileNotFoundError"),
}


@pytest.mark.parametrize(("breaks", "kind"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_checked_is_refused_without_a_path(
    gate: BudgetGate, site: Site, breaks: Callable[[Site], Any], kind: str
) -> None:
    breaks(site)
    expected = f"this site cannot check the job against its privacy policy ({kind})"
    assert gate.validate(str(site.app)) == (expected, {})


# ---- the answers that pass -----------------------------------------------------------------------------------------


def train_answer(site: Site, **released: Any) -> Shareable:
    return tasks.message(fields={"weight": 1.0, "privacy": site.release(**released)}, vector=UPDATE)


def join_answer() -> Shareable:
    fields = {"layout": LAYOUT.to_json(), "evaluates": False, "backbone": "stand-in", "is_stand_in": True}
    fields |= {"backbone_digest": "ab" * 32, "device": "cpu (x86_64, 1 threads)", "versions": {"torch": "2.9"}}
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
    found = figures(scores, np.eye(8, 3), 0.5, from_val=True)
    answer = tasks.message(fields={"figures": {**found, "zero_shot": found}})
    site.settle(evaluate=True)
    assert site.guard("validate", answer) == answer


def test_an_unprotected_update_leaves_where_the_site_allows_it(site: Site) -> None:
    site.deploy(replace(JOB, privacy=UNPROTECTED))
    answer = tasks.message(fields={"weight": 10.0, "privacy": {}}, vector=UPDATE)
    assert "without differential privacy" in reason(site.guard("train", answer))
    site.settle(allow_unprotected=True)
    assert site.guard("train", answer) == answer
    assert reason(site.guard("train", tasks.message(fields={"weight": 1.0, "privacy": {}, "loss": 1.0}, vector=UPDATE)))
    assert reason(site.guard("train", tasks.message(fields={"weight": math.nan, "privacy": {}}, vector=UPDATE)))


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
    said = {"epsilon": budget.spent(), "delta": 1e-5, "head": budget.head().to_dict()}
    answer = tasks.message(fields={"weight": 1.0, "privacy": said}, vector=UPDATE)
    assert "not a release of this job" in reason(site.guard("train", answer))


JOIN_CHANGES: dict[str, Callable[[Shareable], Any]] = {
    "further field": lambda a: a["fields"].update(records=10),
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


@pytest.mark.parametrize("task", ["dump", "", None])
def test_no_other_task_is_answered(site: Site, task: Any) -> None:
    assert "an unknown task" in reason(site.guard(task, train_answer(site)))


def test_a_refusal_leaves_with_its_sentence_and_nothing_else(site: Site) -> None:
    answer = tasks.refusal(tasks.SITE_REFUSED, "privacy budget: the cap is 3")
    answer["vector"] = UPDATE
    answer.set_header("loss", 0.25)
    assert reason(site.guard("train", answer)) == "privacy budget: the cap is 3"


@pytest.mark.parametrize("said", ["x" * 3000, 7, None, {"loss": 0.25}])
def test_a_reason_that_is_no_sentence_stays(site: Site, said: Any) -> None:
    answer = make_reply(tasks.SITE_FAILED, headers={tasks.REASON: said})
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


@pytest.mark.parametrize("answer", [None, {}, {"fields": {}}])
def test_the_guard_never_raises(site: Site, answer: Any) -> None:
    assert reason(site.guard("train", answer))


def test_the_guards_need_no_torch() -> None:
    """They live in processes that must stay small and must not die."""
    code = "import sys, fedmpt_flare.site.egress_guard as g; g.BudgetGate(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# ---- answers of a masked job -------------------------------------------------------------------------------------

MASKED_JOB = replace(JOB, secagg=SecAggConfig(), federation=FederationConfig(max_failed_rounds=0))
SAID = {
    tasks.ADVERTISE: b"\xffADV1 keys",
    tasks.CONFIRM: b"\xffCFM1 signature",
    tasks.TRAIN: b"\xffMSK1 masked words",
    tasks.CONSISTENCY: b"\xffCNS1 signature",
    tasks.UNMASK: b"\xffUNM1 shares",
}
ABORT = b"\xffABR1 reason"


@pytest.fixture
def masked(site: Site) -> Site:
    """A site with a roster, in the middle of a masked job; what it said is on record, the update is committed."""
    site.settings = replace(site.settings, secagg=SiteSecAggConfig(roster="/somewhere/roster.json"))
    site.settle()
    site.deploy(MASKED_JOB)
    latch = Latch(JOB_ID, 1, release=hashlib.sha256(UPDATE).hexdigest(), stage="masked")
    latch = replace(latch, setup=tuple(digest_of(SAID[t]) for t in (tasks.ADVERTISE, tasks.CONFIRM)))
    for message in (SAID[tasks.TRAIN], SAID[tasks.CONSISTENCY], SAID[tasks.UNMASK], ABORT):
        latch = latch.saying(digest_of(message))
    write_latch(latch_path(site.settings, JOB_ID), latch)
    return site


def masked_answer(site: Site, task: str) -> Shareable:
    fields = {tasks.PRIVACY: site.release(job=MASKED_JOB)} if task == tasks.TRAIN else {}
    return tasks.message(fields=fields, protocol=SAID[task])


@pytest.mark.parametrize("task", list(SAID))
def test_messages_of_the_site_s_own_making_leave(masked: Site, task: str) -> None:
    answer = masked_answer(masked, task)
    assert masked.guard(task, answer) == answer


@pytest.mark.parametrize("task", list(SAID))
@pytest.mark.parametrize("change", ["bytes", "kind", "field", "vector", "no record", "damaged record"])
def test_a_protocol_message_changed_in_one_place_is_held_back(masked: Site, task: str, change: str) -> None:
    answer = masked_answer(masked, task)
    path = latch_path(masked.settings, JOB_ID)
    match change:
        case "bytes":
            answer[tasks.PROTOCOL] += b"!"
        case "kind":
            answer[tasks.PROTOCOL] = SAID[tasks.TRAIN if task != tasks.TRAIN else tasks.UNMASK]
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
    fields = {tasks.PRIVACY: masked.release(LAYOUT.encode(np.ones(6, np.float32)), job=MASKED_JOB)}
    held = masked.guard(tasks.TRAIN, tasks.message(fields=fields, protocol=SAID[tasks.TRAIN]))
    assert "not a release of this job" in reason(held)


def test_masks_have_no_place_in_a_job_without(site: Site) -> None:
    for task, said in SAID.items():
        assert site.guard(task, tasks.message(protocol=said)).get_return_code() == tasks.SITE_REFUSED


def test_only_the_site_s_own_reason_for_leaving_goes_with_a_refusal(masked: Site) -> None:
    for abort, kept in ((ABORT, ABORT), (ABORT + b"!", None), (SAID[tasks.TRAIN], None), ("text", None)):
        held = masked.guard(tasks.UNMASK, tasks.refusal(tasks.SITE_REFUSED, "no", abort))  # type: ignore[arg-type]
        assert held.get_header(tasks.ABORT) == kept
        assert (set(held), held.get_header(tasks.REASON)) == ({ReservedHeaderKey.HEADERS}, "no")


@pytest.mark.parametrize(
    ("site_says", "job_says", "expected"),
    [
        ({}, {"secagg": UNMASKED}, "shows this site's updates to the server"),
        ({"min_cohort": 4}, {}, "min_sites=3 and secagg.colluders=1 of the job are below this site's min_cohort=4"),
        ({"colluders": 2}, {}, "below this site's min_cohort=3 and colluders=2"),
        ({"roster": ""}, {}, "no roster"),
        ({}, {"secagg": SecAggConfig(insecure_identities=True)}, "is for simulations"),
        (
            {},
            {"secagg": SecAggConfig(metrics=("loss",)), "privacy": UNPROTECTED},
            "sums figures of training that this site does not give: loss",
        ),
    ],
)
def test_a_job_below_the_site_s_floors_is_deployed_nowhere(
    gate: BudgetGate, masked: Site, site_says: dict[str, Any], job_says: dict[str, Any], expected: str
) -> None:
    masked.settings = replace(masked.settings, secagg=replace(masked.settings.secagg, **site_says))
    masked.settle(allow_unprotected=True)
    masked.deploy(replace(MASKED_JOB, **job_says))
    assert expected in gate.validate(str(masked.app))[0]


def test_a_masked_job_within_the_floors_is_deployed(gate: BudgetGate, masked: Site) -> None:
    assert gate.validate(str(masked.app)) == ("", {})
