"""Plans against POT, and independence of the problems of a batch."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpt_core.model.fedmpt.transport import patch_importance, solve

with warnings.catch_warnings():
    # POT's own source has escape sequences that Python warns of when it compiles them
    warnings.simplefilter("ignore")
    import ot


def problems(
    shape: tuple[int, ...], seed: int = 0, sharp: float = 20.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """cost (..., P, C) of similarity form, a (..., P), b (C,), in float64."""
    rng = np.random.default_rng(seed)
    cosine = torch.from_numpy(rng.uniform(-0.2, 0.4, shape))
    cost = 1 - torch.softmax(sharp * cosine, dim=-1)
    return cost, patch_importance(cosine, 0.1), torch.full((shape[-1],), 1 / shape[-1], dtype=torch.float64)


def pot_plans(cost: torch.Tensor, a: torch.Tensor, b: torch.Tensor, reg: float) -> torch.Tensor:
    flat, rows = cost.reshape(-1, *cost.shape[-2:]).numpy(), a.reshape(-1, a.shape[-1]).numpy()
    plans = [
        ot.sinkhorn(r, b.numpy(), c, reg, method="sinkhorn_log", stopThr=1e-13, numItermax=50_000)
        for c, r in zip(flat, rows, strict=True)
    ]
    return torch.from_numpy(np.stack(plans)).reshape(cost.shape)


def rows_off(plan: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """How far the iterations are from converging: sum over patches of |row sum - a|."""
    return (plan.sum(-1) - a).abs().sum(-1)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest total variation between two batches of plans: plans have mass 1, so this is relative."""
    return float((one - other).abs().sum((-2, -1)).max())


@pytest.mark.parametrize("reg", [0.03, 0.1, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_the_plan_is_pot_s(reg: float, dtype: torch.dtype, tolerance: float) -> None:
    cost, a, b = problems((2, 3, 25, 6))
    expected = pot_plans(cost, a, b, reg)
    for bound in (1.0, None):  # scaling form where it is safe, log-domain form
        got = solve(cost.to(dtype), a.to(dtype), b.to(dtype), reg=reg, iterations=1000, cost_bound=bound)
        assert got.dtype == dtype
        assert distance(got.double(), expected) < tolerance


def test_both_forms_run_the_same_iterations() -> None:
    cost, a, b = problems((4, 30, 5), sharp=100)
    for iterations in (1, 2, 7):
        one = solve(cost, a, b, reg=0.05, iterations=iterations, cost_bound=1.0)
        other = solve(cost, a, b, reg=0.05, iterations=iterations, cost_bound=None)
        assert distance(one, other) < 1e-12


def test_falling_reg_leads_to_the_exact_plan() -> None:
    cost, a, b = problems((9, 4), seed=3)
    exact = torch.from_numpy(ot.emd(a.numpy() / a.numpy().sum(), b.numpy(), cost.numpy()))
    gaps = []
    for reg in (0.1, 0.03, 0.01, 0.005):
        gaps.append(distance(solve(cost, a, b, reg=reg, iterations=20_000), exact))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.02


def test_small_reg_in_float32_neither_overflows_nor_loses_the_plan() -> None:
    cost, a, b = problems((3, 20, 5), sharp=100)
    for reg in (0.005, 1 / 40, 1 / 39):  # log-domain form, and either side of the switch
        got = solve(cost.float(), a.float(), b.float(), reg=reg, iterations=3000)
        wanted = solve(cost, a, b, reg=reg, iterations=3000)
        assert distance(got.double(), wanted) < 2e-3


@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    patches=st.integers(1, 12),
    classes=st.integers(1, 7),
    reg=st.floats(0.01, 5),
    iterations=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_columns_are_met_exactly(
    lead: list[int], patches: int, classes: int, reg: float, iterations: int, seed: int
) -> None:
    cost, a, b = problems((*lead, patches, classes), seed)
    got = solve(cost, a, b, reg=reg, iterations=iterations)
    assert got.shape == cost.shape
    assert (got >= 0).all()
    torch.testing.assert_close(got.sum(-2), b.expand(*lead, classes), rtol=0, atol=1e-13)


def test_the_error_falls_with_iterations() -> None:
    cost, a, b = problems((8, 49, 20), sharp=100)
    errors = [float(rows_off(solve(cost, a, b, reg=0.1, iterations=i), a).max()) for i in (1, 5, 20, 80)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("bound", [1.0, None])
@pytest.mark.parametrize("shape", [(5, 3, 9, 7), (17, 2, 16, 5), (23, 1, 5, 3)])
def test_permuting_the_batch_permutes_the_plans_bit_for_bit(shape: tuple[int, ...], bound: float | None) -> None:
    cost, a, b = problems(shape)
    order = torch.from_numpy(np.random.default_rng(1).permutation(shape[0]))
    whole = solve(cost, a, b, reg=0.1, iterations=20, cost_bound=bound)
    moved = solve(cost[order], a[order], b, reg=0.1, iterations=20, cost_bound=bound)
    assert torch.equal(whole[order], moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [1.0, None])
def test_changing_one_record_leaves_the_others_bit_identical(dtype: torch.dtype, bound: float | None) -> None:
    cost, a, b = (t.to(dtype) for t in problems((6, 2, 11, 5)))
    before = solve(cost, a, b, reg=0.1, iterations=20, cost_bound=bound)
    other, rows, _ = problems((2, 11, 5), seed=9, sharp=300)
    cost[4], a[4] = other.to(dtype), rows.to(dtype)
    after = solve(cost, a, b, reg=0.1, iterations=20, cost_bound=bound)
    kept = [0, 1, 2, 3, 5]
    assert torch.equal(before[kept], after[kept])
    assert not torch.equal(before[4], after[4])


def test_a_batch_wide_stopping_rule_would_fail_that_test() -> None:
    """The broken twin: iterate until the whole batch has converged."""

    def stopping(cost: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        for iterations in range(1, 500):
            got = solve(cost, a, b, reg=0.1, iterations=iterations)
            if rows_off(got, a).mean() < 1e-3:
                break
        return got

    cost, a, b = problems((6, 11, 5))
    before = stopping(cost, a, b)
    cost[4] = problems((11, 5), seed=9, sharp=300)[0]
    assert not torch.equal(before[0], stopping(cost, a, b)[0])


def test_problems_that_are_too_many_for_one_group_give_the_plans_of_each_alone() -> None:
    cost, a, b = problems((20, 128, 100))  # 2 MB
    whole = solve(cost, a, b, reg=0.1, iterations=20)
    for i in range(20):
        torch.testing.assert_close(whole[i], solve(cost[i], a[i], b, reg=0.1, iterations=20), rtol=0, atol=1e-15)


def test_permuting_classes_permutes_columns() -> None:
    cost, a, _ = problems((3, 10, 6))
    b = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.2, 0.1], dtype=torch.float64)
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    one = solve(cost, a, b, reg=0.1, iterations=30)[..., order]
    torch.testing.assert_close(solve(cost[..., order], a, b[order], reg=0.1, iterations=30), one)


def test_zero_marginals_give_zero_rows_and_columns() -> None:
    cost, a, b = problems((2, 6, 4))
    a = a * torch.tensor([0, 1, 1, 1, 1, 0])
    a = a / a.sum(-1, keepdim=True)
    b = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64)
    for bound in (1.0, None):
        got = solve(cost, a, b, reg=0.1, iterations=200, cost_bound=bound)
        assert (got[:, [0, 5]] == 0).all()
        assert (got[:, :, 1] == 0).all()
        assert rows_off(got, a).max() < 1e-9


def test_edge_shapes() -> None:
    cost, a, b = problems((4, 7, 3))
    empty = solve(cost[:0], a[:0], b, reg=0.1, iterations=5)
    assert empty.shape == (0, 7, 3)
    single = solve(cost[..., :1], a, torch.ones(1, dtype=torch.float64), reg=0.1, iterations=1)
    torch.testing.assert_close(single.squeeze(-1), a)
    per_problem = solve(cost, a, b.expand(4, 3), reg=0.1, iterations=5)
    assert torch.equal(per_problem, solve(cost, a, b, reg=0.1, iterations=5))


def test_half_precision_is_solved_in_float32() -> None:
    cost, a, b = problems((2, 9, 4))
    got = solve(cost.half(), a.half(), b.half(), reg=0.1, iterations=50)
    assert got.dtype == torch.float32
    wanted = solve(cost.half().double(), a.half().double(), b.half().double(), reg=0.1, iterations=50)
    assert distance(got.double(), wanted) < 1e-5


def test_autocast_does_not_lower_the_precision() -> None:
    cost, a, b = (t.float() for t in problems((2, 9, 4)))
    plain = solve(cost, a, b, reg=0.1, iterations=50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(solve(cost, a, b, reg=0.1, iterations=50), plain)


def test_no_gradient_flows_through_a_plan() -> None:
    cost, a, b = problems((2, 9, 4))
    cost.requires_grad_()
    got = solve(cost, a.requires_grad_(), b, reg=0.1, iterations=5)
    assert not got.requires_grad
    assert torch.func.grad(lambda c: solve(c, a, b, reg=0.1, iterations=5).square().sum())(cost).abs().sum() == 0


def test_vmap_gives_what_the_batch_gives() -> None:
    cost, a, b = problems((5, 3, 9, 4))
    for bound in (1.0, None):
        whole = solve(cost, a, b, reg=0.1, iterations=20, cost_bound=bound)

        def one(c: torch.Tensor, r: torch.Tensor, bound: float | None = bound) -> torch.Tensor:
            return solve(c, r, b, reg=0.1, iterations=20, cost_bound=bound)

        torch.testing.assert_close(torch.func.vmap(one)(cost, a), whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"a": torch.ones(2, 8)}, "a has shape"),
        ({"b": torch.ones(5)}, "b has shape"),
        ({"cost": torch.ones(2, 9, 4, dtype=torch.int64)}, "floating-point"),
        ({"cost": torch.ones(2, 0, 4)}, "at least one patch"),
        ({"cost": torch.ones(4)}, "at least one patch"),
    ],
)
def test_impossible_arguments_are_refused(change: dict[str, object], says: str) -> None:
    cost, a, b = problems((2, 9, 4))
    arguments = {"cost": cost, "a": a, "b": b, "reg": 0.1, "iterations": 5, **change}
    with pytest.raises(ValueError, match=says):
        solve(arguments.pop("cost"), arguments.pop("a"), arguments.pop("b"), **arguments)


def test_patch_importance_is_the_softmax_of_the_best_cosine() -> None:
    cosine = torch.tensor([[[0.1, 0.3], [0.2, 0.0]]], dtype=torch.float64, requires_grad=True)
    got = patch_importance(cosine, 0.1)
    weights = np.exp(np.array([0.3, 0.2]) / 0.1)
    np.testing.assert_allclose(got.numpy()[0], weights / weights.sum(), rtol=1e-12)
    assert not got.requires_grad
