"""Gate: the weight of every condition for a record, P(r | d) of the front-door sum (FedMPT, Eq. 11).

    log_weights = log_softmax( (g down) up / temperature ),   g the record's mean patch scaled to unit mean
    square

The scaling of g is ours: it makes the gate learn at the same speed whatever the length of a backbone's
features. `up` starts at zero, so a new gate is uniform. It must never look at another record (no batch
statistics, no load balancing).
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from fedmpt_core.model.fedmpt.adapters import random_parameter

_TINY = 1e-12


class Gate(nn.Module):
    """Linear bottleneck from the mean patch to log-weights over conditions.

    Attributes:
        down: Parameter (D,S), normal with standard deviation 1 / sqrt(D).
        up: Parameter (S,N), zero.
        temperature: softmax temperature, > 0.
    """

    def __init__(
        self, conditions: int, features: int, width: int, temperature: float, generator: np.random.Generator
    ) -> None:
        """Creates a uniform gate.

        Args:
            conditions: N >= 1.
            features: D >= 1.
            width: S >= 1.
            temperature: > 0.
            generator: source of the initial values, so that they are the same numbers on every machine.
        """
        super().__init__()
        self.temperature = temperature
        self.down = random_parameter(generator, features, width, std=features**-0.5)
        self.up = nn.Parameter(torch.zeros(width, conditions))

    def forward(self, patches: Tensor) -> Tensor:
        """Log-weights over conditions: (..., P, D) frozen patches -> (..., N), exponentials sum to 1."""
        unit = unit_mean_square(patches.mean(-2))  # (...,D)
        # One product per record, so that rounding does not depend on a record's place in the batch.
        rows = unit.reshape(-1, 1, unit.shape[-1])  # (B,1,D)
        inner = torch.bmm(rows, self.down.expand(len(rows), *self.down.shape))
        scores = torch.bmm(inner, self.up.expand(len(rows), *self.up.shape))  # (B,1,N)
        return torch.log_softmax(scores.reshape(*unit.shape[:-1], self.up.shape[-1]) / self.temperature, dim=-1)


def unit_mean_square(values: Tensor) -> Tensor:
    """(..., D) scaled to mean square 1, whatever the length of a backbone's features; zero stays zero."""
    return values * (values.square().mean(-1, keepdim=True) + _TINY).rsqrt()


def uniform_log_weights(patches: Tensor, conditions: int) -> Tensor:
    """Log-weights of a model without a gate, (..., P, D) -> (..., N), each -log N."""
    return patches.new_full((*patches.shape[:-2], conditions), -math.log(conditions))


def entropy(log_weights: Tensor) -> Tensor:
    """Entropy of the gate in nats, (..., N) -> (...), from 0 (one condition) to log N (uniform).

    A weight of zero (log-weight -inf) contributes 0.
    """
    weights = log_weights.exp()
    return -torch.where(weights > 0, weights * log_weights, 0).sum(-1)
