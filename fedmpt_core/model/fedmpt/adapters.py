"""One residual low-rank adapter per condition on the frozen patch features (FedMPT, visual adapters).

    X_n = X + ratio * (X down_n) up_n          X (P,D), down_n (D,S), up_n (S,D), S the adapter width

`up` starts at zero, so a new adapter is the identity. `Adapters.forward` gives X_n itself. `Adapters.cosine`
gives the cosine of every X_n with text features without ever holding the N adapted copies of X: it expands
the inner product and the norm, which needs (N,S,P) numbers where X_n needs (N,P,D). Forward and backward cost
a tenth (32 x 196 patches).

Every product is computed record by record, so that a record's numbers do not depend on its place in the
batch. It must never mix records and never touch the backbone.
"""

import numpy as np
import torch
from torch import Tensor, nn

# An adapted patch this much shorter than the frozen one has lost its direction to rounding; below it the
# length is held.
_SHORTEST = 1e-3
_TINY = 1e-24


class Adapters(nn.Module):
    """N residual low-rank maps of patch features.

    Attributes:
        down: Parameter (N,D,S), normal with standard deviation 1 / sqrt(D).
        up: Parameter (N,S,D), zero.
        ratio: share of the adapter's output that is added, (0, 1].
    """

    def __init__(
        self, conditions: int, features: int, width: int, ratio: float, generator: np.random.Generator
    ) -> None:
        """Creates identity adapters.

        Args:
            conditions: N >= 1.
            features: D >= 1.
            width: S >= 1, the paper's D_s.
            ratio: (0, 1].
            generator: source of the initial values, so that they are the same numbers on every machine.
        """
        super().__init__()
        self.ratio = ratio
        self.down = random_parameter(generator, conditions, features, width, std=features**-0.5)
        self.up = nn.Parameter(torch.zeros(conditions, width, features))

    def forward(self, patches: Tensor) -> Tensor:
        """Adapted patch features, (..., P, D) -> (..., N, P, D), not normalised."""
        inner = per_record(self._stacked_down(), patches).unflatten(-2, (len(self.down), -1))  # (...,N,S,P)
        return patches.unsqueeze(-3) + self.ratio * (inner.mT @ self.up)

    def cosine(self, patches: Tensor, text: Tensor) -> Tensor:
        """Cosines of adapted patches and text features.

        Args:
            patches: (..., P, D), any length.
            text: (N, C, D) of unit length.

        Returns:
            (..., N, P, C) in [-1, 1] up to rounding; equal to normalising `forward(patches)` over D and
            multiplying with `text`. A zero patch has cosine 0.

        Edge cases:
            An adapter that shortens a patch by more than a factor of 1000 -> its cosines shrink towards 0
            instead of amplifying rounding errors.
        """
        inner = per_record(self._stacked_down(), patches).unflatten(-2, (len(self.down), -1))  # (...,N,S,P)
        outer = per_record(self.up.flatten(0, 1), patches).unflatten(-2, (len(self.down), -1))  # (...,N,S,P)
        product = _products(patches, text) + self.ratio * ((text @ self.up.mT) @ inner)  # (...,N,C,P)
        frozen = patches.square().sum(-1).unsqueeze(-2)  # (...,1,P)
        # |x + r h up|^2 = |x|^2 + 2 r <h, up x> + r^2 <h, up up^T h>
        gram = self.up @ self.up.mT  # (N,S,S)
        change = (inner * (2 * self.ratio * outer + self.ratio**2 * (gram @ inner))).sum(-2)  # (...,N,P)
        length = torch.maximum(frozen + change, _SHORTEST**2 * frozen + _TINY)
        return (product * length.rsqrt().unsqueeze(-2)).mT

    def _stacked_down(self) -> Tensor:
        """(N * S, D), row n * S + s is column s of down_n."""
        return self.down.mT.flatten(0, 1)


def random_parameter(generator: np.random.Generator, *shape: int, std: float) -> nn.Parameter:
    """A normal parameter, the same numbers on every machine."""
    return nn.Parameter(torch.from_numpy((std * generator.standard_normal(shape)).astype(np.float32)))


def cosine(patches: Tensor, text: Tensor) -> Tensor:
    """Cosines of frozen patches and text features, without adapters.

    Args:
        patches: (..., P, D), any length.
        text: (N, C, D) of unit length.

    Returns:
        (..., N, P, C) in [-1, 1] up to rounding. A zero patch has cosine 0.
    """
    length = patches.square().sum(-1)[..., None, None, :]  # (...,1,1,P)
    return (_products(patches, text) * (length + _TINY).rsqrt()).mT


def per_record(matrix: Tensor, patches: Tensor) -> Tensor:
    """(K, D) times (..., P, D) -> (..., K, P), as one product per record.

    One large product over all patches of the batch would be the same numbers, except that a row's rounding
    may then depend on where in the batch it stands.
    """
    records = patches.reshape(-1, *patches.shape[-2:]).mT  # (B,D,P)
    product = torch.bmm(matrix.expand(records.shape[0], *matrix.shape), records)
    return product.reshape(*patches.shape[:-2], *product.shape[-2:])


def _products(patches: Tensor, text: Tensor) -> Tensor:
    """Inner products, (..., N, C, P)."""
    return per_record(text.flatten(0, 1), patches).unflatten(-2, text.shape[:2])
