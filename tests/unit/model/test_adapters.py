"""The factored cosine against adapted patches written out; identity at the start; records kept apart."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmpt_core.model.fedmpt.adapters import Adapters, cosine, per_record

B, P, D, N, C, S = 4, 7, 16, 3, 5, 4


def trained(seed: int = 0, size: float = 0.5) -> Adapters:
    adapters = Adapters(N, D, S, 0.2, np.random.default_rng(seed)).double()
    with torch.no_grad():
        adapters.up.copy_(size * torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((N, S, D))))
    return adapters


def inputs(seed: int = 5) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    text = torch.from_numpy(rng.standard_normal((N, C, D)))
    return torch.from_numpy(7 * rng.standard_normal((B, P, D))), F.normalize(text, dim=-1)


def written_out(adapters: Adapters, patches: Tensor, text: Tensor) -> Tensor:
    """Condition by condition, with the N copies of the patches and no batching."""
    cosines = []
    for n in range(len(adapters.down)):
        adapted = patches + adapters.ratio * (patches @ adapters.down[n] @ adapters.up[n])
        cosines.append(F.normalize(adapted, dim=-1) @ text[n].T)
    return torch.stack(cosines, dim=-3)


@pytest.mark.parametrize("size", [0.0, 0.1, 3.0])
def test_the_factored_cosine_is_that_of_adapted_patches(size: float) -> None:
    adapters, (patches, text) = trained(size=size), inputs()
    got = adapters.cosine(patches, text)
    assert got.shape == (B, N, P, C)
    torch.testing.assert_close(got, written_out(adapters, patches, text), rtol=0, atol=1e-12)
    explicit = F.normalize(adapters(patches), dim=-1) @ text.mT
    torch.testing.assert_close(got, explicit, rtol=0, atol=1e-12)
    single = adapters.float().cosine(patches.float(), text.float())
    torch.testing.assert_close(single.double(), got, rtol=0, atol=2e-6)


def test_gradients_are_those_of_adapted_patches() -> None:
    adapters, (patches, text) = trained(), inputs()
    text.requires_grad_()
    weights = torch.from_numpy(np.random.default_rng(9).standard_normal((B, N, P, C)))
    wanted = (adapters.down, adapters.up, text)
    one = torch.autograd.grad((adapters.cosine(patches, text) * weights).sum(), wanted)
    other = torch.autograd.grad((written_out(adapters, patches, text) * weights).sum(), wanted)
    for got, expected in zip(one, other, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_new_adapters_are_the_identity() -> None:
    adapters, (patches, text) = Adapters(N, D, S, 0.2, np.random.default_rng(0)).double(), inputs()
    assert torch.equal(adapters(patches), patches.unsqueeze(1).expand(B, N, P, D))
    assert torch.equal(adapters.cosine(patches, text), cosine(patches, text))
    adapters.cosine(patches, text).sum().backward()
    assert adapters.up.grad is not None
    assert adapters.up.grad.abs().sum() > 0  # and yet they can start to learn


def test_the_length_is_taken_over_the_channels() -> None:
    """The broken twin normalises over the patches, as the released code does: no cosine, and other
    numbers."""
    patches, text = inputs()
    got = cosine(patches, text)
    assert got.abs().max() <= 1 + 1e-12
    lengths = torch.linspace(0.1, 9, B * P).double().reshape(B, P, 1)
    torch.testing.assert_close(cosine(patches * lengths, text), got)
    wrong = F.normalize(patches, dim=-2).unsqueeze(1) @ text.mT
    assert (wrong - got).abs().max() > 0.1


def test_permuting_records_permutes_rows_bit_for_bit() -> None:
    adapters, (patches, text) = trained(), inputs()
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(adapters.cosine(patches, text)[order], adapters.cosine(patches[order], text))
    changed = patches.clone()
    changed[1] = 100
    assert torch.equal(adapters.cosine(patches, text)[[0, 2, 3]], adapters.cosine(changed, text)[[0, 2, 3]])


def test_a_zero_patch_and_a_vanishing_one() -> None:
    patches, text = inputs()
    patches[0, 0] = 0
    adapters = trained()
    assert (adapters.cosine(patches, text)[0, :, 0] == 0).all()
    assert (cosine(patches, text)[0, :, 0] == 0).all()
    erasing = Adapters(1, 2, 2, 1.0, np.random.default_rng(0))
    with torch.no_grad():
        erasing.down.copy_(torch.eye(2))
        erasing.up.copy_(-torch.eye(2) * (1 - 1e-7))
    got = erasing.cosine(torch.tensor([[3.0, 4.0]]), torch.tensor([[[0.6, 0.8]]]))
    assert got.abs().max() <= 1
    got.sum().backward()
    assert erasing.up.grad is not None
    assert torch.isfinite(erasing.up.grad).all()


def test_one_record_and_none() -> None:
    adapters, (patches, text) = trained(), inputs()
    torch.testing.assert_close(adapters.cosine(patches[1], text), adapters.cosine(patches, text)[1])
    assert adapters.cosine(patches[:0], text).shape == (0, N, P, C)
    assert cosine(patches[:0], text).shape == (0, N, P, C)


def test_per_record_is_a_matrix_product() -> None:
    patches, _ = inputs()
    matrix = torch.from_numpy(np.random.default_rng(3).standard_normal((6, D)))
    torch.testing.assert_close(per_record(matrix, patches), matrix @ patches.mT)


def test_the_start_depends_on_the_generator_alone() -> None:
    one, other = (Adapters(N, D, S, 0.2, np.random.default_rng(4)) for _ in range(2))
    assert torch.equal(one.down, other.down)
    assert not torch.equal(one.down, Adapters(N, D, S, 0.2, np.random.default_rng(5)).down)
    wide = Adapters(5, 512, 32, 0.2, np.random.default_rng(0)).down.detach()
    assert 0.97 < float(wide.std()) * 512**0.5 < 1.03
