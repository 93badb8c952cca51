"""What a site tells the federation when it joins a job; nothing in it depends on a picture.

Site and server know it under one name. numpy only, no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmpt_core.model.vector import ParameterLayout

MOST_TEXT = 256  # chosen: characters of a name, a version, a device, and so many of them
_KINDS = {
    "layout": str,
    "evaluates": bool,
    "backbone": str,
    "is_stand_in": bool,
    "backbone_digest": str,
    "device": str,
    "versions": dict,
    "weight": int,
}


@dataclass(frozen=True)
class Joined:
    """One site in one job.

    Attributes:
        layout: the trained tensors.
        initial: (d,) float32 initial parameters, equal at every site.
        evaluates: whether this site scores the global model.
        backbone: name of the frozen towers.
        is_stand_in: whether the towers only stand in for CLIP.
        backbone_digest: SHA-256 hex of the frozen weights.
        device: kind of device, for example `cpu` or the name of a GPU.
        versions: package versions.
        weight: of this site in the mean, from 1: a declared number (`site.admission.weight_of`).
    """

    layout: ParameterLayout
    initial: np.ndarray
    evaluates: bool
    backbone: str
    is_stand_in: bool
    backbone_digest: str
    device: str
    versions: dict[str, str]
    weight: int = 1

    @property
    def start(self) -> tuple[str, bytes]:
        """What sites of one job must have in common: the frozen weights and the first parameters, in wire bytes."""
        return self.backbone_digest, self.layout.encode(self.initial)

    def fields(self) -> dict[str, Any]:
        """Plain values of all but the initial parameters, which travel beside them."""
        return {name: getattr(self, name) for name in _KINDS} | {"layout": self.layout.to_json()}

    @staticmethod
    def from_message(fields: Mapping[str, Any], initial: bytes) -> "Joined":
        """What a site sent.

        Args:
            fields: as `fields` gives them; further ones are of no interest.
            initial: the initial parameters in wire bytes.

        Raises:
            ValueError: a field is missing or of another kind, or the parameters are not of the layout.
        """
        for name, kind in _KINDS.items():
            if type(fields.get(name)) is not kind:
                raise ValueError(f"{name}={fields.get(name)!r:.100} is not of the kind {kind.__name__}")
        if fields["weight"] < 1:
            raise ValueError(f"weight={fields['weight']!r:.100} is not a number from 1")
        versions = fields["versions"]
        texts = [*versions, *versions.values(), *(fields[name] for name in ("backbone", "backbone_digest", "device"))]
        if not all(type(text) is str and len(text) <= MOST_TEXT and text.isprintable() for text in texts[:MOST_TEXT]):
            raise ValueError("a name, a version or a device in it is no short line of text")
        if len(texts) > MOST_TEXT:
            raise ValueError(f"it names {len(versions)} packages, more than {MOST_TEXT} texts are none")
        layout = ParameterLayout.from_json(fields["layout"])
        return Joined(layout, layout.decode(initial), **{name: fields[name] for name in _KINDS if name != "layout"})
