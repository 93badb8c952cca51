"""One training step on ViT-B/16 (random weights): cached patches and shared prefixes against recomputing everything.

The other side is the data flow in which every step runs the image tower twice (once for the summary token, once with a
learned visual token inserted, gradients flowing through it) and encodes all N*C prompts at the full 77 tokens.
"""

import json
import sys
from collections.abc import Callable

import open_clip
import torch
from torch import Tensor, nn

from fedmpt_core.config.job import ModelConfig
from fedmpt_core.model.backbone.open_clip import OpenClipBackbone
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from fedmpt_core.training.loss import asymmetric_loss
from tests.bench.measure import Row, cpu_seconds, in_own_process, peak_mib

B, C, N = 32, 20, 5
CONDITIONS = ("color", "background", "scene type", "spatial layout", "pose")
CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow dining_table dog horse motorbike person potted_plant "
    "sheep sofa train tv_monitor"
)
NAMES = tuple(c.replace("_", " ") for c in CLASSES.split())


def loss_of(prediction: object, labels: Tensor) -> Tensor:
    """The training loss."""
    return asymmetric_loss(prediction.log_positive, prediction.log_negative, labels).mean()


def our_step() -> tuple[Callable[[], None], FedMPT]:
    """Forward and backward from cached patch features."""
    backbone = OpenClipBackbone("ViT-B-16", "random:0")
    model = FedMPT(backbone, NAMES, CONDITIONS, ModelConfig(conditions=CONDITIONS), seed=0)
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(B, 196, 512, generator=generator)
    labels = (torch.rand(B, C, generator=generator) < 0.1).float()

    def step() -> None:
        loss_of(model(patches), labels).backward()

    return step, model


class RecomputingFlow(nn.Module):
    """The other side: same head, but both towers run in full at every step."""

    def __init__(self, head: FedMPT) -> None:
        super().__init__()
        clip = open_clip.create_model("ViT-B-16", pretrained=None)
        self.clip = clip.eval().requires_grad_(False)
        self.condition = nn.Parameter(torch.randn(N, 4, 512) * 0.02)
        self.shared = nn.Parameter(torch.randn(4, 512) * 0.02)
        self.visual = nn.Linear(512, 768)
        self.ours = head
        tokenizer = open_clip.get_tokenizer("ViT-B-16")
        words = [f"{'x ' * 4}{cond} {'x ' * 4}{cls}." for cond in CONDITIONS for cls in NAMES]
        self.tokens = tokenizer(words)  # (N*C,77)
        self.starts = [len(tokenizer.encode(cond)) for cond in CONDITIONS]
        with torch.no_grad():
            self.embedded = clip.token_embedding(self.tokens)

    def prompts(self) -> Tensor:
        """(N*C,77,E) with the learned vectors in place of the placeholders."""
        rows = []
        for n in range(N):
            block = self.embedded[n * C : (n + 1) * C]
            after = 5 + self.starts[n]
            parts = (
                block[:, :1],
                self.condition[n].expand(C, 4, 512),
                block[:, 5:after],
                self.shared.expand(C, 4, 512),
            )
            rows.append(torch.cat((*parts, block[:, after + 4 :]), 1))
        return torch.cat(rows)

    def text(self) -> Tensor:
        """(N,C,D) through all 77 positions."""
        x = self.prompts() + self.clip.positional_embedding
        x = self.clip.transformer(x, attn_mask=self.clip.attn_mask)
        x = self.clip.ln_final(x)
        x = x[torch.arange(len(x)), self.tokens.argmax(-1)] @ self.clip.text_projection
        return nn.functional.normalize(x, dim=-1).reshape(N, C, -1)

    def image(self, images: Tensor) -> Tensor:
        """(B,196,D): a pass for the summary token, then a pass with the visual token."""
        with torch.no_grad():
            summary = self.clip.encode_image(images)
        tower = self.clip.visual
        x = tower._embeds(images)
        x = torch.cat((x[:, :1], self.visual(summary)[:, None], x[:, 1:]), 1)
        x = tower.ln_post(tower.transformer(x)) @ tower.proj
        return x[:, 2:]

    def forward(self, images: Tensor) -> object:
        return self.ours(self.image(images), self.text())


def run() -> list[Row]:
    """Time both sides in this process, and the peak memory of ours in a process of its own."""
    step, model = our_step()
    step()
    mine = cpu_seconds(step, 3)
    flow = RecomputingFlow(model)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(B, 3, 224, 224, generator=generator)
    labels = (torch.rand(B, C, generator=generator) < 0.1).float()
    theirs = cpu_seconds(lambda: loss_of(flow(images), labels).backward(), 1)
    ratio = theirs / mine
    alone = in_own_process("tests.bench.step", "alone")
    growth = alone["peak_mib"] - alone["before_mib"]
    return [
        Row(
            f"training step ViT-B/16, B={B} C={C} N={N}, against two image passes and 77 tokens (CPU-s)",
            f"{mine:.2f}",
            f"{theirs:.1f}",
            f"{ratio:.1f}x",
            ">= 25x",
            ratio >= 25,
        ),
        Row(
            "peak memory of that step with cached features (MiB; of which towers, torch and features before it)",
            f"{alone['peak_mib']:.0f} ({alone['before_mib']:.0f})",
            "–",
            f"+{growth:.0f}",
            "<= 3072",
            alone["peak_mib"] <= 3072,
        ),
    ]


def alone() -> None:
    """One step and nothing else, for its peak memory."""
    step, _ = our_step()
    before = peak_mib()
    step()
    print(json.dumps({"before_mib": before, "peak_mib": peak_mib()}))


if __name__ == "__main__" and sys.argv[1:] == ["alone"]:
    alone()
