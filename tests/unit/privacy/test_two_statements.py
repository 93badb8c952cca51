"""Where sites share the noise a ledger says two things: what is spent in the sums, and what if the masks fail."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fedmpt_core.audit.caps import ALONE, check_caps
from fedmpt_core.config.federation import FederationConfig
from fedmpt_core.config.job import JobConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.secagg import SecAggConfig, SiteSecAggConfig
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.federation.site.policy_card import PolicyCard
from fedmpt_core.privacy.accounting.epsilon import Steps, epsilon
from fedmpt_core.privacy.ledger.budget import Budget, PrivacyRefused, check_policy, project, resolved
from fedmpt_core.privacy.ledger.chain import LedgerError
from fedmpt_core.privacy.ledger.ledger import stated_caps
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, ledger_path, open_ledger, read_site_ledger
from fedmpt_core.privacy.ledger.statement import spending_plan, statement
from fedmpt_core.privacy.ledger.succession import migrate

POLICY = SitePrivacyConfig("chest", units=1000, epsilon=8.0, delta=1e-5, epsilon_alone=12.0)


def shared(sites: int = 4, **privacy: Any) -> JobConfig:
    return resolved(
        JobConfig(
            "p",
            ("cat", "dog"),
            training=TrainingConfig(rounds=10, local_steps=1),
            privacy=PrivacyConfig(
                **{"noise": "distributed", "engine": "exact", "epsilon": 4.0, "sample_rate": 0.25, **privacy}
            ),
            secagg=SecAggConfig(max_sites=10, max_weight=1000),
            federation=FederationConfig(min_sites=sites, weighting="records", max_failed_rounds=0),
        )
    )


def plain() -> JobConfig:
    """The same noise, all of it at each site."""
    job = shared()
    privacy = dataclasses.replace(job.privacy, noise="site")
    federation = FederationConfig(max_failed_rounds=0)
    return JobConfig("q", job.classes, training=job.training, privacy=privacy, federation=federation)


@pytest.fixture
def policy(tmp_path: Path) -> SitePrivacyConfig:
    made = dataclasses.replace(POLICY, ledger=str(tmp_path / "ledgers"))
    create_ledger(made, "a", None)
    return made


def spend(job: JobConfig, policy: SitePrivacyConfig, run: str, rounds: int = 10) -> None:
    site = SiteConfig(DataConfig(path="x"), privacy=policy, cache_dir=f"{policy.ledger}/cache")
    budget = Budget(job, site, open_ledger(policy, "a", None), run)
    budget.hold(1000)
    for number in range(1, rounds + 1):
        budget.commit(budget.reserve(number, 0, {"engine": "exact"}), "ab" * 32)


def test_a_site_that_has_not_said_what_if_the_masks_fail_refuses() -> None:
    silent = dataclasses.replace(POLICY, epsilon_alone=None)
    with pytest.raises(PrivacyRefused, match=r"it would need \[privacy\] epsilon_alone in the site's own file"):
        check_policy(shared(), silent)
    check_policy(plain(), silent)


def test_a_share_below_the_site_s_least_is_refused() -> None:
    job = shared(sites=10, epsilon=8.0)
    with pytest.raises(
        PrivacyRefused, match=r"a site's share of the noise, 0\.\d+, is below this site's least of 0\.3"
    ):
        check_policy(job, POLICY)


def test_each_statement_has_a_cap(policy: SitePrivacyConfig) -> None:
    job = shared()
    noise = job.privacy.noise_multiplier or 0.0
    alone = epsilon([Steps(0.25, noise / 3**0.5, 10)], 1e-5)
    projection = project(job, policy, read_site_ledger(policy, None), "j")
    assert (projection.job, projection.job_alone) == (pytest.approx(4.0, abs=0.01), pytest.approx(alone))
    tight = dataclasses.replace(policy, epsilon_alone=alone - 0.01)
    with pytest.raises(PrivacyRefused, match=rf"would reach epsilon {alone:.3f} if the masks fail") as refused:
        project(job, tight, read_site_ledger(policy, None), "j")
    assert "chest" not in refused.value.public
    assert project(plain(), tight, read_site_ledger(policy, None), "j").total_alone == pytest.approx(4.0, abs=0.01)


def test_jobs_of_both_kinds_add_up_in_both_statements(policy: SitePrivacyConfig) -> None:
    spend(plain(), policy, "one")
    spend(shared(epsilon=2.0), policy, "two")
    account = statement(read_site_ledger(policy, None), 8.0, 12.0)
    first, second = (job.privacy.noise_multiplier or 0.0 for job in (plain(), shared(epsilon=2.0)))
    both = [Steps(0.25, first, 10), Steps(0.25, second, 10)]
    assert account.total == pytest.approx(epsilon(both, 1e-5))
    apart = [Steps(0.25, first, 10), Steps(0.25, second / 3**0.5, 10)]
    assert account.if_masks_fail == pytest.approx(epsilon(apart, 1e-5))
    assert [job.if_masks_fail > job.epsilon for job in account.jobs] == [False, True]
    assert [job.mechanisms[0].honest for job in account.jobs] == [1, 3]
    assert json.loads(json.dumps(account.to_dict()))["cap_alone"] == 12.0


def test_a_plan_counts_what_fits_below_both(policy: SitePrivacyConfig) -> None:
    job, entries = shared(epsilon=1.0), read_site_ledger(policy, None)
    wide = spending_plan(job, dataclasses.replace(policy, epsilon_alone=1000.0), entries)
    narrow = spending_plan(job, dataclasses.replace(policy, epsilon_alone=wide.if_masks_fail + 0.01), entries)
    assert (wide.repeats > 1, narrow.repeats) == (True, 1)
    assert spending_plan(job, dataclasses.replace(policy, epsilon_alone=0.5), entries).repeats == 0


def test_a_card_and_a_successor_carry_both(policy: SitePrivacyConfig) -> None:
    spend(shared(), policy, "one")
    entries = read_site_ledger(policy, None)
    site = SiteConfig(DataConfig(path="x"), privacy=policy, secagg=SiteSecAggConfig())
    card = PolicyCard.of("a", site, entries)
    assert [(c.job, c.steps, c.honest) for c in card.charged] == [("one", 10, 3)]
    with pytest.raises(PrivacyRefused, match="if the masks fail"):
        card.check(shared())
    renamed = dataclasses.replace(policy, dataset="chest-2")
    migrate(renamed, "a", None, ["chest"])
    account = statement(read_site_ledger(renamed, None), None)
    assert account.if_masks_fail == pytest.approx(statement(entries, None).if_masks_fail)
    assert [cap.epsilon for cap in stated_caps(read_site_ledger(renamed, None), ALONE)] == [12.0]


def test_both_caps_are_stated_and_audited(policy: SitePrivacyConfig) -> None:
    spend(shared(), policy, "one")
    raised = dataclasses.replace(policy, epsilon_alone=20.0)
    spend(shared(), raised, "two", rounds=9)
    entries = read_site_ledger(raised, None)
    assert [(c.epsilon, c.before) for c in stated_caps(entries, ALONE)] == [(12.0, None), (20.0, 12.0)]
    assert [c.epsilon for c in stated_caps(entries)] == [8.0]
    found = check_caps(entries, 12.0, ALONE)
    assert [f.code for f in found if f.severity == "warning"] == ["cap-changed", "cap-differs"]
    assert check_caps(entries, 8.0) == []
    assert "if the masks fail" in found[0].text


def test_a_share_that_does_not_fit_its_own_entry_is_no_charge(policy: SitePrivacyConfig) -> None:
    """An unsigned ledger can be written anew; one whose numbers contradict each other is worth nothing."""
    ledger = open_ledger(policy, "a", None)
    details = {"mechanism": "poisson-subsampled-gaussian-share", "sample_rate": 0.25, "noise_multiplier": 2.0}
    for wrong in ({}, {"honest": 4}, {"honest": 4, "share_multiplier": 2.0}):
        assert ledger_path(policy).exists()
        ledger.reserve(job="x", round=1, attempt=0, details={**details, "steps": 1, **wrong}, admit=lambda _: None)
        with pytest.raises(LedgerError, match="does not say what it charges"):
            statement(read_site_ledger(policy, None), None)
