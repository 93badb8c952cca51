"""Whether a record's gradient depends on its place among others: then leaving one out would change the others' too, and
the clipping bound would not bound what that changes.

Sums of floating-point numbers round by how a kernel walks through memory, and a server can send parameters under which
a gradient is nothing but rounding. So records are worked on in blocks of one public size, filled up with blank ones
(`block_rows`), by kernels that were found to round alike everywhere (`fedmpt_core.__init__`, `model.fedmpt`). Another
processor, GPU or library may have others, so a site looks before it trains: `depends_on_place`. Where anything differs
by a bit, it works on one record at a time.

It must never see a record of the site.
"""

from collections.abc import Iterator
from math import ceil, sqrt

import torch
from torch import Tensor, nn

from fedmpt_core.config.job import JobConfig
from fedmpt_core.data.pictures import UNKNOWN
from fedmpt_core.model.base import TunedModel
from fedmpt_core.model.registry import build_model
from fedmpt_core.privacy.mechanism.gradients import GradientEngine
from fedmpt_core.privacy.mechanism.machinery import REAL, Machinery

STEP = 16  # rows; blocks are multiples of it
HUGE = 1e9  # multiplies what makes logits of rounding


def block_rows(expected: float, most: int) -> int:
    """Records in a block, from public numbers alone: a batch of the expected size fits, in steps of 16.

    Args:
        expected: records in a step's batch, as declared.
        most: rows that the site holds at once, at least 1.
    """
    return min(most, STEP * ceil((expected + 4 * sqrt(expected) + 1) / STEP))


def filled_up(patches: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(B, P, D) patches and (B, C) targets with blank records up to `rows`, whose gradients nobody takes."""
    blank = max(0, rows - len(patches))
    return (
        torch.cat([patches, patches.new_zeros(blank, *patches.shape[1:])]),
        torch.cat([targets, targets.new_full((blank, targets.shape[1]), float(UNKNOWN))]),
    )


def device_of(model: TunedModel) -> torch.device:
    """Where the trained parameters are."""
    return next(iter(model.trainable_parameters().values())).device


def depends_on_place(model: TunedModel, job: JobConfig, rows: int, machinery: Machinery = REAL) -> str:
    """Look for a record whose gradient is another one in another place, bit for bit.

    One record stands alone among blanks, first, in the middle and last of a full block of others, and last of a block
    that is not full; under ordinary parameters and under such as a lying server might send.

    Args:
        model: the site's model; only its towers, classes, settings and shapes are used, and it stays as it is.
        job: its loss.
        rows: of a block.
        machinery: whose gradient engine is tried.

    Returns:
        Which parameters and place, in words; "" where no bit differs.
    """
    device, backbone = device_of(model), model._frozen[0]
    patches = backbone.grid[0] * backbone.grid[1]
    copy = build_model(backbone, model.classes, model.config, job.seed).to(device)
    # the text tower comes after: each record's own way back through it is one product by itself
    engine = machinery.engine(copy, job.loss, job.training.loss_weight, feature_space=True)
    engine.encode()
    generator = torch.Generator().manual_seed(1)
    line = torch.randn(backbone.feature_dim, generator=generator)
    others = torch.randn(rows, patches, backbone.feature_dim, generator=generator)
    targets = (torch.rand(rows, len(model.classes), generator=generator) < 0.4).float().to(device)
    for state in _states(copy, line.to(device), generator):
        # under parameters that take a line out of every patch, a picture of that line alone
        inside = state.startswith("patches")
        block = (torch.randn(rows, patches, 1, generator=generator) * line if inside else others).to(device)
        alone = _gradients(engine, block[:1], targets[:1], rows)
        for place, at, count in (
            *((name, at, rows) for name, at in (("first", 0), ("in the middle", rows // 2), ("last", rows - 1))),
            ("last of a block that is not full", (rows - 1) // 2, (rows - 1) // 2 + 1),
        ):
            full, labels = block.clone(), targets.clone()
            full[at], labels[at] = block[0], targets[0]
            placed = _gradients(engine, full[:count], labels[:count], rows)
            if any(not _same(placed[name][at], rows_of[0]) for name, rows_of in alone.items()):
                return f"a record that stands {place} under {state}"
    return ""


def _states(model: TunedModel, line: Tensor, generator: torch.Generator) -> Iterator[str]:
    """Puts one set of parameters after the other into the model, and says which."""
    head: dict[str, nn.Parameter] = {
        n: p for n, p in model.trainable_parameters().items() if not n.startswith("contexts.")
    }
    for parameter in head.values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    yield "ordinary parameters"
    if "gate.up" in head:
        head["gate.up"].data *= 1e4
        yield "a gate that is saturated"
    if "adapters.up" in head and "adapters.down" in head:
        head["adapters.down"].data.zero_()
        head["adapters.up"].data.zero_()
        head["adapters.down"].data[:, :, 0] = line / line.dot(line)
        head["adapters.up"].data[:, 0, :] = -line / model.config.adapter_ratio
        yield "patches that the adapters take away"
        if "head.scale" in head:
            head["head.scale"].data.fill_(HUGE)
            yield "patches that the adapters take away and a scale of 1e9"
    else:
        for parameter in head.values():
            parameter.data *= HUGE
        yield "parameters times 1e9"


def _gradients(engine: GradientEngine, patches: Tensor, targets: Tensor, rows: int) -> dict[str, Tensor]:
    count = len(patches)
    units = torch.arange(count, device=patches.device)
    engine.fill([(*filled_up(patches, targets, rows), units)], count)
    return {name: getattr(parameter, "grad_sample").clone() for name, parameter in engine.private.items()}  # noqa: B009


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
