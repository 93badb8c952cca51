"""Policy and ledger together: what a site refuses, with which sentence, and that refusals cost nothing."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fedmpt_core.config.job import FederationConfig, JobConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.privacy.accounting.epsilon import AccountingError, Steps, epsilon
from fedmpt_core.privacy.ledger.budget import (
    Budget,
    PrivacyRefused,
    check_policy,
    history,
    planned_steps,
    project,
    resolved,
)
from fedmpt_core.privacy.ledger.chain import LedgerHead
from fedmpt_core.privacy.ledger.ledger import Ledger
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, ledger_path, open_ledger, read_site_ledger
from tests.settings import UNMASKED

POLICY = SitePrivacyConfig("chest", units=1000, epsilon=8.0, delta=1e-5)
DETAILS = {"engine": "exact"}


def job(*, rounds: int = 4, steps: int = 5, retries: int = 0, min_sites: int = 2, **privacy: Any) -> JobConfig:
    return JobConfig(
        "p",
        ("cat", "dog"),
        training=TrainingConfig(rounds=rounds, local_steps=steps),
        privacy=PrivacyConfig(**{"epsilon": 4.0, "sample_rate": 0.1, **privacy}),
        secagg=UNMASKED,
        federation=FederationConfig(max_failed_rounds=retries, min_sites=min_sites),
    )


@pytest.fixture
def policy(tmp_path: Path) -> SitePrivacyConfig:
    made = dataclasses.replace(POLICY, ledger=str(tmp_path / "ledgers"))
    create_ledger(made, "a", None)
    return made


def budget(agreed: JobConfig, policy: SitePrivacyConfig, run: str = "job-1") -> Budget:
    return Budget(
        agreed,
        SiteConfig(DataConfig(path="x"), privacy=policy, cache_dir=f"{policy.ledger}/cache"),
        open_ledger(policy, "a", None),
        run,
    )


def spend(agreed: JobConfig, policy: SitePrivacyConfig, run: str, rounds: int) -> Budget:
    found = budget(agreed, policy, run)
    for number in range(1, rounds + 1):
        found.commit(found.reserve(number, 0, DETAILS), "ab" * 32)
    return found


def test_noise_is_worked_out_for_all_rounds_and_failed_attempts() -> None:
    plain, careful = resolved(job()), resolved(job(retries=2))
    assert planned_steps(plain) == 20
    assert planned_steps(careful) == 30
    for agreed in (plain, careful):
        noise = agreed.privacy.noise_multiplier or 0
        assert epsilon([Steps(0.1, noise, planned_steps(agreed))], 1e-5) <= 4.0
        assert epsilon([Steps(0.1, noise - 0.01, planned_steps(agreed))], 1e-5) > 4.0
    assert (careful.privacy.noise_multiplier or 0) > (plain.privacy.noise_multiplier or 0)
    assert resolved(plain) == plain


def test_steps_of_a_round_come_from_the_rate_alone() -> None:
    by_epochs = dataclasses.replace(job(), training=TrainingConfig(rounds=3, local_epochs=2))
    assert by_epochs.steps_per_round == 20
    with pytest.raises(ValueError, match=r"training.batch_size=8 has no meaning under differential privacy"):
        dataclasses.replace(job(), training=TrainingConfig(batch_size=8))


def test_noise_that_breaks_its_own_promise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise_multiplier=0.5 spends epsilon .* privacy.epsilon=4.0 is the most"):
        resolved(job(noise_multiplier=0.5))
    assert resolved(job(noise_multiplier=3.0)).privacy.noise_multiplier == 3.0
    with pytest.raises(AccountingError):
        resolved(job(epsilon=1e-9, delta=1e-11))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("epsilon", 0.0, r"epsilon=0.0 is out of range: allowed is \(0"),
        ("epsilon", -1.0, "epsilon=-1.0 is out of range"),
        ("delta", 0.0, "delta=0.0 is out of range"),
        ("sample_rate", 1.5, r"sample_rate=1.5 is out of range: allowed is \(0, 1\]"),
        ("sample_rate", 0.0, "sample_rate=0.0 is out of range"),
        ("noise_multiplier", 0.0, "noise_multiplier=0.0 is out of range"),
        ("max_grad_norm", 0.0, "max_grad_norm=0.0 is out of range"),
        ("group_norms", {"head": 0.0}, r"\[group_norms\] head=0.0 is out of range"),
        ("group_norms", {"haed": 1.0}, r"\[group_norms\] unknown key 'haed': did you mean 'head'"),
    ],
)
def test_impossible_settings_are_refused(field: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        job(**{field: value})


def test_a_delta_that_would_allow_publishing_a_record_is_refused() -> None:
    with pytest.raises(ValueError, match=r"delta=0.001 must be below 1 / units = 0.001"):
        dataclasses.replace(POLICY, delta=1e-3)


@pytest.mark.parametrize(
    ("change", "agreed", "says"),
    [
        (None, job(noise_multiplier=3.0), "no privacy policy"),
        ({"min_sites": 3}, job(noise_multiplier=3.0), "min_sites=2 of the job is below this site's min_sites=3"),
        ({}, job(mechanism="none"), r"without differential privacy .*, which this site does not allow"),
        ({}, job(), "no noise multiplier"),
        ({"unit": "group"}, job(noise_multiplier=3.0), "privacy.unit='record', this site protects each group"),
        ({"delta": 1e-6}, job(noise_multiplier=3.0), "privacy.delta=1e-05 is above this site's 1e-06"),
        ({"min_noise_multiplier": 4.0}, job(noise_multiplier=3.0), "noise_multiplier=3.0 is below this site's least"),
        ({"max_sample_rate": 0.05}, job(noise_multiplier=3.0), "sample_rate=0.1 is above this site's 0.05"),
        ({"max_steps": 4}, job(noise_multiplier=3.0), "5 steps in a round are more than this site's 4"),
    ],
)
def test_the_stricter_of_job_and_site_holds(change: dict[str, Any] | None, agreed: JobConfig, says: str) -> None:
    allowed = None if change is None else dataclasses.replace(POLICY, **change)
    with pytest.raises(PrivacyRefused, match=says):
        check_policy(agreed, allowed)


def test_what_the_policy_allows_passes() -> None:
    check_policy(resolved(job()), POLICY)
    check_policy(job(mechanism="none"), dataclasses.replace(POLICY, allow_unprotected=True))


def test_a_job_that_would_pass_the_cap_is_refused_before_anything_is_charged(policy: SitePrivacyConfig) -> None:
    agreed = resolved(job())
    spend(agreed, policy, "first", 4)
    tight = dataclasses.replace(policy, epsilon=5.0)
    open_ledger(tight, "a", None)  # notes the new cap
    before = ledger_path(policy).read_bytes()
    with pytest.raises(
        PrivacyRefused, match=r"would reach epsilon 5\.\d+ .*; (3\.99\d|4\.000) is spent and the cap is 5"
    ):
        budget(agreed, tight, "second")
    assert ledger_path(policy).read_bytes() == before
    budget(agreed, policy, "second")


def test_a_cap_below_the_first_round_refuses_the_job(policy: SitePrivacyConfig) -> None:
    with pytest.raises(PrivacyRefused, match=r"0.000 is spent and the cap is 0.1"):
        budget(resolved(job()), dataclasses.replace(policy, epsilon=0.1))


def test_a_restarted_trainer_finds_its_own_rounds_in_the_plan(policy: SitePrivacyConfig) -> None:
    agreed = resolved(job(epsilon=8.0))
    spend(agreed, policy, "job-1", 3)
    again = budget(agreed, policy, "job-1")
    assert again.projection.total <= 8.0
    again.reserve(4, 0, DETAILS)
    with pytest.raises(PrivacyRefused, match="round 5 would raise epsilon from"):
        again.reserve(5, 0, DETAILS)


def test_a_job_is_cut_off_at_its_own_epsilon_and_a_retry_is_charged(policy: SitePrivacyConfig) -> None:
    agreed = resolved(job())
    found = spend(agreed, policy, "job-1", 3)
    found.reserve(4, 0, DETAILS)  # failed later on: spent all the same
    before = ledger_path(policy).read_bytes()
    with pytest.raises(PrivacyRefused, match=r"round 4 would raise epsilon .* the job's own epsilon is 4"):
        found.reserve(4, 1, DETAILS)
    assert ledger_path(policy).read_bytes() == before
    assert found.spent() == pytest.approx(epsilon([Steps(0.1, agreed.privacy.noise_multiplier or 0, 20)], 1e-5))


def test_other_mechanisms_compose_in_one_ledger(policy: SitePrivacyConfig) -> None:
    spend(resolved(job(epsilon=2.0)), policy, "one", 4)
    spend(resolved(job(epsilon=3.0, sample_rate=0.5)), policy, "two", 4)
    entries = read_site_ledger(policy, None)
    assert len(history(entries, "one")) == len(history(entries, "two")) == 4
    together = project(resolved(job(epsilon=1.0)), policy, entries, "three")
    assert max(2.0, 3.0) < together.total < 2.0 + 3.0 + 1.0


def test_a_cut_ledger_is_noticed_by_whoever_saw_a_later_head(policy: SitePrivacyConfig) -> None:
    found = spend(resolved(job()), policy, "job-1", 2)
    head = LedgerHead.from_dict(found.head().to_dict())
    found.check_head(head)
    path = ledger_path(policy)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    with pytest.raises(PrivacyRefused, match=r"lacks entry 4 that it reported earlier: it was cut or replaced"):
        budget(resolved(job()), policy, "job-1").check_head(head)


def test_a_missing_ledger_is_never_started_by_a_job(tmp_path: Path) -> None:
    lost = dataclasses.replace(POLICY, ledger=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere"):
        open_ledger(lost, "a", None)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ValueError, match=r"privacy\.ledger is empty"):
        open_ledger(POLICY, "a", None)


def test_a_ledger_of_another_policy_is_refused(policy: SitePrivacyConfig) -> None:
    for change in ({"delta": 1e-6}, {"unit": "group"}):
        with pytest.raises(ValueError, match="open the ledger that belongs"):
            open_ledger(dataclasses.replace(policy, **change), "a", None)
    with pytest.raises(ValueError, match="site='a', not 'b'"):
        open_ledger(policy, "b", None)
    with pytest.raises(ValueError, match="exists"):
        create_ledger(policy, "a", None)
    assert isinstance(open_ledger(policy, "a", None), Ledger)
