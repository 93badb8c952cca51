"""How much signal each gradient engine leaves of the contexts' gradient at equal epsilon: `python -m
tests.bench.engines`.

Both engines clip at the median norm of what they release and get the same noise multiplier, so epsilon is equal.
Shown is the norm of the clipped sum that reaches the contexts over the norm of the noise that reaches them, for noise
multiplier 1 and the batch given. Noise of `feature_space` passes the text tower's Jacobian, whose Frobenius norm is
estimated by Hutchinson's method. The stand-in sees scenes; CLIP's towers have random weights and random patches, so
their figures show the trend with the number of classes and no more.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedmpt_core.config.job import LossConfig, ModelConfig
from fedmpt_core.config.toml import load_job, load_sites
from fedmpt_core.data.source import load_split
from fedmpt_core.federation.site.session import open_cache
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.backbone.load import load_backbone
from fedmpt_core.model.backbone.open_clip import OpenClipBackbone
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from fedmpt_core.privacy.mechanism.gradients import TEXT, GradientEngine
from tests.bench.step import CONDITIONS, NAMES

DEMO = Path(__file__).parents[2] / "jobs" / "demo"
CACHE = str(Path.home() / ".cache" / "fedmpt" / "features")


def ratio(model: FedMPT, patches: Tensor, targets: Tensor, probes: int) -> tuple[float, float]:
    """Signal to noise of the contexts' gradient with the exact engine and with the feature-space engine."""
    rows = {}
    for fast in (False, True):
        engine = GradientEngine(model, LossConfig(), 1.0, feature_space=fast)
        engine.encode()
        engine.fill([(patches, targets, torch.arange(len(patches)))], len(patches))
        rows[fast] = {n: p.grad_sample for n, p in engine.private.items()}
    exact = torch.cat([g.flatten(1) for g in rows[False].values()], 1)
    bound, total = clipped(exact)
    text = rows[True][TEXT]
    text_bound, text_total = clipped(text.flatten(1))
    features = model.text_features()
    contexts = list(model.trainable_parameters().values())

    def pulled(vector: Tensor) -> Tensor:
        found = torch.autograd.grad(features, contexts, vector.reshape(features.shape), retain_graph=True)
        return torch.cat([g.flatten() for g in found])

    frobenius = np.sqrt(np.mean([float(pulled(torch.randn_like(text[0])).square().sum()) for _ in range(probes)]))
    return (
        float(total.norm()) / (bound * exact.shape[1] ** 0.5),
        float(pulled(text_total).norm()) / (text_bound * float(frobenius)),
    )


def clipped(rows: Tensor) -> tuple[float, Tensor]:
    """The median norm of (B, d) gradients, and their sum when each is clipped to it."""
    norms = rows.norm(dim=1, keepdim=True)
    bound = float(norms.median())
    return bound, (rows * (bound / norms).clamp(max=1)).sum(0)


def stand_in() -> tuple[FedMPT, Tensor, Tensor]:
    """The demo's model and 32 of its scenes."""
    job = load_job(DEMO / "job.toml")
    site = load_sites(DEMO / "site.toml")["site-1"]
    backbone = load_backbone(job.backbone)
    scenes = load_split(job, site.data, "train")
    assert scenes
    chosen = scenes.take(np.arange(32))
    features = open_cache(dataclasses.replace(site, cache_dir=CACHE)).features(chosen.pictures, backbone)
    config = dataclasses.replace(job.model, trained="contexts")
    model = FedMPT(backbone, job.classes, config.conditions, config, 0)
    return model, features.batch(np.arange(32)), torch.from_numpy(chosen.targets).float()


def clip_tower(backbone: Backbone, classes: int, batch: int) -> tuple[FedMPT, Tensor, Tensor]:
    """ViT-B/16's text tower with random weights, and random patches."""
    names = [f"{word} {i}" if i else word for i in range(classes // len(NAMES)) for word in NAMES]
    config = ModelConfig(conditions=CONDITIONS, trained="contexts")
    model = FedMPT(backbone, names, CONDITIONS, config, 0)
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(batch, 196, 512, generator=generator)
    return model, patches, (torch.rand(batch, classes, generator=generator) < 3 / classes).float()


def main() -> None:
    """Print a Markdown table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = OpenClipBackbone("ViT-B-16", "random:0")
    cases = {
        "stand-in, scenes, N=3, C=20, B=32": (stand_in(), 24),
        "ViT-B/16 random weights, N=5, C=20, B=16": (clip_tower(backbone, 20, 16), 16),
        "ViT-B/16 random weights, N=5, C=80, B=8": (clip_tower(backbone, 80, 8), 8),
    }
    print("| | exact | feature_space | ratio |\n|---|---|---|---|")
    for name, ((model, patches, targets), probes) in cases.items():
        exact, fast = ratio(model, patches, targets, probes)
        print(f"| {name} | {exact:.3f} | {fast:.3f} | {fast / exact:.2f} |", flush=True)


if __name__ == "__main__":
    main()
