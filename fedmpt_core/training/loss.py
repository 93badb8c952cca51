"""Asymmetric loss for multi-label records, on log-probabilities (Ridnik et al. 2021; FedMPT, optimisation).

    y = 1:  -(1 - p)^gamma_positive * log p
    y = 0:  -p_m^gamma_negative * log(1 - p_m),   p_m = max(p - margin, 0)

The powers are focusing weights and carry no gradient. A label that nobody knows costs nothing. The loss takes log p and
log(1 - p) because the model's mixture is computed there: going through p would lose every value below 1e-38. It must
never reduce over records: per-record gradients need one number per record.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmpt_core.config.job import LossConfig

_DEFAULT = LossConfig()


def asymmetric_loss(log_positive: Tensor, log_negative: Tensor, targets: Tensor, loss: LossConfig = _DEFAULT) -> Tensor:
    """Asymmetric loss of each record, summed over its classes.

    Args:
        log_positive: (..., C) log p, at most 0.
        log_negative: (..., C) log(1 - p), at most 0.
        targets: (..., C) labels: 1 present, 0 absent, 2 (or above) unknown.
        loss: the exponents, and the margin below which an absent label costs nothing.

    Returns:
        (...) loss of each record in nats, >= 0, finite for log-probabilities down to -1e4.

    Raises:
        ValueError: shapes that differ.

    Edge cases:
        No known label -> 0. margin = 0 and both gammas = 0 -> binary cross-entropy.
    """
    for name, tensor in (("log_negative", log_negative), ("targets", targets)):
        if tensor.shape != log_positive.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} but log_positive has {tuple(log_positive.shape)}: "
                "give one value per record and class"
            )

    # log(1 - p_m) with p_m = max(p - margin, 0) is log(min(1 - p + margin, 1)).
    log_absent = log_negative
    if loss.margin > 0:
        # log(e^a + e^m) as m - log sigmoid(m - a): torch.logaddexp rounds the last records of a batch otherwise
        log_margin = math.log(loss.margin)
        log_absent = (log_margin - F.logsigmoid(log_margin - log_negative)).clamp(max=0)
    weight_present = (loss.gamma_positive * log_negative.detach()).exp()
    weight_absent = (log_positive.detach().exp() - loss.margin).clamp(min=0) ** loss.gamma_negative
    per_label = -torch.where(targets > 0.5, weight_present * log_positive, weight_absent * log_absent)
    return torch.where(targets < 1.5, per_label, 0).sum(-1)
