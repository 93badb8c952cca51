"""Federated CoOp and what became of it for many labels: contexts that are learnt around class names.

Fed-CoOp: one learnt context before every class name (CoOp, Zhou et al. 2022; federated: PromptFL, Guo et al. 2023).

    prompt_c = [V_1] .. [V_M] CLASS_c.        logit_c = scale * pooled_c + bias

`pooled_c` is the class's cosine with the patches, pooled by region. Differs from the paper: it has one label per
picture, a softmax over classes and the image tower's pooled feature; here each class has a sigmoid with a learnt scale
and bias, on the patch features that are cached. M = 16 random vectors, as there.

Trained numbers: M E + 2. Cost: C prompts through the text tower, one cosine per patch and class.

Fed-DualCoOp: a positive and a negative context for every class (DualCoOp, Sun et al. 2022), federated.

    prompt_c+ = [V+_c1] .. [V+_cM] CLASS_c.      prompt_c- = [V-_c1] .. [V-_cM] CLASS_c.
    logit_c = scale * (pooled_c+ - pooled_c-) + bias

so that P(Y_c = 1) is the softmax of the two pooled cosines over a temperature. Pooling is the paper's class-specific
region feature aggregation, the loss its asymmetric one, M = 16 as there. Differs: the temperature is learnt and a bias
added, as for every method here (it starts at -2.2, a label in one picture of ten); the paper takes regions before the
tower's attention pooling, here they are the patch features.

Trained numbers: 2 C M E + 2. Cost: 2 C prompts through the text tower, two cosines per patch and class.

Fed-PosCoOp: only "is there" is a prompt; "is not" is a vector (PositiveCoOp, Rawlekar et al. 2025), federated.

    prompt_c = [V_c1] .. [V_cM] CLASS_c.         n_c a learnt vector in the towers' shared space
    logit_c = scale * (pooled cosine with prompt_c - pooled cosine with n_c) + bias

The paper's point is that a text tower never read captions of what is absent, so the negative half does without it.
Everything else as in `dualcoop`, with the same differences.

Trained numbers: C M E + C D + 2. Cost: C prompts through the text tower, two cosines per patch and class.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmpt_core.model.base import Prediction
from fedmpt_core.model.baselines.baseline import Baseline, Setup
from fedmpt_core.model.baselines.parts import PRIOR_LOGIT, ClassContexts, Output, SharedContext, answer, pooled
from fedmpt_core.model.fedmpt.adapters import cosine, random_parameter


class RegionHead(nn.Module):
    """Pooled cosine of patches with one text per class."""

    def __init__(self, setup: Setup) -> None:
        """See `Output`."""
        super().__init__()
        self.output, self._temperature = Output(setup), setup.config.patch_temperature

    def forward(self, text: Tensor, patches: Tensor) -> Prediction:
        """(1, C, D) and (..., P, D) -> Prediction."""
        return answer(self.output(pooled(cosine(patches, text), self._temperature).squeeze(-2)))


class DualHead(nn.Module):
    """Difference of the pooled cosines with the positive and the negative text."""

    def __init__(self, setup: Setup) -> None:
        """See `Output`."""
        super().__init__()
        self.output, self._temperature = Output(setup, PRIOR_LOGIT), setup.config.patch_temperature

    def forward(self, text: Tensor, patches: Tensor) -> Prediction:
        """(2, C, D) and (..., P, D) -> Prediction."""
        present, absent = pooled(cosine(patches, text), self._temperature).unbind(-2)
        return answer(self.output(present - absent))


class PositiveHead(DualHead):
    """Attributes: negative Parameter (C, D), random directions of about unit length."""

    def __init__(self, setup: Setup) -> None:
        """See `DualHead`."""
        super().__init__(setup)
        width = setup.backbone.feature_dim
        self.negative = random_parameter(setup.generator, len(setup.classes), width, std=width**-0.5)

    def forward(self, text: Tensor, patches: Tensor) -> Prediction:
        """(1, C, D) and (..., P, D) -> Prediction."""
        return super().forward(torch.cat([text, F.normalize(self.negative, dim=-1).unsqueeze(0)]), patches)


def coop(setup: Setup) -> Baseline:
    """Fed-CoOp."""
    return Baseline(setup, SharedContext(setup), RegionHead(setup))


def dualcoop(setup: Setup) -> Baseline:
    """Fed-DualCoOp."""
    return Baseline(setup, ClassContexts(setup, 2), DualHead(setup), texts=2)


def poscoop(setup: Setup) -> Baseline:
    """Fed-PosCoOp."""
    return Baseline(setup, ClassContexts(setup, 1), PositiveHead(setup))
