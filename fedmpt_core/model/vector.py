"""The flat vector in which trained parameters travel, and its named, versioned layout.

A layout lists tensor names and shapes in the model's fixed order. A vector on the wire is the layout's digest followed
by little-endian float32, so that two programs that disagree on names, order or shapes find out before any arithmetic.
numpy only: the server needs neither torch nor the model to average.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from fedmpt_core.common.canonical import canonical_digest

LAYOUT_VERSION = 1
_DIGEST_BYTES = 32


class LayoutError(ValueError):
    """Bytes that are not a parameter vector of the expected layout."""


@dataclass(frozen=True)
class ParameterLayout:
    """Names and shapes of the trained tensors, in order.

    Attributes:
        names: tensor names such as `contexts.condition`.
        shapes: one shape per name.
        version: version of this description.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        """Raises LayoutError when names and shapes do not belong together."""
        if self.version != LAYOUT_VERSION:
            raise LayoutError(f"layout version={self.version} is not supported: this release reads {LAYOUT_VERSION}")
        if len(self.names) != len(self.shapes) or len(set(self.names)) != len(self.names):
            raise LayoutError(
                f"layout has {len(self.names)} names and {len(self.shapes)} shapes: one distinct name each"
            )

    @property
    def size(self) -> int:
        """Number of floats in the vector."""
        return sum(prod(shape) for shape in self.shapes)

    def digest(self) -> str:
        """SHA-256 hex over version, names and shapes."""
        return canonical_digest(self._plain())

    def to_json(self) -> str:
        """The layout as one line of JSON."""
        return json.dumps(self._plain(), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "ParameterLayout":
        """The layout that `to_json` wrote. Raises LayoutError."""
        try:
            plain = json.loads(text)
            names, shapes, version = plain["names"], plain["shapes"], plain["version"]
            return ParameterLayout(tuple(names), tuple(tuple(int(n) for n in s) for s in shapes), version)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise LayoutError(f"not a parameter layout: {error}") from None

    def flatten(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Tensors by name into one (size,) float32 vector. Raises LayoutError on a wrong name or shape."""
        if set(tensors) != set(self.names):
            raise LayoutError(f"tensors {sorted(set(tensors) ^ set(self.names))} are not the same as in the layout")
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tuple(tensors[name].shape) != shape:
                raise LayoutError(f"tensor {name} has shape {tuple(tensors[name].shape)}, the layout says {shape}")
        parts = [np.asarray(tensors[name], dtype=np.float32).reshape(-1) for name in self.names]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def split(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """A (size,) vector into views by name. Raises LayoutError on a wrong length."""
        if vector.shape != (self.size,):
            raise LayoutError(f"vector has shape {vector.shape}, the layout needs ({self.size},)")
        tensors, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            tensors[name] = vector[start : start + prod(shape)].reshape(shape)
            start += prod(shape)
        return tensors

    def encode(self, vector: np.ndarray) -> bytes:
        """A finite (size,) vector into wire bytes. Raises LayoutError."""
        if not np.isfinite(vector).all():
            raise LayoutError(f"vector holds NaN or infinity, first at {int(np.argmin(np.isfinite(vector)))}: not sent")
        return self._wire(vector, "<f4")

    def decode(self, data: bytes) -> np.ndarray:
        """Wire bytes into a (size,) float32 vector. Raises LayoutError on another length or layout, NaN or infinity."""
        vector = self._values(data, "<f4").astype(np.float32)
        if not np.isfinite(vector).all():
            raise LayoutError("parameter vector holds NaN or infinity: refused")
        return vector

    def encode_words(self, words: np.ndarray) -> bytes:
        """(size,) uint32 words, integers modulo 2^32, into wire bytes. Raises LayoutError on another length."""
        return self._wire(words, "<u4")

    def decode_words(self, data: bytes) -> np.ndarray:
        """Wire bytes into (size,) uint32 words. Raises LayoutError on another length or layout."""
        return self._values(data, "<u4")

    def _wire(self, values: np.ndarray, kind: str) -> bytes:
        self.split(values)  # finds another length
        return bytes.fromhex(self.digest()) + values.astype(kind).tobytes()

    def _values(self, data: bytes, kind: str) -> np.ndarray:
        expected = _DIGEST_BYTES + 4 * self.size
        if len(data) != expected:
            raise LayoutError(f"parameter vector has {len(data)} bytes, expected {expected}")
        if data[:_DIGEST_BYTES].hex() != self.digest():
            raise LayoutError("parameter vector is of another layout: all sites must run the same job and release")
        return np.frombuffer(data, dtype=kind, offset=_DIGEST_BYTES)

    def _plain(self) -> dict[str, object]:
        return {"names": list(self.names), "shapes": [list(s) for s in self.shapes], "version": self.version}
