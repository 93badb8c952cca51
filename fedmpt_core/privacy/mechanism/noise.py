"""The Gaussian mechanism of DP-SGD: clip each unit's gradient, sum, add noise on an integer grid, divide by a
constant.

    release = gamma * ( sum_i round(clip(g_i) / gamma) + round(noise_multiplier * G' / gamma * Z) ) / expected batch
    size

Z is standard normal from a `Keystream`. Rounding the noise after adding it to an integer is the same as rounding the
sum, so the release is post-processing of the continuous Gaussian mechanism and every accountant's bound holds; its
values lie on a public grid, so their low bits carry nothing (Mironov 2012). gamma = G * 2^-20, or what a mechanism with
shared noise says (`shared_noise`), of which one site adds a share, and whose integers leave as they are (`integers`).

Each unit's part is rounded by itself, so the sum is one of integers below 2^53, which float64 adds exactly in any order
(up to 2^33 units): what a unit adds does not depend on the others by a bit. It is at most G + gamma sqrt(d) / 2 long
(d released numbers); G' = G + gamma sqrt(d) covers that with gamma sqrt(d) / 2 to spare, a thousand million times what
clipping in float64 may round.

Clipping is flat (one bound on a unit's whole gradient) or per group of parameters: then with m groups, group g is
clipped to G_g and gets noise of standard deviation noise_multiplier * sqrt(m) * G_g, which is the flat mechanism on
gradients scaled to g_g / (sqrt(m) G_g).

The sum is divided by the public expected batch size, never by the realised one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import inf, prod, sqrt
from typing import Any

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.mechanism import GRID_BITS

PURPOSE = "noise"


@dataclass(frozen=True)
class ClipGroup:
    """Parameters that are clipped together.

    Attributes:
        names: names of the private parameters.
        max_grad_norm: bound G_g on the L2 norm of one unit's gradient over them, > 0.
    """

    names: tuple[str, ...]
    max_grad_norm: float

    def __post_init__(self) -> None:
        """Raises ValueError for a bound that is no positive number."""
        if not 0 < self.max_grad_norm < float("inf"):
            raise ValueError(f"max_grad_norm={self.max_grad_norm} of {', '.join(self.names)}: give a positive number")


class PrivateOptimizer(DPOptimizer):
    """Opacus' DP optimizer with our clipping and noise.

    An engine (`gradients`) sets `grad_sample`, shape (units, *p.shape), on every private parameter. `step` clips and
    sums; unless it was told by `signal_skip_step` that more parts of the same batch follow, it adds noise once,
    divides, calls the step hook and steps the wrapped optimizer. An empty batch is a step like any other.

    Attributes:
        private: private parameters by name.
        not_finite: units so far whose gradient held NaN or infinity and was set to zero; stays at the site.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        private: Mapping[str, nn.Parameter],
        groups: Sequence[ClipGroup],
        *,
        noise_multiplier: float,
        expected_batch_size: float,
        keystream: Keystream,
        grid_bits: int = GRID_BITS,
        limit: float = inf,
    ) -> None:
        """Wraps an optimizer.

        Args:
            optimizer: steps from the noisy gradients.
            private: every parameter whose gradient is released.
            groups: clip groups; each private parameter is in exactly one.
            noise_multiplier: noise standard deviation over clip norm, > 0.
            expected_batch_size: public divisor, > 0.
            keystream: source of the noise.
            grid_bits: released numbers lie on a grid of 2^-grid_bits of the clip bound.
            limit: largest absolute value of a sum before the noise, in steps of that grid.

        Raises:
            ValueError: impossible numbers, or a parameter in no group or in two.
        """
        if not 0 < noise_multiplier < float("inf"):
            raise ValueError(f"noise_multiplier={noise_multiplier}: give a positive number")
        if not 0 < expected_batch_size < float("inf"):
            raise ValueError(f"expected_batch_size={expected_batch_size}: give a positive number")
        listed = [n for g in groups for n in g.names]
        if sorted(listed) != sorted(private):
            raise ValueError(f"clip groups hold {sorted(listed)}, the private parameters are {sorted(private)}")
        self.private = dict(private)
        self._tensors: dict[str, Any] = self.private  # Opacus hangs grad_sample and summed_grad on parameters
        self._groups = tuple(groups)
        self._keystream, self._bits, self._limit = keystream, grid_bits, limit
        self.not_finite = 0
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=sqrt(sum(g.max_grad_norm**2 for g in groups)),
            expected_batch_size=expected_batch_size,  # type: ignore[arg-type]  # Opacus means a count, any number serves
        )

    @property
    def params(self) -> list[nn.Parameter]:
        """The private parameters, which need not be those that the wrapped optimizer steps."""
        return list(self.private.values())

    def clip_and_accumulate(self) -> None:
        """Adds the clipped gradients of this part of the batch to `summed_grad`, in float64; all of them or none.

        Raises:
            ValueError: a private parameter without `grad_sample`, or with that of other units.
            torch.OutOfMemoryError: the device is full; the part may be given again in smaller ones.
        """
        samples = {name: self._grad_sample(name) for name in self.private}
        units = {len(s) for s in samples.values()}
        if len(units) != 1:
            raise ValueError(f"grad_sample holds {sorted(units)} units for different parameters: all must be equal")
        for name, parameter in self._tensors.items():
            if parameter.summed_grad is None:
                parameter.summed_grad = torch.zeros(parameter.shape, dtype=torch.float64, device=samples[name].device)
        wide = {name: s.flatten(1).double() for name, s in samples.items()}
        lengths = {name: _lengths(rows) for name, rows in wide.items()}
        finite = torch.stack([torch.isfinite(length) for length in lengths.values()]).all(0)
        broken = int((~finite).sum())
        added = {}
        for group in self._groups:
            norms = reduce(torch.add, [lengths[n].square() for n in group.names]).sqrt()
            factor = torch.where(finite, (group.max_grad_norm / norms).clamp(max=1.0), 0.0)
            factor = torch.where(norms == 0, 0.0, factor)
            for name in group.names:
                rows = torch.where(finite[:, None], wide[name], 0) if broken else wide[name]  # zero times NaN is NaN
                whole = (factor[:, None] * rows).div_(self._grid(group)).round_().sum(0)
                added[name] = (whole * self._grid(group)).reshape(self._tensors[name].shape)
        for name, part in added.items():
            self._tensors[name].summed_grad += part
        self.not_finite += broken

    def integers(self) -> dict[str, np.ndarray]:
        """The noisy sum in steps of the grid, int64 in the shape of each private parameter. Draws noise anew."""
        noisy = {}
        for group, std in zip(self._groups, self.noise_stds(), strict=True):
            grid = self._grid(group)
            for name in group.names:
                total = np.rint(self._tensors[name].summed_grad.cpu().numpy() / grid).clip(-self._limit, self._limit)
                noise = np.rint(std / grid * self._normals(total.size)).reshape(total.shape)
                noisy[name] = (total + noise).astype(np.int64)
        return noisy

    def share(self) -> np.ndarray:
        """Ends a batch as `step` does, but hands its noisy sum on as it is: (d,) uint32, integers modulo 2^32.

        Its numbers are in the order of the private parameters.
        """
        self.clip_and_accumulate()
        noisy = self.integers()
        self.zero_grad(set_to_none=True)
        return np.concatenate([noisy[name].ravel() for name in self.private]).astype(np.uint32)

    def add_noise(self) -> None:
        """Puts the noisy sum into `grad` of every private parameter."""
        noisy = self.integers()
        for group in self._groups:
            for name in group.names:
                parameter = self._tensors[name]
                values = noisy[name] * self._grid(group)
                parameter.grad = torch.from_numpy(values).to(parameter.device, parameter.dtype)

    def scale_grad(self) -> None:
        """Divides by the expected batch size."""
        for parameter in self.params:
            parameter.grad = parameter.grad / self.expected_batch_size  # type: ignore[operator]

    def noise_stds(self) -> list[float]:
        """Noise standard deviation of the sum, per clip group; sqrt(d) of the rounding is that of the group."""
        return [self.noise_multiplier * sqrt(len(self._groups)) * self._sensitivity(g) for g in self._groups]

    def _sensitivity(self, group: ClipGroup) -> float:
        released = sum(prod(self.private[n].shape) for n in group.names)
        return group.max_grad_norm + self._grid(group) * sqrt(released)

    def _grid(self, group: ClipGroup) -> float:
        return group.max_grad_norm * 2.0**-self._bits

    def _normals(self, count: int) -> np.ndarray:
        return self._keystream.normals(PURPOSE, count)

    def _grad_sample(self, name: str) -> Tensor:
        sample: Any = getattr(self.private[name], "grad_sample", None)
        if not isinstance(sample, Tensor) or sample.shape[1:] != self.private[name].shape:
            raise ValueError(
                f"{name} has no per-record gradient: its gradient may not be released, so this step is refused"
            )
        return sample


def _lengths(rows: Tensor) -> Tensor:
    """(B, K) -> (B,) L2 norms, each by itself: over a whole batch a norm's last bit may follow the number of rows."""
    return torch.stack([torch.linalg.vector_norm(row) for row in rows]) if len(rows) else rows.new_zeros(0)
