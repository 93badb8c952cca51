"""What a job holds of the budget, what a site stated as its cap, and ledgers from before either was noted."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedmpt_core.config.job import FederationConfig, JobConfig, PrivacyConfig, ResumeConfig, TrainingConfig
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.federation.site.policy_card import PolicyCard
from fedmpt_core.privacy.accounting.epsilon import Steps, epsilon
from fedmpt_core.privacy.ledger import succession
from fedmpt_core.privacy.ledger.budget import Budget, PrivacyRefused, charges, held, history, project
from fedmpt_core.privacy.ledger.chain import Entry
from fedmpt_core.privacy.ledger.ledger import Cap, Ledger, read_ledger, stated_caps
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, open_ledger, read_site_ledger
from fedmpt_core.privacy.ledger.statement import spending_plan, statement
from tests.settings import OPEN, UNMASKED
from tests.unit.privacy.test_ledger import KEY, PLACE

BEFORE = Path(__file__).parents[2] / "vectors" / "ledger_schema_1.jsonl"  # written by a release that knew no holds
JOB = JobConfig(
    "held",
    ("cat", "dog"),
    training=TrainingConfig(rounds=2, local_steps=2),
    privacy=PrivacyConfig(epsilon=8.0, sample_rate=0.5, noise_multiplier=1.5),
    secagg=UNMASKED,
    federation=FederationConfig(max_failed_rounds=1),
)
POLICY = SitePrivacyConfig("chest", units=1000, epsilon=5.0, delta=1e-5)
SITE = SiteConfig(DataConfig(path="x"), privacy=POLICY, secagg=OPEN)
ROUND = Steps(0.5, 1.5, 2)


class Site:
    """A site whose clock the test moves."""

    def __init__(self, root: Path) -> None:
        self.later = timedelta()
        self.policy = replace(POLICY, ledger=str(root / "ledgers"))
        self.cache = str(root / "cache")
        create_ledger(self.policy, "a", None)

    @property
    def settings(self) -> SiteConfig:
        return replace(SITE, privacy=self.policy, cache_dir=self.cache)

    def now(self) -> datetime:
        return datetime.now(UTC) + self.later

    def budget(self, job_id: str, job: JobConfig = JOB) -> Budget:
        """As a process opens it that has just been started."""
        path = open_ledger(self.policy, "a", None).path
        place: dict[str, Any] = {"site": "a", "dataset": self.policy.dataset, "delta": 1e-5}
        ledger = Ledger.open(path, **place, signer=None, verify=None, clock=self.now)
        return Budget(job, self.settings, ledger, job_id)

    def entries(self) -> Any:
        return read_site_ledger(self.policy, None)

    def left(self) -> dict[str, int]:
        return {h.job: h.steps.count for h in held(self.entries(), self.now())}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def train(budget: Budget, *rounds: int) -> None:
    for number in rounds:
        budget.commit(budget.reserve(number, 0, {}), "ab" * 32)


def test_what_is_held_shrinks_with_what_is_charged_and_ends_with_the_job(site: Site) -> None:
    one = site.budget("one")
    one.hold(3600.0)
    assert site.left() == {"one": 6}
    train(one, 1)
    one.reserve(2, 0, {})  # failed: charged all the same
    assert site.left() == {"one": 2}
    assert statement(site.entries(), 5.0).reach == epsilon([replace(ROUND, count=6)], 1e-5)
    train(one, 2)
    assert site.left() == {}
    one.free()
    one.free()
    assert [e.kind for e in site.entries()].count("free") == 1


def test_a_second_job_is_refused_wherever_the_budget_is_looked_at(site: Site) -> None:
    """A job that fits alone: at deployment, before a round, when it is planned, and on the card that others plan by."""
    site.budget("one").hold(3600.0)
    reaches = epsilon([replace(ROUND, count=6)], 1e-5)
    says = (
        rf"0.000 is spent, {reaches:.3f} with what 'one' holds until .*Z and the cap is 5; the job plans {reaches:.3f}"
    )
    with pytest.raises(PrivacyRefused, match=says) as refused:
        site.budget("two")
    assert "running jobs" in refused.value.public and "5" not in refused.value.public
    with pytest.raises(PrivacyRefused, match=says):
        project(JOB, site.policy, site.entries(), "planned")
    assert spending_plan(JOB, site.policy, site.entries()).repeats == 0
    with pytest.raises(PrivacyRefused, match=r"a would refuse the job: .* with what 'one' holds"):
        PolicyCard.of("a", site.settings, site.entries()).check(JOB)
    assert history(site.entries()) == []


def test_two_that_were_looked_at_together_are_not_both_let_in(site: Site) -> None:
    one, two = site.budget("one"), site.budget("two")
    one.hold(3600.0)
    for attempt in (lambda: two.hold(3600.0), lambda: two.reserve(1, 0, {})):
        with pytest.raises(PrivacyRefused, match="'one' holds until"):
            attempt()
    train(one, 1, 2)


def test_a_process_that_is_started_again_has_what_its_job_held(site: Site) -> None:
    site.budget("one").hold(3600.0)
    again = site.budget("one")
    again.hold(3600.0)
    assert [e.kind for e in site.entries()] == ["genesis", "hold"]
    train(again, 1, 2)
    again.free()
    short = replace(JOB, training=replace(JOB.training, rounds=1), federation=FederationConfig(max_failed_rounds=0))
    train(site.budget("two", short), 1)  # fits, as what a failed attempt might have cost is free


def test_a_run_that_is_continued_hands_over_what_it_held(site: Site) -> None:
    """Its server died, so nothing was freed; whoever goes on needs the room for the same rounds."""
    first = site.budget("one")
    first.hold(3600.0)
    train(first, 1)
    job = replace(JOB, resume=ResumeConfig("one", 1))
    site.budget("two", job).hold(3600.0)
    assert site.left() == {"two": 4}
    train(site.budget("two", job), 2)
    with pytest.raises(PrivacyRefused, match="'two' holds until"):
        first.reserve(3, 0, {})


def test_what_a_dead_job_held_is_free_when_its_time_is_over(site: Site) -> None:
    site.budget("one").hold(3600.0)
    site.later = timedelta(seconds=3000)
    with pytest.raises(PrivacyRefused, match="'one' holds"):
        site.budget("two")
    site.later = timedelta(seconds=3600)
    site.budget("two").hold(3600.0)
    assert site.left() == {"two": 6}


def test_a_cap_that_changes_is_noted_before_a_job_is_admitted_under_it(site: Site) -> None:
    running = site.budget("one")
    running.hold(3600.0)
    site.policy = replace(site.policy, epsilon=9.0)
    assert stated_caps(site.entries())[-1].epsilon == 5.0  # nobody has asked under it
    for _ in range(2):
        site.budget("two")
    last = site.entries()[-1]
    assert (last.kind, last.old, last.new) == ("cap", "5.0", "9.0")
    assert [(c.epsilon, c.before) for c in statement(site.entries(), 9.0).caps] == [(5.0, None), (9.0, 5.0)]
    # a process that has read the cap before it was lowered is held to what is stated now
    site.policy = replace(site.policy, epsilon=0.5)
    open_ledger(site.policy, "a", None)
    with pytest.raises(PrivacyRefused, match=r"the cap is 0\.5"):
        running.reserve(1, 0, {})


def test_a_new_name_is_no_new_promise(site: Site) -> None:
    old = site.policy
    site.policy = replace(old, dataset="chest-2", epsilon=9.0)
    succession.migrate(site.policy, "a", None, ["chest"])
    open_ledger(site.policy, "a", None)
    assert [(c.epsilon, c.before) for c in stated_caps(site.entries())] == [(5.0, None), (9.0, 5.0)]


def test_a_ledger_of_the_schema_before_goes_on(tmp_path: Path) -> None:
    """Its lines stay as they are and cost what they cost; what follows them, the release before refuses to read."""
    path = Path(shutil.copy(BEFORE, tmp_path / "chest.ledger.jsonl"))
    before, old = path.read_bytes(), read_ledger(path, KEY.verify)
    assert [e.kind for e in old] == ["genesis", *["reserve", "commit"] * 2, "reserve"]
    assert history(old) == [Steps(0.1, 1.5, 5)] * 3 and (stated_caps(old), held(old)) == ((), [])

    def admit(entries: Sequence[Entry]) -> None:
        assert len(charges(entries)) == 3

    ledger = Ledger.open(path, **PLACE, signer=KEY, verify=KEY.verify)
    ledger.state_caps({"cap": 8.0})
    plan = {"sample_rate": 0.1, "noise_multiplier": 1.5, "steps": 20}
    ledger.hold(job="job-1", seconds=3600.0, details=plan, admit=admit)
    ledger.reserve(job="job-1", round=4, attempt=0, details={**plan, "steps": 5}, admit=admit)
    assert path.read_bytes().startswith(before)
    new = [json.loads(line) for line in path.read_bytes()[len(before) :].splitlines()]
    assert [(line["v"], line["kind"]) for line in new] == [(2, "cap"), (2, "hold"), (2, "reserve")]
    entries = read_ledger(path, KEY.verify)
    assert stated_caps(entries) == (Cap(entries[6].time, 6, 8.0, None),)
    assert history(entries) == [Steps(0.1, 1.5, 5)] * 4
    assert held(entries) == []  # all 20 steps of its job are charged
