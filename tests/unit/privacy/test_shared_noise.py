"""Sites that share the noise of a sum: what a job must say, what leaves, that the sum is noisy enough, broken twins."""

from collections.abc import Callable
from dataclasses import replace
from math import erf, exp, log, sqrt
from typing import Any

import numpy as np
import pytest
import torch

from fedmpt_core.config.federation import FederationConfig
from fedmpt_core.config.job import JobConfig, ModelConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.secagg import SecAggConfig
from fedmpt_core.config.server_step import ServerStepConfig
from fedmpt_core.federation.terms import encoding_of
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from fedmpt_core.privacy.accounting.epsilon import Steps, epsilon
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.machinery import REAL, Machinery
from fedmpt_core.privacy.mechanism.mechanism import SHARES, Mechanism
from fedmpt_core.privacy.mechanism.noise import ClipGroup, PrivateOptimizer
from fedmpt_core.privacy.mechanism.private_update import private_update
from fedmpt_core.privacy.mechanism.self_test import self_test
from fedmpt_core.privacy.mechanism.shared_noise import LEAST_STEPS, REACH, SharedNoise, largest_batch
from fedmpt_core.training.local import TrainingRecords
from tests.fakes import FakeBackbone

CLASSES, CONDITIONS = ("cat", "dog", "tv monitor"), ("color", "pose")
BOUND, UNITS = 0.7, 8


def shared(sites: int = 3, most: int = 5, **privacy: Any) -> JobConfig:
    return JobConfig(
        "job",
        CLASSES,
        model=ModelConfig(conditions=CONDITIONS),
        training=TrainingConfig(rounds=40, local_steps=1),
        privacy=PrivacyConfig(
            **{"noise": "distributed", "engine": "exact", "noise_multiplier": 1.0, "max_grad_norm": BOUND} | privacy
        ),
        secagg=SecAggConfig(max_sites=most, max_weight=UNITS),
        federation=FederationConfig(min_sites=sites, weighting="records"),
        server=ServerStepConfig(learning_rate=5.0),
    )


def model(job: JobConfig) -> FedMPT:
    return FedMPT(FakeBackbone(), CLASSES, CONDITIONS, job.model, 0)


@pytest.mark.parametrize(
    ("table", "setting", "value", "sentence"),
    [
        ("privacy", "mechanism", "none", "dp-sgd"),
        ("secagg", "mechanism", "none", "a share protects nothing by itself"),
        ("secagg", "colluders", 0, "at least one must be reckoned with"),
        ("secagg", "colluders", 2, "fewer than 2 sites to share the noise"),
        ("training", "local_steps", 2, "a second step would follow"),
        ("training", "local_steps", None, "training.local_steps = 1"),
        ("federation", "weighting", "equal", "federation.weighting = 'records'"),
        ("privacy", "engine", "feature_space", "privacy.engine = 'exact'"),
        ("training", "learning_rate", 0.5, "training.learning_rate is a site's"),
        ("training", "momentum", 0.0, "training.momentum is a site's"),
        ("secagg", "rounding", "deterministic", "secagg.rounding is not used"),
        ("secagg", "value_range", 8.0, "secagg.value_range is not used"),
    ],
)
def test_a_job_that_would_share_noise_wrongly_is_refused(table: str, setting: str, value: Any, sentence: str) -> None:
    job = shared()
    with pytest.raises(ValueError, match=f"distributed.*{sentence}"):
        replace(job, **{table: replace(getattr(job, table), **{setting: value})})


def test_a_job_of_noise_at_each_site_has_no_server_step() -> None:
    with pytest.raises(ValueError, match=r"server\.learning_rate is for privacy\.noise = 'distributed'"):
        JobConfig("job", CLASSES, server=ServerStepConfig(learning_rate=5.0))


@pytest.mark.parametrize(
    ("noise", "most", "sentence"),
    [
        (5e-5, 3, "is 4.63 steps wide.*max_sites=3, at least 64 are needed"),
        (0.02, 1000, "steps wide.*max_sites=1000"),
        (1e4, 1000, "max_sites=1000 sites have no room"),
    ],
)
def test_a_share_that_no_grid_has_room_for_is_refused(noise: float, most: int, sentence: str) -> None:
    job = shared(most=most, noise_multiplier=noise)
    job = replace(job, secagg=replace(job.secagg, max_weight=5000))
    with pytest.raises(ValueError, match=f"distributed.*{sentence}"):
        Mechanism.of(job)


@pytest.mark.parametrize("noise", [0.3, 1.2, 12.0, 60.0])
@pytest.mark.parametrize(("most", "units"), [(3, 8), (10, 500), (100, 500), (100, 50_000), (1000, 5000)])
def test_no_sum_runs_over_and_each_share_is_wide(noise: float, most: int, units: int) -> None:
    job = replace(shared(most=most, noise_multiplier=noise), secagg=SecAggConfig(max_sites=most, max_weight=units))
    noisy = SharedNoise.of(job)
    share = noise / sqrt(noisy.honest)
    widest = noisy.limit + REACH * share * (2**noisy.bits + 2**11) + 1  # rounding, and 2^22 numbers
    assert widest <= noisy.room
    assert most * noisy.room < 2**31
    assert share * 2**noisy.bits >= LEAST_STEPS
    if noisy.bits > 12:  # no batch can be cut off
        assert noisy.limit >= largest_batch(job.privacy.sample_rate, units) * 2**noisy.bits


def test_who_must_be_honest_follows_from_the_job_alone() -> None:
    mechanism = Mechanism.of(shared(sites=7, most=10))
    facts = mechanism.describe()
    assert facts["mechanism"] == SHARES
    assert (facts["honest"], facts["min_sites"], facts["colluders"]) == (6, 7, 1)
    assert facts["share_multiplier"] == pytest.approx(1 / sqrt(6))
    assert mechanism.steps().noise_multiplier == 1.0
    assert mechanism.steps(40).alone == Steps(0.25, facts["share_multiplier"], 40)


def delta(probabilities: Callable[[int], float], shift: int, rate: float, at: float, reach: int) -> float:
    """Hockey-stick divergence of integers' distribution, one record of `shift` steps taken with probability `rate`."""
    numbers = np.arange(-reach, reach + 1)
    without, there = (np.array([probabilities(int(n) - s) for n in numbers]) for s in (0, shift))
    taken = (1 - rate) * without + rate * there
    return max(np.maximum(a - exp(at) * b, 0).sum() for a, b in ((taken, without), (without, taken)))


@pytest.mark.parametrize("width", [0.5, 1.0, 4.0, 14.0, 45.0])
@pytest.mark.parametrize("honest", [2, 6])
def test_a_sum_of_rounded_shares_is_as_private_as_the_gaussian(width: float, honest: int) -> None:
    """By exact convolution of what `integers` draws; never above the continuous Gaussian of all shares' variance."""
    reach = int(14 * width) + 3
    edges = np.arange(-reach, reach + 2) - 0.5
    one = np.diff([0.5 * (1 + erf(e / width / sqrt(2))) for e in edges])
    total = one
    for _ in range(honest - 1):
        total = np.convolve(total, one)
    half, sigma = len(total) // 2, width * sqrt(honest)

    def integers(n: int) -> float:
        return float(total[n + half]) if abs(n) <= half else 0.0

    for rate, ratio in ((1.0, 0.5), (0.25, 1.0), (1.0, 2.0)):  # of the shift to the noise
        shift = max(1, round(sigma * ratio))
        for at in (0.1, 1.0, 3.0):
            mu = shift / sigma
            plain = _gaussian(mu, rate, at)
            exactly = delta(integers, shift, rate, at, half + shift)
            assert exactly <= plain * (1 + 1e-9) + 1e-13, (rate, ratio, at)


def _gaussian(mu: float, rate: float, at: float) -> float:
    """Of the sampled Gaussian N(0, 1) and N(mu, 1), both directions, by fine sums."""
    x = np.linspace(-14 - mu, 14 + 2 * mu, 400_001)
    without, there = (np.exp(-((x - m) ** 2) / 2) / sqrt(2 * np.pi) for m in (0, mu))
    taken, step = (1 - rate) * without + rate * there, x[1] - x[0]
    return max(float(np.maximum(a - exp(at) * b, 0).sum() * step) for a, b in ((taken, without), (without, taken)))


def optimizer(mechanism: Mechanism, numbers: int) -> Any:
    parameter = torch.nn.Parameter(torch.zeros(numbers))
    step = torch.optim.SGD([parameter], lr=1.0)
    return REAL.noisy(mechanism, step, {"head.w": parameter}, UNITS, Keystream(bytes(32))), parameter


def integers_of(mechanism: Mechanism, gradients: np.ndarray) -> np.ndarray:
    """What a site sends for these gradients with the same noise each time, (d,) int64."""
    noisy, parameter = optimizer(mechanism, gradients.shape[1])
    parameter.grad_sample = torch.from_numpy(gradients)
    return noisy.share().view(np.int32).astype(np.int64)


def test_one_record_moves_the_integers_by_its_bound_at_most() -> None:
    """A thousand hostile neighbours: huge, tiny, all in one number, just above the bound, halves of a grid step."""
    rng, mechanism = np.random.default_rng(1), Mechanism.of(shared(noise_multiplier=0.5))
    grid = BOUND * 2.0**-mechanism.grid_bits
    worst = 0.0
    for trial in range(1000):
        size = int(rng.integers(1, 60))
        scale = 10.0 ** rng.uniform(-9, 9, (int(rng.integers(1, 6)), 1))
        rows = (rng.standard_normal((len(scale), size)) * scale).astype(np.float32)
        if trial % 3 == 1:
            rows[0] = np.float32(grid) * (np.round(rows[0]) + 0.5)
        if trial % 3 == 2:
            rows[0] = 0
            rows[0, 0] = np.float32(BOUND * rng.choice([1, 1 + 1e-7, -1, 1e12]))
        moved = np.linalg.norm(integers_of(mechanism, rows) - integers_of(mechanism, rows[1:]))
        worst = max(worst, moved / (2.0**mechanism.grid_bits + sqrt(size)))
    assert 0.9 < worst <= 1


def test_the_sum_has_the_noise_that_is_claimed() -> None:
    """Three sites, words added modulo 2^32: the decoded mean's noise is sqrt(3/2) of that of two honest sites."""
    job = shared(noise_multiplier=1.3)
    mechanism, numbers = Mechanism.of(job), 20_000
    total = np.zeros(numbers, np.uint32)
    for _ in range(3):
        parameter = torch.nn.Parameter(torch.zeros(numbers))
        parameter.grad_sample = torch.zeros(0, numbers)  # type: ignore[attr-defined]
        step = torch.optim.SGD([parameter], lr=1.0)
        total += REAL.noisy(mechanism, step, {"head.w": parameter}, UNITS, Keystream()).share()
    layout = type(model(job).layout())(("head.w",), ((numbers,),))
    mean = encoding_of(job, layout).decode(total, [1.0, 1.0, 0.5]).mean
    charged = 1.3 * BOUND * (1 + 2.0**-mechanism.grid_bits * sqrt(numbers)) * sqrt(3 / 2)
    assert np.std(mean) * job.privacy.sample_rate * 2.5 * UNITS == pytest.approx(charged, rel=0.02)


def test_what_is_too_large_is_cut_off_before_the_noise_and_wraps_round_after_none() -> None:
    mechanism = Mechanism.of(shared(most=1000, noise_multiplier=20.0))
    assert mechanism.shared is not None
    tight = replace(mechanism, shared=replace(mechanism.shared, limit=5))
    rows = np.full((1, 4), 1e9, np.float32)
    apart = integers_of(tight, rows) - integers_of(tight, rows[:0])
    assert (apart == 5).all()  # noise is the same, and far beyond the limit
    assert np.abs(integers_of(tight, rows)).max() > 1000


def test_the_self_test_passes_shares_again_and_again() -> None:
    for job in (
        shared(),
        shared(
            sites=6,
            most=100,
            noise_multiplier=4.0,
            group_norms=dict.fromkeys(("contexts", "adapters", "gate", "head"), 0.5),
        ),
    ):
        checks = self_test(model(job), job, Mechanism.of(job))
        assert [c for c in checks if not c.passed] == []


class CutOffAfterNoise(PrivateOptimizer):
    def integers(self) -> dict[str, np.ndarray]:
        return {name: np.clip(values, -(2**19), 2**19) for name, values in super().integers().items()}


class RoundedAtRandomAfterNoise(PrivateOptimizer):
    def integers(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng()
        return {n: 16 * np.floor(v / 16 + rng.random(v.shape)).astype(np.int64) for n, v in super().integers().items()}


class ShareOfAllSites(PrivateOptimizer):
    """Noise over the root of the sites in the cohort, not of those that must be honest."""

    def noise_stds(self) -> list[float]:
        return [std * sqrt(2 / 5) for std in super().noise_stds()]


class SameShareAgain(PrivateOptimizer):
    def integers(self) -> dict[str, np.ndarray]:
        self._keystream = Keystream(bytes(32))
        return super().integers()


class NoShare(PrivateOptimizer):
    def noise_stds(self) -> list[float]:
        return [0.0 for _ in super().noise_stds()]


@pytest.mark.parametrize(
    "broken", [CutOffAfterNoise, RoundedAtRandomAfterNoise, ShareOfAllSites, SameShareAgain, NoShare]
)
def test_the_self_test_stops_broken_shares(broken: type[PrivateOptimizer]) -> None:
    job = shared()
    checks = self_test(model(job), job, Mechanism.of(job), Machinery(optimizer=broken))
    assert any(not check.passed for check in checks)


def records() -> TrainingRecords:
    class Patches:
        def __len__(self) -> int:
            return UNITS

        def batch(self, indices: Any) -> torch.Tensor:
            return torch.ones(len(indices), 4, 16)

    targets = np.eye(3, dtype=np.uint8)[np.arange(UNITS) % 3]
    return TrainingRecords(Patches(), targets, np.arange(UNITS))  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [2, 8])
def test_a_second_step_from_a_sum_of_one_share_is_refused(steps: int) -> None:
    job = shared()
    subject = model(job)
    with pytest.raises(ValueError, match="sites that share their noise take one"):
        private_update(
            subject,
            records(),
            state=subject.vector(),
            round_number=1,
            job=job,
            mechanism=replace(Mechanism.of(job), steps_per_round=steps),
            declared_units=UNITS,
            keystream=Keystream(),
        )


def test_accounting_of_the_sum_and_of_a_share_alone() -> None:
    """The table of what is left if the masks fail (docs/privacy.md): epsilon 8, rate 0.25, 40 steps."""
    for sites, alone in ((3, 14.3), (4, 20.6), (7, 40.4)):
        mechanism = Mechanism.of(shared(sites=sites, most=10, noise_multiplier=1.235))
        assert epsilon([mechanism.steps(40)], 1e-5) == pytest.approx(8.0, abs=0.05)
        assert epsilon([mechanism.steps(40).alone], 1e-5) == pytest.approx(alone, abs=0.15)


def test_clip_groups_have_grids_of_their_own() -> None:
    groups = {"contexts": 2.0, "adapters": 1.0, "gate": 0.5, "head": 0.25}
    job = shared(group_norms=groups)
    subject = model(job)
    grid = encoding_of(job, subject.layout()).grid  # type: ignore[union-attr]
    named = subject.layout().split(grid.astype(np.float32))
    bits = Mechanism.of(job).grid_bits
    for name, values in named.items():
        assert values == pytest.approx(groups[name.split(".")[0]] * 2.0**-bits)
    assert ClipGroup(("x",), 1.0).max_grad_norm == 1.0
    assert log(grid.max() / grid.min(), 2) == 3
