"""Canaries in a site's training, and how an attacker who sees every release tells which were trained on.

`private_update` plants them: in each step, when the site's own units are in the sum, canaries take part by the job's
Poisson sampling and pass through the optimizer's own clipping. Whether a canary is trained on at all is a fair coin of
the run's keystream. The attacker knows all other units, which of them took part, and all parameters, as accountants
assume, so it subtracts what they summed up to; what remains of a release is canaries of one kind and noise:

    gradient canaries   gradients ten bounds long in directions of their own, random signs on coordinates that no other
                        canary uses: they never disturb each other, and no matrix of directions is needed
    picture canaries    units of the site with half of their labels turned over; their gradients, by the job's engine,
                        overlap, so they hide behind each other, which makes this attack weaker

Scores depend on no record but the picture canaries'. It must never change what happens to the other units.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmpt_core.config.job import JobConfig
from fedmpt_core.data.pictures import UNKNOWN
from fedmpt_core.model.base import TunedModel
from fedmpt_core.model.device import PieceSize, in_pieces
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.machinery import REAL, Machinery, clip_groups
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from fedmpt_core.privacy.mechanism.noise import ClipGroup, PrivateOptimizer
from fedmpt_core.training.local import TrainingRecords

CANARIES = 1000  # gradient canaries; fewer where fewer numbers are released
PICTURES = 100  # picture canaries; at most half of a site's units
FEWEST = 20  # of either kind: fewer could show nothing
LENGTH = 10.0  # of a gradient canary over the clip bound
_PURPOSE = "canaries"
_FLOATS = 4_000_000  # of canaries' gradients summed at once; chosen


class Canaries(ABC):
    """What both kinds share; an object is what `private_update` takes as `plant`.

    Attributes:
        trained_on: (m,) bool, the coins.
    """

    def __init__(
        self,
        private: Mapping[str, nn.Parameter],
        mechanism: Mechanism,
        machinery: Machinery,
        keystream: Keystream,
        count: int,
    ) -> None:
        """Throws the coins of `count` canaries; `private` are the released parameters by name."""
        self.trained_on = keystream.words(_PURPOSE, count) >= np.uint64(2**63)
        self._mechanism, self._machinery, self._keystream = mechanism, machinery, keystream
        self._groups = clip_groups(private, mechanism)
        self._inside = np.flatnonzero(self.trained_on)
        self._optimizer: PrivateOptimizer | None = None
        self._batches: Iterator[np.ndarray] = iter(())
        self._own: list[np.ndarray] = []  # what these canaries added to the sum of this step

    def __call__(self, optimizer: PrivateOptimizer) -> None:
        """Add the canaries that take part in this step to the sum."""
        if optimizer is not self._optimizer:
            self._start(optimizer)
        before = self._by_group(optimizer, "summed_grad")
        taking_part = self._inside[next(self._batches)]
        rows, tensors = self._gradients(taking_part), dict[str, Any](optimizer.private)

        def add(start: int, stop: int) -> None:
            for name, part in rows(start, stop).items():
                tensors[name].grad_sample = part.to(tensors[name].device)
            optimizer.clip_and_accumulate()

        at_once = PieceSize(max(1, _FLOATS // sum(p.numel() for p in tensors.values())))
        in_pieces(len(taking_part), at_once, add)
        after = self._by_group(optimizer, "summed_grad")
        self._own = [new - old for new, old in zip(after, before, strict=True)]

    @abstractmethod
    def _gradients(self, canaries: np.ndarray) -> Callable[[int, int], Mapping[str, Tensor]]:
        """Gradients, before clipping, of some of these canaries in this step: (start, stop) -> rows by parameter."""

    @abstractmethod
    def _look(self, remains: list[np.ndarray]) -> None:
        """Score a step by what remains of its release: a float64 vector per clip group, over the group's bound."""

    def _start(self, optimizer: PrivateOptimizer) -> None:
        """A round begins. What is released is looked at just before the optimizer steps with it."""
        hook = optimizer.step_hook

        def look(stepping: Any) -> None:
            released, divisor = self._by_group(stepping, "grad"), float(stepping.expected_batch_size)
            parts = zip(self._groups, released, self._by_group(stepping, "summed_grad"), self._own, strict=True)
            # the sum less these canaries is what the attacker knows
            self._look([(seen * divisor - (total - own)) / g.max_grad_norm for g, seen, total, own in parts])
            if hook:
                hook(stepping)

        optimizer.attach_step_hook(look)
        self._optimizer = optimizer
        self._batches = self._machinery.draws(self._mechanism, len(self._inside), self._keystream)

    def _by_group(self, optimizer: PrivateOptimizer, attribute: str) -> list[np.ndarray]:
        gradients = []
        for group in self._groups:
            tensors = [getattr(optimizer.private[name], attribute) for name in group.names]
            gradients.append(np.concatenate([t.detach().double().cpu().numpy().ravel() for t in tensors]))
        return gradients


@dataclass(frozen=True)
class CanaryScores:
    """Gradient canaries after some steps.

    Attributes:
        likelihood: (m,) log likelihood ratio of "trained on" against "left out", summed over the steps, by the claimed
            mechanism: the most powerful score (Neyman and Pearson).
        sums: (m,) what remained of the releases along each canary's direction, over the clip bound, summed up.
        squares: (m,) the same squared, step by step, and summed up.
        steps: how many.
        std: claimed standard deviation of a step's noise in `sums`.
    """

    likelihood: np.ndarray
    sums: np.ndarray
    squares: np.ndarray
    steps: int
    std: float


class GradientCanaries(Canaries):
    """Canaries made of gradients.

    With clip groups a canary has a part in every group that has a number for each canary; other groups get none, which
    makes the attack weaker and never wrong.

    Attributes:
        scores: of the steps so far.
    """

    def __init__(
        self,
        private: Mapping[str, nn.Parameter],
        mechanism: Mechanism,
        keystream: Keystream,
        machinery: Machinery = REAL,
        count: int = CANARIES,
    ) -> None:
        """Draws directions and coins.

        Args:
            private: the released parameters by name.
            mechanism: the claimed one.
            keystream: of the run.
            machinery: draws the steps that a canary takes part in.
            count: canaries; as many as the largest clip group has numbers if those are fewer.

        Raises:
            ValueError: too few numbers are released.
        """
        groups = clip_groups(private, mechanism)
        self._sizes = [[private[name].numel() for name in group.names] for group in groups]
        self._shapes = {name: parameter.shape for name, parameter in private.items()}
        sizes = [sum(parts) for parts in self._sizes]
        count = min(count, max(sizes))
        if count < FEWEST:
            raise ValueError(f"{max(sizes)} released numbers are too few for canaries: {FEWEST} is the least")
        super().__init__(private, mechanism, machinery, keystream, count)
        generator = public_generator(keystream)
        self._supports: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by group: (m, k) coordinates and signs
        for number, size in enumerate(sizes):
            if size >= count:
                chosen = generator.permutation(size)[: size // count * count].reshape(count, -1)
                self._supports[number] = chosen, generator.choice((-1.0, 1.0), chosen.shape)
        # noise over bound of each group, written out again so that a slip in the optimizer shows
        ratios = [1 + 2.0**-mechanism.grid_bits * sqrt(sizes[number]) for number in self._supports]
        std = mechanism.share_multiplier * sqrt(len(sizes) * sum(r * r for r in ratios)) / len(ratios)
        zeros = np.zeros(count)
        self.scores = CanaryScores(zeros, zeros, zeros, 0, std)

    def _gradients(self, canaries: np.ndarray) -> Callable[[int, int], Mapping[str, Tensor]]:
        def rows(start: int, stop: int) -> Mapping[str, Tensor]:
            shaped = {}
            for number, (group, sizes) in enumerate(zip(self._groups, self._sizes, strict=True)):
                flat = np.zeros((stop - start, sum(sizes)), np.float32)
                if number in self._supports:
                    support, signs = (part[canaries[start:stop]] for part in self._supports[number])
                    length = LENGTH * group.max_grad_norm / sqrt(support.shape[1])
                    np.put_along_axis(flat, support, (length * signs).astype(np.float32), axis=1)
                for name, part in zip(group.names, torch.from_numpy(flat).split(sizes, dim=1), strict=True):
                    shaped[name] = part.reshape(-1, *self._shapes[name])
            return shaped

        return rows

    def _look(self, remains: list[np.ndarray]) -> None:
        before, rate = self.scores, self._mechanism.sample_rate
        seen = np.zeros(len(before.sums))
        for number, (support, signs) in self._supports.items():
            along = (remains[number][support] * signs).sum(1) / sqrt(support.shape[1])  # (m,k) -> (m,)
            seen += along / len(self._supports)
        absent = np.log1p(-rate) if rate < 1 else -inf
        gained = np.logaddexp(absent, np.log(rate) + (seen - 0.5) / before.std**2)
        self.scores = replace(
            before,
            likelihood=before.likelihood + gained,
            sums=before.sums + seen,
            squares=before.squares + seen**2,
            steps=before.steps + 1,
        )


class PictureCanaries(Canaries):
    """Canaries made of a site's units with wrong labels, which are no longer among the units that train.

    With a canary trained on or left out, data sets are neighbours as the claim means them: with a unit, and without it.
    The attacker works out each canary's clipped gradient g_i in every step; what remains of the release is
    sum_i b_i g_i and noise, where b_i is whether it took part. The score is the best linear estimate of b_i, summed
    over the steps.

    Attributes:
        scores: (m,) of the steps so far.
    """

    def __init__(
        self,
        model: TunedModel,
        records: TrainingRecords,
        job: JobConfig,
        mechanism: Mechanism,
        keystream: Keystream,
        machinery: Machinery = REAL,
        micro_batch: int = 64,
    ) -> None:
        """Turns labels and throws coins.

        Args:
            model: the one that is trained.
            records: the canaries', with their right labels; the unit of each is its canary.
            job: the loss.
            mechanism: the claimed one.
            keystream: of the run.
            machinery: makes gradients, and draws the steps that a canary takes part in.
            micro_batch: most records whose gradients are held at once.
        """
        self._micro_batch, targets = micro_batch, records.targets
        self._engine = machinery.gradients(mechanism, model, job)
        super().__init__(self._engine.private, mechanism, machinery, keystream, int(records.units.max()) + 1)
        turned = public_generator(keystream).random(targets.shape) < 0.5
        known = targets != UNKNOWN
        turned[~(turned & known).any(1)] = True  # a record with all labels right would be no canary
        self._labels = torch.from_numpy(np.where(known, targets != turned, UNKNOWN).astype(np.float32))
        self._features, self._units = records.features, records.units
        self._along = torch.zeros(0)
        self.scores = np.zeros(len(self.trained_on))

    def _gradients(self, canaries: np.ndarray) -> Callable[[int, int], Mapping[str, Tensor]]:
        gradients = self._all_gradients()
        self._along = torch.cat([self._clipped(gradients, group) for group in self._groups], 1)
        return lambda start, stop: {name: rows[canaries[start:stop]] for name, rows in gradients.items()}

    def _all_gradients(self) -> dict[str, Tensor]:
        """Of all canaries with the current parameters, on the CPU."""
        self._engine.encode()
        private = dict[str, Any](self._engine.private)
        gradients: dict[str, list[Tensor]] = {name: [] for name in private}
        size = PieceSize(self._micro_batch)

        def fill(start: int, stop: int) -> None:
            self._engine.fill(self._portions(start, stop, size.rows), stop - start)
            for name, parameter in private.items():
                gradients[name].append(parameter.grad_sample.cpu())

        in_pieces(len(self.trained_on), size, fill)
        return {name: torch.cat(rows) for name, rows in gradients.items()}

    def _portions(self, start: int, stop: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        device = next(iter(self._engine.private.values())).device
        rows = np.flatnonzero((self._units >= start) & (self._units < stop))
        for i in range(0, len(rows), size):
            part = rows[i : i + size]
            owner = torch.from_numpy(self._units[part] - start)
            yield self._features.batch(part).to(device), self._labels[part].to(device), owner.to(device)

    def _clipped(self, gradients: Mapping[str, Tensor], group: ClipGroup) -> Tensor:
        """(m, d_g) over the bound and the root of the number of groups: no longer than 1 over all groups."""
        rows = torch.cat([gradients[name].flatten(1) for name in group.names], 1)
        rows = torch.where(torch.isfinite(rows).all(1, keepdim=True), rows, 0.0) / group.max_grad_norm
        return rows / rows.norm(dim=1, keepdim=True).clamp(min=1.0) / sqrt(len(self._groups))

    def _look(self, remains: list[np.ndarray]) -> None:
        seen = torch.from_numpy(np.concatenate(remains) / sqrt(len(self._groups))).float()
        chance = self._mechanism.sample_rate / 2  # that a canary is trained on and takes part
        overlap = (self._along @ self._along.T).double().numpy()
        surprise = (self._along @ seen).double().numpy() - chance * overlap.sum(1)
        ridge = self._mechanism.noise_multiplier**2 / (chance * (1 - chance))
        self.scores = self.scores + np.linalg.solve(overlap + ridge * np.eye(len(overlap)), surprise)


def public_generator(keystream: Keystream) -> np.random.Generator:
    """For what need not be secret: directions, wrong labels, and which units are canaries."""
    return np.random.default_rng([int(word) for word in keystream.words(_PURPOSE, 4)])
