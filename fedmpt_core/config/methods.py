"""The methods that a job can name, each once: what tables call it and which settings it takes.

`model.registry` builds their models.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

_OUTPUT = ("scale", "bias")
_PROMPT = ("context_tokens", "patch_temperature", *_OUTPUT)
_VISUAL = ("adapter_width", "adapter_ratio", "patch_temperature", *_OUTPUT)


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        label: what it is called in tables.
        settings: names of the fields of `ModelConfig` that it takes; everything else must stay at its default.
    """

    label: str
    settings: tuple[str, ...]


METHODS = {
    "linear": Method("linear head", ("bias",)),
    "coop": Method("Fed-CoOp", _PROMPT),
    "dualcoop": Method("Fed-DualCoOp", _PROMPT),
    "poscoop": Method("Fed-PosCoOp", _PROMPT),
    "fedtpg": Method("FedTPG", _PROMPT),
    "fedmvp": Method("FedMVP (feature space)", _VISUAL),
    "released": Method("FedMPT as released", ("conditions", "context_tokens", "gate_temperature", *_VISUAL)),
    "fedmpt": Method(
        "FedMPT",
        (
            *("conditions", "components", "trained", "condition_tokens", "class_tokens", "class_init"),
            *("adapter_width", "adapter_ratio", "patch_temperature", "similarity_scale", "reg", "iterations"),
            *("gate_width", "gate_temperature", "mixture", "prediction", *_OUTPUT),
        ),
    ),
}
"""In the order of tables."""

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]
