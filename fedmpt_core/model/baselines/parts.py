"""What several baselines are made of: prompts with learnt contexts, pooled cosines, cross-attention, the output.

Every product over records is computed record by record (`adapters.per_record`), so that no record's numbers depend on
another's, nor on its place in the batch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.base import Prediction
from fedmpt_core.model.baselines.baseline import Setup
from fedmpt_core.model.fedmpt.adapters import per_record, random_parameter
from fedmpt_core.model.fedmpt.readout import pooling_weights
from fedmpt_core.model.words import CONTEXT_STD, Words, class_words

PRIOR_LOGIT = -2.2
"""Start of a logit that is made of a difference, 0 at first: a label in one picture of ten, a public constant."""

TEMPLATE = "a photo of a"


class FixedText(nn.Module):
    """Text features that no parameter changes, as a buffer that follows the module to its device."""

    def __init__(self, features: Tensor) -> None:
        """(N, C, D)."""
        super().__init__()
        self._features: Tensor
        self.register_buffer("_features", features, persistent=False)

    def forward(self, backbone: Backbone) -> Tensor:
        """(N, C, D), whatever the backbone."""
        return self._features


class FrozenPrompts(FixedText):
    """`a photo of a CLASS.`, encoded once: (1, C, D), nothing to train."""

    def __init__(self, setup: Setup) -> None:
        """Raises ValueError for a class that the backbone cannot tokenise."""
        backbone = setup.backbone
        device = backbone.embed(backbone.tokenize(TEMPLATE)).device  # the tower may stand on a GPU already
        with torch.no_grad():
            prefix, *suffixes = (
                word.to(device)
                for word in (*Words(backbone, "template", [TEMPLATE])(), *class_words(backbone, setup.classes)())
            )
            features = backbone.encode_prompts([prefix], suffixes)
        super().__init__(features.detach().to("cpu", torch.float32))


class SharedContext(nn.Module):
    """`[V_1] .. [V_M] CLASS.`, one context for all classes (CoOp's unified context).

    Attributes:
        context: Parameter (M, E).
    """

    def __init__(self, setup: Setup) -> None:
        """Starts from random vectors."""
        super().__init__()
        self.classes = class_words(setup.backbone, setup.classes)
        shape = (setup.config.context_tokens, setup.backbone.token_dim)
        self.context = random_parameter(setup.generator, *shape, std=CONTEXT_STD)

    def forward(self, backbone: Backbone) -> Tensor:
        """(1, C, D)."""
        return backbone.encode_prompts([self.context], self.classes())


class ClassContexts(nn.Module):
    """`[V_kc1] .. [V_kcM] CLASS.`, K contexts of its own for every class (DualCoOp: one for "is there", one for "is
    not").

    Attributes:
        context: Parameter (K, C, M, E).
    """

    def __init__(self, setup: Setup, kinds: int) -> None:
        """Starts from random vectors."""
        super().__init__()
        self.classes = class_words(setup.backbone, setup.classes)
        shape = (kinds, len(setup.classes), setup.config.context_tokens, setup.backbone.token_dim)
        self.context = random_parameter(setup.generator, *shape, std=CONTEXT_STD)

    def forward(self, backbone: Backbone) -> Tensor:
        """(K, C, D)."""
        words = self.classes()
        prompts = [
            torch.cat([context, word]) for kind in self.context for context, word in zip(kind, words, strict=True)
        ]
        nothing = self.context.new_zeros(0, self.context.shape[-1])
        return backbone.encode_prompts([nothing], prompts).reshape(len(self.context), len(words), -1)


class CrossAttention(nn.Module):
    """Multi-head attention of queries to text features, without biases.

    Attributes:
        query, key, value, out: Parameters (D, D), normal with standard deviation 1 / sqrt(D).
    """

    def __init__(self, setup: Setup, heads: int) -> None:
        """Uses as many heads, up to `heads`, as divide the width."""
        super().__init__()
        width = setup.backbone.feature_dim
        self._heads = math.gcd(width, heads)
        self.query, self.key, self.value, self.out = (
            random_parameter(setup.generator, width, width, std=width**-0.5) for _ in range(4)
        )

    def forward(self, queries: Tensor, texts: Tensor) -> Tensor:
        """(..., M, D) queries of each record and (T, D) texts -> (..., M, D)."""
        asked = per_record(self.query, queries).unflatten(-2, (self._heads, -1))  # (...,H,d,M)
        keys = (texts @ self.key.mT).unflatten(-1, (self._heads, -1)).transpose(0, 1)  # (H,T,d)
        values = (texts @ self.value.mT).unflatten(-1, (self._heads, -1)).transpose(0, 1)
        scores = keys @ asked / keys.shape[-1] ** 0.5  # (...,H,T,M)
        weights = torch.softmax(scores.mT, dim=-1).mT  # over T; see `pooling_weights`
        return per_record(self.out, (values.mT @ weights).flatten(-3, -2).mT).mT


class Output(nn.Module):
    """Logits out of cosines: scale * cosine + bias, the same two numbers for all classes.

    Attributes:
        scale: Parameter (1,) logit per unit of cosine.
        bias: Parameter (1,) logit at cosine 0.
    """

    def __init__(self, setup: Setup, start: float | None = None) -> None:
        """Starts from the settings, or the backbone's public constants; `start` stands for its bias, which belongs to
        one cosine.
        """
        super().__init__()
        backbone, config = setup.backbone, setup.config
        scale = backbone.logit_scale if config.scale is None else config.scale
        bias = (backbone.logit_bias if start is None else start) if config.bias is None else config.bias
        self.scale = nn.Parameter(torch.full((1,), float(scale)))
        self.bias = nn.Parameter(torch.full((1,), float(bias)))

    def forward(self, cosine: Tensor) -> Tensor:
        """(...) -> (...)."""
        return self.scale * cosine + self.bias


def pooled(cosine: Tensor, temperature: float) -> Tensor:
    """Class-specific region pooling (DualCoOp): each class's cosines, weighted by their own softmax over the patches.

    Args:
        cosine: (..., P, C).
        temperature: > 0; a large one takes the plain mean.

    Returns:
        (..., C).
    """
    return (pooling_weights(cosine, temperature) * cosine).sum(-2)


def answer(logits: Tensor) -> Prediction:
    """The prediction of a method without conditions, (..., C) logits."""
    log_positive = F.logsigmoid(logits)
    probabilities = log_positive.exp()
    return Prediction(
        probabilities=probabilities,
        log_positive=log_positive,
        log_negative=F.logsigmoid(-logits),
        gate=torch.ones_like(logits[..., :1]),
        condition_probabilities=probabilities.unsqueeze(-2),
        plan=None,
    )
