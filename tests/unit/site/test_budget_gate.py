"""The gate without FLARE's processes: what is agreed passes, and whatever else a job holds is refused."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext

from fedmpt_core.common.release import RELEASE
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.secagg import SecAggConfig
from fedmpt_core.config.toml import without_none
from fedmpt_core.privacy.accounting.epsilon import Steps
from fedmpt_core.privacy.ledger.budget import Budget, PrivacyRefused, held, history, lasting
from fedmpt_core.privacy.ledger.ledger import Ledger
from fedmpt_core.privacy.ledger.site_ledger import open_ledger, read_site_ledger, signing
from fedmpt_flare.site.budget_gate import BudgetGate
from fedmpt_flare.site.budget_report import BudgetReport
from fedmpt_flare.site.refusals import REFUSALS
from fedmpt_flare.workspace import SITE_FILE
from tests.guarded_site import BROKEN, JOB, JOB_ID, MASKED_JOB, PRIVACY, SITE, SPENT, Site
from tests.settings import UNMASKED, UNPROTECTED


def test_an_agreed_job_may_be_deployed_and_nothing_is_charged(gate: BudgetGate, site: Site) -> None:
    assert gate.validate(str(site.app)) == ("", {})
    entries = read_site_ledger(site.policy, site.root / "startup")
    assert [(e.kind, e.job) for e in entries] == [("genesis", ""), ("hold", JOB_ID)]
    assert history(entries) == [] and [h.steps for h in held(entries)] == [Steps(0.5, 1.5, 4)]


def test_of_two_jobs_that_fit_alone_the_second_is_refused_with_the_numbers(
    gate: BudgetGate, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """Both were submitted together; of the second nothing is charged, and it fits when the first has ended."""
    site.settle(epsilon=5.0)
    second = site.root / "2b7e-job" / f"app_{SITE}"
    shutil.copytree(site.app, second)
    assert gate.validate(str(site.app)) == gate.validate(str(site.app)) == ("", {})  # deployed again: its own hold
    sentence = "privacy budget: what running jobs leave at this site does not suffice: submit it when they end"
    assert gate.validate(str(second)) == (sentence, {})
    numbers = rf"0.000 is spent, 3.738 with what '{JOB_ID}' holds until .*Z and the cap is 5; the job plans 3.738"
    assert re.search(numbers, caplog.text)
    site.settle(show_budget=True)
    assert re.search(numbers, gate.validate(str(second))[0])
    open_ledger(site.policy, SITE, site.root / "startup").free(JOB_ID)
    assert gate.validate(str(second)) == ("", {})


@pytest.mark.parametrize("place", ["file", "folder", "heads"])
def test_a_ledger_that_cannot_be_written_is_noticed_at_deployment(
    gate: BudgetGate, site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    site.settings.cache.mkdir()
    read_only = {"file": site.ledger, "folder": site.ledger.parent, "heads": site.settings.cache}[place]
    real_open, real_access = os.open, os.access

    def refuse(path: Any, flags: int, *more: Any, **names: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and (Path(path) == read_only or read_only in Path(path).parents):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real_open(path, flags, *more, **names)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != read_only and real_access(path, mode))
    assert gate.validate(str(site.app))[0].startswith("this site's privacy ledger cannot be used (LedgerError)")
    assert str(read_only) in caplog.text


def test_a_job_is_not_charged_where_its_hold_ran_out_and_another_took_the_room(site: Site) -> None:
    """Who sleeps longer than it may loses its room, and is told before a round that could not be finished."""
    kit, clock = site.root / "startup", SimpleNamespace(now=datetime.now(UTC))
    signer, verify = signing(kit)
    site.settle(epsilon=5.0)

    def budget(job_id: str) -> Budget:
        place = {"site": SITE, "dataset": "pictures", "delta": 1e-5, "signer": signer, "verify": verify}
        return Budget(JOB, site.settings, Ledger.open(site.ledger, **place, clock=lambda: clock.now), job_id)

    first, second = budget("first"), budget("second")
    first.hold(60.0)
    with pytest.raises(PrivacyRefused, match="'first' holds until"):
        second.hold(60.0)
    first.commit(first.reserve(1, 0, {}), "ab" * 32)  # renews what it holds, for as long as its timeouts
    clock.now += timedelta(seconds=lasting(JOB) - 1)
    with pytest.raises(PrivacyRefused, match="'first' holds until"):
        second.hold(60.0)
    clock.now += timedelta(seconds=1)
    second.hold(60.0)
    with pytest.raises(PrivacyRefused, match="'second' holds until"):
        first.reserve(2, 0, {})
    second.free()
    first.reserve(2, 0, {})


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
    ("policy", "job", "public", "own"),
    [
        (
            {"epsilon": 3.7},
            JOB,
            "privacy budget: what is left at this site does not suffice for the job",
            "'pictures' would reach epsilon 3.738 (delta 1e-05); 0.000 is spent and the cap is 3.7",
        ),
        (
            {"min_noise_multiplier": 2.0, "max_sample_rate": 0.3, "max_steps": 1, "delta": 1e-6, "unit": "group"},
            JOB,
            "privacy.unit='record', this site protects each; privacy.delta=1e-05 is above this site's; "
            "privacy.noise_multiplier=1.5 is below this site's least; privacy.sample_rate=0.5 is above this site's; "
            "2 steps in a round are more than this site's",
            "this site protects each group; privacy.delta=1e-05 is above this site's 1e-06; "
            "privacy.noise_multiplier=1.5 is below this site's least of 2.0; privacy.sample_rate=0.5 is above this "
            "site's 0.3; 2 steps in a round are more than this site's 1",
        ),
        ({}, replace(JOB, privacy=replace(PRIVACY, noise_multiplier=None)), "the job gives no noise multiplier", ""),
        (
            {},
            replace(JOB, privacy=replace(PRIVACY, epsilon=3.0)),
            "the job plans more than the epsilon=3 that it declares",
            "declares epsilon=3 and plans 3.738",
        ),
        ({}, replace(JOB, privacy=UNPROTECTED), "which this site does not allow: it would need", ""),
        ({"min_sites": 3}, JOB, "federation.min_sites=2 of the job is below this site's", "this site's min_sites=3"),
        (
            {},
            replace(JOB, federation=replace(JOB.federation, min_units=11)),
            "this site declares fewer units than federation.min_units=11 of the job",
            "min_units=11 of the job: 10",
        ),
    ],
    ids=["cap", "mechanism", "no noise", "declares less", "unprotected", "few sites", "few units"],
)
def test_a_job_beyond_the_policy_is_refused_and_the_site_s_numbers_stay(
    gate: BudgetGate,
    site: Site,
    caplog: pytest.LogCaptureFixture,
    policy: dict[str, Any],
    job: JobConfig,
    public: str,
    own: str,
) -> None:
    site.settle(**policy)
    site.deploy(job)
    sentence = gate.validate(str(site.app))[0]
    assert public in sentence
    assert own in caplog.text
    assert own in (site.root / REFUSALS).read_text()
    numbers = r"\d[\d.]*(?:e-\d+)?"
    named, agreed = (set(map(float, re.findall(numbers, text))) for text in (sentence, json.dumps(job.to_dict())))
    assert named <= agreed
    for secret in ("pictures", str(site.root), "spent", "cap"):
        assert secret not in sentence


def test_what_other_jobs_spent_counts(gate: BudgetGate, site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.settle(epsilon=4.0)
    assert gate.validate(str(site.app)) == ("", {})
    open_ledger(site.policy, SITE, site.root / "startup").free(JOB_ID)
    site.release(job_id="another", job=replace(JOB, training=replace(JOB.training, rounds=1)))
    assert gate.validate(str(site.app))[0] == "privacy budget: what is left at this site does not suffice for the job"
    assert f"{SPENT:.3f} is spent and the cap is 4" in caplog.text


@pytest.mark.parametrize("most", [9, 10, 11])
@pytest.mark.parametrize("weighting", ["equal", "records"])
def test_a_weight_above_the_job_s_largest_is_refused_by_the_declared_number(
    gate: BudgetGate, masked: Site, most: int, weighting: Any
) -> None:
    """Whoever searches for the bound at which a site refuses finds the number that it declares."""
    secagg = replace(MASKED_JOB.secagg, max_weight=most)
    masked.deploy(replace(MASKED_JOB, secagg=secagg, federation=replace(MASKED_JOB.federation, weighting=weighting)))
    sentence = gate.validate(str(masked.app))[0]
    if weighting == "records" and most == 9:
        assert sentence == "this site declares more units than secagg.max_weight=9 of the job"
    else:
        assert sentence == ""


@pytest.mark.parametrize(
    ("release", "sentence"),
    [("0.0.1", "exported with fedmpt 0.0.1"), ("x" * 999, "with fedmpt another release"), (None, "another release")],
)
def test_a_job_of_another_release_is_refused(gate: BudgetGate, site: Site, release: Any, sentence: str) -> None:
    site.edit(lambda p: _executor(p)["args"].update(release=release))
    refusal = gate.validate(str(site.app))[0]
    assert sentence in refusal
    assert f"this site runs {RELEASE}: all must run the same release" in refusal


def test_an_unprotected_job_may_be_deployed_where_the_site_allows_it(gate: BudgetGate, site: Site) -> None:
    site.settle(allow_unprotected=True)
    site.deploy(replace(JOB, privacy=UNPROTECTED))
    assert gate.validate(str(site.app)) == ("", {})


def test_a_site_without_a_policy_takes_no_job(gate: BudgetGate, site: Site) -> None:
    site.settings = replace(site.settings, privacy=None)
    (site.root / "local" / SITE_FILE).write_text(tomli_w.dumps(without_none(asdict(site.settings))))
    assert "no privacy policy" in gate.validate(str(site.app))[0]


@pytest.mark.parametrize(("breaks", "kind"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_checked_is_refused_without_a_path(
    gate: BudgetGate, site: Site, breaks: Callable[[Site], Any], kind: str
) -> None:
    breaks(site)
    expected = f"this site cannot check the job against its privacy policy ({kind})"
    if kind == "LedgerError":
        expected = f"this site's privacy ledger cannot be used (LedgerError); its {REFUSALS} says why"
    assert gate.validate(str(site.app)) == (expected, {})


@pytest.mark.parametrize(
    ("site_says", "job_says", "expected"),
    [
        ({}, {"secagg": UNMASKED}, "shows this site's updates to the server"),
        ({"min_cohort": 4}, {}, "min_sites=3 and secagg.colluders=1 of the job are below this site's"),
        ({"colluders": 2}, {}, "min_sites=3 and secagg.colluders=1 of the job are below this site's"),
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


def test_a_job_whose_process_was_killed_holds_nothing_when_the_site_notices(gate: BudgetGate, site: Site) -> None:
    assert gate.validate(str(site.app)) == ("", {})
    ended, place = FLContext(), FLContext()
    place.set_prop(FLContextKey.WORKSPACE_ROOT, str(site.root))
    ended.set_prop(ReservedKey.ENGINE, SimpleNamespace(new_context=lambda: place), private=True)
    ended.set_prop(FLContextKey.CURRENT_JOB_ID, JOB_ID, private=True, sticky=False)
    ended.set_prop(FLContextKey.CLIENT_NAME, SITE, private=True, sticky=False)
    report = BudgetReport()
    report.handle_event(EventType.JOB_COMPLETED, ended)
    entries = read_site_ledger(site.policy, site.root / "startup")
    assert [e.kind for e in entries] == ["genesis", "hold", "free"] and held(entries) == []
    site.ledger.unlink()
    report.handle_event(EventType.JOB_COMPLETED, ended)  # says so in the site's log and goes on
