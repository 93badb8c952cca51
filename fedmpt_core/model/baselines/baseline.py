"""A baseline: words for the text tower and a head, together a `TunedModel`, so that it trains wherever FedMPT does.

`words` has every parameter that the text features depend on, `head` all others; both are trained whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from fedmpt_core.config.job import ModelConfig
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.base import TunedModel
from fedmpt_core.model.fedmpt.fedmpt import NO_CONDITION


@dataclass(frozen=True)
class Setup:
    """What a baseline is made from.

    Attributes:
        backbone: frozen towers.
        classes: C >= 1 class names.
        config: the settings.
        generator: source of the initial values.
    """

    backbone: Backbone
    classes: Sequence[str]
    config: ModelConfig
    generator: np.random.Generator


class Baseline(TunedModel):
    """One method of this package.

    Attributes:
        words: (backbone) -> (N, C, D) text features of any length.
    """

    def __init__(
        self,
        setup: Setup,
        words: nn.Module,
        head: nn.Module,
        *,
        texts: int = 1,
        conditions: Sequence[str] = (NO_CONDITION,),
    ) -> None:
        """Joins the parts.

        Args:
            setup: towers, classes and settings.
            words: see the class.
            head: (text (N, C, D), patches) -> Prediction, records one by one.
            texts: N, text features of a class.
            conditions: names of what the head's gate weighs.
        """
        super().__init__(setup.backbone, setup.classes, conditions, setup.config)
        self.words, self.head, self.texts = words, head, texts

    def encoded_prompts(self) -> Tensor:
        """See `TunedModel`."""
        return self.words(self._frozen[0])

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """See `TunedModel`: `contexts.*` of the words, then `head.*`."""
        parts = (("contexts", self.words), ("head", self.head))
        return {f"{part}.{name}": p for part, module in parts for name, p in module.named_parameters()}
