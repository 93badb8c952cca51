"""The small benchmark of the tests: its folder's files, and random targets."""

import json
from typing import Any

import numpy as np

from fedmpt_core.benchmark.tables import COLUMNS
from fedmpt_core.data.scenes import CLASSES

JOB = f"""
name = "small"
classes = {json.dumps(list(CLASSES))}
[model]
conditions = ["pose"]
adapter_width = 3
[training]
rounds = 2
local_steps = 1
batch_size = 8
optimizer = "adam"
learning_rate = 0.01
[privacy]
mechanism = "none"
[secagg]
mechanism = "none"
"""
SITES = """
[defaults.data]
source = "scenes"
train = 14
[defaults.privacy]
dataset = "scenes"
units = 14
epsilon = 8.0
delta = 1e-5
allow_unprotected = true
[sites.site-1.data]
evaluate = true
val = 12
test = 16
[sites.site-2]
"""
METHOD_FILE = """
[coop.model]
context_tokens = 3
[coop.training]
learning_rate = 0.02
"""
GRID = """
[coop]
"training.learning_rate" = [0.001, 0.01]
[linear]
"training.learning_rate" = [0.01, 0.1]
"""


def binary(shape: tuple[int, int], seed: int, share: float = 0.4) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) < share).astype(np.uint8)


def result(mean: float, activation: float | None) -> dict[str, Any]:
    """What a run leaves, every figure `mean`."""
    figures = dict.fromkeys((c.key.partition(".")[2] for c in COLUMNS if c.key.startswith("figures.")), mean)
    figures |= {k: activation for k in figures if k.startswith("false_activation")}
    costs = {"trained": 10, "bytes_per_round": 72, "epsilon": None, "cpu_ms_per_step": 8.0, "cpu_ms_zero_shot": 2.0}
    return {"figures": figures, **costs, "backbone": "towers", "is_stand_in": True, "method": "coop", "seed": 0}
