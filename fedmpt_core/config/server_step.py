"""What the server does with the sums of a job whose noise is distributed: one step of an optimizer for each."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from fedmpt_core.config.checks import checked

Group = Literal["contexts", "adapters", "gate", "head"]
Factor = Annotated[float, Field(gt=0, le=1000, description="Factor of this group.")]


@checked
class ServerStepConfig:
    """The server's optimizer, with `privacy.noise = "distributed"`; it sees sums alone, so it costs no privacy."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    """`sgd` or `adam`; its state lasts for the whole run."""
    learning_rate: Annotated[float, Field(gt=0, le=10_000)] = 1.0
    """Step size. Nearly all gradients are clipped, so what counts is its product with `privacy.max_grad_norm`."""
    group_rates: dict[Group, Factor] = field(default_factory=dict)
    """Factors on the step size by group of parameters; 1 for a group that is not named."""
    momentum: Annotated[float, Field(ge=0, le=0.9999)] = 0.0
    """Momentum of sgd, or beta1 of adam."""
    beta2: Annotated[float, Field(ge=0.5, le=0.999999)] = 0.999
    """Decay of adam's mean of squares."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """`cosine` over the rounds, or `constant`."""
    averaging: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the rounds, the last ones, whose parameters are averaged when the run ends; 0 keeps the last alone."""
