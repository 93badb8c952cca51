"""Fed-CoOp: one learnt context before every class name (CoOp, Zhou et al. 2022; federated: PromptFL, Guo et al. 2023).

    prompt_c = [V_1] .. [V_M] CLASS_c.        logit_c = scale * pooled_c + bias

`pooled_c` is the class's cosine with the patches, pooled by region. Differs from the paper: it has one label per
picture, a softmax over classes and the image tower's pooled feature; here each class has a sigmoid with a learnt scale
and bias, on the patch features that are cached. M = 16 random vectors, as there.

Trained numbers: M E + 2. Cost: C prompts through the text tower, one cosine per patch and class.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from fedmpt_core.config.job import ModelConfig
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.base import Prediction
from fedmpt_core.model.baselines.baseline import Baseline
from fedmpt_core.model.baselines.parts import Output, SharedContext, answer, pooled
from fedmpt_core.model.fedmpt.adapters import cosine


class RegionHead(nn.Module):
    """Pooled cosine of patches with one text per class."""

    def __init__(self, backbone: Backbone, config: ModelConfig) -> None:
        """See `Output`."""
        super().__init__()
        self.output, self._temperature = Output(backbone, config), config.patch_temperature

    def forward(self, text: Tensor, patches: Tensor) -> Prediction:
        """(1, C, D) and (..., P, D) -> Prediction."""
        return answer(self.output(pooled(cosine(patches, text), self._temperature).squeeze(-2)))


def build(backbone: Backbone, classes: Sequence[str], config: ModelConfig, generator: np.random.Generator) -> Baseline:
    """The model."""
    words = SharedContext(backbone, classes, config.context_tokens, generator)
    return Baseline(backbone, classes, config, words, RegionHead(backbone, config))
