"""A baseline: words for the text tower and a head, together a `TunedModel`, so that it trains wherever FedMPT does.

`words` has every parameter that the text features depend on, `head` all others; both are trained whole.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmpt_core.config.job import ModelConfig
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.base import TunedModel
from fedmpt_core.model.fedmpt.fedmpt import NO_CONDITION


class Baseline(TunedModel):
    """One method of this package.

    Attributes:
        words: (backbone) -> (N, C, D) text features of any length.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        config: ModelConfig,
        words: nn.Module,
        head: nn.Module,
        *,
        texts: int = 1,
        conditions: Sequence[str] = (NO_CONDITION,),
    ) -> None:
        """Joins the parts.

        Args:
            backbone: frozen towers.
            classes: C >= 1 class names.
            config: the settings.
            words: see the class.
            head: (text (N, C, D), patches) -> Prediction, records one by one.
            texts: N, text features of a class.
            conditions: names of what the head's gate weighs.
        """
        super().__init__(backbone, classes, conditions, config)
        self.words, self.head, self._texts = words, head, texts

    @property
    def texts(self) -> int:
        """N, text features of a class."""
        return self._texts

    def text_features(self) -> Tensor:
        """Unit text features (N, C, D). Raises ValueError when a prompt is longer than the text tower reads."""
        features = self.words(self._frozen[0])
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter: `contexts.*` of the words, then `head.*`."""
        parts = (("contexts", self.words), ("head", self.head))
        return {f"{part}.{name}": p for part, module in parts for name, p in module.named_parameters()}

    def group_sizes(self) -> dict[str, int]:
        """Numbers of the words and of the head."""
        parts = {"contexts.": self.words, "head.": self.head}
        return {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
