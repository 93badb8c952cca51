"""Settings to begin with, by how many records a site has and whether training is private.

Tried on the stand-in towers: `few` on photographs (84 to 174 a site, five labels) in single runs at epsilon 7.4, which
ended 2 to 6 points of mAP above zero-shot, while the defaults learnt nothing; the others on the embedded scenes (500 a
site, docs/comparison.md). With few records the noise of every step is large beside what they say, so few steps are
right: more of them spend the same epsilon on more noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedmpt_core.config.job import JobConfig

FEW = 300
"""Records a site below which steps are few (chosen between what was measured: 100 and 500)."""

Sections = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Profile:
    """Settings by section that differ from the defaults, and in words whom they are for."""

    words: str
    sections: Sections

    def unlike(self, job: JobConfig) -> dict[str, dict[str, Any]]:
        """What of it a job says otherwise, by section."""
        plain = job.to_dict()
        differing = {s: {k: v for k, v in values.items() if plain[s][k] != v} for s, values in self.sections.items()}
        return {section: values for section, values in differing.items() if values}


_HEAD = {"adapter_width": 64, "adapter_ratio": 1.0, "similarity_scale": 20.0, "patch_temperature": 8.0}
_NOISED = {
    **{"trained": "adapters", "condition_tokens": 0},  # contexts are not trained, random ones make all texts alike
    **_HEAD,
    **{"scale": 20.0, "bias": -2.0},
}
_STEPS = {"optimizer": "sgd", "learning_rate": 30.0, "weight_decay": 0.0, "schedule": "constant", "loss_weight": 1.0}
_PRIVATE_FEW = Profile(
    "few records, differential privacy: few steps on large batches",
    {
        "model": _NOISED,
        "training": {"rounds": 6, "local_steps": 2, **_STEPS},
        "privacy": {"sample_rate": 0.5, "max_grad_norm": 0.1},
    },
)
_PRIVATE = Profile(
    "hundreds of records or more, differential privacy",
    {
        "model": _NOISED,
        "training": {"rounds": 5, "local_steps": 8, **_STEPS},
        "privacy": {"sample_rate": 0.25, "max_grad_norm": 0.1},
    },
)
_PLAIN = Profile(
    "no differential privacy",
    {
        "model": _HEAD,
        "training": {
            **{"rounds": 20, "local_steps": 12, "batch_size": 48, "optimizer": "adam", "learning_rate": 0.01},
            **{"weight_decay": 0.0, "loss_weight": 1.0, "group_rates": {"gate": 0.1}},
        },
    },
)


def profile_for(units: int, *, private: bool) -> Profile:
    """The settings to begin with.

    Args:
        units: training records (or groups) of an ordinary site, from 1.
        private: whether training is differentially private.
    """
    if not private:
        return _PLAIN
    return _PRIVATE_FEW if units < FEW else _PRIVATE
