"""FedTPG: a network writes the context from the class names (Qiu et al. 2024).

    T = frozen text features of the classes (C, D)
    [V_1] .. [V_M] = h( CrossAttention(queries Q (M, D), keys and values T) ),   h: linear, ReLU, linear to token width
    prompt_c = [V_1] .. [V_M] CLASS_c.         logit_c = scale * pooled_c + bias

What travels is the network, so it can write a context for classes that it never saw. Four heads, as in the paper,
whose M is 4. Differs from it as `coop` does from CoOp. All of it stands before the text tower, so under the engine
`feature_space` the noise hits the text features alone, however large the network.

Trained numbers: M D + 4 D^2 + (D^2 + D) + (D E + E) + 2. Cost: as `coop`, and the network once per step.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmpt_core.config.job import ModelConfig
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.baselines.baseline import Baseline
from fedmpt_core.model.baselines.coop import RegionHead
from fedmpt_core.model.baselines.parts import CONTEXT_STD, ClassWords, CrossAttention, FrozenPrompts, random_parameter

HEADS = 4


class GeneratedContext(nn.Module):
    """The prompts of all classes out of the generator.

    Attributes:
        queries: Parameter (M, D).
        attention: queries to class names.
        hidden, hidden_bias, out, out_bias: Parameters (D, D), (D,), (D, E), (E,).
    """

    def __init__(self, backbone: Backbone, classes: Sequence[str], tokens: int, generator: np.random.Generator) -> None:
        """Starts with contexts as small as CoOp's."""
        super().__init__()
        width, token = backbone.feature_dim, backbone.token_dim
        self.classes, self.names = ClassWords(backbone, classes), FrozenPrompts(backbone, classes)
        self.queries = random_parameter(generator, tokens, width, std=1.0)
        self.attention = CrossAttention(width, HEADS, generator)
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


def build(backbone: Backbone, classes: Sequence[str], config: ModelConfig, generator: np.random.Generator) -> Baseline:
    """The model."""
    words = GeneratedContext(backbone, classes, config.context_tokens, generator)
    return Baseline(backbone, classes, config, words, RegionHead(backbone, config))
