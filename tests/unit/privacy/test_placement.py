"""A record's gradient and what it adds to a sum do not depend on the records beside it, by a bit."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmpt_core.config.job import JobConfig, ModelConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.site import DataConfig, SiteConfig, SitePrivacyConfig
from fedmpt_core.model.base import TunedModel
from fedmpt_core.model.registry import build_model
from fedmpt_core.privacy.charged_training import ChargedTraining
from fedmpt_core.privacy.ledger.budget import resolved
from fedmpt_core.privacy.ledger.site_ledger import create_ledger
from fedmpt_core.privacy.mechanism.gradients import GradientEngine
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.machinery import REAL, Machinery
from fedmpt_core.privacy.mechanism.noise import GRID_BITS, ClipGroup, PrivateOptimizer
from fedmpt_core.privacy.mechanism.placement import block_rows, depends_on_place
from tests.fakes import FakeBackbone, Table, training_records

JOB = resolved(
    JobConfig(
        "p",
        ("cat", "dog", "bus"),
        model=ModelConfig(conditions=("color", "pose"), adapter_width=4, gate_width=4),
        training=TrainingConfig(rounds=1, local_steps=2, learning_rate=0.05),
        privacy=PrivacyConfig(epsilon=8.0, sample_rate=0.5, max_grad_norm=0.3),
    )
)


def model(job: JobConfig = JOB, **tower: Any) -> TunedModel:
    return build_model(FakeBackbone(**tower), job.classes, job.model, job.seed)


@pytest.mark.parametrize("rows", [2, 16, 48])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trained": "adapters"},
        {"components": ("prompts", "adapters", "gate")},
        {"prediction": "literal"},
        {"mixture": "logits"},
    ],
    ids=str,
)
def test_these_kernels_round_alike_in_every_place(rows: int, changes: dict[str, Any]) -> None:
    job = replace(JOB, model=replace(JOB.model, **changes))
    assert depends_on_place(model(job), job, rows) == ""


@pytest.mark.parametrize("method", ["linear", "coop"])
def test_other_methods_round_alike_too(method: str) -> None:
    job = replace(JOB, model=ModelConfig(method=method))  # type: ignore[arg-type]
    assert depends_on_place(model(job), job, 16) == ""


def test_looking_changes_no_model() -> None:
    one = model()
    before = one.vector()
    depends_on_place(one, JOB, 16)
    assert np.array_equal(one.vector(), before)


class Leaning(GradientEngine):
    """As on a machine whose kernels round the last rows of a block by the last bit of another one."""

    def fill(self, parts: Iterable[tuple[Tensor, Tensor, Tensor]], count: int) -> None:
        parts = list(parts)
        super().fill(parts, count)
        beside = [int((block.flatten(1).abs().sum(1) > 0).sum()) for block, _, _ in parts]
        for parameter in self.private.values():
            rows: Any = getattr(parameter, "grad_sample")  # noqa: B009
            if rows.numel() and max(beside, default=0) > 1:
                rows[-1] = torch.nextafter(rows[-1], torch.full_like(rows[-1], torch.inf))


class Neighbourly(GradientEngine):
    """A record's gradient holds a trace of the one before it."""

    def fill(self, parts: Iterable[tuple[Tensor, Tensor, Tensor]], count: int) -> None:
        super().fill(parts, count)
        for parameter in self.private.values():
            rows: Any = getattr(parameter, "grad_sample")  # noqa: B009
            rows[1:] += 1e-6 * rows[:-1].clone()


@pytest.mark.parametrize(("engine", "where"), [(Leaning, "last"), (Neighbourly, "in the middle")])
def test_a_machine_whose_kernels_do_not_is_told_from_one_whose_do(engine: type[GradientEngine], where: str) -> None:
    words = depends_on_place(model(), JOB, 16, Machinery(engine=engine))
    assert words == f"a record that stands {where} under ordinary parameters"


@pytest.mark.parametrize(("engine", "largest"), [(GradientEngine, 12), (Leaning, 1)])
def test_such_a_site_works_on_one_record_at_a_time_and_says_so(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    engine: type[GradientEngine],
    largest: int,
) -> None:
    monkeypatch.setattr("fedmpt_core.privacy.charged_training.require_self_test", lambda *_: None)  # it would fail too
    policy = SitePrivacyConfig("x", units=12, epsilon=20.0, delta=1e-5, ledger=str(tmp_path / "ledgers"))
    create_ledger(policy, "a", None)
    site = SiteConfig(DataConfig("scenes"), privacy=policy, cache_dir=str(tmp_path / "cache"))
    job = replace(JOB, privacy=replace(JOB.privacy, sample_rate=1.0, noise_multiplier=20.0))
    charged = ChargedTraining.open(job, site, "a", "run", None, machinery=replace(REAL, engine=engine))
    one = model(job)
    with caplog.at_level(logging.WARNING):
        charged.test_mechanism(one)
    table = Table(torch.randn(12, 9, 16, generator=torch.Generator().manual_seed(0)))
    records = training_records(table, np.eye(3, dtype=np.uint8)[np.arange(12) % 3])
    charged.train(one, records, state=one.vector(), round_number=1)
    assert table.largest == largest
    said = [m for m in caplog.messages if "gradients are computed one record at a time, which takes longer" in m]
    assert len(said) == (largest == 1)


@pytest.mark.parametrize(
    ("expected", "most", "rows"), [(0.5, 64, 16), (10, 64, 32), (40, 64, 64), (500, 64, 64), (10, 1, 1), (10, 5, 5)]
)
def test_blocks_have_a_public_size(expected: float, most: int, rows: int) -> None:
    assert block_rows(expected, most) == rows


def summed(rows: Tensor, bounds: tuple[float, ...]) -> list[Tensor]:
    """What a batch's sum is before noise, for two parameters, in steps of each one's grid."""
    private = {"one": nn.Parameter(torch.zeros(5)), "two": nn.Parameter(torch.zeros(2, 3))}
    groups = (
        [ClipGroup(("one", "two"), bounds[0])]
        if len(bounds) == 1
        else [ClipGroup((name,), bound) for name, bound in zip(private, bounds, strict=True)]
    )
    optimizer = PrivateOptimizer(
        torch.optim.SGD(list(private.values()), lr=1.0),
        private,
        groups,
        noise_multiplier=1.0,
        expected_batch_size=1.0,
        keystream=Keystream(),
    )
    parameters: dict[str, Any] = dict(private)
    parameters["one"].grad_sample, parameters["two"].grad_sample = rows[:, :5], rows[:, 5:].reshape(-1, 2, 3)
    optimizer.clip_and_accumulate()
    steps = [bounds[0] * 2.0**-GRID_BITS, bounds[-1] * 2.0**-GRID_BITS]
    sums = [parameters[name].summed_grad.flatten() / step for name, step in zip(private, steps, strict=True)]
    assert all((total - total.round()).abs().max() <= 1e-6 for total in sums)
    return [total.round() for total in sums]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**32), st.sampled_from([(1.0,), (3e-3,), (0.7, 1e3)]))
def test_what_a_unit_adds_is_within_the_bound_and_the_same_whoever_is_beside_it(
    units: int, seed: int, bounds: tuple[float, ...]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = 10.0 ** (8 * torch.rand(units, 1, generator=generator) - 5)
    rows = torch.randn(units, 11, generator=generator) * lengths
    out = seed % units
    whole, rest = summed(rows, bounds), summed(torch.cat([rows[:out], rows[out + 1 :]]), bounds)
    alone = summed(rows[out : out + 1], bounds)
    assert all(torch.equal(a - b, c) for a, b, c in zip(whole, rest, alone, strict=True))
    for part in [torch.cat(alone)] if len(bounds) == 1 else alone:
        assert float(part.norm()) <= 2.0**GRID_BITS + len(part) ** 0.5 / 2
