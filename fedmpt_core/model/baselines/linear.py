"""A linear head on the frozen image tower: what can be had without any words.

    logit_c = w_c g + b_c,   g the mean patch scaled to unit mean square (as FedMPT's gate sees a picture)

The usual linear probe (Radford et al. 2021), trained by the federation. It differs in the input: the mean of the patch
features, since those are what is cached, instead of the tower's pooled feature.

Trained numbers: C D + C. Cost: no text tower, and a product of (C, D) with one vector per picture.
"""

import torch
from torch import Tensor, nn

from fedmpt_core.model.base import Prediction
from fedmpt_core.model.baselines.baseline import Baseline, Setup
from fedmpt_core.model.baselines.parts import PRIOR_LOGIT, FixedText, answer
from fedmpt_core.model.fedmpt.adapters import per_record
from fedmpt_core.model.fedmpt.gating import unit_mean_square


class LinearHead(nn.Module):
    """Attributes: weight Parameter (C, D), zero; bias Parameter (C,)."""

    def __init__(self, setup: Setup) -> None:
        """Starts as a constant."""
        super().__init__()
        classes, bias = len(setup.classes), setup.config.bias
        self.weight = nn.Parameter(torch.zeros(classes, setup.backbone.feature_dim))
        self.bias = nn.Parameter(torch.full((classes,), PRIOR_LOGIT if bias is None else float(bias)))

    def forward(self, text: Tensor, patches: Tensor) -> Prediction:
        """Prediction of (..., P, D); the text is not looked at."""
        picture = unit_mean_square(patches.mean(-2)).unsqueeze(-2)  # (...,1,D)
        return answer(per_record(self.weight, picture).squeeze(-1) + self.bias)


def linear(setup: Setup) -> Baseline:
    """The model; it draws nothing, as it starts from zero."""
    return Baseline(setup, FixedText(torch.zeros(1, len(setup.classes), setup.backbone.feature_dim)), LinearHead(setup))
