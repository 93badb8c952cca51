"""The server's step against torch's optimizers, its memory over a break, and how far it can move the parameters."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedmpt_core.config.federation import FederationConfig
from fedmpt_core.config.job import JobConfig, ModelConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.secagg import SecAggConfig
from fedmpt_core.config.server_step import ServerStepConfig
from fedmpt_core.federation.movement import largest_change, largest_movement
from fedmpt_core.federation.server.optimizer import ServerOptimizer
from fedmpt_core.federation.terms import encoding_of
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.machinery import REAL
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from tests.settings import UNMASKED, UNPROTECTED

ROUNDS, UNITS = 12, 100
LAYOUT = ParameterLayout(("adapters.up", "head.bias"), ((3, 4), (5,)))
START = np.linspace(-1, 1, LAYOUT.size).astype(np.float32)


def job(federation: dict[str, Any] | None = None, **server: Any) -> JobConfig:
    return JobConfig(
        "s",
        ("cat", "dog"),
        model=ModelConfig(condition_tokens=0),
        training=TrainingConfig(rounds=ROUNDS, local_steps=1),
        privacy=PrivacyConfig(noise="distributed", engine="exact", noise_multiplier=1.0),
        secagg=SecAggConfig(max_sites=3, max_weight=UNITS),
        federation=FederationConfig(**{"weighting": "records", "max_movement": 1e6, **(federation or {})}),
        server=ServerStepConfig(**{"learning_rate": 0.01, "schedule": "constant", **server}),
    )


def gradients(size: int = LAYOUT.size) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.normal(size=size) for _ in range(ROUNDS)]


def states(
    agreed: JobConfig, means: Sequence[np.ndarray], start: np.ndarray = START, break_at: int = 0
) -> list[np.ndarray]:
    server, state, passed = ServerOptimizer(agreed, LAYOUT), start, []
    for number, mean in enumerate(means, 1):
        if number == break_at:
            memory = server.memory()
            server = ServerOptimizer(agreed, LAYOUT)
            server.recall(memory)
        state = server.next(state, mean, number)
        passed.append(state)
    return passed


@pytest.mark.parametrize(
    "server",
    [
        {"momentum": 0.0},
        {"momentum": 0.9, "schedule": "cosine"},
        {"optimizer": "adam", "momentum": 0.9},
        {"optimizer": "adam", "momentum": 0.5, "beta2": 0.9, "group_rates": {"head": 3.0}},
    ],
)
def test_a_step_is_torch_s(server: dict[str, Any]) -> None:
    agreed = job(**server)
    passed = states(agreed, gradients())
    s = agreed.server
    split = [torch.nn.Parameter(torch.from_numpy(t.astype(np.float64))) for t in LAYOUT.split(START).values()]
    groups = [
        {"params": [parameter], "lr": s.learning_rate * s.group_rates.get(name, 1.0)}  # type: ignore[call-overload]
        for name, parameter in zip(("adapters", "head"), split, strict=True)
    ]
    plain: torch.optim.Optimizer = (
        torch.optim.Adam(groups, betas=(s.momentum, s.beta2))
        if s.optimizer == "adam"
        else torch.optim.SGD(groups, lr=1.0, momentum=s.momentum)
    )
    rates = [group["lr"] for group in plain.param_groups]
    for number, gradient in enumerate(gradients()):
        for group, rate in zip(plain.param_groups, rates, strict=True):
            group["lr"] = rate * (0.5 * (1 + np.cos(np.pi * number / ROUNDS)) if s.schedule == "cosine" else 1.0)
        for parameter, part in zip(split, LAYOUT.split(gradient).values(), strict=True):
            parameter.grad = torch.from_numpy(part.copy())
        plain.step()
        whole = np.concatenate([p.detach().numpy().ravel() for p in split])
        assert passed[number] == pytest.approx(whole, abs=1e-5)


def test_where_sites_train_by_themselves_the_mean_is_added() -> None:
    agreed = JobConfig("s", ("cat", "dog"), privacy=UNPROTECTED, secagg=UNMASKED)
    server = ServerOptimizer(agreed, LAYOUT)
    update = np.full(LAYOUT.size, 0.01)
    assert server.next(START, update, 1) == pytest.approx(START + 0.01)
    assert server.memory() == {}


@pytest.mark.parametrize(
    "server", [{"momentum": 0.9}, {"optimizer": "adam", "momentum": 0.9}, {"averaging": 0.5}, {"averaging": 1.0}]
)
def test_who_remembers_goes_on_as_if_nothing_had_happened(server: dict[str, Any]) -> None:
    agreed = job(**server)
    whole = states(agreed, gradients())
    for broken in (2, 7, 12):
        assert all(map(np.array_equal, states(agreed, gradients(), break_at=broken), whole))


def test_the_last_rounds_are_averaged_when_the_run_ends() -> None:
    plain, averaged = states(job(), gradients()), states(job(averaging=0.25), gradients())
    assert all(map(np.array_equal, averaged[:-1], plain[:-1]))
    assert averaged[-1] == pytest.approx(np.mean(plain[-3:], axis=0), abs=1e-6)


@pytest.mark.parametrize("server", [{"momentum": 0.9}, {"optimizer": "adam", "momentum": 0.9}, {"averaging": 0.5}])
def test_a_sum_that_no_honest_sites_can_have_moves_no_further_than_sites_take(server: dict[str, Any]) -> None:
    agreed = job({"max_movement": 0.05}, **server)
    passed = states(agreed, [1e9 * g for g in gradients()])
    for number, (before, after) in enumerate(zip([START, *passed], passed, strict=False), 1):
        largest = largest_change(agreed, LAYOUT, number, float(np.linalg.norm(before)))
        assert np.linalg.norm(after.astype(np.float64) - before) <= largest * (1 + 1e-5)


@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("adam", 0.9)])
def test_the_real_mechanism_moves_no_further_and_not_far_less(optimizer: str, momentum: float) -> None:
    """Three sites whose units all point one way, with the noise that they draw: the bound is from public numbers."""
    agreed = job({"min_units": UNITS}, optimizer=optimizer, momentum=momentum)
    mechanism, numbers = Mechanism.of(agreed), 400
    layout = ParameterLayout(("adapters.up",), ((numbers,),))
    server, state = ServerOptimizer(agreed, layout), np.zeros(numbers, np.float32)
    batch = int(2 * UNITS * agreed.privacy.sample_rate)
    for number in range(1, ROUNDS + 1):
        total = np.zeros(numbers, np.uint32)
        for _ in range(3):
            parameter = torch.nn.Parameter(torch.zeros(numbers))
            parameter.grad_sample = torch.ones(batch, numbers)  # type: ignore[attr-defined]
            step = torch.optim.SGD([parameter], lr=1.0)
            total += REAL.noisy(mechanism, step, {"adapters.up": parameter}, UNITS, Keystream()).share()
        mean = encoding_of(agreed, layout).decode(total, [1.0] * 3).mean
        after = server.next(state, mean, number)
        moved = float(np.linalg.norm(after.astype(np.float64) - state))
        largest = largest_movement(agreed, layout, number, float(np.linalg.norm(state)))
        assert not server.shortened
        assert moved <= largest
        state = after
    assert moved >= largest / 8  # momentum is nearly steady after so many rounds


def test_a_site_takes_no_parameters_beyond_the_server_s_own_step() -> None:
    near, far = (job({"min_units": units}) for units in (10_000, 100))
    assert largest_movement(near, LAYOUT, 1, 0.0) < largest_movement(far, LAYOUT, 1, 0.0)
    tight = replace(near, server=replace(near.server, learning_rate=1e-6))
    assert largest_movement(tight, LAYOUT, 1, 0.0) < 1e-3 * largest_movement(near, LAYOUT, 1, 0.0)
