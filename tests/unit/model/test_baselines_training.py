"""Baselines where FedMPT trains: under privacy, in a plain round, in a job, in checkpoints and predictions."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fedmpt_core.config.job import JobConfig, LossConfig, ModelConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.federation import preflight
from fedmpt_core.federation.prediction import Predictor
from fedmpt_core.federation.run.record import RunRecord, save_model
from fedmpt_core.federation.server.checkpoint import Checkpoint, load_checkpoint
from fedmpt_core.model.base import TunedModel
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from fedmpt_core.model.fedmpt.readout import pooling_weights
from fedmpt_core.model.registry import build_model
from fedmpt_core.privacy.mechanism.gradients import TEXT, GradientEngine
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.machinery import clip_groups
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from fedmpt_core.privacy.mechanism.private_update import private_update
from fedmpt_core.privacy.mechanism.self_test import self_test
from fedmpt_core.training.local import local_update
from tests.fakes import FakeBackbone, Table, training_records
from tests.settings import UNMASKED
from tests.unit.model.test_baselines import (
    BASELINES,
    CLASSES,
    SIZES,
    config,
    patches,
    targets,
)
from tests.unit.privacy.test_gradients import one_by_one
from tests.unit.privacy.test_private_update import Silent


def job(method: str, **privacy: Any) -> JobConfig:
    return JobConfig(
        "b",
        CLASSES,
        model=config(method),
        training=TrainingConfig(rounds=4, local_steps=3, learning_rate=0.5, weight_decay=0.0, momentum=0.0),
        privacy=PrivacyConfig(**{"noise_multiplier": 1.0, "sample_rate": 0.5, "max_grad_norm": 0.3, **privacy}),
        secagg=UNMASKED,
    )


def private(agreed: JobConfig, model: TunedModel, keystream: Keystream) -> np.ndarray:
    labels = targets(12).numpy().astype(np.uint8)
    return private_update(
        model,
        training_records(Table(patches(12).float()), labels),
        state=model.vector(),
        round_number=1,
        job=agreed,
        mechanism=Mechanism.of(agreed),
        declared_units=12,
        keystream=keystream,
    ).vector


@pytest.mark.parametrize("engine", ["exact", "feature_space"])
@pytest.mark.parametrize("method", BASELINES)
def test_a_private_round_moves_and_noises_every_trained_number(method: str, engine: str) -> None:
    agreed = job(method, engine=engine)
    model = build_model(FakeBackbone(), CLASSES, agreed.model, 0)
    start, found = model.vector(), private(agreed, model, Keystream())
    moved = model.layout().split(found)
    assert all(np.count_nonzero(part) for part in moved.values())
    assert np.isfinite(found).all()
    model.load_vector(start)
    assert not np.array_equal(private(agreed, model, Keystream()), found)
    released = GradientEngine(model, agreed.loss, 1.0, feature_space=engine == "feature_space").private
    assert (TEXT in released) == (engine == "feature_space" and model.group_sizes()["contexts."] > 0)
    groups = dict.fromkeys(("contexts", "head"), 0.1) if model.group_sizes()["contexts."] else {"head": 0.1}
    grouped = dataclasses.replace(Mechanism.of(agreed), bounds=groups)
    assert len(clip_groups(released, grouped)) == len(groups)


@pytest.mark.parametrize("method", ["linear", "released"])
def test_without_noise_a_private_round_is_clipped_gradient_descent(method: str) -> None:
    agreed, key = job(method, engine="exact"), bytes(range(32))
    model = build_model(FakeBackbone(), CLASSES, agreed.model, 0)
    start = model.vector()
    found = private(agreed, model, Silent(key))
    model.load_vector(start)
    from fedmpt_core.privacy.mechanism.sampling import poisson_batches

    parameters = list(model.trainable_parameters().values())
    for batch in poisson_batches(12, 0.5, 3, Keystream(key)):
        gradients = one_by_one_scaled(model, patches(12).float()[batch], targets(12).float()[batch], agreed)
        norms = torch.sqrt(sum((g.flatten(1).square().sum(1) for g in gradients), torch.zeros(len(batch))))
        factor = (0.3 / norms).clamp(max=1)
        with torch.no_grad():
            for parameter, g in zip(parameters, gradients, strict=True):
                parameter -= 0.5 * torch.tensordot(factor, g, dims=1) / 6
    np.testing.assert_allclose(model.vector() - start, found, atol=2e-5)
    assert np.abs(found).max() > 1e-3


def one_by_one_scaled(model: TunedModel, x: Tensor, y: Tensor, agreed: JobConfig) -> list[Tensor]:
    """Gradients of single records at the job's loss weight, in the order of the parameters."""
    weight = agreed.training.loss_weight / 0.7  # the oracle's own weight
    return [weight * g for g in one_by_one(model, x, y).values()]  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["fedtpg", "released"])
def test_the_site_s_self_test_passes_with_a_baseline(method: str) -> None:
    agreed = job(method)
    model = build_model(FakeBackbone(), CLASSES, agreed.model, 0)
    assert [c.name for c in self_test(model, agreed, Mechanism.of(agreed)) if not c.passed] == []


@pytest.mark.parametrize("method", BASELINES)
def test_a_plain_round_lowers_the_loss(method: str) -> None:
    model = build_model(FakeBackbone(), CLASSES, config(method), 0)
    agreed = TrainingConfig(rounds=4, local_steps=20, batch_size=12, optimizer="adam", learning_rate=0.03)
    update = local_update(
        model,
        Table(patches(12).float()),  # type: ignore[arg-type]
        targets(12).numpy().astype(np.uint8),
        state=model.vector(),
        round_number=1,
        training=agreed,
        loss=LossConfig(),
        generator=np.random.default_rng(0),
    )
    assert update.losses[-1] < 0.95 * update.losses[0]


def test_group_rates_are_factors_on_the_step_of_their_group() -> None:
    def moved(**rates: float) -> dict[str, np.ndarray]:
        model = build_model(FakeBackbone(), CLASSES, config("poscoop"), 0)
        training = TrainingConfig(local_steps=1, batch_size=12, momentum=0.0, weight_decay=0.0, group_rates=rates)
        rows, labels = Table(patches(12).float()), targets(12).numpy().astype(np.uint8)
        update = local_update(
            model,
            rows,  # type: ignore[arg-type]
            labels,
            state=model.vector(),
            round_number=1,
            training=training,
            loss=LossConfig(),
            generator=np.random.default_rng(0),
        )
        return model.layout().split(update.vector)

    plain, changed = moved(), moved(contexts=8.0)
    np.testing.assert_allclose(changed["contexts.context"], 8 * plain["contexts.context"], rtol=1e-2, atol=1e-8)
    assert np.array_equal(changed["head.negative"], plain["head.negative"])
    with pytest.raises(ValueError, match=r"group_rates names 'gate', trained are contexts, head"):
        moved(gate=0.1)
    for rates, says in (
        ({"hats": 1.0}, r"\[group_rates\] unknown key 'hats': .*contexts, adapters, gate, head"),
        ({"head": 0.0}, r"\[group_rates\] head=0.0 is out of range: allowed is \(0, 1000\]"),
    ):
        with pytest.raises(ValueError, match=says):
            TrainingConfig(group_rates=rates)


@pytest.mark.parametrize("method", BASELINES)
def test_checkpoint_prediction_and_preflight(method: str, tmp_path: Path) -> None:
    agreed = job(method)
    size = preflight.check_model(agreed, FakeBackbone())
    assert size.floats == SIZES[method]
    open_world = dataclasses.replace(agreed, unseen_classes=("bus",))
    if method in ("linear", "dualcoop", "poscoop"):
        with pytest.raises(ValueError, match="trains numbers per class"):
            preflight.check_model(open_world, FakeBackbone())
    else:
        assert preflight.check_model(open_world, FakeBackbone()).floats == SIZES[method]
    assert set(size.released) == {"all"}
    model = build_model(FakeBackbone(), CLASSES, agreed.model, agreed.seed)
    state = (model.vector() + 0.01).astype(np.float32)
    record = RunRecord.start(agreed, "run").with_round(1, 1.0, {}, {"mAP": 1.0, "threshold": 0.3})
    Checkpoint("run", agreed, 1, model.layout(), state, record, {}).save(tmp_path)
    kept = load_checkpoint(tmp_path, "run")
    assert kept.job == agreed
    assert np.array_equal(kept.state, state)
    (tmp_path / "result.json").write_text(json.dumps(dataclasses.asdict(record)))
    (tmp_path / "model.safetensors").write_bytes(save_model(model.layout(), state))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    ready = Predictor.load(tmp_path, backbone=FakeBackbone())
    answer = ready.predict(tmp_path / "picture.png")
    model.load_vector(state)
    backbone = FakeBackbone()
    image = backbone.preprocess(Image.open(tmp_path / "picture.png").convert("RGB"))
    with torch.no_grad():
        np.testing.assert_allclose(
            answer.probabilities, model(backbone.patches(image[None])).probabilities[0], atol=1e-6
        )
    with pytest.raises(ValueError, match="without 'transport'"):
        ready.explain(answer, tmp_path, top=1)


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        ("coop", {"components": ("prompts",)}, "method='coop' has no components"),
        ("linear", {"scale": 3.0}, "method='linear' has no scale, given is 3.0: remove it; the method takes bias"),
        ("fedmvp", {"conditions": ("pose",)}, "has no conditions"),
        ("released", {"reg": 0.5}, "has no reg"),
        ("dualcoop", {"trained": "contexts"}, "has no trained"),
        ("fedmpt", {"context_tokens": 4}, "method='fedmpt' has no context_tokens"),
        ("coop", {"context_tokens": 0}, r"context_tokens=0 is out of range"),
    ],
)
def test_settings_of_another_method_are_refused(method: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ModelConfig(method=method, **changes)  # type: ignore[arg-type]


def test_a_job_without_a_method_is_fedmpt() -> None:
    assert type(build_model(FakeBackbone(), CLASSES, ModelConfig(), 0)) is FedMPT


def test_words_that_cannot_be_tokenised_are_refused_by_every_method() -> None:
    for method in BASELINES:
        if method != "linear":
            with pytest.raises(ValueError, match="no word piece"):
                build_model(FakeBackbone(), ("cat", "___"), config(method), 0)


def test_pooling_goes_from_the_best_patch_to_the_mean() -> None:
    cosine = torch.tensor([[0.1], [0.9], [0.2]])
    sharp, flat = ((pooling_weights(cosine, t) * cosine).sum() for t in (0.01, 10.0))
    assert float(sharp) == pytest.approx(0.9)
    assert float(flat) == pytest.approx(0.4, abs=0.02)
