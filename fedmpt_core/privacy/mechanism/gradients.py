"""Gradients per record of every trained tensor, including the context tokens that all records share.

The text features T (N, C, D) do not depend on a record, so a record's gradient splits at them:

    (g_phi_i, g_T_i) = gradient of record i's loss in (head, T)     vmap over the head
    g_theta_i        = J^T g_T_i,   J = dT / d contexts              one vector-Jacobian product per unit

`exact` releases (g_theta_i, g_phi_i). `feature_space` releases (g_T_i, g_phi_i) and applies J^T once, to the noisy
sum: J depends on earlier releases alone, so that is post-processing; the noise then passes through J^T too.

Each record's loss is the plain loss of `training` on that record alone. With groups (patients) the gradients of a
group's records are averaged before anything else, so that a group counts as one unit of privacy.

No number here may depend on two units: no batch statistics, no stopping tests, no dropout.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedmpt_core.config.job import LossConfig
from fedmpt_core.model.base import TunedModel
from fedmpt_core.training.loss import asymmetric_loss

TEXT = "text"


class GradientEngine:
    """Fills `grad_sample` of the private parameters, one row per unit.

    Attributes:
        private: the parameters whose noisy gradients are released: every trained parameter (`exact`), or the head's
            and a stand-in for the text features under the name `text` (`feature_space`).
    """

    def __init__(self, model: TunedModel, loss: LossConfig, loss_weight: float, *, feature_space: bool) -> None:
        """Prepares the model's gradients.

        Args:
            model: the model; its trainable parameters are what is trained.
            loss: the asymmetric loss.
            loss_weight: factor on a record's loss summed over classes.
            feature_space: the second engine.
        """
        self._model, self._feature_space = model, feature_space
        trained = model.trainable_parameters()
        self._contexts = {n: p for n, p in trained.items() if n.startswith("contexts.")}
        self._head = {n: p for n, p in trained.items() if n not in self._contexts}
        self._text: Tensor | None = None
        self.private: dict[str, nn.Parameter] = trained
        if feature_space and self._contexts:
            text = model.text_features().detach()
            self.private = {TEXT: nn.Parameter(torch.zeros_like(text)), **self._head}
        self._per_record = _per_record_gradients(model, loss, loss_weight, with_text=bool(self._contexts))

    def encode(self) -> None:
        """Encode the prompts with the current contexts; call once per step, before `fill`."""
        if self._contexts:
            self._text = self._model.text_features()
        else:
            with torch.no_grad():
                self._text = self._model.text_features() if self._text is None else self._text

    def fill(self, parts: Iterable[tuple[Tensor, Tensor, Tensor]], count: int) -> None:
        """Set `grad_sample` of every private parameter.

        Args:
            parts: records in portions that fit in memory: (B, P, D) patch features, (B, C) targets (1 present, 0
                absent, 2 unknown), and int64 the unit, in [0, count), that each record belongs to: (B,), or fewer where
                the last records are blank and fill up a block. A unit may be spread over portions.
            count: units; each has at least one record. 0 gives `grad_sample` with no row.

        Raises:
            ValueError: `encode` was not called, or a unit has no record.
        """
        means = self._means(parts, count)
        for name, rows in means.items():
            if name != TEXT or self._feature_space:
                _fill(self.private[name], rows)
        if self._contexts and not self._feature_space:
            pulled = [self._pull(row) for row in means[TEXT]]
            for i, parameter in enumerate(self._contexts.values()):
                rows = [gradients[i] for gradients in pulled]
                _fill(parameter, torch.stack(rows) if rows else parameter.new_zeros(0, *parameter.shape))

    def _means(self, parts: Iterable[tuple[Tensor, Tensor, Tensor]], count: int) -> dict[str, Tensor]:
        """The head's and the text features' gradients, (count, ...) each: the mean over each unit's records."""
        text = self._encoded().detach()
        sums: dict[str, Tensor] = {}
        records = torch.zeros(count, dtype=torch.int64, device=text.device)
        for patches, targets, units in parts:
            blocks = self._per_record(dict(self._head), text, patches, targets)
            gradients = {name: rows[: len(units)] for name, rows in blocks.items()}
            if not sums and torch.equal(units, torch.arange(count, device=units.device)):
                sums = gradients  # a record for each unit in order: nothing to sum, so no copy
            else:
                sums = sums or {name: rows.new_zeros(count, *rows.shape[1:]) for name, rows in gradients.items()}
                for name, rows in gradients.items():
                    sums[name].index_add_(0, units, rows)
            records += torch.bincount(units, minlength=count)
        if not count:
            shapes = {**self._head, **({TEXT: text} if self._contexts else {})}
            return {name: value.new_zeros(0, *value.shape) for name, value in shapes.items()}
        if not bool((records > 0).all()):
            raise ValueError("a unit has no record: give each at least one")
        if bool((records > 1).any()):
            for total in sums.values():
                total /= records.reshape(-1, *[1] * (total.ndim - 1))
        return sums

    def pull_back(self) -> None:
        """After noise: turn the noisy gradient of the text features into that of the contexts (feature space
        only).
        """
        if self._feature_space and self._contexts:
            noisy = self.private[TEXT].grad
            if noisy is None:
                raise ValueError("pull_back before the noise was added: there is no gradient to pull back")
            for parameter, gradient in zip(self._contexts.values(), self._pull(noisy), strict=True):
                parameter.grad = gradient

    def _encoded(self) -> Tensor:
        if self._text is None:
            raise ValueError("fill before encode: the prompts are not encoded")
        return self._text

    def _pull(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """J^T gradient: (N,C,D) -> one tensor per context."""
        return torch.autograd.grad(self._encoded(), list(self._contexts.values()), gradient, retain_graph=True)


def _fill(parameter: Any, rows: Tensor) -> None:
    parameter.grad_sample = rows  # where Opacus looks for it


def _per_record_gradients(
    model: TunedModel, loss: LossConfig, weight: float, *, with_text: bool
) -> Callable[[dict[str, Tensor], Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """(head, text, patches, targets) -> gradients of each record by name, (B, ...) each."""

    def objective(head: dict[str, Tensor], text: Tensor, patches: Tensor, target: Tensor) -> Tensor:
        inside = {n.removeprefix("head."): p for n, p in head.items()}
        prediction = functional_call(model.head, inside, (text, patches))
        return weight * asymmetric_loss(prediction.log_positive, prediction.log_negative, target, loss)

    each = vmap(grad(objective, argnums=(0, 1) if with_text else 0), in_dims=(None, None, 0, 0))

    def gradients(head: dict[str, Tensor], text: Tensor, patches: Tensor, targets: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():  # `grad` differentiates all the same; nothing is recorded for the frozen parts
            rows = each(head, text, patches, targets)
        return {**rows[0], TEXT: rows[1]} if with_text else rows

    return gradients
