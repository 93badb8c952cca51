"""A site's private round: plain DP-SGD arithmetic when the noise is silenced, and settings that mean what they say."""

from typing import Any

import numpy as np
import pytest
import torch

from fedmpt_core.config.job import JobConfig, ModelConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from fedmpt_core.privacy.mechanism.private_update import private_update
from fedmpt_core.privacy.mechanism.sampling import poisson_batches
from fedmpt_core.training.local import LocalUpdate
from fedmpt_core.training.loss import asymmetric_loss
from tests.fakes import FakeBackbone, Table, training_records

CLASSES = ("cat", "dog", "tv monitor")
RECORDS = 12
KEY = bytes(range(32))


class Silent(Keystream):
    """Real sampling, no noise."""

    def normals(self, purpose: str, count: int) -> np.ndarray:
        return np.zeros(count)


def setting(trained: str = "all", **privacy: Any) -> tuple[JobConfig, FedMPT, Table, np.ndarray]:
    job = JobConfig(
        "p",
        CLASSES,
        model=ModelConfig(conditions=("color", "pose"), adapter_width=3, gate_width=3, trained=trained),  # type: ignore[arg-type]
        training=TrainingConfig(rounds=4, local_steps=3, learning_rate=0.5, weight_decay=0.0, momentum=0.0),
        privacy=PrivacyConfig(
            **{"noise_multiplier": 1.0, "sample_rate": 0.5, "max_grad_norm": 0.3, "engine": "exact", **privacy}
        ),
    )
    model = FedMPT(FakeBackbone(), CLASSES, job.model.conditions, job.model, 0)
    values = torch.randn(RECORDS, 9, 16, generator=torch.Generator().manual_seed(0))
    targets = (np.random.default_rng(0).random((RECORDS, 3)) < 0.4).astype(np.uint8)
    return job, model, Table(values), targets


def update(
    keystream: Keystream, trained: str = "all", units: np.ndarray | None = None, declared: int = RECORDS, **privacy: Any
) -> LocalUpdate:
    job, model, table, targets = setting(trained, **privacy)
    return private_update(
        model,
        training_records(table, targets, units),
        state=model.vector(),
        round_number=1,
        job=job,
        mechanism=Mechanism.of(job),
        declared_units=declared,
        keystream=keystream,
    )


def by_hand(declared: int = RECORDS) -> np.ndarray:
    """Clip every record's gradient, sum, divide by rate times declared units, step; in a plain loop."""
    job, model, table, targets = setting()
    start = model.vector()
    parameters = list(model.trainable_parameters().values())
    for batch in poisson_batches(RECORDS, 0.5, 3, Keystream(KEY)):
        total = [torch.zeros_like(p) for p in parameters]
        for i in batch:
            prediction = model(table.values[i : i + 1])
            loss = job.training.loss_weight * asymmetric_loss(
                prediction.log_positive, prediction.log_negative, torch.from_numpy(targets[i : i + 1]).float()
            )
            gradients = torch.autograd.grad(loss.sum(), parameters)
            norm = torch.sqrt(sum((g.square().sum() for g in gradients), torch.zeros(())))
            for t, g in zip(total, gradients, strict=True):
                t += g * min(1.0, 0.3 / float(norm))
        with torch.no_grad():
            for p, t in zip(parameters, total, strict=True):
                p -= 0.5 * t / (0.5 * declared)
    return model.vector() - start


@pytest.mark.parametrize("declared", [RECORDS, 40])
def test_without_noise_it_is_clipped_gradient_descent_over_the_declared_number(declared: int) -> None:
    wanted = by_hand(declared)
    assert np.abs(update(Silent(KEY), declared=declared).vector - wanted).max() <= 2e-5
    assert np.abs(wanted).max() > 1e-3


def test_portions_change_nothing_and_bound_what_is_held() -> None:
    found = []
    for size in (1, 2, 64):
        job, model, table, targets = setting()
        one = private_update(
            model,
            training_records(table, targets, np.array([0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 7])),
            state=model.vector(),
            round_number=1,
            job=job,
            mechanism=Mechanism.of(job),
            declared_units=8,
            keystream=Keystream(KEY),
            micro_batch=size,
        )
        found.append(one.vector)
        assert table.largest <= size
    assert np.abs(found[0] - found[2]).max() <= 1e-5
    assert np.abs(found[1] - found[2]).max() <= 1e-5


def test_every_call_draws_new_noise() -> None:
    one, other = update(Keystream()).vector, update(Keystream()).vector
    assert not np.array_equal(one, other)
    keystream = Keystream()
    assert not np.array_equal(update(keystream).vector, update(keystream).vector)


@pytest.mark.parametrize("engine", ["exact", "feature_space"])
@pytest.mark.parametrize("trained", ["all", "contexts", "contexts+gate", "adapters"])
def test_only_what_is_trained_moves_and_all_of_it_is_noised(engine: str, trained: str) -> None:
    _, model, _, _ = setting(trained)
    found = update(Keystream(), trained, engine=engine).vector
    assert found.shape == (model.layout().size,)
    moved = model.layout().split(found)
    # a class context token may be out of reach of rounding, nothing else: every number gets noise
    assert all((np.abs(part) > 0).mean() > 0.95 for part in moved.values())
    assert set(moved) == set(model.trainable_parameters())


def test_the_engines_agree_without_noise_and_clipping() -> None:
    settings: dict[str, Any] = {"max_grad_norm": 1e6}
    exact = update(Silent(KEY), engine="exact", **settings).vector
    fast = update(Silent(KEY), engine="feature_space", **settings).vector
    # the grid is 2^-20 of the bound: about 1
    assert exact.shape == fast.shape
    small: dict[str, Any] = {"max_grad_norm": 50.0}
    exact, fast = (update(Silent(KEY), engine=e, **small).vector for e in ("exact", "feature_space"))
    assert np.abs(exact - fast).max() <= 2e-3 * np.abs(exact).max() + 1e-4


def test_a_site_without_records_still_answers_with_noise() -> None:
    job, model, _, _ = setting()
    found = private_update(
        model,
        training_records(Table(torch.zeros(0, 9, 16)), np.zeros((0, 3), np.uint8), np.zeros(0, np.int64)),
        state=model.vector(),
        round_number=1,
        job=job,
        mechanism=Mechanism.of(job),
        declared_units=8,
        keystream=Keystream(),
    )
    assert np.abs(found.vector).max() > 0
    assert (found.steps, found.losses) == (3, ())


def test_units_without_a_gradient_are_told_in_the_site_s_own_log(caplog: pytest.LogCaptureFixture) -> None:
    def told(*broken: int) -> LocalUpdate:
        job, model, table, targets = setting(sample_rate=1.0)
        table.values[list(broken), 0, 0] = torch.nan
        update = private_update(
            model,
            training_records(table, targets, np.arange(RECORDS) // 2),
            state=model.vector(),
            round_number=7,
            job=job,
            mechanism=Mechanism.of(job),
            declared_units=8,
            keystream=Keystream(KEY),
        )
        assert np.isfinite(update.vector).all()
        return update

    told()
    assert not caplog.messages
    silent = told(0, 1, 6)  # two records of one unit, and one of another, in each of three steps
    assert len(caplog.messages) == 1
    assert "round 7: 6 times in 3 steps the gradient of a unit was NaN or infinite" in caplog.messages[0]
    assert (set(vars(silent)), silent.losses) == ({"vector", "steps", "losses"}, ())  # nothing of it goes on


def test_bounds_by_group_must_name_what_is_trained() -> None:
    with pytest.raises(ValueError, match="trained are adapters, contexts, gate, head"):
        update(Keystream(), group_norms={"contexts": 1.0})
    bounds = {"contexts": 0.1, "adapters": 0.2, "gate": 0.3, "head": 0.4}
    assert np.abs(update(Keystream(), group_norms=bounds).vector).max() > 0
    with pytest.raises(ValueError, match="noise_multiplier is not worked out"):
        update(Keystream(), noise_multiplier=None)


def test_divergence_is_a_sentence_not_an_update() -> None:
    job, model, table, targets = setting(max_grad_norm=1000.0)
    state = model.vector()
    object.__setattr__(job.training, "learning_rate", 1e38)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        private_update(
            model,
            training_records(table, targets),
            state=state,
            round_number=1,
            job=job,
            mechanism=Mechanism.of(job),
            declared_units=8,
            keystream=Keystream(),
        )
