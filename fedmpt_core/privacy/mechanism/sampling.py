"""Poisson sampling: in every step each unit (record or group) takes part with the same probability, on its own.

This is the sampling that the accountants assume (Abadi et al. 2016; Mironov et al. 2019): batches vary in size and
may be empty. Shuffled batches of a fixed size have another privacy loss; nothing here makes them.
"""

from collections.abc import Iterator

import numpy as np

from fedmpt_core.privacy.mechanism.keystream import Keystream

PURPOSE = "sampling"


def poisson_batches(units: int, sample_rate: float, steps: int, keystream: Keystream) -> Iterator[np.ndarray]:
    """One batch per step.

    Args:
        units: U units to draw from, >= 0.
        sample_rate: probability q of each unit in each step, (0, 1].
        steps: number of batches, >= 0.
        keystream: source of secret randomness; one 64-bit word per unit and step.

    Yields:
        (B,) int64 ascending indices, B varying from 0 to U.

    Raises:
        ValueError: a rate outside (0, 1] or a negative number.
    """
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate={sample_rate} is out of range: allowed is (0, 1]")
    if units < 0 or steps < 0:
        raise ValueError(f"units={units}, steps={steps}: neither may be negative")
    bound = int(sample_rate * 2**64)  # exact: a float times a power of two
    for _ in range(steps):
        words = keystream.words(PURPOSE, units)
        # 2^64 itself is no uint64
        taken = words < np.uint64(bound) if bound < 2**64 else np.ones(units, bool)
        yield np.flatnonzero(taken)
