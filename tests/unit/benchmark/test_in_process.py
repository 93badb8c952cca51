"""A benchmark's federations: shared towers and records change no number; divisions and masks."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmpt_core.benchmark.cases import cases_of
from fedmpt_core.benchmark.in_process import Federation, open_federation
from fedmpt_core.benchmark.inputs import BenchmarkInputs
from fedmpt_core.benchmark.shared_records import SharedRecords
from fedmpt_core.federation.site.session import SiteSession
from tests.fakes import FakeBackbone


def test_sharing_towers_and_records_changes_no_number(
    inputs: BenchmarkInputs, shared: SharedRecords, cache: Path
) -> None:
    job = inputs.job("fedmpt", 0)
    records = shared.records(job, inputs.sites)
    sessions = {
        name: SiteSession(job, dataclasses.replace(site, cache_dir=str(cache)), name, backbone=FakeBackbone())
        for name, site in records.sites.items()
    }
    joined = {name: session.prepare() for name, session in sessions.items()}
    alone = list(Federation(job, sessions, joined).rounds())
    with open_federation(job, records.sites, backbone=shared.backbone(job.backbone), data=records.data) as federation:
        together = list(federation.rounds())
        assert len({id(s.backbone) for s in federation.sessions.values()}) == 1
    assert [r.row["round"] for r in together] == [0, 1, 2]
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one.state, other.state)
    assert set(together[-1].row["bytes_sent"].values()) == {32 + 4 * len(together[-1].state)}
    assert together[-1].steps == 2
    assert {"mAP", "zero_shot"} <= set(alone[0].row)
    assert "mAP" not in together[0].row  # records without a test split: the benchmark judges by itself


def test_a_share_of_the_sites_is_asked(inputs: BenchmarkInputs, shared: SharedRecords) -> None:
    job = inputs.job("linear", 0)
    records = shared.records(job, inputs.sites, 0.2)
    some = dataclasses.replace(job, federation=dataclasses.replace(job.federation, participation=0.5))
    backbone = shared.backbone(job.backbone)
    with open_federation(some, records.sites, backbone=backbone, data=records.data) as federation:
        assert [r.steps for r in federation.rounds()] == [0, 2, 2]  # two of four sites, one step each


def test_records_are_shared_out_anew_by_their_labels(
    inputs: BenchmarkInputs, shared: SharedRecords, cache: Path
) -> None:
    job = inputs.job("linear", 0)
    plain = shared.records(job, inputs.sites)
    spread = shared.records(job, inputs.sites, 0.3)
    assert len(spread.sites) == 6

    def digests(records: Any) -> list[str]:
        return sorted(d for data in records.data.values() for d in data.train.features.digests())

    assert digests(plain) == digests(spread)
    for name, data in spread.data.items():
        assert data.train is not None
        policy = spread.sites[name].privacy
        assert policy is not None
        assert policy.units == len(data.train.targets) == len(data.train.features)
    assert np.array_equal(spread.held_out.independent.targets, plain.held_out.independent.targets)
    again = SharedRecords(cache, load=lambda _: FakeBackbone()).records(job, inputs.sites, 0.3)
    assert [d.train.features.digests() for d in again.data.values() if d.train] == [
        d.train.features.digests() for d in spread.data.values() if d.train
    ]


def test_masks_drop_training_labels_alone(inputs: BenchmarkInputs, shared: SharedRecords) -> None:
    case = next(c for c in cases_of(inputs, "masks", ["linear"], [0]) if c.value == 0.5)
    plain, masked = shared.records(case.job, inputs.sites), shared.records(case.job, case.sites)
    for name, data in plain.data.items():
        other = masked.data[name]
        assert data.train is not None
        assert other.train is not None
        assert (other.train.targets <= data.train.targets).all()
        assert 0.2 < other.train.targets.sum() / data.train.targets.sum() < 0.8
    for split in ("val", "independent", "correlated"):
        assert np.array_equal(getattr(plain.held_out, split).targets, getattr(masked.held_out, split).targets)


def test_features_taken_are_those_of_the_records(inputs: BenchmarkInputs, shared: SharedRecords) -> None:
    features = shared.records(inputs.job("linear", 0), inputs.sites).held_out.independent.features
    taken = features.take([3, 0, 3])
    assert torch.equal(taken.batch([0, 1, 2]), features.batch([3, 0, 3]))
    assert taken.digests() == [features.digests()[i] for i in (3, 0, 3)]
    assert len(features.take([])) == 0
    with pytest.raises(ValueError, match="index 99 is out of range"):
        features.take([99])
