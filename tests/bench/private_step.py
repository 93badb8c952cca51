"""A DP step against a plain one, and our per-record gradients against Opacus' own and against vmap over everything.

Steps are whole: forward, gradients, clipping, noise, optimizer. The bound of the exact engine is what it must pay: a
plain step and one backward through the text tower for each record, timed by itself. The comparison with Opacus runs
on a small text tower, each way in a process of its own for its peak memory.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedmpt_core.config.job import JobConfig, ModelConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.backbone.open_clip import OpenClipBackbone
from fedmpt_core.model.fedmpt.fedmpt import FedMPT, Prediction
from fedmpt_core.privacy.mechanism.gradients import GradientEngine
from fedmpt_core.privacy.mechanism.keystream import Keystream
from fedmpt_core.privacy.mechanism.machinery import REAL
from fedmpt_core.privacy.mechanism.mechanism import Mechanism
from fedmpt_core.training.local import make_optimizer
from fedmpt_core.training.loss import asymmetric_loss
from tests.bench.measure import Row, cpu_seconds, in_own_process, peak_mib
from tests.bench.step import CONDITIONS, NAMES, B

SMALL = {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4}
SMALL_VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
WAYS = ("ours", "opacus", "vmap")
ROUNDS = 8


def job_for(classes: Sequence[str], engine: str) -> JobConfig:
    """A job that trains everything with SGD."""
    return JobConfig(
        "bench",
        tuple(classes),
        model=ModelConfig(conditions=CONDITIONS),
        training=TrainingConfig(learning_rate=1e-4),
        privacy=PrivacyConfig(noise_multiplier=1.0, sample_rate=0.5, engine=engine),  # type: ignore[arg-type]
    )


def records(classes: int, patches: int, width: int) -> tuple[Tensor, Tensor]:
    """B random records."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(B, patches, width, generator=generator)
    return features, (torch.rand(B, classes, generator=generator) < 3 / classes).float()


def loss_of(prediction: Prediction, targets: Tensor) -> Tensor:
    """(B,) training losses."""
    return asymmetric_loss(prediction.log_positive, prediction.log_negative, targets)


def private_step(model: FedMPT, job: JobConfig, features: Tensor, targets: Tensor) -> Callable[[], None]:
    """One whole DP step on B records."""
    engine, optimizer = REAL.round(Mechanism.of(job), model, job, 1, 2 * B, Keystream())

    def step() -> None:
        engine.encode()
        engine.fill([(features, targets, torch.arange(B, device=features.device))], B)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def plain_step(model: FedMPT, job: JobConfig, features: Tensor, targets: Tensor) -> Callable[[], None]:
    """The same without differential privacy."""
    optimizer = make_optimizer(model, job.training, 1)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(model(features), targets).mean().backward()
        optimizer.step()

    return step


def against_plain(backbone: Backbone, classes: int, repeats: int) -> list[Row]:
    """Exact and feature-space steps on ViT-B/16."""
    names = [f"{word} {i}" if i else word for i in range(classes // len(NAMES)) for word in NAMES]
    exact, fast = job_for(names, "exact"), job_for(names, "feature_space")
    model = FedMPT(backbone, names, CONDITIONS, exact.model, 0)
    features, targets = records(classes, 196, 512)
    text = model.text_features()
    contexts = [p for n, p in model.trainable_parameters().items() if n.startswith("contexts.")]
    backward = cpu_seconds(lambda: torch.autograd.grad(text, contexts, torch.ones_like(text), retain_graph=True), 5)
    quick = private_step(model, fast, features, targets)
    simple = plain_step(model, exact, features, targets)
    simple()
    quick()
    plain = fast_seconds = float("inf")
    for _ in range(ROUNDS):  # in turn: what slows the machine for a while then slows both
        plain = min(plain, cpu_seconds(simple, 1))
        fast_seconds = min(fast_seconds, cpu_seconds(quick, 1))
    exact_seconds = cpu_seconds(private_step(model, exact, features, targets), repeats)
    floor = plain + B * backward
    size = f"ViT-B/16, B={B} C={classes} N={len(CONDITIONS)} (CPU-s)"
    return [
        Row(
            f"exact DP step, {size}, against plain + {B} text backwards; {exact_seconds / plain:.1f}x a plain step",
            f"{exact_seconds:.2f}",
            f"{floor:.2f}",
            f"{exact_seconds / floor:.2f}x",
            "<= 1.15x",
            exact_seconds <= 1.15 * floor,
        ),
        Row(
            f"feature-space DP step, {size}, against a plain step",
            f"{fast_seconds:.2f}",
            f"{plain:.2f}",
            f"{fast_seconds / plain:.2f}x",
            "<= 1.1x",
            fast_seconds <= 1.1 * plain,
        ),
    ]


class Root(nn.Module):
    """All trained parameters in one module whose forward is the whole model: how Opacus is told of shared
    parameters."""

    def __init__(self, model: FedMPT) -> None:
        super().__init__()
        self._model = [model]  # hidden from Opacus: a module within would be hooked for itself
        self._names = {name.replace(".", "_"): name for name in model.trainable_parameters()}
        for flat, name in self._names.items():
            self.register_parameter(flat, model.trainable_parameters()[name])

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, D) -> (B, 2C) both log-probabilities."""
        return outputs(self._model[0], {n: getattr(self, flat) for flat, n in self._names.items()}, features)


def outputs(model: FedMPT, parameters: dict[str, Tensor], features: Tensor) -> Tensor:
    """The whole model as a function of its trained parameters."""
    contexts = {
        "condition_context": parameters["contexts.condition"],
        "class_context": parameters["contexts.class"],
    }
    prefixes, suffixes = functional_call(model.prompts, contexts, ())
    text = F.normalize(model._frozen[0].encode_prompts(prefixes, suffixes), dim=-1)
    head = {n.removeprefix("head."): p for n, p in parameters.items() if not n.startswith("contexts.")}
    prediction = functional_call(model.head, head, (text, features))
    return torch.cat((prediction.log_positive, prediction.log_negative), -1)


def per_record(way: str, model: FedMPT, features: Tensor, targets: Tensor) -> Callable[[], dict[str, Tensor]]:
    """Per-record gradients of every trained parameter, by name."""
    names = list(model.trainable_parameters())
    if way == "ours":
        engine = GradientEngine(model, job_for(model.classes, "exact").loss, 1.0, feature_space=False)

        def ours() -> dict[str, Tensor]:
            engine.encode()
            engine.fill([(features, targets, torch.arange(B, device=features.device))], B)
            return {n: _grad_sample(p) for n, p in engine.private.items()}

        return ours
    if way == "opacus":
        from opacus.grad_sample import GradSampleModule

        root = Root(model)
        wrapped = GradSampleModule(root, strict=False, loss_reduction="sum", force_functorch=True)

        def opacus() -> dict[str, Tensor]:
            wrapped.zero_grad(set_to_none=True)
            positive, negative = wrapped(features).chunk(2, -1)
            asymmetric_loss(positive, negative, targets).sum().backward()
            return {n: _grad_sample(getattr(root, n.replace(".", "_"))) for n in names}

        return opacus

    def objective(parameters: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        positive, negative = outputs(model, parameters, one).chunk(2, -1)
        return asymmetric_loss(positive, negative, target)

    each = vmap(grad(objective), in_dims=(None, 0, 0))

    def everything() -> dict[str, Tensor]:
        with torch.no_grad():
            return each(dict(model.trainable_parameters()), features, targets)

    return everything


def _grad_sample(parameter: Any) -> Tensor:
    return parameter.grad_sample


def small_model() -> tuple[FedMPT, Tensor, Tensor]:
    """A small text tower with random weights, 20 classes."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_cfg": {"embed_dim": 128, "vision_cfg": SMALL_VISION, "text_cfg": SMALL}, "preprocess_cfg": {}}
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(config))
        backbone = OpenClipBackbone(folder, "random:0")
    model = FedMPT(backbone, NAMES, CONDITIONS, ModelConfig(conditions=CONDITIONS), 0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.trainable_parameters().values():  # some start where others have no gradient
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model, *records(len(NAMES), 49, 128)


def alone(way: str) -> None:
    """Time and peak memory of one way, and how far its gradients are from ours."""
    torch.set_num_threads(1)
    model, features, targets = small_model()
    call = per_record(way, model, features, targets)
    before = peak_mib()
    found = call()
    peak = peak_mib()
    wanted = per_record("ours", model, features, targets)()
    error = float(torch.stack([(found[n] - g).norm() / g.norm() for n, g in wanted.items()]).max())  # NaN stays NaN
    seconds = cpu_seconds(call, ROUNDS)
    print(json.dumps({"seconds": seconds, "mib": peak - before, "error": error}))


def against_opacus() -> list[Row]:
    """Time and memory of the three ways, side by side; all must give the same gradients."""
    found = {way: in_own_process("tests.bench.private_step", way) for way in WAYS}
    wrong = {way: f["error"] for way, f in found.items() if not f["error"] < 1e-3}
    if wrong:
        raise ValueError(f"gradients differ from ours by {wrong}: they cannot be compared")
    ours = found["ours"]
    return [
        Row(
            f"per-record gradients, small CLIP, B={B} C=20 N=5, against {name} (CPU-s; MiB)",
            f"{ours['seconds']:.2f}; +{ours['mib']:.0f}",
            f"{found[way]['seconds']:.2f}; +{found[way]['mib']:.0f}",
            f"{found[way]['seconds'] / ours['seconds']:.1f}x; {found[way]['mib'] / ours['mib']:.1f}x",
            "–",
            None,
        )
        for way, name in (("opacus", "Opacus' root module"), ("vmap", "vmap over everything"))
    ]


def run() -> list[Row]:
    """All of it."""
    backbone = OpenClipBackbone("ViT-B-16", "random:0")
    return [*against_plain(backbone, 20, 2), *against_plain(backbone, 80, 1), *against_opacus()]


if __name__ == "__main__" and sys.argv[1:] and sys.argv[1] in WAYS:
    alone(sys.argv[1])
