"""Fed-DualCoOp: a positive and a negative context for every class (DualCoOp, Sun et al. 2022), federated.

    prompt_c+ = [V+_c1] .. [V+_cM] CLASS_c.      prompt_c- = [V-_c1] .. [V-_cM] CLASS_c.
    logit_c = scale * (pooled_c+ - pooled_c-) + bias

so that P(Y_c = 1) is the softmax of the two pooled cosines over a temperature. Pooling is the paper's class-specific
region feature aggregation, the loss its asymmetric one, M = 16 as there. Differs: the temperature is learnt and a bias
added, as for every method here (it starts at -2.2, a label in one picture of ten); the paper takes regions before the
tower's attention pooling, here they are the patch features.

Trained numbers: 2 C M E + 2. Cost: 2 C prompts through the text tower, two cosines per patch and class.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from fedmpt_core.config.job import ModelConfig
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.base import Prediction
from fedmpt_core.model.baselines.baseline import Baseline
from fedmpt_core.model.baselines.parts import PRIOR_LOGIT, ClassContexts, Output, answer, pooled
from fedmpt_core.model.fedmpt.adapters import cosine


class DualHead(nn.Module):
    """Difference of the pooled cosines with the positive and the negative text."""

    def __init__(self, backbone: Backbone, config: ModelConfig) -> None:
        """See `Output`."""
        super().__init__()
        self.output, self._temperature = Output(backbone, config, PRIOR_LOGIT), config.patch_temperature

    def forward(self, text: Tensor, patches: Tensor) -> Prediction:
        """(2, C, D) and (..., P, D) -> Prediction."""
        present, absent = pooled(cosine(patches, text), self._temperature).unbind(-2)
        return answer(self.output(present - absent))


def build(backbone: Backbone, classes: Sequence[str], config: ModelConfig, generator: np.random.Generator) -> Baseline:
    """The model."""
    words = ClassContexts(backbone, classes, 2, config.context_tokens, generator)
    return Baseline(backbone, classes, config, words, DualHead(backbone, config), texts=2)
