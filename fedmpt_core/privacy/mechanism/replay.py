"""A round worked out a second time, from what it drew and what it summed: what must leave, if the mechanism is sound.

`private_update` makes an update in one way; here the same formulas stand again, plain and slow, so that a slip in one
shows. Recorded are the keystream's draws (`Tape`) and each unit's gradient just before it is clipped (`recording`);
everything after that, and who is in a batch, follows.

It must never see an update before it has worked out its own, nor take anything from the optimizer that it checks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, prod, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmpt_core.config.job import JobConfig
from fedmpt_core.model.base import TunedModel
from fedmpt_core.privacy.mechanism.gradients import TEXT
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.machinery import Machinery, clip_groups
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from fedmpt_core.training.local import make_optimizer

EXACT = 1e-6  # of an update's largest number: float32 steps in the same order
HALF = 2e-2  # of the contexts' way back through a text tower in half precision; 0.6 % measured
_ULP = 2.0**-23  # of float32


class Tape(Keystream):
    """A keystream that keeps what another one drew.

    Attributes:
        sampled: uniform words by draw; `normal`: normal numbers by draw.
    """

    def __init__(self, inner: Keystream) -> None:
        """Draws from `inner` alone."""
        super().__init__()
        self._inner = inner
        self.sampled: list[np.ndarray] = []
        self.normal: list[np.ndarray] = []

    @property
    def key_id(self) -> str:
        """Of the other one."""
        return self._inner.key_id

    def words(self, purpose: str, count: int) -> np.ndarray:
        """As the other one draws."""
        drawn = self._inner.words(purpose, count)
        if purpose == "sampling":
            self.sampled.append(drawn.copy())
        return drawn

    def normals(self, purpose: str, count: int) -> np.ndarray:
        """As the other one draws."""
        drawn = self._inner.normals(purpose, count)
        self.normal.append(drawn.copy())
        return drawn


@dataclass
class Steps:
    """What came in, step by step.

    Attributes:
        gradients: of each step, (B, *shape) by private tensor, before clipping.
    """

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    parts: list[dict[str, Tensor]] = field(default_factory=list)


def recording(machinery: Machinery, steps: Steps) -> Machinery:
    """The same machinery, whose optimizer writes down the gradients that it is given."""

    class Recorded(machinery.optimizer):
        def clip_and_accumulate(self) -> None:
            tensors: dict[str, Any] = self.private
            given = {name: tensor.grad_sample.detach().clone() for name, tensor in tensors.items()}
            super().clip_and_accumulate()
            steps.parts.append(given)

        def integers(self) -> dict[str, np.ndarray]:
            steps.gradients.append({n: torch.cat([part[n] for part in steps.parts]) for n in self.private})
            steps.parts.clear()
            return super().integers()

    return replace(machinery, optimizer=Recorded)


def batches(words: Sequence[np.ndarray], rate: float) -> list[np.ndarray]:
    """Units of each step: those whose word, as a number in [0, 1), is below the rate."""
    return [np.array([i for i, word in enumerate(row) if int(word) < int(rate * 2**64)], np.int64) for row in words]


def clipped_sums(
    gradients: Mapping[str, Tensor], mechanism: Mechanism, shapes: Mapping[str, torch.Size]
) -> dict[str, np.ndarray]:
    """What a step may sum: every unit's gradient within its bounds and on their grid, in float64, by private tensor."""
    sums = {name: np.zeros(shape) for name, shape in shapes.items()}
    for group in _groups(mechanism, shapes):
        rows, grid = {name: gradients[name].double().cpu().numpy() for name in group.names}, _grid(group, mechanism)
        for unit in range(len(next(iter(rows.values())))):
            every = [gradients[name][unit].double().cpu().numpy() for name in shapes]
            norm = sqrt(sum(float((rows[name][unit] ** 2).sum()) for name in group.names))
            if norm == 0 or not all(np.isfinite(values).all() for values in every):
                continue
            for name in group.names:
                sums[name] += np.rint(rows[name][unit] * min(1.0, group.max_grad_norm / norm) / grid) * grid
    return sums


def released_shapes(model: TunedModel, mechanism: Mechanism) -> dict[str, torch.Size]:
    """The tensors on which noise goes: those trained, or with `feature_space` text features in place of contexts."""
    trained = model.trainable_parameters()
    head = {name: tensor.shape for name, tensor in trained.items() if not name.startswith("contexts.")}
    if mechanism.engine != "feature_space" or len(head) == len(trained):
        return {name: tensor.shape for name, tensor in trained.items()}
    with torch.no_grad():
        return {TEXT: model.text_features().shape, **head}


class Replay:
    """One round's steps, in order; the model's parameters are overwritten."""

    def __init__(
        self,
        model: TunedModel,
        job: JobConfig,
        mechanism: Mechanism,
        *,
        state: np.ndarray,
        round_number: int,
        divisor: float,
        noise: Iterator[np.ndarray],
    ) -> None:
        """At the start of a round.

        Args:
            model: the one that was trained.
            job: training.
            mechanism: as it is charged.
            state: (d,) float32 global parameters.
            round_number: from 1.
            divisor: charged sample rate times declared units.
            noise: the draws of standard normal numbers, in order.
        """
        self._model, self._mechanism, self._divisor, self._noise = model, mechanism, divisor, noise
        self._state = state
        model.load_vector(state)
        self._trained = model.trainable_parameters()
        self.shapes = released_shapes(model, mechanism)
        self._optimizer = make_optimizer(model, job.training, round_number)

    def step(self, sums: Mapping[str, np.ndarray]) -> None:
        """Noise on the sums of a step, the division, the way back to the contexts, and the optimizer's step."""
        like = next(iter(self._trained.values()))
        released: dict[str, Tensor] = {
            name: torch.from_numpy(whole * grid).to(like.device, like.dtype) / self._divisor
            for name, (whole, grid) in self._noisy(sums).items()
        }
        contexts = {name: tensor for name, tensor in self._trained.items() if name.startswith("contexts.")}
        if TEXT in released:
            pulled = torch.autograd.grad(self._model.text_features(), [*contexts.values()], released.pop(TEXT))
            released |= dict(zip(contexts, pulled, strict=True))
        for name, parameter in self._trained.items():
            parameter.grad = released[name]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def share(self, sums: Mapping[str, np.ndarray]) -> np.ndarray:
        """What leaves a site that adds a share of the noise to the sums of its step: (d,) uint32."""
        noisy = self._noisy(sums)
        whole = np.concatenate([noisy[name][0].ravel() for name in self.shapes])
        return np.array([int(number) % 2**32 if np.isfinite(number) else 0 for number in whole], np.uint32)

    def _noisy(self, sums: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
        """By private tensor, the noisy sum in steps of the grid, and the grid; infinite where no noise was drawn."""
        noisy: dict[str, tuple[np.ndarray, float]] = {}
        mechanism, groups = self._mechanism, _groups(self._mechanism, self.shapes)
        limit, honest = (mechanism.shared.limit, mechanism.shared.honest) if mechanism.shared else (inf, 1)
        for group in groups:
            grid = _grid(group, mechanism)
            bound = group.max_grad_norm + grid * sqrt(sum(prod(self.shapes[name]) for name in group.names))
            std = mechanism.noise_multiplier / sqrt(honest) * sqrt(len(groups)) * bound
            for name in group.names:
                draw = next(self._noise, np.full(1, inf))
                drawn = draw if draw.size == sums[name].size else np.full(sums[name].size, inf)
                whole = np.minimum(np.maximum(np.rint(sums[name] / grid), -limit), limit)
                noisy[name] = whole + np.rint(std / grid * drawn).reshape(whole.shape), grid
        return noisy

    def error(self, update: np.ndarray, rounded: float = EXACT) -> float:
        """Largest difference to an update, over what rounding explains: at most 1 for the same; infinite for NaN.

        Args:
            update: (d,) what left.
            rounded: relative rounding of the contexts, where their way back is in half precision.
        """
        layout = self._model.layout()
        end = self._model.vector()
        worst = 0.0
        if update.shape != end.shape:
            return inf
        theirs, ours, ends = (layout.split(vector) for vector in (update, end - self._state, end))
        for name, expected in ours.items():
            relative = rounded if name.startswith("contexts.") else EXACT
            allowed = relative * np.abs(expected).max() + 8 * _ULP * np.abs(ends[name]).max() + 1e-30
            ratio = float(np.abs(theirs[name].astype(np.float64) - expected).max() / allowed)
            worst = max(worst, ratio if np.isfinite(ratio) else inf)
        return worst


def _groups(mechanism: Mechanism, shapes: Mapping[str, torch.Size]) -> Any:
    return clip_groups(dict.fromkeys(shapes, torch.nn.Parameter(torch.zeros(1))), mechanism)


def _grid(group: Any, mechanism: Mechanism) -> float:
    return group.max_grad_norm * 2.0**-mechanism.grid_bits
