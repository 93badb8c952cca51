"""One site's round: the update is the optimiser's, repeatable, and divergence is a sentence."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from fedmpt_core.config.job import LossConfig, ModelConfig, TrainingConfig
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from fedmpt_core.training.local import LocalUpdate, local_update, make_optimizer
from fedmpt_core.training.loss import asymmetric_loss
from tests.fakes import FakeBackbone, Table

CONDITIONS = ("color", "pose")
CLASSES = ("cat", "dog", "tv monitor")
LOSS = LossConfig()


def setting(records: int = 10) -> tuple[FedMPT, Table, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    model = FedMPT(FakeBackbone(), CLASSES, CONDITIONS, ModelConfig(conditions=CONDITIONS), 0)
    targets = (np.random.default_rng(0).random((records, 3)) < 0.4).astype(np.uint8)
    return model, Table(torch.randn(records, 9, 16, generator=generator)), targets


def update(records: int = 10, number: int = 1, seed: int = 0, loss: LossConfig = LOSS, **changes: Any) -> LocalUpdate:
    model, table, targets = setting(records)
    return local_update(
        model,
        table,  # type: ignore[arg-type]
        targets,
        state=model.vector(),
        round_number=number,
        training=TrainingConfig(**{"rounds": 4, "batch_size": 4, "weight_decay": 0.0, **changes}),
        loss=loss,
        generator=np.random.default_rng(seed),
    )


def test_a_single_full_batch_step_is_minus_the_gradient() -> None:
    model, table, targets = setting()
    prediction = model(table.values)
    per_record = asymmetric_loss(prediction.log_positive, prediction.log_negative, torch.from_numpy(targets).float())
    (0.64 * per_record.mean()).backward()
    gradient = {n: p.grad for n, p in model.trainable_parameters().items()}
    flat = model.layout().flatten({n: g.numpy() for n, g in gradient.items() if g is not None})
    one = update(local_steps=1, batch_size=10, learning_rate=0.01)
    assert np.abs(flat).max() > 0
    # the update is a difference of float32 parameters of up to 20 in size
    assert np.allclose(one.vector, -0.01 * flat, rtol=1e-3, atol=4e-6)
    assert not np.allclose(one.vector, 0.01 * flat, rtol=1e-3, atol=4e-6)


def test_the_same_round_gives_the_same_update_and_another_seed_does_not() -> None:
    assert np.array_equal(update().vector, update().vector)
    assert not np.array_equal(update().vector, update(seed=1).vector)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({}, 3), ({"local_epochs": 2}, 6), ({"local_steps": 7}, 7), ({"batch_size": 64}, 1), ({"batch_size": 5}, 2)],
)
def test_steps_are_those_the_job_says(changes: dict[str, Any], steps: int) -> None:
    round_of = update(**changes)
    assert round_of.steps == len(round_of.losses) == steps
    assert min(round_of.losses) > 0


def test_an_epoch_visits_every_record_once() -> None:
    asked: list[int] = []

    class Noted(Table):
        def batch(self, indices: Any) -> torch.Tensor:
            asked.extend(indices)
            return super().batch(indices)

    model, table, targets = setting()
    local_update(
        model,
        Noted(table.values),  # type: ignore[arg-type]
        targets,
        state=model.vector(),
        round_number=1,
        training=TrainingConfig(batch_size=4, local_epochs=3),
        loss=LOSS,
        generator=np.random.default_rng(0),
    )
    for epoch in np.split(np.array(asked), 3):
        assert sorted(epoch) == list(range(10))


def test_the_schedule_falls_over_the_rounds_and_constant_does_not() -> None:
    cosine, constant = (TrainingConfig(rounds=10, learning_rate=0.1, schedule=s) for s in ("cosine", "constant"))
    model, _, _ = setting()

    def rate(training: TrainingConfig, number: int) -> float:
        return make_optimizer(model, training, number).param_groups[0]["lr"]

    rates = [rate(cosine, r) for r in range(1, 11)]
    assert rates[0] == 0.1
    assert all(a > b > 0 for a, b in pairwise(rates))
    assert {rate(constant, r) for r in range(1, 11)} == {0.1}


def test_training_lowers_the_loss_of_separable_records() -> None:
    losses = update(local_steps=60, batch_size=10, learning_rate=0.02, optimizer="adam").losses
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("huge", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_a_sentence_not_an_update(huge: float) -> None:
    model, table, targets = setting()
    table.values[3, 0, 0] = huge
    with pytest.raises(FloatingPointError, match=r"the loss became nan in round 2, step 0: lower learning_rate=0\.001"):
        local_update(
            model,
            table,  # type: ignore[arg-type]
            targets,
            state=model.vector(),
            round_number=2,
            training=TrainingConfig(batch_size=10),
            loss=LOSS,
            generator=np.random.default_rng(0),
        )


def test_every_trained_group_moves() -> None:
    model, _, _ = setting()
    moved = model.layout().split(update(local_steps=3, learning_rate=0.1).vector)
    assert {n for n, v in moved.items() if np.abs(v).max() > 0} == set(model.trainable_parameters())
    assert {n.split(".")[0] for n in moved} == {"contexts", "adapters", "gate", "head"}
