"""From cosines and patch weights to one logit per condition and class.

    sigmoid (default):  logit = scale_n * sum_m W_mc cos_mc + bias_n
    literal (paper):    logit = log( p / (1 - p) ),   p = sum_m W_mc S_mc,   S the class softmax of scaled
    cosines

W is a class-specific attention over patches: its columns sum to 1. With transport it is C times the plan;
without, it is a softmax over patches. The paper's p of a plan as it stands (mass 1 spread over C columns) is
of the order of 1 / C for every class and says nothing after a sigmoid, hence the factor C.

All functions act on the last two axes only and work inside `torch.func.vmap`. They must never compare
records.
"""

import torch
from torch import Tensor

# Probabilities of the literal form are kept this far from 0 and 1: rounding can put the sum of S on or beyond
# them.
_EDGE = 1e-6


def plan_weights(plan: Tensor) -> Tensor:
    """Plan with columns summing to 1 / C -> weights with columns summing to 1, (..., P, C)."""
    return plan * plan.shape[-1]


def pooling_weights(cosine: Tensor, temperature: float) -> Tensor:
    """Patch weights of a model without transport: softmax over patches of each class's own cosine.

    Args:
        cosine: (..., P, C) in [-1, 1].
        temperature: > 0.

    Returns:
        (..., P, C), columns summing to 1. The gradient flows through the weights, as in softmax region
        pooling.
    """
    # Over the last axis: over another one torch rounds the last records of a batch otherwise.
    return torch.softmax((cosine / temperature).mT, dim=-1).mT


def class_similarity(cosine: Tensor, scale: float) -> Tensor:
    """S: softmax over classes of `scale` times the cosine, (..., P, C) -> (..., P, C), rows summing to 1."""
    return torch.softmax(scale * cosine, dim=-1)


def sigmoid_logits(cosine: Tensor, weights: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Default prediction.

    Args:
        cosine: (..., N, P, C).
        weights: (..., N, P, C), columns summing to 1.
        scale: (N,) logit per unit of cosine.
        bias: (N,) logit.

    Returns:
        (..., N, C) logits.
    """
    evidence = (weights * cosine).sum(-2)
    return scale.unsqueeze(-1) * evidence + bias.unsqueeze(-1)


def literal_logits(similarity: Tensor, weights: Tensor) -> Tensor:
    """The paper's prediction as a logit.

    Args:
        similarity: (..., P, C) in [0, 1].
        weights: (..., P, C), columns summing to 1.

    Returns:
        (..., C) logits of probabilities in [1e-6, 1 - 1e-6]; there the gradient is 0.
    """
    probability = (weights * similarity).sum(-2).clamp(_EDGE, 1 - _EDGE)
    return torch.logit(probability)
