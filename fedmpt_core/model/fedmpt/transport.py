"""Entropic optimal transport between patches and classes, for many records and conditions at once.

For every problem in the batch it finds the plan T >= 0 with row sums `a` and column sums `b` that minimises

    sum_mc T_mc cost_mc + reg * sum_mc T_mc (log T_mc - 1)

by Sinkhorn's alternating scaling (Cuturi 2013), always for the same number of iterations. `patch_importance`
is the row marginal of condition-guided transport (FedMPT, Eq. 8).

It must never stop early: a stopping test over the batch would let one record change the plan, and so the
gradient, of another. It never carries a gradient: the plan is a constant for the loss (envelope theorem).
"""

import torch
from torch import Tensor

# Largest cost_bound / reg at which the scaling form neither overflows nor underflows: the scalings stay below
# exp(2 * ratio), which is 6e34 of float32's 3e38 and 4e260 of float64's 2e308.
_SAFE_RATIO = {torch.float32: 40.0, torch.float64: 300.0}
# Problems are solved in groups whose kernels stay in a core's second-level cache (chosen; 2.5x faster at 160
# problems).
_CHUNK_BYTES = 768 * 1024
_CHUNK_LEAST = 8


def solve(cost: Tensor, a: Tensor, b: Tensor, *, reg: float, iterations: int, cost_bound: float | None = 1.0) -> Tensor:
    """Entropic transport plans by a fixed number of Sinkhorn iterations.

    Args:
        cost: (..., P, C) cost of moving a unit from a patch to a class, finite, in [0, cost_bound]. Half
            precision is solved in float32; float64 stays float64.
        a: (..., P) row marginals, non-negative, each summing to the sum of its `b`.
        b: (C,) or (..., C) column marginals, non-negative.
        reg: entropic regularisation in units of the cost, > 0.
        iterations: number of iterations, >= 1.
        cost_bound: largest cost that the caller's formula can give, 1 for 1 - similarity; None if it has no
            bound.

    Returns:
        (..., P, C) plans, non-negative, without gradient.

    Raises:
        ValueError: shapes that do not belong together, integer costs.

    Guarantees:
        No problem depends on another. Columns sum to `b` to rounding, rows to `a` as far as the iterations converged.
        Works inside `torch.func.vmap` and `grad`: no branch looks at a value.

    Edge cases:
        No problems, (0, P, C) -> empty plan. a_m = 0 -> row m is zero. b_c = 0 -> column c is zero. One class
        -> the plan is `a`. Costs beyond `cost_bound` by more than a factor of about four -> overflow shows as
        NaN.

    Source:
        Cuturi 2013. The scaling form is used where `cost_bound / reg` rules out overflow, the log-domain form
        of Schmitzer 2019 otherwise; both compute the same iterates.
    """
    _check(cost, a, b)
    work = torch.float64 if cost.dtype == torch.float64 else torch.float32
    iterate = _scale
    if cost_bound is None or cost_bound / reg > _SAFE_RATIO[work]:
        iterate = _scale_in_log_domain
    patches, classes = cost.shape[-2:]
    lead = cost.shape[:-2]
    with torch.no_grad(), torch.autocast(cost.device.type, enabled=False):
        # (R,C,P): with patches innermost both matrix-vector products of an iteration stream along memory.
        kernel = cost.detach().to(work).mT.reshape(-1, classes, patches)
        rows = a.detach().to(work).reshape(-1, 1, patches)  # (R,1,P)
        columns = b.detach().to(work).expand(*lead, classes).reshape(-1, 1, classes)  # (R,1,C)
        parts = _chunks(kernel)
        solved = [
            iterate(k, r, c, reg, iterations)
            for k, r, c in zip(
                kernel.tensor_split(parts), rows.tensor_split(parts), columns.tensor_split(parts), strict=True
            )
        ]
        plan = torch.cat(solved) if parts > 1 else solved[0]
        return plan.reshape(*lead, classes, patches).mT


def patch_importance(cosine: Tensor, temperature: float) -> Tensor:
    """Row marginals: how much of the transported mass each patch may send.

    Args:
        cosine: (..., P, C) cosine of patch and class under a condition, in [-1, 1].
        temperature: divides the best cosine of a patch, > 0; small values favour the most class-like patches.

    Returns:
        (..., P), positive, summing to 1 over patches, without gradient.

    Source:
        FedMPT, Eq. 8: softmax over patches of max over classes of the similarity over the temperature.
    """
    return torch.softmax(cosine.detach().amax(-1) / temperature, dim=-1)


def _check(cost: Tensor, a: Tensor, b: Tensor) -> None:
    if not cost.is_floating_point():
        raise ValueError(f"cost has type {cost.dtype}: give floating-point costs")
    if cost.ndim < 2 or 0 in cost.shape[-2:]:
        raise ValueError(f"cost has shape {tuple(cost.shape)}: give (..., P, C) with at least one patch and one class")
    if a.shape != cost.shape[:-1]:
        raise ValueError(
            f"a has shape {tuple(a.shape)} but cost has {tuple(cost.shape)}: give {tuple(cost.shape[:-1])}"
        )
    if b.shape not in (cost.shape[-1:], cost.shape[:-2] + cost.shape[-1:]):
        raise ValueError(f"b has shape {tuple(b.shape)} but cost has {tuple(cost.shape)}: give ({cost.shape[-1]},)")


def _chunks(kernel: Tensor) -> int:
    """Into how many groups to cut the problems; one everywhere but on a CPU, where the cache decides."""
    if kernel.device.type != "cpu":
        return 1
    problem = kernel.shape[-1] * kernel.shape[-2] * kernel.element_size()
    most = max(_CHUNK_LEAST, _CHUNK_BYTES // problem)
    return max(1, -(-kernel.shape[0] // most))


def _scale(cost: Tensor, rows: Tensor, columns: Tensor, reg: float, iterations: int) -> Tensor:
    """Sinkhorn on exp(-cost / reg): (R,C,P), (R,1,P), (R,1,C) -> plan (R,C,P)."""
    kernel = torch.mul(cost, -1 / reg).contiguous().exp_()
    kernel_t = kernel.mT
    u, v = rows, torch.ones_like(columns)
    for _ in range(iterations):
        u = rows / torch.bmm(v, kernel)
        v = columns / torch.bmm(u, kernel_t)
    return torch.mul(u, v.mT).mul_(kernel)


def _scale_in_log_domain(cost: Tensor, rows: Tensor, columns: Tensor, reg: float, iterations: int) -> Tensor:
    """The same iterates as `_scale`, held as logarithms: slower, and safe for any cost and reg."""
    log_kernel = cost * (-1 / reg)
    log_rows, log_columns = rows.log(), columns.log().mT  # (R,1,P), (R,C,1)
    f, g = log_rows, torch.zeros_like(log_columns)
    for _ in range(iterations):
        f = log_rows - torch.logsumexp(log_kernel + g, dim=-2, keepdim=True)
        g = log_columns - torch.logsumexp(log_kernel + f, dim=-1, keepdim=True)
    return (log_kernel + f + g).exp()
