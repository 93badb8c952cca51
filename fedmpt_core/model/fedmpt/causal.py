"""Front-door adjustment: from condition-wise predictions to P(Y | do(D)).

    P(Y | do(D)) = sum_r P(r | d) sum_d' P(d') P(Y | r, d')

D is the picture, Y a label, r the condition under which the picture is read (the mediator). In the model P(r
| d) is the gate and sum_d' P(d') P(Y | r, d') is the prediction of condition r: its parameters are shared by
all sites, so the average over other pictures d' is taken by training them on everyone's pictures. What
remains is a mixture of probabilities, which `front_door` computes from logits in log space.

Limits: a condition's prediction sees the patches, so paths from D to Y beside r are not ruled out, and the
inner expectation has no estimator of its own. `front_door` must never mix logits: that is a product of experts,
which `product_of_experts` computes to compare with.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Outcome(NamedTuple):
    """log P(Y = 1 | do(D)) and log P(Y = 0 | do(D)), each (..., C) and at most 0."""

    log_positive: Tensor
    log_negative: Tensor


def front_door(log_r_given_d: Tensor, logit_y_given_r: Tensor) -> Outcome:
    """Mixture over conditions of label probabilities, in log space.

    Args:
        log_r_given_d: (..., N) log P(r | d), the gate; exponentials sum to 1.
        logit_y_given_r: (..., N, C) logit of sum_d' P(d') P(Y = 1 | r, d'), the prediction of each condition.

    Returns:
        Outcome of two (..., C).

    Raises:
        ValueError: the numbers of conditions differ.

    Guarantees:
        Finite, with finite gradients, for logits up to 1e4 either way. Both exponentials lie in [0, 1] and
        sum to 1 up to rounding. Each lies between the smallest and the largest prediction.
    """
    if log_r_given_d.shape[-1] != logit_y_given_r.shape[-2]:
        raise ValueError(
            f"log_r_given_d has {log_r_given_d.shape[-1]} conditions but logit_y_given_r has "
            f"{logit_y_given_r.shape[-2]}: give (..., N) and (..., N, C)"
        )
    log_r = log_r_given_d.unsqueeze(-1)  # (...,N,1)
    log_positive = torch.logsumexp(log_r + F.logsigmoid(logit_y_given_r), dim=-2)
    log_negative = torch.logsumexp(log_r + F.logsigmoid(-logit_y_given_r), dim=-2)
    # Weights that sum to one only up to rounding may put a certain outcome a hair above log 1.
    return Outcome(log_positive.clamp(max=0), log_negative.clamp(max=0))


def product_of_experts(log_r_given_d: Tensor, logit_y_given_r: Tensor) -> Outcome:
    """Weighted mean of the conditions' logits: what the front-door sum is not, for comparison.

    Args:
        log_r_given_d: (..., N) log-weights; exponentials sum to 1.
        logit_y_given_r: (..., N, C) logits.

    Returns:
        Outcome of two (..., C).
    """
    logit = (log_r_given_d.exp().unsqueeze(-1) * logit_y_given_r).sum(-2)
    return Outcome(F.logsigmoid(logit), F.logsigmoid(-logit))
