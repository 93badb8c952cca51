"""One value says what a round does; the ledger says the same of it in every release."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.config.toml import load_job
from fedmpt_core.model.registry import build_model
from fedmpt_core.privacy.accounting.epsilon import Steps
from fedmpt_core.privacy.charged_training import ChargedTraining
from fedmpt_core.privacy.ledger.budget import charges, resolved
from fedmpt_core.privacy.ledger.chain import Entry
from fedmpt_core.privacy.ledger.ledger import LedgerError
from fedmpt_core.privacy.ledger.site_ledger import create_ledger, read_site_ledger
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from tests.fakes import FakeBackbone

DEMO = Path(__file__).parents[3] / "jobs" / "demo" / "job.toml"


@pytest.fixture(scope="module")
def demo() -> JobConfig:
    return resolved(load_job(DEMO))


def test_the_entry_of_a_round_is_what_it_always_was(demo: JobConfig, tmp_path: Path) -> None:
    policy = SitePrivacyConfig("scenes", units=500, epsilon=8.0, delta=1e-5, ledger=str(tmp_path))
    create_ledger(policy, "a", None)
    charged = ChargedTraining.open(
        demo, SiteConfig(DataConfig("scenes"), privacy=policy, cache_dir=str(tmp_path / "cache")), "a", "run", None
    )
    charged.test_mechanism(build_model(FakeBackbone(), demo.classes, demo.model, demo.seed))
    charged.know_records(["one", "two"])
    charged.reserve(1, 0)
    details = dict(next(e for e in read_site_ledger(policy, None) if e.kind == "reserve").details)
    assert details.pop("rng_key_id") == charged.keystream.key_id
    assert details.pop("config") == demo.digest()
    assert details.pop("code").startswith("fedmpt ")
    assert len(details.pop("records")) == 64
    assert details == {
        "aggregation": "masked",
        "engine": "feature_space",
        "expected_batch_size": "125.0",
        "grid_bits": 20,
        "identities": "insecure",
        "max_grad_norm": "0.1",
        "mechanism": "poisson-subsampled-gaussian",
        "noise_multiplier": "1.2346",
        "noise_std": ["0.12346462347534652"],
        "released": 1542,
        "rng": "AES-256-CTR",
        "sample_rate": "0.25",
        "steps": 8,
        "trained": ["adapters.up", "head.scale", "head.bias"],
        "unit": "record",
    }


def entry(**details: object) -> Entry:
    fields = {
        "v": 1,
        "seq": 1,
        "prev": "",
        "hash": "",
        "sig": "",
        "kind": "reserve",
        "site": "a",
        "time": "",
        "job": "j",
    }
    price = {"sample_rate": "0.25", "noise_multiplier": "1.5", "steps": 8}
    return Entry(**fields, dataset="d", details={**price, **details})  # type: ignore[arg-type]


def test_an_entry_without_a_later_detail_costs_what_it_did_and_an_unknown_mechanism_is_refused() -> None:
    for known in ({}, {"mechanism": "poisson-subsampled-gaussian"}, {"mechanism": "gaussian co-occurrence counts"}):
        assert [charge.steps for charge in charges([entry(**known)])] == [Steps(0.25, 1.5, 8)]
    with pytest.raises(LedgerError, match=r"entry 1 of 'd' .*mechanism 'tree' is not one that this release can price"):
        charges([entry(mechanism="tree")])


def test_a_mechanism_is_the_job_s(demo: JobConfig) -> None:
    one = Mechanism.of(demo)
    assert one == Mechanism("record", 0.25, 1.2346, 0.1, 8, "feature_space")
    assert one.steps() == Steps(0.25, 1.2346, 8)
    assert one.steps(40).count == 40
    bounds = {"adapters": 0.3, "head": 0.1}
    grouped = replace(demo, privacy=replace(demo.privacy, group_norms=bounds))
    assert Mechanism.of(grouped).describe()["max_grad_norm"] == bounds
    with pytest.raises(ValueError, match="noise_multiplier is not worked out"):
        Mechanism.of(replace(demo, privacy=replace(demo.privacy, noise_multiplier=None)))
