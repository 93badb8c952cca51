"""Unknown labels in training: they move nothing, with and without differential privacy, and no other record."""

import numpy as np
import pytest
import torch

from fedmpt_core.config.job import LossConfig, ModelConfig, TrainingConfig
from fedmpt_core.data.pictures import UNKNOWN
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from fedmpt_core.privacy.mechanism.gradients import GradientEngine
from fedmpt_core.training.local import local_update
from fedmpt_core.training.loss import asymmetric_loss
from tests.fakes import FakeBackbone, Table

CONDITIONS, CLASSES = ("color", "pose"), ("cat", "dog", "bus", "boat")
B = 6
LOSS = LossConfig()


def setting() -> tuple[FedMPT, torch.Tensor, np.ndarray]:
    model = FedMPT(FakeBackbone(), CLASSES, CONDITIONS, ModelConfig(conditions=CONDITIONS), 0)
    with torch.no_grad():
        for i, parameter in enumerate(model.trainable_parameters().values()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    patches = torch.randn(B, 9, 16, generator=torch.Generator().manual_seed(9))
    targets = np.random.default_rng(0).integers(0, 3, (B, len(CLASSES)))
    targets[2] = UNKNOWN
    return model, patches, targets


def known_only(model: FedMPT, patches: torch.Tensor, targets: np.ndarray) -> dict[str, torch.Tensor]:
    """Gradients of one record's loss, summed over the columns that are known."""
    prediction = model(patches[None])
    total = sum(
        asymmetric_loss(prediction.log_positive[0, c : c + 1], prediction.log_negative[0, c : c + 1], torch.tensor([t]))
        for c, t in enumerate(targets.tolist())
        if t != UNKNOWN
    )
    trained = model.trainable_parameters()
    if not isinstance(total, torch.Tensor):
        return {name: torch.zeros_like(p) for name, p in trained.items()}
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained.items(), found, strict=True)}


def test_a_record_s_gradient_is_that_of_its_known_labels() -> None:
    model, patches, targets = setting()
    engine = GradientEngine(model, LOSS, 1.0, feature_space=False)
    engine.encode()
    engine.fill([(patches, torch.from_numpy(targets).float(), torch.arange(B))], B)
    for i in range(B):
        expected = known_only(model, patches[i], targets[i])
        for name, parameter in engine.private.items():
            found = parameter.grad_sample[i]  # type: ignore[attr-defined]
            torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6)
    assert all(float(p.grad_sample[2].norm()) == 0 for p in engine.private.values())  # type: ignore[attr-defined]
    assert any(float(p.grad_sample[0].norm()) > 0 for p in engine.private.values())  # type: ignore[attr-defined]


def test_a_step_without_privacy_is_that_of_the_known_labels() -> None:
    model, patches, targets = setting()
    grads = [known_only(model, patches[i], targets[i]) for i in range(B)]
    training = TrainingConfig(
        rounds=1, local_steps=1, batch_size=B, learning_rate=0.5, momentum=0.0, weight_decay=0.0, loss_weight=1.0
    )
    state = model.vector()
    update = local_update(
        model,
        Table(patches),  # type: ignore[arg-type]
        targets,
        state=state,
        round_number=1,
        training=training,
        loss=LOSS,
        generator=np.random.default_rng(0),
    )
    mean = {name: torch.stack([g[name] for g in grads]).mean(0) for name in grads[0]}
    expected = -0.5 * np.concatenate([mean[name].detach().numpy().ravel() for name in mean])
    np.testing.assert_allclose(update.vector, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("value", [0, 1])
def test_it_is_neither_absence_nor_presence(value: int) -> None:
    model, patches, targets = setting()
    other = np.where(targets == UNKNOWN, value, targets)
    one, two = (known_only(model, patches[0], t[0]) for t in (targets, other))
    assert UNKNOWN in targets[0]
    assert any(not torch.allclose(one[n], two[n]) for n in one)
