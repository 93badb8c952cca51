"""A tiny stand-in for the frozen towers: deterministic, quick, and differentiable in the prompts."""

import hashlib
import re
import zlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.training.local import TrainingRecords

_PATCH = 4  # pixels per side of a patch


class FakeBackbone(Backbone):
    """Random towers over words and pixels. Word order matters to the text tower, as in a real one.

    Words are runs of letters and digits, or single other signs; blanks separate. Weights come from `seed`
    alone.
    """

    name = "fake towers"
    is_stand_in = True

    def __init__(
        self,
        feature_dim: int = 16,
        token_dim: int = 12,
        grid: tuple[int, int] = (3, 3),
        *,
        seed: int = 0,
        context_length: int = 32,
        vocabulary: int = 512,
        logit_scale: float = 20.0,
        logit_bias: float = -4.0,
    ) -> None:
        self.feature_dim, self.token_dim, self.grid = feature_dim, token_dim, grid
        self.image_size = _PATCH * max(grid)
        self.logit_scale, self.logit_bias = logit_scale, logit_bias
        self.context_length, self.vocabulary = context_length, vocabulary
        rng = np.random.default_rng(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.from_numpy((scale * rng.standard_normal(shape)).astype(np.float32))

        self._tokens = normal(vocabulary, token_dim)
        self._places = normal(context_length, token_dim)
        self._inner = normal(token_dim, 32, scale=token_dim**-0.5)
        self._text = normal(32, feature_dim, scale=32**-0.5)
        self._pixels = normal(3 * _PATCH**2, feature_dim)
        self._offset = normal(feature_dim)

    def _weights(self) -> tuple[Tensor, ...]:
        return self._tokens, self._places, self._inner, self._text, self._pixels, self._offset

    def digest(self) -> str:
        return hashlib.sha256(b"".join(w.cpu().numpy().tobytes() for w in self._weights())).hexdigest()

    def preprocessing_digest(self) -> str:
        return hashlib.sha256(f"fake resize to {self.image_size}, grid {self.grid}".encode()).hexdigest()

    def preprocess(self, image: PIL.Image.Image) -> Tensor:
        small = image.convert("RGB").resize((self.image_size, self.image_size))
        return torch.from_numpy(np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 255)

    def seen(self, image: PIL.Image.Image) -> PIL.Image.Image:
        return image

    def patches(self, images: Tensor) -> Tensor:
        side = self.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(f"images has shape {tuple(images.shape)}: give (B, 3, {side}, {side})")
        rows, columns = self.grid
        with torch.no_grad():
            cells = images[:, :, : rows * _PATCH, : columns * _PATCH].unflatten(2, (rows, _PATCH))
            cells = cells.unflatten(4, (columns, _PATCH)).permute(0, 2, 4, 1, 3, 5).flatten(3)
            return (cells.flatten(1, 2) - 0.5) @ self._pixels + self._offset

    def tokenize(self, words: str) -> list[int]:
        pieces = re.findall(r"[^\W_]+|[^\w\s]", words.lower())
        if not pieces:
            raise ValueError(f"{words!r} has no word piece: use letters or digits")
        return [zlib.crc32(p.encode()) % self.vocabulary for p in pieces]

    def embed(self, ids: Sequence[int]) -> Tensor:
        return self._tokens[list(ids)].clone()

    def encode_prompts(self, prefixes: Sequence[Tensor], suffixes: Sequence[Tensor]) -> Tensor:
        rows = []
        for n, prefix in enumerate(prefixes):
            for c, suffix in enumerate(suffixes):
                tokens = torch.cat([prefix, suffix])
                if len(tokens) > self.context_length:
                    raise ValueError(
                        f"prompt of condition {n} and class {c} has {len(prefix)} + {len(suffix)} tokens: "
                        f"at most {self.context_length} fit"
                    )
                places = self._places[: len(tokens)].to(tokens)
                inner = torch.tanh((tokens + 0.3 * tokens.roll(1, 0) * places) @ self._inner.to(tokens))
                rows.append(inner.mean(0) @ self._text.to(tokens))
        return torch.stack(rows).unflatten(0, (len(prefixes), len(suffixes)))

    def to(self, device: torch.device | str) -> Self:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self


class Table:
    """Patch features in memory, (R, P, D), that note the largest batch that was asked for."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.largest = values, 0

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, indices: Any) -> Tensor:
        self.largest = max(self.largest, len(indices))
        return self.values[torch.as_tensor(np.asarray(indices))]


def training_records(table: Table, targets: np.ndarray, units: np.ndarray | None = None) -> TrainingRecords:
    """Records with these features; each its own unit unless `units` says otherwise."""
    return TrainingRecords(table, targets, np.arange(len(table)) if units is None else units)  # type: ignore[arg-type]
