"""A visual prompt in the manner of FedMVP (Singha et al. 2025), in feature space.

    g = mean patch                                       v = MLP( CrossAttention(query g, keys and values T) )
    X' = X scaled to unit mean square + ratio * v        logit_c = scale * pooled cosine of X' with T_c + bias

T are the frozen prompts "a photo of a CLASS." The MLP is D to S, ReLU, S to D, and starts at zero, so a new model is
the zero-shot one. Differs from the paper, and this is no small thing: there v is a set of tokens that enter the image
tower beside the patches and change them through its attention. Patch features are cached here and both towers stay
frozen, so v is added to every patch instead. The keys are class prompts instead of an LLM's attributes, and the
consistency loss is left out.

Trained numbers: 4 D^2 + 2 D S + S + D + 2. Cost: no text tower, one attention of one query and a small network per
picture.
"""

import torch
from torch import Tensor, nn

from fedmpt_core.model.base import Prediction
from fedmpt_core.model.baselines.baseline import Baseline, Setup
from fedmpt_core.model.baselines.coop import RegionHead
from fedmpt_core.model.baselines.parts import CrossAttention, FrozenPrompts
from fedmpt_core.model.fedmpt.adapters import per_record, random_parameter
from fedmpt_core.model.fedmpt.gating import unit_mean_square

HEADS = 8


class VisualPrompt(nn.Module):
    """What is added to every patch of a picture.

    Attributes:
        attention: of the picture to the texts.
        down, down_bias, up, up_bias: Parameters (S, D), (S,), (D, S), (D,); the last two start at zero.
    """

    def __init__(self, setup: Setup) -> None:
        """S is `adapter_width`, the share of the prompt that is added `adapter_ratio`."""
        super().__init__()
        features, width = setup.backbone.feature_dim, setup.config.adapter_width
        self._ratio = setup.config.adapter_ratio
        self.attention = CrossAttention(setup, HEADS)
        self.down = random_parameter(setup.generator, width, features, std=features**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(width))
        self.up = nn.Parameter(torch.zeros(features, width))
        self.up_bias = nn.Parameter(torch.zeros(features))

    def forward(self, patches: Tensor, texts: Tensor) -> Tensor:
        """(..., P, D) patches of any length and (T, D) texts -> (..., P, D)."""
        picture = unit_mean_square(patches.mean(-2)).unsqueeze(-2)  # (...,1,D)
        seen = self.attention(picture, texts)
        inner = torch.relu(per_record(self.down, seen).mT + self.down_bias)  # (...,1,S)
        prompt = per_record(self.up, inner).mT + self.up_bias  # (...,1,D)
        return unit_mean_square(patches) + self._ratio * prompt


class PromptedHead(RegionHead):
    """Pooled cosine of prompted patches with one text per class."""

    def __init__(self, setup: Setup) -> None:
        """See `RegionHead` and `VisualPrompt`."""
        super().__init__(setup)
        self.prompt = VisualPrompt(setup)

    def forward(self, text: Tensor, patches: Tensor) -> Prediction:
        """(1, C, D) and (..., P, D) -> Prediction."""
        return super().forward(text, self.prompt(patches, text[0]))


def fedmvp(setup: Setup) -> Baseline:
    """The model."""
    return Baseline(setup, FrozenPrompts(setup), PromptedHead(setup))
