"""The gate: uniform at the start, a softmax of a linear map, blind to other records."""

import math

import numpy as np
import torch

from fedmpt_core.model.fedmpt.gating import Gate, entropy, uniform_log_weights

B, P, D, N, S = 5, 7, 16, 3, 4


def trained() -> Gate:
    gate = Gate(N, D, S, 0.7, np.random.default_rng(0)).double()
    with torch.no_grad():
        gate.up.copy_(torch.from_numpy(np.random.default_rng(1).standard_normal((S, N))))
    return gate


def patches() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(2).standard_normal((B, P, D)))


def test_a_new_gate_is_uniform_and_can_learn() -> None:
    gate = Gate(N, D, S, 1.0, np.random.default_rng(0)).double()
    got = gate(patches())
    assert torch.equal(got, torch.full((B, N), math.log(1 / N), dtype=torch.float64))
    torch.testing.assert_close(got, uniform_log_weights(patches(), N))
    gate(patches())[:, 0].sum().backward()
    assert gate.up.grad is not None
    assert gate.up.grad.abs().sum() > 0


def test_it_is_the_softmax_written_out() -> None:
    gate, x = trained(), patches()
    for b in range(B):
        mean = x[b].numpy().mean(0)
        scores = (mean / np.sqrt((mean**2).mean())) @ gate.down.detach().numpy() @ gate.up.detach().numpy() / 0.7
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(gate(x)[b].exp().detach().numpy(), weights, rtol=1e-9)


def test_the_length_of_the_features_does_not_matter() -> None:
    gate, x = trained(), patches()
    torch.testing.assert_close(gate(1000 * x), gate(x))
    assert torch.isfinite(gate(0 * x)).all()


def test_records_do_not_meet() -> None:
    gate, x = trained(), patches()
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(gate(x)[order], gate(x[order]))
    changed = x.clone()
    changed[2] *= -50
    assert torch.equal(gate(x)[[0, 1, 3, 4]], gate(changed)[[0, 1, 3, 4]])
    torch.testing.assert_close(gate(x[1]), gate(x)[1])
    assert gate(x[:0]).shape == (0, N)


def test_permuting_patches_changes_nothing() -> None:
    gate, x = trained(), patches()
    torch.testing.assert_close(gate(x.flip(1)), gate(x))


def test_entropy_runs_from_zero_to_log_n() -> None:
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(entropy(weights.log()), torch.tensor([math.log(4), 0.0, math.log(2)]))
