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
from fedmpt_core.model.fedmpt.adapters import random_parameter
from fedmpt_core.model.words import CONTEXT_STD, Words, class_words, embedded, word_ids


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
        width = backbone.token_dim
        self.condition_context: nn.Parameter | None = None
        if conditions and condition_tokens:
            self.condition_context = random_parameter(
                generator, len(conditions), condition_tokens, width, std=CONTEXT_STD
            )
        self.class_context: nn.Parameter | None = None
        if class_tokens:
            ids = word_ids(backbone, "class_init", class_init)
            self.class_context = nn.Parameter(embedded(backbone, [ids[i % len(ids)] for i in range(class_tokens)]))
        self._condition_words = Words(backbone, "condition", conditions) if conditions else None
        self._class_words = class_words(backbone, classes)

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Embeddings for `Backbone.encode_prompts`.

        Returns:
            N prefixes (Lp_n, E) [V_n | e(COND_n) | U] and C suffixes (Ls_c, E) [e(CLASS_c) | e(".")].
        """
        classes = self._class_words()
        prefixes = []
        for n, words in enumerate(self._condition_words() if self._condition_words else [classes[0][:0]]):
            parts = [words]
            if self.condition_context is not None:
                parts.insert(0, self.condition_context[n])
            if self.class_context is not None:
                parts.append(self.class_context)
            prefixes.append(torch.cat(parts))
        return prefixes, classes
