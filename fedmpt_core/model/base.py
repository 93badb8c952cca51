"""What every method that can be trained here offers: words for the frozen text tower, and a head on frozen patches.

    text = text_features()      (N,C,D), depends on parameters named `contexts.*` alone, never on a record
    head(text, patches)         Prediction of records one by one; its parameters have any other name

Whatever keeps to this trains under DP-SGD and secure aggregation as it stands: the gradients of single records are
taken through the head by vmap and through the text tower by one vector-Jacobian product
(`privacy/mechanism/gradients.py`).

A method must never compute a statistic over a batch, hold the backbone in its state, or train it.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedmpt_core.config.job import ModelConfig
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.vector import ParameterLayout

TRAINED = {
    "contexts": ("contexts.",),
    "contexts+gate": ("contexts.", "gate.", "head."),
    "adapters": ("adapters.up", "head."),
    "all": ("contexts.", "adapters.", "gate.", "head."),
}
"""By `ModelConfig.trained`: how the names of the trained parameters begin."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of B records. Without the leading B where a single record went in.

    Attributes:
        probabilities: (B, C) P(Y = 1 | do(D)), [0, 1].
        log_positive: (B, C) log P(Y = 1 | do(D)), at most 0.
        log_negative: (B, C) log P(Y = 0 | do(D)), at most 0.
        gate: (B, N) weights of the conditions, summing to 1.
        condition_probabilities: (B, N, C) each condition's own prediction, [0, 1].
        plan: (B, N, P, C) transport plan, columns summing to 1 / C; None without transport.
    """

    probabilities: Tensor
    log_positive: Tensor
    log_negative: Tensor
    gate: Tensor
    condition_probabilities: Tensor
    plan: Tensor | None


class TunedModel(nn.Module, abc.ABC):
    """A method on frozen towers.

    Attributes:
        classes: C class names, in the order of every score.
        conditions: conditions, in the order of every gate; `("no condition",)` for a method without.
        config: the settings.
        texts: N, text features of a class; one for each condition unless a method says otherwise.
        head: everything after the towers.
    """

    head: nn.Module

    def __init__(
        self, backbone: Backbone, classes: Sequence[str], conditions: Sequence[str], config: ModelConfig
    ) -> None:
        """Keeps the towers outside the module's state, so move them by themselves."""
        super().__init__()
        self.texts = len(conditions)
        self.classes, self.conditions, self.config = tuple(classes), tuple(conditions), config
        # In a tuple, so that towers that are themselves modules do not become part of this one.
        self._frozen = (backbone,)

    @abc.abstractmethod
    def encoded_prompts(self) -> Tensor:
        """Text features (N, C, D) of all prompts, of any length, differentiable in the contexts."""

    @abc.abstractmethod
    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Every parameter, trained or not, by the name under which it travels, always in the same order."""

    def text_features(self) -> Tensor:
        """Unit text features (N, C, D) of all prompts, differentiable in the contexts.

        Raises:
            ValueError: a prompt is longer than the text tower reads.
        """
        features = self.encoded_prompts()
        # Half precision is widened first: the head is float32.
        return nn.functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by name, always in the same order."""
        wanted = TRAINED[self.config.trained]
        return {name: p for name, p in self.parameters_by_name().items() if name.startswith(wanted)}

    def group_sizes(self) -> dict[str, int]:
        """Numbers in each part that `TRAINED` names, trained or not."""
        parts, named = {part for parts in TRAINED.values() for part in parts}, self.parameters_by_name()
        return {part: sum(p.numel() for name, p in named.items() if name.startswith(part)) for part in parts}

    def forward(self, patches: Tensor, text: Tensor | None = None) -> Prediction:
        """Prediction of B records.

        Args:
            patches: (B, P, D) patch features, or (P, D).
            text: (N, C, D) from `text_features`, if already computed.

        Returns:
            Prediction.

        Raises:
            ValueError: patches or text of another width or count.
        """
        width = self._frozen[0].feature_dim
        if patches.ndim < 2 or patches.shape[-1] != width:
            raise ValueError(f"patches has shape {tuple(patches.shape)}: give (B, P, {width})")
        text = self.text_features() if text is None else text
        expected = (self.texts, len(self.classes), width)
        if tuple(text.shape) != expected:
            raise ValueError(f"text has shape {tuple(text.shape)}: give {expected}, as text_features() returns")
        return self.head(text, patches)

    def layout(self) -> ParameterLayout:
        """Names and shapes of the trained parameters in the order of `vector`."""
        parameters = self.trainable_parameters()
        return ParameterLayout(tuple(parameters), tuple(tuple(p.shape) for p in parameters.values()))

    def vector(self) -> np.ndarray:
        """A copy of the trained parameters as one (d,) float32 vector."""
        return self.layout().flatten(
            {name: p.detach().float().cpu().numpy() for name, p in self.trainable_parameters().items()}
        )

    def load_vector(self, vector: np.ndarray) -> None:
        """Overwrites the trained parameters.

        Args:
            vector: (d,) finite, as `vector` returns it.

        Raises:
            ValueError: another length, or a value that is not finite; nothing is changed then.
        """
        tensors = self.layout().split(vector)
        if not np.isfinite(vector).all():
            raise ValueError("vector holds NaN or infinity: the parameters stay as they were")
        with torch.no_grad():
            for name, parameter in self.trainable_parameters().items():
                parameter.copy_(torch.from_numpy(np.array(tensors[name])))
