"""Clipping, noise, grid and divisor of the DP optimizer, against what the formula says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.mechanism import GRID_BITS
from fedmpt_core.privacy.mechanism.noise import ClipGroup, PrivateOptimizer

SIGMA = 1.5


class Silent(Keystream):
    """Noise of zero, to look at what lies under it."""

    def normals(self, purpose: str, count: int) -> np.ndarray:
        return np.zeros(count)


def build(
    shapes: dict[str, tuple[int, ...]],
    groups: list[ClipGroup] | None = None,
    *,
    keystream: Keystream | None = None,
    batch: float = 4.0,
    rate: float = 1.0,
) -> PrivateOptimizer:
    private = {n: nn.Parameter(torch.zeros(s)) for n, s in shapes.items()}
    return PrivateOptimizer(
        torch.optim.SGD(private.values(), lr=rate),
        private,
        groups or [ClipGroup(tuple(private), 1.0)],
        noise_multiplier=SIGMA,
        expected_batch_size=batch,
        keystream=keystream or Keystream(),
    )


def feed(optimizer: PrivateOptimizer, samples: dict[str, torch.Tensor], *, last: bool = True) -> None:
    for name, sample in samples.items():
        optimizer.private[name].grad_sample = sample
    optimizer.signal_skip_step(not last)
    optimizer.step()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in optimizer.private.items()}
    optimizer.zero_grad(set_to_none=True)
    optimizer.seen = grads  # type: ignore[attr-defined]


def released(optimizer: PrivateOptimizer) -> dict[str, np.ndarray]:
    return {n: g.double().numpy() for n, g in optimizer.seen.items()}  # type: ignore[attr-defined]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6), st.floats(0.01, 100), st.integers(0, 2**31))
def test_the_release_without_noise_is_the_sum_of_clipped_gradients_over_the_expected_batch(
    units: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    samples = {
        "a": scale * torch.randn(units, 3, 2, generator=generator),
        "b": torch.randn(units, 4, generator=generator),
    }
    optimizer = build({"a": (3, 2), "b": (4,)}, keystream=Silent())
    feed(optimizer, samples)
    wanted = {"a": np.zeros((3, 2)), "b": np.zeros(4)}
    for u in range(units):
        norm = np.sqrt(sum(float(s[u].double().square().sum()) for s in samples.values()))
        for name, sample in samples.items():
            wanted[name] += sample[u].double().numpy() * min(1.0, 1.0 / norm)
    for name, value in released(optimizer).items():
        assert np.abs(value - wanted[name] / 4).max() <= 2.0**-GRID_BITS + 1e-6


def test_no_unit_moves_the_sum_by_more_than_its_bound_whatever_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(5, 50, generator=generator)
    for extreme in (1e-30, 1e-6, 1.0, 1e6, 1e19, 1e30, float("nan"), float("inf")):
        sums = []
        for sample in (base, torch.cat((base, extreme * torch.ones(1, 50)))):
            optimizer = build({"a": (50,)}, keystream=Silent(), batch=1.0)
            feed(optimizer, {"a": sample})
            sums.append(released(optimizer)["a"])
        grid = 2.0**-GRID_BITS * np.sqrt(50)
        assert np.linalg.norm(sums[1] - sums[0]) <= 1.0 + grid + 1e-5, extreme


def test_a_unit_that_is_no_number_counts_as_zero_and_is_counted_here_only() -> None:
    good = torch.ones(1, 4) / 4
    bad = {"a": torch.cat((good, good * torch.nan, good)), "b": torch.cat((good, good, good * torch.inf))}
    optimizer = build({"a": (4,), "b": (4,)}, keystream=Silent(), batch=1.0)
    feed(optimizer, bad)
    for value in released(optimizer).values():
        assert value == pytest.approx(0.25, abs=1e-5)
    assert optimizer.not_finite == 2


def test_noise_has_the_announced_spread_and_is_normal() -> None:
    optimizer = build({"a": (40_000,)}, batch=1.0)
    feed(optimizer, {"a": torch.zeros(3, 40_000)})
    drawn = released(optimizer)["a"]
    std = optimizer.noise_stds()[0]
    assert std == pytest.approx(SIGMA * (1 + 2.0**-GRID_BITS * 200))
    ratio = np.square(drawn).sum() / std**2
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], 40_000)
    assert low < ratio < high
    assert stats.kstest(drawn / std, "norm").pvalue > 1e-4


@pytest.mark.parametrize("units", [0, 1, 20])
def test_every_release_lies_on_the_public_grid(units: int) -> None:
    optimizer = build({"a": (1000,)}, batch=1.0)
    feed(optimizer, {"a": torch.randn(units, 1000)})
    # float32 holds k * 2^-20 exactly while k < 2^24, that is below 16
    steps = released(optimizer)["a"] * 2.0**GRID_BITS
    small = np.abs(steps) < 2**23
    assert small.sum() > 900
    assert np.array_equal(steps[small], np.rint(steps[small]))


def test_groups_have_bounds_of_their_own_and_noise_with_the_root_of_their_number() -> None:
    groups = [ClipGroup(("a",), 2.0), ClipGroup(("b", "c"), 0.1)]
    quiet = build({"a": (9,), "b": (4,), "c": (5,)}, groups, keystream=Silent(), batch=1.0)
    feed(quiet, {"a": 100 * torch.ones(1, 9), "b": 100 * torch.ones(1, 4), "c": 100 * torch.ones(1, 5)})
    found = released(quiet)
    assert np.linalg.norm(found["a"]) == pytest.approx(2.0, rel=1e-5)
    assert np.hypot(np.linalg.norm(found["b"]), np.linalg.norm(found["c"])) == pytest.approx(0.1, rel=1e-4)
    noisy = build({"a": (20_000,), "b": (9_000,), "c": (11_000,)}, groups, batch=1.0)
    feed(noisy, {n: torch.zeros(1, *p.shape) for n, p in noisy.private.items()})
    found = released(noisy)
    assert found["a"].std() == pytest.approx(SIGMA * np.sqrt(2) * 2.0, rel=0.03)
    assert np.concatenate((found["b"], found["c"])).std() == pytest.approx(SIGMA * np.sqrt(2) * 0.1, rel=0.03)


def test_parts_of_a_batch_get_noise_once() -> None:
    samples = torch.randn(9, 30_000)
    whole, parts = build({"a": (30_000,)}, batch=1.0), build({"a": (30_000,)}, batch=1.0)
    feed(whole, {"a": samples})
    for i in (0, 3, 6):
        feed(parts, {"a": samples[i : i + 3]}, last=i == 6)
    clipped = (samples / samples.norm(dim=1, keepdim=True).clamp(min=1)).sum(0).double().numpy()
    for optimizer in (whole, parts):
        assert (released(optimizer)["a"] - clipped).std() == pytest.approx(SIGMA, rel=0.03)
    moved = parts.private["a"].detach().double().numpy()
    assert np.allclose(moved, -released(parts)["a"], atol=1e-6)


def test_an_empty_batch_is_a_noisy_step() -> None:
    optimizer = build({"a": (10_000,)}, batch=2.0)
    feed(optimizer, {"a": torch.zeros(0, 10_000)})
    assert released(optimizer)["a"].std() == pytest.approx(SIGMA / 2, rel=0.05)


def test_noise_never_repeats() -> None:
    optimizer = build({"a": (1000,)})
    draws = []
    for _ in range(3):
        feed(optimizer, {"a": torch.zeros(1, 1000)})
        draws.append(released(optimizer)["a"])
    other = build({"a": (1000,)})
    feed(other, {"a": torch.zeros(1, 1000)})
    draws.append(released(other)["a"])
    for i in range(4):
        for j in range(i):
            assert abs(np.corrcoef(draws[i], draws[j])[0, 1]) < 0.2


def test_a_parameter_that_the_mechanism_does_not_cover_stops_the_step() -> None:
    optimizer = build({"a": (2,), "b": (2,)})
    optimizer.private["a"].grad_sample = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="Per sample gradient not found"):
        optimizer.step()
    optimizer.private["b"].grad_sample = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"holds \[2, 3\] units"):
        optimizer.step()
    optimizer.private["b"].grad_sample = torch.zeros(3, 5)
    with pytest.raises(ValueError, match="b has no per-record gradient"):
        optimizer.step()


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([ClipGroup(("a",), 1.0)], "clip groups hold"),
        ([ClipGroup(("a", "b"), 1.0), ClipGroup(("b",), 1.0)], "clip groups hold"),
    ],
)
def test_groups_must_cover_the_parameters_once(groups: list[ClipGroup], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build({"a": (2,), "b": (2,)}, groups)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_bounds_are_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="max_grad_norm"):
        ClipGroup(("a",), bound)
    with pytest.raises(ValueError, match="expected_batch_size"):
        build({"a": (2,)}, batch=bound)
