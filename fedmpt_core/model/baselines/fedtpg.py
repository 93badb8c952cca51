"""FedTPG: a network writes the context from the class names (Qiu et al. 2024).

    T = frozen text features of the classes (C, D)
    [V_1] .. [V_M] = h( CrossAttention(queries Q (M, D), keys and values T) ),   h: linear, ReLU, linear to token width
    prompt_c = [V_1] .. [V_M] CLASS_c.         logit_c = scale * pooled_c + bias

What travels is the network, so it can write a context for classes that it never saw. Four heads, as in the paper,
whose M is 4. Differs from it as `coop` does from CoOp. All of it stands before the text tower, so under the engine
`feature_space` the noise hits the text features alone, however large the network.

Trained numbers: M D + 4 D^2 + (D^2 + D) + (D E + E) + 2. Cost: as `coop`, and the network once per step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.baselines.baseline import Baseline, Setup
from fedmpt_core.model.baselines.coop import RegionHead
from fedmpt_core.model.baselines.parts import CrossAttention, FrozenPrompts
from fedmpt_core.model.fedmpt.adapters import random_parameter
from fedmpt_core.model.words import CONTEXT_STD, class_words

HEADS = 4


class GeneratedContext(nn.Module):
    """The prompts of all classes out of the generator.

    Attributes:
        queries: Parameter (M, D).
        attention: queries to class names.
        hidden, hidden_bias, out, out_bias: Parameters (D, D), (D,), (D, E), (E,).
    """

    def __init__(self, setup: Setup) -> None:
        """Starts with contexts as small as CoOp's."""
        super().__init__()
        generator, width, token = setup.generator, setup.backbone.feature_dim, setup.backbone.token_dim
        self.classes, self.names = class_words(setup.backbone, setup.classes), FrozenPrompts(setup)
        self.queries = random_parameter(generator, setup.config.context_tokens, width, std=1.0)
        self.attention = CrossAttention(setup, HEADS)
        self.hidden = random_parameter(generator, width, width, std=1.0)
        self.hidden_bias = nn.Parameter(torch.zeros(width))
        self.out = random_parameter(generator, width, token, std=CONTEXT_STD * width**-0.5)
        self.out_bias = nn.Parameter(torch.zeros(token))

    def context(self, backbone: Backbone) -> Tensor:
        """(M, E)."""
        names = F.normalize(self.names(backbone)[0], dim=-1)  # (C,D)
        inner = F.relu(self.attention(self.queries, names) @ self.hidden + self.hidden_bias)
        return inner @ self.out + self.out_bias

    def forward(self, backbone: Backbone) -> Tensor:
        """(1, C, D)."""
        return backbone.encode_prompts([self.context(backbone)], self.classes())


def fedtpg(setup: Setup) -> Baseline:
    """The model."""
    return Baseline(setup, GeneratedContext(setup), RegionHead(setup))
