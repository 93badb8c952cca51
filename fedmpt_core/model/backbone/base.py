"""What FedMPT needs from a frozen vision-language model.

A backbone turns a picture into patch features and a prompt into a text feature of the same width D, so that a
cosine between the two means something (method of the paper, sections 3 and 4). Nothing in it is ever trained:
the learnable context vectors come in through `encode_prompts`, and only they receive gradients.

A backbone must never change its weights, be in training mode, or let one picture of a batch touch another's
features.
"""

import abc
from collections.abc import Sequence
from typing import Self

import PIL.Image
import torch
from torch import Tensor


class Backbone(abc.ABC):
    """Frozen image and text towers with one shared feature space.

    Every tensor of it has `requires_grad` False and every module is in evaluation mode.

    Attributes:
        name: shown to people, for example `open_clip ViT-B-16 (openai)`.
        is_stand_in: true when the towers only stand in for a real vision-language model.
        feature_dim: D, width shared by patch and text features.
        token_dim: E, width of a token embedding.
        grid: (rows, columns) of patches; P = rows * columns, patches are listed row by row.
        image_size: side in pixels of the square picture that `preprocess` makes.
        logit_scale: initial scale of a cosine in a label's logit, > 0.
        logit_bias: initial bias of a label's logit.
    """

    name: str
    is_stand_in: bool
    feature_dim: int
    token_dim: int
    grid: tuple[int, int]
    image_size: int
    logit_scale: float
    logit_bias: float

    @abc.abstractmethod
    def digest(self) -> str:
        """SHA-256 hex of the architecture and every weight that the features depend on."""

    @abc.abstractmethod
    def preprocessing_digest(self) -> str:
        """SHA-256 hex of the description of the image transform."""

    @abc.abstractmethod
    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        """One RGB picture of any size -> (3,H,W) float32, H = W = `image_size`."""

    @abc.abstractmethod
    def seen(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """What `preprocess` shows the towers of one RGB picture, in the picture's own pixels and proportions.

        The grid of patches spans it from edge to edge: what is cut away is missing, padding is part of it, and what the
        towers see squashed stays as it was.
        """

    @abc.abstractmethod
    def patches(self, images: Tensor) -> Tensor:
        """Patch features of preprocessed pictures.

        Args:
            images: (B,3,H,W) float32, as `preprocess` makes them.

        Returns:
            (B,P,D) float32 without gradient, not normalised; summary tokens (CLS, registers) are left out.

        Raises:
            ValueError: another shape, or features that are not finite.
        """

    @abc.abstractmethod
    def tokenize(self, words: str) -> list[int]:
        """Word pieces of `words`, without special tokens.

        Raises:
            ValueError: no word piece results, or one of them is a special token.
        """

    @abc.abstractmethod
    def embed(self, ids: Sequence[int]) -> Tensor:
        """Frozen input embeddings of word pieces: L ids -> (L,E)."""

    @abc.abstractmethod
    def encode_prompts(self, prefixes: Sequence[Tensor], suffixes: Sequence[Tensor]) -> Tensor:
        """Text features of every condition joined with every class.

        Args:
            prefixes: N tensors (Lp_n,E), the condition's half of a prompt; gradients flow into them.
            suffixes: C tensors (Ls_c,E), the class's half of a prompt.

        Returns:
            (N,C,D), not normalised, features of [start | prefix_n | suffix_c | end]; the backbone adds start
            and end.

        Raises:
            ValueError: a prompt is longer than the tower's context, or a tensor is not (L,E).
        """

    @abc.abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Move the weights to a device; returns the same backbone."""


def centre_square(image: PIL.Image.Image, side: int, fill: int = 0) -> PIL.Image.Image:
    """The square of `side` pixels around a picture's centre; beyond the picture it is the grey `fill`."""
    square = PIL.Image.new("RGB", (side, side), (fill, fill, fill))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
