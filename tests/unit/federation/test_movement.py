"""How far a round can move the parameters: bounds that the real optimizers keep, and do not keep by miles."""

from dataclasses import replace
from math import inf, isfinite, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpt_core.config.job import FederationConfig, JobConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.federation.movement import largest_movement, shortened
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.noise import ClipGroup, PrivateOptimizer
from tests.settings import UNMASKED, UNPROTECTED

SIZE = 500
LAYOUT = ParameterLayout(("adapters.up",), ((SIZE,),))
CONTEXTS = ParameterLayout(("contexts.condition",), ((SIZE,),))
WIDE = FederationConfig(max_movement=1e6, min_units=40)
JOB = JobConfig(
    "m",
    ("cat", "dog"),
    training=TrainingConfig(rounds=4, local_steps=6, learning_rate=0.5, momentum=0.9, weight_decay=0.0),
    privacy=PrivacyConfig(noise_multiplier=1.1, sample_rate=0.25, max_grad_norm=0.7),
    secagg=UNMASKED,
    federation=WIDE,
)


def trained(job: JobConfig, start: torch.Tensor, gradients: torch.Tensor) -> float:
    """How far torch's optimizer moves under these gradients, (steps, SIZE)."""
    parameter = torch.nn.Parameter(start.clone())
    t = job.training
    if t.optimizer == "adam":
        optimizer = torch.optim.Adam(
            [parameter], lr=t.learning_rate, betas=(t.momentum, 0.999), weight_decay=t.weight_decay
        )
    else:
        optimizer = torch.optim.SGD([parameter], lr=t.learning_rate, momentum=t.momentum, weight_decay=t.weight_decay)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return float((parameter.detach() - start).norm())


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99, 0.9997])
@pytest.mark.parametrize("kind", ["constant", "growing", "spike", "random"])
def test_adam_moves_no_further_whatever_the_gradients(momentum: float, kind: str) -> None:
    job = replace(JOB, privacy=UNPROTECTED, training=replace(JOB.training, optimizer="adam", momentum=momentum))
    torch.manual_seed(0)
    steps = 6
    gradients = {
        "constant": torch.ones(steps, SIZE),
        "growing": 10.0 ** torch.arange(0, 2 * steps, 2)[:, None] * torch.ones(steps, SIZE),
        "spike": torch.eye(steps)[:, 2:3] * torch.ones(steps, SIZE),
        "random": torch.randn(steps, SIZE),
    }[kind]
    for layout in (LAYOUT, CONTEXTS):
        largest = largest_movement(job, layout, 1, 0.0)
        assert trained(job, torch.zeros(SIZE), gradients.float()) <= largest * 1.0001
        assert isfinite(largest)


def test_adam_s_bound_is_reached_by_steady_gradients() -> None:
    job = replace(
        JOB, privacy=UNPROTECTED, training=replace(JOB.training, optimizer="adam", momentum=0.0, local_steps=1)
    )
    largest = largest_movement(job, LAYOUT, 1, 0.0)
    assert trained(job, torch.zeros(SIZE), torch.ones(1, SIZE)) == pytest.approx(largest, rel=1e-4)


class Real:
    """The real mechanism's noise on gradients that all point one way, with torch's SGD behind it."""

    def __init__(self, job: JobConfig, batch: int) -> None:
        self.parameter = torch.nn.Parameter(torch.ones(SIZE))
        t, p = job.training, job.privacy
        inner = torch.optim.SGD([self.parameter], lr=t.learning_rate, momentum=t.momentum, weight_decay=t.weight_decay)
        self.optimizer = PrivateOptimizer(
            inner,
            {"adapters.up": self.parameter},
            [ClipGroup(("adapters.up",), p.max_grad_norm)],
            noise_multiplier=p.noise_multiplier or inf,
            expected_batch_size=p.sample_rate * job.federation.min_units,
            keystream=Keystream(),
        )
        self.batch = batch

    def moved(self, steps: int) -> float:
        for _ in range(steps):
            self.parameter.grad_sample = torch.ones(self.batch, SIZE)  # type: ignore[attr-defined]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return float((self.parameter.detach() - 1).norm())


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_private_mechanism_moves_no_further_and_not_far_less(momentum: float, decay: float) -> None:
    job = replace(JOB, training=replace(JOB.training, momentum=momentum, weight_decay=decay))
    largest = largest_movement(job, LAYOUT, 1, sqrt(SIZE))
    moved = max(Real(job, batch=20).moved(job.steps_per_round) for _ in range(20))  # 40 units, 10 expected in a batch
    assert moved <= largest
    assert moved >= largest / 4


def test_without_noise_to_speak_of_the_signal_decides() -> None:
    quiet = replace(JOB, privacy=replace(JOB.privacy, noise_multiplier=1e-6))
    loud = replace(JOB, privacy=replace(JOB.privacy, noise_multiplier=100.0))
    assert largest_movement(quiet, LAYOUT, 1, 0.0) < largest_movement(JOB, LAYOUT, 1, 0.0)
    assert largest_movement(loud, LAYOUT, 1, 0.0) > 10 * largest_movement(JOB, LAYOUT, 1, 0.0)


def test_the_schedule_and_the_least_units_tighten_the_bound() -> None:
    first, last = (largest_movement(JOB, LAYOUT, number, 0.0) for number in (1, 4))
    assert last < first / 4
    few = replace(JOB, federation=replace(WIDE, min_units=1))
    assert largest_movement(few, LAYOUT, 1, 0.0) > 5 * first


def test_noise_that_goes_through_the_text_tower_has_the_declared_bound() -> None:
    agreed = replace(JOB, federation=replace(WIDE, max_movement=3.0))
    assert largest_movement(agreed, CONTEXTS, 1, 0.0) == 3.0 * sqrt(SIZE)
    exact = replace(agreed, privacy=replace(agreed.privacy, engine="exact"))
    assert largest_movement(exact, CONTEXTS, 1, 0.0) < 3.0 * sqrt(SIZE)


@settings(deadline=None)
@given(
    st.floats(1e-6, 100),
    st.floats(0, 0.9999),
    st.floats(0, 1),
    st.sampled_from(["sgd", "adam"]),
    st.sampled_from([1, 3, 1_000_000]),
    st.floats(0, 1e30),
    st.integers(1, 4),
)
def test_whatever_a_job_says_the_bound_is_a_number(
    rate: float, momentum: float, decay: float, optimizer: str, steps: int, norm: float, number: int
) -> None:
    training = TrainingConfig(4, steps, learning_rate=rate, momentum=momentum, weight_decay=decay)
    training = replace(training, optimizer=optimizer)
    for privacy in (JOB.privacy, UNPROTECTED):
        largest = largest_movement(replace(JOB, training=training, privacy=privacy), LAYOUT, number, norm)
        assert 0 < largest <= 1e6 * sqrt(SIZE)


def test_a_mean_within_the_bound_stays_and_one_beyond_is_shortened() -> None:
    agreed = replace(JOB, privacy=UNPROTECTED, federation=FederationConfig(max_movement=0.5))
    state, bound = np.zeros(SIZE, np.float32), 0.5 * sqrt(SIZE)
    within, beyond = np.full(SIZE, 0.4), np.full(SIZE, -3.0)
    assert shortened(within, agreed, LAYOUT, 1, state) is within
    back = shortened(beyond, agreed, LAYOUT, 1, state)
    assert np.linalg.norm(back) == pytest.approx(bound)
    assert np.allclose(back, -0.5)
    masked = replace(agreed, secagg=replace(UNMASKED, mechanism="pairwise-masking", value_range=0.1))
    assert np.allclose(shortened(beyond, masked, LAYOUT, 1, state), -0.1)
