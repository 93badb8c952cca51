"""Federated averaging (McMahan et al. 2017): the server's arithmetic on updates.

An update is `local parameters - global parameters` as a flat vector (`model/vector.py`). numpy only; updates are summed
in float64 in the order of the sites' names, so the result does not depend on who answered first.
"""

from collections.abc import Mapping

import numpy as np


def average(updates: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Weighted mean of the sites' updates.

    Args:
        updates: (d,) float32 by site, at least one, all of one length.
        weights: positive finite weight by site, the same sites.

    Returns:
        (d,) float64.
    """
    total = sum(weights.values())
    return np.asarray(sum((weights[s] / total) * updates[s].astype(np.float64) for s in sorted(updates)))


def apply(state: np.ndarray, update: np.ndarray) -> np.ndarray:
    """The next global parameters: (d,) float32 of `state + update`, added in float64."""
    return (state.astype(np.float64) + update).astype(np.float32)
