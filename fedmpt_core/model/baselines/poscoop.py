"""Fed-PosCoOp: only "is there" is a prompt; "is not" is a vector (PositiveCoOp, Rawlekar et al. 2025), federated.

    prompt_c = [V_c1] .. [V_cM] CLASS_c.         n_c a learnt vector in the towers' shared space
    logit_c = scale * (pooled cosine with prompt_c - pooled cosine with n_c) + bias

The paper's point is that a text tower never read captions of what is absent, so the negative half does without it.
Everything else as in `dualcoop`, with the same differences.

Trained numbers: C M E + C D + 2. Cost: C prompts through the text tower, two cosines per patch and class.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmpt_core.config.job import ModelConfig
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.base import Prediction
from fedmpt_core.model.baselines.baseline import Baseline
from fedmpt_core.model.baselines.dualcoop import DualHead
from fedmpt_core.model.baselines.parts import ClassContexts, random_parameter


class PositiveHead(DualHead):
    """Attributes: negative Parameter (C, D), random directions of about unit length."""

    def __init__(self, backbone: Backbone, classes: int, config: ModelConfig, generator: np.random.Generator) -> None:
        """See `DualHead`."""
        super().__init__(backbone, config)
        width = backbone.feature_dim
        self.negative = random_parameter(generator, classes, width, std=width**-0.5)

    def forward(self, text: Tensor, patches: Tensor) -> Prediction:
        """(1, C, D) and (..., P, D) -> Prediction."""
        return super().forward(torch.cat([text, F.normalize(self.negative, dim=-1).unsqueeze(0)]), patches)


def build(backbone: Backbone, classes: Sequence[str], config: ModelConfig, generator: np.random.Generator) -> Baseline:
    """The model."""
    words = ClassContexts(backbone, classes, 1, config.context_tokens, generator)
    return Baseline(backbone, classes, config, words, PositiveHead(backbone, len(classes), config, generator))
