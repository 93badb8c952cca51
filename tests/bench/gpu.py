"""Steps of ViT-B/16 (random weights) on a GPU against the same steps on one CPU thread; no rows without a GPU."""

import time
from collections.abc import Callable, Iterator

import torch

from fedmpt_core.config.job import ModelConfig
from fedmpt_core.model.backbone.open_clip import OpenClipBackbone
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from tests.bench.measure import Row
from tests.bench.private_step import job_for, plain_step, private_step, records
from tests.bench.step import CONDITIONS, NAMES, B

REPEATS = 20
PICTURES = 256


def seconds(step: Callable[[], object], repeats: int) -> float:
    """Wall seconds of one call, least of `repeats` after two more, the GPU's work included."""
    least = float("inf")
    for number in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if number >= min(2, repeats):
            least = min(least, time.perf_counter() - start)
    return least


def steps(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is timed, by name; one model at a time."""
    backbone = OpenClipBackbone("ViT-B-16", "random:0").to(device)
    features, targets = records(len(NAMES), 196, 512)
    features, targets = features.to(device), targets.to(device)
    for name in ("plain", "feature_space", "exact"):
        model = FedMPT(backbone, NAMES, CONDITIONS, ModelConfig(conditions=CONDITIONS), seed=0).to(device)
        job = job_for(NAMES, "feature_space" if name == "plain" else name)
        make = plain_step if name == "plain" else private_step
        yield f"{name} step, B={B}, C={len(NAMES)}, N={len(CONDITIONS)}", make(model, job, features, targets)


def run() -> list[Row]:
    """The table's rows."""
    if not torch.cuda.is_available():
        return []
    card, found = torch.cuda.get_device_name(), []
    torch.set_num_threads(1)
    for (what, on_gpu), (_, on_cpu) in zip(steps("cuda"), steps("cpu"), strict=True):
        gpu, cpu = seconds(on_gpu, REPEATS), seconds(on_cpu, 1)
        what = f"{what}, {card}; other: one CPU thread"
        found.append(Row(what, f"{1e3 * gpu:.1f} ms", f"{cpu:.2f} s", f"{cpu / gpu:.0f}x", "–", None))
    backbone = OpenClipBackbone("ViT-B-16", "random:0").to("cuda")
    pictures = torch.randn(PICTURES, 3, 224, 224, device="cuda")
    rate = PICTURES / seconds(lambda: backbone.patches(pictures), REPEATS)
    what = f"image tower, ViT-B/16, half precision, {card}"
    found.append(Row(what, f"{rate:.0f} pictures/s", "–", "–", "–", None))
    return found
