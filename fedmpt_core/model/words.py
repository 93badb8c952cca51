"""What every method's prompts are made of: the frozen embeddings of words, between vectors that are learnt."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from fedmpt_core.model.backbone.base import Backbone

CONTEXT_STD = 0.02
"""Standard deviation of a new context vector (CoOp)."""


TOLERANCE = 1e-5
"""Cosines of text features that are this near to 1 are equal (chosen: above the rounding of half precision's sums)."""


class Words(nn.Module):
    """Frozen embeddings of K phrases, as a buffer that follows the module to its device and is in no state."""

    def __init__(self, backbone: Backbone, role: str, phrases: Sequence[str], *, end: str = "") -> None:
        """Looks the words up.

        Args:
            backbone: tokenises and embeds; not kept.
            role: what a phrase is, for messages.
            phrases: K >= 1.
            end: words behind each of them.

        Raises:
            ValueError: no phrase, or one without a token, named.
        """
        super().__init__()
        if not phrases:
            raise ValueError(f"no {role} is given: give at least one")
        stop = word_ids(backbone, "end", end) if end else []
        ids = [word_ids(backbone, role, phrase) + stop for phrase in phrases]
        self._lengths = [len(of_one) for of_one in ids]
        self._rows: Tensor
        self.register_buffer("_rows", embedded(backbone, list(chain(*ids))), persistent=False)

    def forward(self) -> list[Tensor]:
        """K tensors (L_k, E)."""
        return list(self._rows.split(self._lengths))


def class_words(backbone: Backbone, classes: Sequence[str]) -> Words:
    """`CLASS.` for every class. Raises ValueError for no class, or one without a token."""
    if not classes:
        raise ValueError("classes is empty: give at least one class name")
    return Words(backbone, "class", classes, end=".")


def word_ids(backbone: Backbone, role: str, words: str) -> list[int]:
    """Word pieces. Raises ValueError, naming role and words, when there is none."""
    try:
        ids = list(backbone.tokenize(words))
    except ValueError as error:
        raise ValueError(f"{role} {words!r} cannot be tokenised: {error}") from error
    if not ids:
        raise ValueError(f"{role} {words!r} has no token in the vocabulary of {backbone.name}: use other words")
    return ids


def indistinct(backbone: Backbone, role: str, phrases: Sequence[str]) -> list[str]:
    """Phrases that the towers cannot tell apart and will score alike for ever, a sentence for each pair.

    Args:
        backbone: the frozen towers.
        role: what a phrase is, for messages.
        phrases: K different ones.

    Raises:
        ValueError: a phrase without a token, or too long for the tower.
    """
    ids = [word_ids(backbone, role, phrase) for phrase in phrases]
    with torch.no_grad():
        article = embedded(backbone, word_ids(backbone, "article", "a"))
        features = backbone.encode_prompts([article], [embedded(backbone, one) for one in ids])[0].float().cpu()
    unit = torch.nn.functional.normalize(features, dim=-1)
    sentences = []
    for i, j in (unit @ unit.mT >= 1 - TOLERANCE).triu(1).nonzero().tolist():
        what = "word pieces" if ids[i] == ids[j] else "text features"
        sentences.append(
            f"{role} {phrases[i]!r} and {phrases[j]!r} have the same {what} in {backbone.name}, which cannot tell them "
            "apart: give one of them other words"
        )
    return sentences


def embedded(backbone: Backbone, ids: list[int]) -> Tensor:
    """(L, E) frozen embeddings of word pieces, a copy on the CPU."""
    return backbone.embed(ids).detach().to("cpu", torch.float32, copy=True)
