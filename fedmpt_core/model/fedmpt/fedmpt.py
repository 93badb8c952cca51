"""FedMPT: from patch features of a picture to label probabilities (the paper's model).

    patches -> adapters -> cosine with N x C prompt features -> transport plan -> condition logits -> gate,
    front door

`Head` is everything after the two towers. It treats records one by one, so that its per-record gradients by
`torch.func.vmap` are the gradients of single records. `FedMPT` joins it with the prompts and the frozen text
tower.

The model must never compute a statistic over a batch, hold the backbone in its state, or train it.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmpt_core.config.job import ModelConfig
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.base import Prediction, TunedModel
from fedmpt_core.model.fedmpt import adapters, causal, gating, readout, transport
from fedmpt_core.model.fedmpt.prompts import PromptLearner

ZERO_SHOT_TEMPLATE = "a photo of a"
NO_CONDITION = "no condition"


class Head(nn.Module):
    """Everything after the frozen towers.

    Attributes:
        adapters: one adapter per condition, or None without adapters.
        gate: weights over conditions, or None without a gate or with a single condition (weight 1).
        scale: Parameter (N,) logit per unit of cosine, or None for the literal prediction.
        bias: Parameter (N,) logit, or None for the literal prediction.
    """

    def __init__(
        self,
        conditions: int,
        features: int,
        config: ModelConfig,
        *,
        similarity_scale: float,
        scale: float,
        bias: float,
        generators: tuple[np.random.Generator, np.random.Generator],
    ) -> None:
        """Creates a head that starts as the uniform mixture of un-adapted conditions.

        Args:
            conditions: N >= 1.
            features: D.
            config: components and their settings.
            similarity_scale: cosine scale inside the transport cost, > 0.
            scale: initial logit per unit of cosine.
            bias: initial logit at cosine 0; a public constant, never a label frequency of private records.
            generators: sources of the initial adapters and the initial gate.
        """
        super().__init__()
        self._conditions = conditions
        self._config = config
        self._similarity_scale = similarity_scale
        self.adapters: adapters.Adapters | None = None
        if "adapters" in config.components:
            self.adapters = adapters.Adapters(
                conditions, features, config.adapter_width, config.adapter_ratio, generators[0]
            )
        self.gate: gating.Gate | None = None
        if "gate" in config.components and conditions > 1:
            self.gate = gating.Gate(conditions, features, config.gate_width, config.gate_temperature, generators[1])
        self.scale: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if config.prediction == "sigmoid":
            self.scale = nn.Parameter(torch.full((conditions,), float(scale)))
            self.bias = nn.Parameter(torch.full((conditions,), float(bias)))

    def forward(self, text: Tensor, patches: Tensor) -> Prediction:
        """Prediction from the features of both towers.

        Args:
            text: (N, C, D) text features of unit length.
            patches: (B, P, D) patch features of any length, or (P, D) for a single record.

        Returns:
            Prediction, with or without the leading B. No record's numbers depend on another record.
        """
        adapt = adapters.cosine if self.adapters is None else self.adapters.cosine
        cosine = adapt(patches, text)  # (B,N,P,C)
        plan = None
        if "transport" in self._config.components:
            plan = self._plan(cosine.detach())
            weights = readout.plan_weights(plan)
        else:
            weights = readout.pooling_weights(cosine, self._config.patch_temperature)
        if self.scale is None or self.bias is None:
            similarity = readout.class_similarity(cosine, self._similarity_scale)
            logits = readout.literal_logits(similarity, weights)  # (B,N,C)
        else:
            logits = readout.sigmoid_logits(cosine, weights, self.scale, self.bias)
        log_gate = gating.uniform_log_weights(patches, self._conditions)  # (B,N)
        if self.gate is not None:
            log_gate = self.gate(patches)
        mix = causal.front_door if self._config.mixture == "probabilities" else causal.product_of_experts
        outcome = mix(log_gate, logits)
        return Prediction(
            probabilities=outcome.log_positive.exp(),
            log_positive=outcome.log_positive,
            log_negative=outcome.log_negative,
            gate=log_gate.exp(),
            # Not torch.sigmoid: its last bit depends on where in the batch a number stands.
            condition_probabilities=F.logsigmoid(logits).exp(),
            plan=plan,
        )

    def _plan(self, cosine: Tensor) -> Tensor:
        """Condition-guided transport plan of detached cosines, (..., N, P, C) -> (..., N, P, C)."""
        classes = cosine.shape[-1]
        return transport.solve(
            1 - readout.class_similarity(cosine, self._similarity_scale),
            transport.patch_importance(cosine, self._config.patch_temperature),
            cosine.new_full((classes,), 1 / classes),
            reg=self._config.reg,
            iterations=self._config.iterations,
            cost_bound=1.0,
        )


class FedMPT(TunedModel):
    """Prompts, frozen text tower and head.

    Attributes:
        prompts: the learnable contexts.
        head: everything after the towers.
    """

    head: Head

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        conditions: Sequence[str],
        config: ModelConfig,
        seed: int,
    ) -> None:
        """Creates a model whose initial values depend on the seed and the backbone only.

        Each component draws from its own stream of the seed, so leaving one out changes no other.

        Args:
            backbone: frozen towers; held outside the module's state, so move it by itself.
            classes: C >= 1 class names.
            conditions: N >= 1 condition words, unused without the component `prompts`.
            config: components and their settings.
            seed: fixes the initial values, >= 0.

        Raises:
            ValueError: no class, no condition, or words that the backbone cannot tokenise.
        """
        words = tuple(conditions) if "prompts" in config.components else ()
        if "prompts" in config.components and not words:
            raise ValueError("conditions is empty: give at least one condition, or leave 'prompts' out of components")
        super().__init__(backbone, classes, words or (NO_CONDITION,), config)
        contexts, adapter, gate = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
        self.prompts = PromptLearner(
            backbone,
            self.classes,
            words,
            condition_tokens=config.condition_tokens,
            class_tokens=config.class_tokens,
            class_init=config.class_init,
            generator=contexts,
        )
        self.head = Head(
            len(self.conditions),
            backbone.feature_dim,
            config,
            similarity_scale=_given(config.similarity_scale, backbone.logit_scale),
            scale=_given(config.scale, backbone.logit_scale),
            bias=_given(config.bias, backbone.logit_bias),
            generators=(adapter, gate),
        )
        trained = self.trainable_parameters()
        if not trained:
            raise ValueError(
                f"trained='{config.trained}' with components={list(config.components)} trains nothing: "
                "choose parts that the model has"
            )
        for name, parameter in self.parameters_by_name().items():
            parameter.requires_grad_(name in trained)

    def encoded_prompts(self) -> Tensor:
        """See `TunedModel`."""
        return self._frozen[0].encode_prompts(*self.prompts())

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """See `TunedModel`; parts that this model has not are left out."""
        head = self.head
        named = {
            "contexts.condition": self.prompts.condition_context,
            "contexts.class": self.prompts.class_context,
            "adapters.down": head.adapters and head.adapters.down,
            "adapters.up": head.adapters and head.adapters.up,
            "gate.down": head.gate and head.gate.down,
            "gate.up": head.gate and head.gate.up,
            "head.scale": head.scale,
            "head.bias": head.bias,
        }
        return {name: parameter for name, parameter in named.items() if parameter is not None}


def zero_shot_model(backbone: Backbone, classes: Sequence[str], config: ModelConfig | None = None) -> FedMPT:
    """The untrained baseline: prompt "a photo of a CLASS." and the head as it starts, one condition.

    Args:
        backbone: frozen towers.
        classes: C class names.
        config: settings of the head (prediction, scale, bias, and transport if it is a component); defaults
            if None.

    Returns:
        A model to score with, on the backbone's words alone. Nothing in it depends on a seed.
    """
    config = ModelConfig() if config is None else config
    if config.method != "fedmpt":
        config = ModelConfig(components=(), scale=config.scale, bias=config.bias)
    plain = replace(
        config,
        components=tuple(c for c in config.components if c == "transport"),
        trained="all",
        class_init=ZERO_SHOT_TEMPLATE,
        class_tokens=len(backbone.tokenize(ZERO_SHOT_TEMPLATE)),
    )
    return FedMPT(backbone, classes, (), plain, seed=0)


def _given(value: float | None, fallback: float) -> float:
    return fallback if value is None else value
