"""What several baselines are made of: prompts with learnt contexts, pooled cosines, cross-attention, the output.

Every product over records is computed record by record (`adapters.per_record`), so that no record's numbers depend on
another's, nor on its place in the batch.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmpt_core.config.job import ModelConfig
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.base import Prediction
from fedmpt_core.model.fedmpt.adapters import per_record
from fedmpt_core.model.fedmpt.readout import pooling_weights

CONTEXT_STD = 0.02
"""Standard deviation of a new context vector (CoOp)."""

PRIOR_LOGIT = -2.2
"""Start of a logit that is made of a difference, 0 at first: a label in one picture of ten, a public constant."""

TEMPLATE = "a photo of a"
_TINY = 1e-12


def random_parameter(generator: np.random.Generator, *shape: int, std: float) -> nn.Parameter:
    """A normal parameter, the same numbers on every machine."""
    return nn.Parameter(torch.from_numpy((std * generator.standard_normal(shape)).astype(np.float32)))


def embedded(backbone: Backbone, words: str) -> Tensor:
    """(L, E) frozen embeddings of some words, on the CPU. Raises ValueError when they cannot be tokenised."""
    return backbone.embed(backbone.tokenize(words)).detach().to("cpu", torch.float32, copy=True)


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

    def __init__(self, backbone: Backbone, classes: Sequence[str]) -> None:
        """Raises ValueError for a class that the backbone cannot tokenise."""
        device = backbone.embed(backbone.tokenize(TEMPLATE)).device  # the tower may stand on a GPU already
        with torch.no_grad():
            suffixes = [word.to(device) for word in ClassWords(backbone, classes)()]
            features = backbone.encode_prompts([embedded(backbone, TEMPLATE).to(device)], suffixes)
        super().__init__(features.detach().to("cpu", torch.float32))


class ClassWords(nn.Module):
    """Embeddings of `CLASS.` for every class, as buffers that follow the module to its device."""

    def __init__(self, backbone: Backbone, classes: Sequence[str]) -> None:
        """Raises ValueError for no class, or one that the backbone cannot tokenise."""
        super().__init__()
        if not classes:
            raise ValueError("classes is empty: give at least one class name")
        rows = [torch.cat([embedded(backbone, c), embedded(backbone, ".")]) for c in classes]
        self._lengths = [len(row) for row in rows]
        self._rows: Tensor
        self.register_buffer("_rows", torch.cat(rows), persistent=False)

    def forward(self) -> list[Tensor]:
        """C tensors (L_c, E)."""
        return list(self._rows.split(self._lengths))


class SharedContext(nn.Module):
    """`[V_1] .. [V_M] CLASS.`, one context for all classes (CoOp's unified context).

    Attributes:
        context: Parameter (M, E).
    """

    def __init__(self, backbone: Backbone, classes: Sequence[str], tokens: int, generator: np.random.Generator) -> None:
        """Starts from random vectors."""
        super().__init__()
        self.classes = ClassWords(backbone, classes)
        self.context = random_parameter(generator, tokens, backbone.token_dim, std=CONTEXT_STD)

    def forward(self, backbone: Backbone) -> Tensor:
        """(1, C, D)."""
        return backbone.encode_prompts([self.context], self.classes())


class ClassContexts(nn.Module):
    """`[V_kc1] .. [V_kcM] CLASS.`, K contexts of its own for every class (DualCoOp: one for "is there", one for "is
    not").

    Attributes:
        context: Parameter (K, C, M, E).
    """

    def __init__(
        self, backbone: Backbone, classes: Sequence[str], kinds: int, tokens: int, generator: np.random.Generator
    ) -> None:
        """Starts from random vectors."""
        super().__init__()
        self.classes = ClassWords(backbone, classes)
        self.context = random_parameter(generator, kinds, len(classes), tokens, backbone.token_dim, std=CONTEXT_STD)

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

    def __init__(self, features: int, heads: int, generator: np.random.Generator) -> None:
        """Uses as many heads, up to `heads`, as divide the width."""
        super().__init__()
        self._heads = math.gcd(features, heads)
        self.query, self.key, self.value, self.out = (
            random_parameter(generator, features, features, std=features**-0.5) for _ in range(4)
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

    def __init__(self, backbone: Backbone, config: ModelConfig, start: float | None = None) -> None:
        """Starts from the settings, or the backbone's public constants; `start` stands for its bias, which belongs to
        one cosine.
        """
        super().__init__()
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


def unit_mean_square(values: Tensor) -> Tensor:
    """(..., D) scaled to mean square 1, whatever the length of a backbone's features; zero stays zero."""
    return values * (values.square().mean(-1, keepdim=True) + _TINY).rsqrt()


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
