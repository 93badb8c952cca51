"""The asymmetric loss against its formula, number by number."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedmpt_core.config.job import LossConfig
from fedmpt_core.data.pictures import UNKNOWN
from fedmpt_core.training.loss import asymmetric_loss

B, C = 5, 6


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.uniform(-4, 4, (B, C)))
    return logits, torch.from_numpy((rng.random((B, C)) < 0.4).astype(np.float64))


def of_logits(logits: torch.Tensor, targets: torch.Tensor, **settings: float) -> torch.Tensor:
    return asymmetric_loss(F.logsigmoid(logits), F.logsigmoid(-logits), targets, LossConfig(**settings))


@pytest.mark.parametrize(("negative", "positive", "margin"), [(2, 1, 0.05), (4, 0, 0.2), (3, 3, 0), (0, 0, 0.05)])
def test_the_loss_written_out(negative: float, positive: float, margin: float) -> None:
    logits, targets = batch()
    got = of_logits(logits, targets, gamma_negative=negative, gamma_positive=positive, margin=margin)
    assert got.shape == (B,)
    for b in range(B):
        total = 0.0
        for c in range(C):
            p = 1 / (1 + math.exp(-float(logits[b, c])))
            shifted = max(p - margin, 0)
            if targets[b, c] == 1:
                total -= (1 - p) ** positive * math.log(p)
            else:
                total -= shifted**negative * math.log(1 - shifted)
        assert float(got[b]) == pytest.approx(total, rel=1e-9)


def test_without_focusing_it_is_binary_cross_entropy() -> None:
    logits, targets = batch()
    got = of_logits(logits, targets, gamma_negative=0, gamma_positive=0, margin=0)
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)
    torch.testing.assert_close(got, expected)


def test_the_focusing_weight_carries_no_gradient() -> None:
    logits, targets = batch()
    logits.requires_grad_()
    of_logits(logits, targets).sum().backward()
    p = torch.sigmoid(logits.detach())
    shifted = (p - 0.05).clamp(min=0)
    # d log p = 1 - p; d log(1 - shifted) = -p (1 - p) / (1 - shifted) where shifted > 0
    present = -(1 - p) * (1 - p)
    absent = shifted**2 * p * (1 - p) / (1 - shifted)
    torch.testing.assert_close(logits.grad, torch.where(targets > 0.5, present, absent))


def test_unknown_labels_cost_nothing_and_move_nothing() -> None:
    logits, targets = batch()
    known = torch.from_numpy(np.random.default_rng(1).random((B, C)) < 0.5)
    known[3] = False
    logits.requires_grad_()
    got = of_logits(logits, torch.where(known, targets, UNKNOWN))
    single = torch.stack([of_logits(logits[:, c : c + 1], targets[:, c : c + 1]) for c in range(C)], -1)
    torch.testing.assert_close(got, (single * known).sum(-1))
    assert float(got[3].detach()) == 0
    got.sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad != 0, known & (single.detach() != 0))


@pytest.mark.parametrize("margin", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_stays_finite_far_out(margin: float, dtype: torch.dtype) -> None:
    log_positive = torch.tensor([[-1e4, 0.0, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    log_negative = torch.tensor([[0.0, -1e4, 0.0, -1e4]], dtype=dtype, requires_grad=True)
    got = asymmetric_loss(log_positive, log_negative, torch.tensor([[1, 1, 0, 0]]), LossConfig(margin=margin))
    assert torch.isfinite(got).all()
    assert float(got.detach()) >= (1e4 if margin == 0 else -math.log(0.05) * 0.95**2)
    got.sum().backward()
    for tensor in (log_positive, log_negative):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


def test_the_margin_frees_easy_negatives() -> None:
    p = torch.tensor([[0.01, 0.049, 0.06]]).double()
    got = [float(asymmetric_loss(p[:, [c]].log(), (1 - p[:, [c]]).log(), torch.zeros(1, 1))) for c in range(3)]
    assert got[0] == got[1] == 0
    assert got[2] > 0


def test_records_do_not_meet_and_one_record_is_enough() -> None:
    logits, targets = batch()
    whole = of_logits(logits, targets)
    for b in range(B):
        torch.testing.assert_close(of_logits(logits[b], targets[b]), whole[b])
    mapped = torch.func.vmap(of_logits)(logits, targets)
    torch.testing.assert_close(mapped, whole)
    assert of_logits(logits[:0], targets[:0]).shape == (0,)


def test_targets_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="targets has shape"):
        of_logits(batch()[0], batch()[1][:, :2])


@pytest.mark.parametrize("double", [False, True])
def test_a_record_s_loss_does_not_depend_on_its_place_in_the_batch(double: bool) -> None:
    rng = np.random.default_rng(3)
    for records in (5, 13, 31):
        logits = torch.from_numpy(rng.normal(0, 3, (records, 7))).to(torch.float64 if double else torch.float32)
        targets = torch.from_numpy(rng.random((records, 7)) < 0.3).to(logits.dtype)
        for _ in range(20):
            order = torch.from_numpy(rng.permutation(records))
            assert torch.equal(of_logits(logits, targets)[order], of_logits(logits[order], targets[order]))
