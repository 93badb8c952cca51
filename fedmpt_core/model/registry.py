"""The model that a job names: FedMPT, or a baseline in the same harness and under the same privacy.

Names, labels and settings are `config.methods`.
"""

from collections.abc import Sequence

import numpy as np

from fedmpt_core.config.job import JobConfig, ModelConfig
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.base import TunedModel
from fedmpt_core.model.baselines.baseline import Setup
from fedmpt_core.model.baselines.coop import coop, dualcoop, poscoop
from fedmpt_core.model.baselines.fedmvp import fedmvp
from fedmpt_core.model.baselines.fedtpg import fedtpg
from fedmpt_core.model.baselines.linear import linear
from fedmpt_core.model.baselines.released import released
from fedmpt_core.model.fedmpt.fedmpt import FedMPT

BASELINES = {make.__name__: make for make in (linear, coop, dualcoop, poscoop, fedtpg, fedmvp, released)}


def build_model(backbone: Backbone, classes: Sequence[str], config: ModelConfig, seed: int) -> TunedModel:
    """A model of `config.method` at its start, which depends on the seed and the backbone only.

    Args:
        backbone: frozen towers.
        classes: C >= 1 class names.
        config: method and settings.
        seed: fixes the initial values, >= 0.

    Raises:
        ValueError: no class, no condition, or words that the backbone cannot tokenise.
    """
    if config.method == "fedmpt":
        return FedMPT(backbone, classes, config.conditions, config, seed)
    return BASELINES[config.method](Setup(backbone, classes, config, np.random.default_rng(seed)))


def scoring_model(backbone: Backbone, job: JobConfig, model: TunedModel) -> TunedModel:
    """The model that scores: the trained one, or one of all classes that takes the same parameters.

    Args:
        backbone: the job's frozen towers.
        job: with or without `unseen_classes`.
        model: what is trained, of the job's `classes`.

    Raises:
        ValueError: there are unseen classes and the method trains numbers per class.
    """
    if not job.unseen_classes:
        return model
    whole = build_model(backbone, job.all_classes, job.model, job.seed)
    if whole.layout() != model.layout():
        raise ValueError(f"method='{job.model.method}' trains numbers per class: it has none for unseen_classes")
    return whole
