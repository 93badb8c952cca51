"""The variant of FedMPT that was released as code, by its description, without the slips of that code.

    prompt_nc = [V_1] .. [V_M] COND_n [U_1] .. [U_M] CLASS_c.     V, U shared by all conditions and classes, random
    X' = X + visual prompt (as in `fedmvp`; keys are all N C prompts)
    o_nc = scale * pooled cosine of X' with prompt_nc + bias      softmax pooling instead of transport
    w = softmax over n of ( standard deviation over c of o_nc / temperature )     no parameter
    logit_c = sum_n w_n o_nc                                      logits are mixed, not probabilities

It has no adapters, no transport and no learnt gate. Put right: features are normalised over channels; conditions of
several words keep all of them; scores are not standardised over the classes, after which no picture could be without
labels; the mixture is not divided by N once more. The visual prompt stands in feature space (see `fedmvp`). A
comparison, no reproduction.

Trained numbers: 2 M E + 4 D^2 + 2 D S + S + D + 2. Cost: N C prompts through the text tower, N cosines per patch and
class.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.base import Prediction
from fedmpt_core.model.baselines.baseline import Baseline, Setup
from fedmpt_core.model.baselines.fedmvp import VisualPrompt
from fedmpt_core.model.baselines.parts import Output, answer, pooled
from fedmpt_core.model.fedmpt.adapters import cosine, random_parameter
from fedmpt_core.model.words import CONTEXT_STD, Words, class_words

_TINY = 1e-12


class SharedConditionContext(nn.Module):
    """Prompts whose two contexts are shared by all conditions and classes.

    Attributes:
        condition, klass: Parameters (M, E).
    """

    def __init__(self, setup: Setup) -> None:
        """Raises ValueError for words that the backbone cannot tokenise."""
        super().__init__()
        self.classes = class_words(setup.backbone, setup.classes)
        self.conditions = Words(setup.backbone, "condition", setup.config.conditions)
        shape = (setup.config.context_tokens, setup.backbone.token_dim)
        self.condition, self.klass = (random_parameter(setup.generator, *shape, std=CONTEXT_STD) for _ in range(2))

    def forward(self, backbone: Backbone) -> Tensor:
        """(N, C, D)."""
        prefixes = [torch.cat([self.condition, words, self.klass]) for words in self.conditions()]
        return backbone.encode_prompts(prefixes, self.classes())


class ReleasedHead(nn.Module):
    """Visual prompt, pooled cosines, the gate without parameters."""

    def __init__(self, setup: Setup) -> None:
        """See `Output` and `VisualPrompt`."""
        super().__init__()
        config = setup.config
        self.output, self.prompt = Output(setup), VisualPrompt(setup)
        self._patch_temperature, self._gate_temperature = config.patch_temperature, config.gate_temperature

    def forward(self, text: Tensor, patches: Tensor) -> Prediction:
        """(N, C, D) and (..., P, D) -> Prediction."""
        seen = cosine(self.prompt(patches, text.flatten(0, 1)), text)  # (...,N,P,C)
        logits = self.output(pooled(seen, self._patch_temperature))  # (...,N,C)
        centred = logits - logits.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1) + _TINY).sqrt()  # (...,N), the bias changes nothing in it
        gate = torch.softmax(spread / self._gate_temperature, dim=-1)  # (...,N)
        mixed = (gate.unsqueeze(-1) * logits).sum(-2)
        return replace(answer(mixed), gate=gate, condition_probabilities=F.logsigmoid(logits).exp())


def released(setup: Setup) -> Baseline:
    """The model."""
    conditions = setup.config.conditions
    words, head = SharedConditionContext(setup), ReleasedHead(setup)
    return Baseline(setup, words, head, texts=len(conditions), conditions=conditions)
