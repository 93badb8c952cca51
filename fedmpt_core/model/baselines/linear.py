"""A linear head on the frozen image tower: what can be had without any words.

    logit_c = w_c g + b_c,   g the mean patch scaled to unit mean square (as FedMPT's gate sees a picture)

The usual linear probe (Radford et al. 2021), trained by the federation. It differs in the input: the mean of the patch
features, since those are what is cached, instead of the tower's pooled feature.

Trained numbers: C D + C. Cost: no text tower, and a product of (C, D) with one vector per picture.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedmpt_core.config.job import ModelConfig
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.base import Prediction
from fedmpt_core.model.baselines.baseline import Baseline
from fedmpt_core.model.baselines.parts import PRIOR_LOGIT, FixedText, answer, unit_mean_square
from fedmpt_core.model.fedmpt.adapters import per_record


class LinearHead(nn.Module):
    """Attributes: weight Parameter (C, D), zero; bias Parameter (C,)."""

    def __init__(self, classes: int, features: int, bias: float) -> None:
        """Starts as a constant."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, features))
        self.bias = nn.Parameter(torch.full((classes,), float(bias)))

    def forward(self, text: Tensor, patches: Tensor) -> Prediction:
        """Prediction of (..., P, D); the text is not looked at."""
        picture = unit_mean_square(patches.mean(-2)).unsqueeze(-2)  # (...,1,D)
        return answer(per_record(self.weight, picture).squeeze(-1) + self.bias)


def build(backbone: Backbone, classes: Sequence[str], config: ModelConfig, generator: np.random.Generator) -> Baseline:
    """The model; `generator` is not needed, as it starts from zero."""
    bias = PRIOR_LOGIT if config.bias is None else config.bias
    width = backbone.feature_dim
    no_words = FixedText(torch.zeros(1, len(classes), width))
    return Baseline(backbone, classes, config, no_words, LinearHead(len(classes), width, bias))
