"""The front door: against the literal double sum, against a simulated world, and at the ends of the number
line."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmpt_core.model.fedmpt.causal import front_door

# A world in which the front-door assumptions hold. U hides behind both the picture and the label; the picture
# acts on the label only through the mediator R, and nothing but the picture acts on R.
P_U = np.array([0.7, 0.3])
P_D_GIVEN_U = np.array([[0.85, 0.10, 0.05], [0.05, 0.15, 0.80]])  # (U,D)
P_R_GIVEN_D = np.array([[0.8, 0.2], [0.5, 0.5], [0.15, 0.85]])  # (D,R)
P_Y_GIVEN_R_U = np.array([[0.10, 0.75], [0.25, 0.95]])  # (R,U)


def tables(joint: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    """From P(d, r, y), all that an observer sees: P(r|d), P(d), P(y=1|r,d), P(y=1|d)."""
    p_d, p_dr = joint.sum((1, 2)), joint.sum(2)
    p_y_given_rd = (joint[:, :, 1] / p_dr).T
    seen = (p_dr / p_d[:, None], p_d, p_y_given_rd)
    return *(torch.from_numpy(np.ascontiguousarray(t)) for t in seen), joint[:, :, 1].sum(1) / p_d


def front_door_adjustment(p_r_given_d: torch.Tensor, p_d: torch.Tensor, p_y_given_r_d: torch.Tensor) -> torch.Tensor:
    """The literal double sum (Pearl 1995): (K, N), (K,) and (N, K) -> (K,) P(Y = 1 | do(D = d))."""
    return p_r_given_d @ (p_y_given_r_d @ p_d)


def truth() -> np.ndarray:
    """P(Y=1 | do(D=d)) of the world, by intervention: D is set, so U keeps its own distribution."""
    return P_R_GIVEN_D @ P_Y_GIVEN_R_U @ P_U


def observed() -> np.ndarray:
    joint = np.zeros((3, 2, 2))
    for u, d, r in itertools.product(range(2), range(3), range(2)):
        mass = P_U[u] * P_D_GIVEN_U[u, d] * P_R_GIVEN_D[d, r]
        joint[d, r] += mass * np.array([1 - P_Y_GIVEN_R_U[r, u], P_Y_GIVEN_R_U[r, u]])
    return joint


def test_the_adjustment_finds_the_effect_that_the_plain_conditional_misses() -> None:
    p_r, p_d, p_y, conditional = tables(observed())
    np.testing.assert_allclose(front_door_adjustment(p_r, p_d, p_y).numpy(), truth(), atol=1e-12)
    assert np.abs(conditional - truth()).max() > 0.15


def test_the_adjustment_from_simulated_records() -> None:
    rng = np.random.default_rng(0)
    count = 200_000
    u = (rng.random(count) < P_U[1]).astype(int)
    d = (rng.random(count)[:, None] > P_D_GIVEN_U.cumsum(1)[u]).sum(1)
    r = (rng.random(count) < P_R_GIVEN_D[d, 1]).astype(int)
    y = (rng.random(count) < P_Y_GIVEN_R_U[r, u]).astype(int)
    joint = np.zeros((3, 2, 2))
    np.add.at(joint, (d, r, y), 1 / count)
    p_r, p_d, p_y, conditional = tables(joint)
    np.testing.assert_allclose(front_door_adjustment(p_r, p_d, p_y).numpy(), truth(), atol=0.01)
    assert np.abs(conditional - truth()).max() > 0.15


def test_the_model_s_mixture_is_the_literal_double_sum() -> None:
    p_r, p_d, p_y, _ = tables(observed())
    logit_y_given_r = torch.logit(p_y @ p_d).unsqueeze(-1)  # (N,C=1): sum_d' P(d') P(Y | r, d')
    for d in range(3):
        literal = sum(float(p_r[d, r]) * sum(float(p_d[e]) * float(p_y[r, e]) for e in range(3)) for r in range(2))
        got = front_door(p_r[d].log(), logit_y_given_r)
        assert float(got.log_positive.exp()) == pytest.approx(literal, abs=1e-12)
        assert float(got.log_negative.exp()) == pytest.approx(1 - literal, abs=1e-12)


@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([1.0, 30.0, 1e4]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**32 - 1),
)
def test_the_mixture_is_a_probability(
    conditions: int, classes: int, size: float, dtype: torch.dtype, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.uniform(-size, size, (3, conditions, classes))).to(dtype).requires_grad_()
    gate = torch.log_softmax(torch.from_numpy(rng.uniform(-5, 5, (3, conditions))), -1).to(dtype).requires_grad_()
    got = front_door(gate, logits)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for log in got:
        assert torch.isfinite(log).all()
        assert (log <= 0).all()
    torch.testing.assert_close(got.log_positive.exp() + got.log_negative.exp(), torch.ones(3, classes, dtype=dtype))
    each = torch.sigmoid(logits)
    assert (got.log_positive.exp() <= each.amax(-2) + tolerance).all()
    assert (got.log_positive.exp() >= each.amin(-2) - tolerance).all()
    (got.log_positive.sum() + got.log_negative.sum()).backward()
    for tensor in (logits, gate):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


def test_logits_far_out_keep_their_logarithm() -> None:
    half = torch.tensor([0.5, 0.5]).log()
    got = front_door(half, torch.tensor([[1e4], [1e4]]))
    assert float(got.log_positive) == pytest.approx(0, abs=1e-6)
    assert float(got.log_negative) == pytest.approx(-1e4)
    mixed = front_door(half, torch.tensor([[1e4], [-1e4]]))
    assert float(mixed.log_positive.exp()) == pytest.approx(0.5)


def test_a_single_condition_is_itself() -> None:
    logits = torch.linspace(-9, 9, 7).double().reshape(1, 7)
    got = front_door(torch.zeros(1).double(), logits)
    torch.testing.assert_close(got.log_positive.exp(), torch.sigmoid(logits[0]))


def test_mixing_logits_is_something_else() -> None:
    """The broken twin: the average of logits is a product of experts and outvotes a certain condition."""
    weights, logits = torch.tensor([0.5, 0.5]), torch.tensor([[6.0], [-2.0]])
    right = float(front_door(weights.log(), logits).log_positive.exp())
    wrong = float(torch.sigmoid((weights @ logits).squeeze()))
    assert right == pytest.approx(0.558, abs=0.001)
    assert wrong == pytest.approx(0.881, abs=0.001)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="log_r_given_d has 2 conditions"):
        front_door(torch.zeros(2), torch.zeros(3, 1))
