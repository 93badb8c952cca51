"""Per-record gradients against a plain loop over records, in double precision; groups; independence of records."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpt_core.config.job import LossConfig, ModelConfig
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.backbone.open_clip import OpenClipBackbone
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from fedmpt_core.privacy.mechanism.gradients import GradientEngine
from fedmpt_core.training.loss import asymmetric_loss
from tests.fakes import FakeBackbone

WORDS = ("cat", "dog", "tv monitor", "bus", "red chair", "pizza")
CONDITIONS = ("color", "pose", "background")
LOSS = LossConfig()
WEIGHT = 0.7


def build(backbone: Backbone, conditions: int = 2, classes: int = 3, *, moved: bool = True, **changes: Any) -> FedMPT:
    """A model in double precision, away from its start, where many gradients are zero."""
    config = ModelConfig(conditions=CONDITIONS[:conditions], adapter_width=3, gate_width=3, iterations=20, **changes)
    model = FedMPT(backbone, WORDS[:classes], config.conditions, config, 0).double()
    if moved:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def records(model: FedMPT, count: int, patches: int = 9, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = model.text_features().shape[-1]
    features = torch.randn(count, patches, width, generator=generator, dtype=torch.float64)
    return features, (torch.rand(count, len(model.classes), generator=generator) < 0.4).double()


def losses(model: FedMPT, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    prediction = model(features)
    return WEIGHT * asymmetric_loss(prediction.log_positive, prediction.log_negative, targets, LOSS)


def one_by_one(model: FedMPT, features: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """The oracle: every record alone through the whole model."""
    parameters = model.trainable_parameters()
    found: dict[str, list[torch.Tensor]] = {name: [] for name in parameters}
    for i in range(len(features)):
        value = losses(model, features[i : i + 1], targets[i : i + 1]).sum()
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            found[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    return {n: torch.stack(g) if g else parameters[n].new_zeros(0, *parameters[n].shape) for n, g in found.items()}


def exact(
    model: FedMPT, features: torch.Tensor, targets: torch.Tensor, units: torch.Tensor | None = None, size: int = 1000
) -> dict[str, torch.Tensor]:
    engine = GradientEngine(model, LOSS, WEIGHT, feature_space=False)
    engine.encode()
    owner = torch.arange(len(features)) if units is None else units
    parts = [(features[i : i + size], targets[i : i + size], owner[i : i + size]) for i in range(0, len(owner), size)]
    engine.fill(parts, int(owner.max()) + 1 if len(owner) else 0)
    return {name: p.grad_sample for name, p in engine.private.items()}


def relative(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert set(found) == set(wanted)
    assert all(found[n].shape == wanted[n].shape for n in wanted)
    return max((float((found[n] - wanted[n]).norm() / (wanted[n].norm() + 1e-30)) for n in wanted), default=0.0)


def open_clip_tower(folder: Path) -> Backbone:
    text = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    backbone = OpenClipBackbone(str(folder), "random:1")
    backbone.model.double()
    return backbone


def embedded_tower(folder: Path) -> Backbone:
    from fedmpt_core.model.backbone.embedded import EmbeddedBackbone

    backbone = EmbeddedBackbone()
    backbone._text, backbone._mean = backbone._text.double(), backbone._mean.double()
    return backbone


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 7), st.integers(1, 3), st.integers(2, 6), st.sampled_from(["all", "contexts", "contexts+gate"]))
def test_every_gradient_is_that_of_the_record_alone(batch: int, conditions: int, classes: int, trained: str) -> None:
    model = build(FakeBackbone(), conditions, classes, trained=trained)
    features, targets = records(model, batch)
    assert relative(exact(model, features, targets), one_by_one(model, features, targets)) <= 1e-10


@pytest.mark.parametrize("batch", [0, 1, 6, 12])
@pytest.mark.parametrize("components", [("prompts", "adapters", "transport", "gate"), ("prompts", "adapters")])
@pytest.mark.parametrize("trained", ["all", "adapters"])
def test_batches_that_could_be_mistaken_for_prompts(batch: int, components: tuple[Any, ...], trained: str) -> None:
    # 2 conditions and 3 classes: 6 records are as many as prompts
    model = build(FakeBackbone(), components=components, trained=trained)
    features, targets = records(model, batch)
    assert relative(exact(model, features, targets), one_by_one(model, features, targets)) <= 1e-10


@pytest.mark.parametrize("tower", [open_clip_tower, embedded_tower])
@pytest.mark.parametrize("batch", [3, 6])
def test_real_text_towers(tower: Callable[[Path], Backbone], batch: int, tmp_path: Path) -> None:
    model = build(tower(tmp_path))
    features, targets = records(model, batch)
    features[1], targets[1] = features[0], targets[0]
    found = exact(model, features, targets)
    assert relative(found, one_by_one(model, features, targets)) <= 1e-10
    assert all(torch.equal(g[0], g[1]) for g in found.values())
    assert all(float(g.norm()) > 0 for g in found.values())


@pytest.mark.parametrize("double", [False, True])
def test_changing_one_record_leaves_the_others_bit_identical(double: bool) -> None:
    model = build(FakeBackbone())
    features, targets = records(model, 6)
    if not double:
        model, features, targets = model.float(), features.float(), targets.float()
    before = exact(model, features, targets)
    for j in range(6):
        changed = features.clone()
        changed[j] = 100 * torch.randn_like(changed[j])
        after = exact(model, changed, targets)
        kept = [i for i in range(6) if i != j]
        assert all(torch.equal(before[n][kept], after[n][kept]) for n in before)
        assert any(not torch.equal(before[n][j], after[n][j]) for n in before)


def test_a_group_counts_with_the_mean_of_its_records_however_they_are_portioned() -> None:
    model = build(FakeBackbone())
    features, targets = records(model, 7)
    units = torch.tensor([0, 2, 1, 2, 0, 2, 3])
    alone = one_by_one(model, features, targets)
    wanted = {n: torch.stack([g[units == u].mean(0) for u in range(4)]) for n, g in alone.items()}
    for size in (1, 3, 7):
        assert relative(exact(model, features, targets, units, size), wanted) <= 1e-10
    with pytest.raises(ValueError, match="a unit has no record"):
        exact(model, features, targets, units + 1)


def test_the_feature_space_engine_releases_text_gradients_and_pulls_their_sum_back() -> None:
    model = build(FakeBackbone())
    features, targets = records(model, 5)
    engine = GradientEngine(model, LOSS, WEIGHT, feature_space=True)
    engine.encode()
    engine.fill([(features, targets, torch.arange(5))], 5)
    assert set(engine.private) == {
        "text",
        "adapters.down",
        "adapters.up",
        "gate.down",
        "gate.up",
        "head.scale",
        "head.bias",
    }
    for parameter in engine.private.values():
        parameter.grad = parameter.grad_sample.sum(0)
    engine.pull_back()
    found = {n: p.grad for n, p in model.trainable_parameters().items() if p.grad is not None}
    wanted = {n: g.sum(0) for n, g in one_by_one(model, features, targets).items()}
    assert relative(found, wanted) <= 1e-10


def test_calls_out_of_order_are_refused() -> None:
    model = build(FakeBackbone())
    engine = GradientEngine(model, LOSS, WEIGHT, feature_space=True)
    with pytest.raises(ValueError, match="fill before encode"):
        engine.fill([], 0)
    engine.encode()
    with pytest.raises(ValueError, match="pull_back before the noise"):
        engine.pull_back()


def test_frozen_parts_receive_nothing() -> None:
    model = build(FakeBackbone(), trained="adapters")
    features, targets = records(model, 4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = exact(model, features, targets)
    assert set(found) == {"adapters.up", "head.scale", "head.bias"}
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())
    assert not any(g.requires_grad for g in found.values())
    assert np.isfinite(sum(float(g.sum()) for g in found.values()))


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        (None, "AUTO,STRICT"),
        ("AVX2", "AUTO,STRICT"),
        ("AUTO", "AUTO,STRICT"),
        ("AVX2,STRICT", "AVX2,STRICT"),
        ("COMPATIBLE", "COMPATIBLE"),
    ],
)
def test_kernels_whose_rounding_depends_on_memory_are_never_used(chosen: str | None, wanted: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "MKL_CBWR"} | ({"MKL_CBWR": chosen} if chosen else {})
    code = "import os, fedmpt_core; print(os.environ['MKL_CBWR'])"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == wanted
