"""Condition logits against loops, and what the two forms can say."""

import numpy as np
import pytest
import torch

from fedmpt_core.model.fedmpt.readout import (
    class_similarity,
    literal_logits,
    plan_weights,
    pooling_weights,
    sigmoid_logits,
)

B, N, P, C = 2, 3, 6, 4


def cosines() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).uniform(-0.3, 0.5, (B, N, P, C)))


def weights() -> torch.Tensor:
    raw = torch.from_numpy(np.random.default_rng(1).random((B, N, P, C)))
    return raw / raw.sum(-2, keepdim=True)


def test_the_default_logit_written_out() -> None:
    cosine, weight = cosines(), weights()
    scale, bias = torch.tensor([10.0, 20.0, 30.0]).double(), torch.tensor([-1.0, 0.0, 1.0]).double()
    got = sigmoid_logits(cosine, weight, scale, bias)
    for b, n, c in np.ndindex(B, N, C):
        evidence = sum(float(weight[b, n, m, c] * cosine[b, n, m, c]) for m in range(P))
        assert float(got[b, n, c]) == pytest.approx(float(scale[n]) * evidence + float(bias[n]), rel=1e-12)


def test_plan_weights_sum_to_one_per_class() -> None:
    plan = weights() / C
    torch.testing.assert_close(plan_weights(plan).sum(-2), torch.ones(B, N, C, dtype=torch.float64))


def test_the_literal_probability_written_out() -> None:
    similarity, weight = class_similarity(cosines(), 20.0), weights()
    torch.testing.assert_close(similarity.sum(-1), torch.ones(B, N, P, dtype=torch.float64))
    got = torch.sigmoid(literal_logits(similarity, weight))
    torch.testing.assert_close(got, (weight * similarity).sum(-2), rtol=1e-9, atol=0)


def test_certain_similarities_stay_finite() -> None:
    similarity = torch.zeros(P, C)
    similarity[:, 0] = 1
    similarity.requires_grad_()
    logits = literal_logits(similarity, torch.full((P, C), 1 / P))
    assert logits[0] > 10
    assert (logits[1:] < -10).all()
    logits.sum().backward()
    assert similarity.grad is not None
    assert torch.isfinite(similarity.grad).all()


def test_pooling_favours_a_class_s_own_patches_and_carries_a_gradient() -> None:
    cosine = cosines().requires_grad_()
    got = pooling_weights(cosine, 0.1)
    torch.testing.assert_close(got.sum(-2), torch.ones(B, N, C, dtype=torch.float64))
    assert torch.equal(got.argmax(-2), cosine.argmax(-2))
    assert got.requires_grad
    hard = (pooling_weights(cosine, 1e-6) * cosine).sum(-2)
    torch.testing.assert_close(hard, cosine.amax(-2))


def test_the_plan_as_it_stands_says_nothing() -> None:
    """The broken twin: a plan of mass 1 used without the factor C gives every class about one half."""
    cosine, plan = cosines(), weights() / (P * C)
    unscaled = torch.sigmoid((plan * cosine).sum(-2))
    assert (unscaled - 0.5).abs().max() < 0.01
    one, zero = torch.ones(N).double(), torch.zeros(N).double()
    scaled = torch.sigmoid(sigmoid_logits(cosine, weights(), 20 * one, zero))
    assert (scaled - 0.5).abs().max() > 0.3


@pytest.mark.parametrize(("shape", "dtype"), [((13, 9, 8), torch.float32), ((5, 3, 7, 4), torch.float64)])
def test_a_record_s_pooling_does_not_depend_on_its_place_in_the_batch(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(4)
    cosine = torch.from_numpy(rng.uniform(-1, 1, shape)).to(dtype)
    for _ in range(40):
        order = torch.from_numpy(rng.permutation(shape[0]))
        assert torch.equal(pooling_weights(cosine, 0.1)[order], pooling_weights(cosine[order], 0.1))
