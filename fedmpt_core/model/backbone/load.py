"""The frozen towers that a job names."""

from fedmpt_core.config.job import BackboneConfig
from fedmpt_core.model.backbone.base import Backbone


def load_backbone(config: BackboneConfig) -> Backbone:
    """Build the towers, on the CPU, frozen, in evaluation mode.

    Raises:
        ValueError: an unknown architecture or weights, a file that does not fit, a missing package.
    """
    match config.kind:
        case "embedded":
            from fedmpt_core.model.backbone.embedded import EmbeddedBackbone

            return EmbeddedBackbone(image_size=config.image_size)
        case "open_clip":
            from fedmpt_core.model.backbone.open_clip import OpenClipBackbone

            return OpenClipBackbone(config.architecture, config.weights, precision=config.precision)
