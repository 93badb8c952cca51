"""Condition prompts: learnable context around fixed condition and class words (FedMPT, condition prompts).

    prefix_n = [ V_n | e(COND_n) | U ]     suffix_c = [ e(CLASS_c) | e(".") ]

V_n is the context of condition n, U the class context that all classes and conditions share, e(.) the frozen
token embeddings. Words keep all their tokens. The backbone joins every prefix with every suffix and adds
start and end.

It must never train a word, and never give a class or condition fewer tokens than its words have.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedmpt_core.model.backbone.base import Backbone

# Standard deviation of a new condition context (paper: as in CoOp).
_CONTEXT_STD = 0.02


class PromptLearner(nn.Module):
    """The learnable halves of N x C prompts.

    Attributes:
        condition_context: Parameter V (N, condition_tokens, E), or None if there are no conditions or no such
            tokens.
        class_context: Parameter U (class_tokens, E), or None if class_tokens is 0.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        conditions: Sequence[str],
        *,
        condition_tokens: int,
        class_tokens: int,
        class_init: str,
        generator: np.random.Generator,
    ) -> None:
        """Looks up the words and creates the contexts.

        Args:
            backbone: tokenises and embeds; not kept.
            classes: C >= 1 class names.
            conditions: N conditions. None at all gives the plain prompt [U | CLASS | .] as the only one.
            condition_tokens: learnable vectors before a condition, >= 0.
            class_tokens: learnable vectors before a class, >= 0.
            class_init: words whose embeddings U starts from. Fewer tokens than `class_tokens` are repeated
                from the first, more are cut after `class_tokens`. Unused if class_tokens is 0.
            generator: source of V's initial values, normal with standard deviation 0.02, so that they are the
                same numbers on every machine.

        Raises:
            ValueError: no class, or words without a token, named.
        """
        super().__init__()
        if not classes:
            raise ValueError("classes is empty: give at least one class name")
        width = backbone.token_dim
        self.condition_context: nn.Parameter | None = None
        if conditions and condition_tokens:
            start = _CONTEXT_STD * generator.standard_normal((len(conditions), condition_tokens, width))
            self.condition_context = nn.Parameter(torch.from_numpy(start.astype(np.float32)))
        self.class_context: nn.Parameter | None = None
        if class_tokens:
            ids = _word_ids(backbone, "class_init", class_init)
            ids = [ids[i % len(ids)] for i in range(class_tokens)]
            self.class_context = nn.Parameter(_embedded(backbone, [ids]))

        stop = _word_ids(backbone, "full stop", ".")
        condition_ids = [_word_ids(backbone, "condition", c) for c in conditions] or [[]]
        class_ids = [_word_ids(backbone, "class", c) + stop for c in classes]
        self._condition_lengths = [len(ids) for ids in condition_ids]
        self._class_lengths = [len(ids) for ids in class_ids]
        # Buffers follow the module to its device; they are the backbone's, so no state holds them.
        self._condition_words: Tensor
        self._class_words: Tensor
        self.register_buffer("_condition_words", _embedded(backbone, condition_ids), persistent=False)
        self.register_buffer("_class_words", _embedded(backbone, class_ids), persistent=False)

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Embeddings for `Backbone.encode_prompts`.

        Returns:
            N prefixes (Lp_n, E) [V_n | e(COND_n) | U] and C suffixes (Ls_c, E) [e(CLASS_c) | e(".")].
        """
        prefixes = []
        for n, words in enumerate(self._condition_words.split(self._condition_lengths)):
            parts = [words]
            if self.condition_context is not None:
                parts.insert(0, self.condition_context[n])
            if self.class_context is not None:
                parts.append(self.class_context)
            prefixes.append(torch.cat(parts))
        return prefixes, list(self._class_words.split(self._class_lengths))


def _word_ids(backbone: Backbone, role: str, words: str) -> list[int]:
    try:
        ids = list(backbone.tokenize(words))
    except ValueError as error:
        raise ValueError(f"{role} {words!r} cannot be tokenised: {error}") from error
    if not ids:
        raise ValueError(f"{role} {words!r} has no token in the vocabulary of {backbone.name}: use other words")
    return ids


def _embedded(backbone: Backbone, words: list[list[int]]) -> Tensor:
    ids = [i for word in words for i in word]
    if not ids:
        return torch.zeros(0, backbone.token_dim)
    return backbone.embed(ids).detach().to("cpu", torch.float32, copy=True)
