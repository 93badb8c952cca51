"""A finished run's model, put to use: labels of pictures, and where in the picture each was found.

The explanation of a label is the transport plan itself: per condition, the share of the label's mass that each patch
received (columns of `C * plan` sum to one), drawn over the picture as the towers saw it, with the gate's weight.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fedmpt_core.data.pictures import FilePicture
from fedmpt_core.federation.run.record import load_model, load_record
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.backbone.load import load_backbone
from fedmpt_core.model.base import TunedModel
from fedmpt_core.model.registry import build_model


@dataclass(frozen=True)
class PictureLabels:
    """One picture's labels.

    Attributes:
        picture: the file.
        classes: C labels.
        probabilities: (C,) in [0, 1].
        gate: (N,) weights of the conditions.
        explanation: the written heat maps, or empty.
    """

    picture: str
    classes: tuple[str, ...]
    probabilities: np.ndarray
    gate: np.ndarray
    explanation: str = ""

    def ranked(self, top: int) -> list[tuple[str, float]]:
        """The `top` labels, likeliest first."""
        order = np.argsort(-self.probabilities, kind="stable")[:top]
        return [(self.classes[i], float(self.probabilities[i])) for i in order]

    def to_dict(self, top: int) -> dict[str, Any]:
        """Plain values for JSON."""
        labels = [{"label": label, "probability": p} for label, p in self.ranked(top)]
        return {
            "picture": self.picture,
            "labels": labels,
            "gate": self.gate.tolist(),
            "explanation": self.explanation,
        }


class Predictor:
    """A trained model with its frozen towers."""

    def __init__(self, backbone: Backbone, model: TunedModel, conditions: tuple[str, ...], threshold: float) -> None:
        """Takes ready parts; `load` makes them from a run's folder."""
        self._backbone, self._model = backbone, model.eval()
        self.conditions, self.threshold = conditions, threshold
        self.backbone_name, self.is_stand_in = backbone.name, backbone.is_stand_in
        with torch.no_grad():
            self._text = model.text_features()

    @staticmethod
    def load(folder: Path) -> "Predictor":
        """From what a run left.

        Raises:
            ValueError: the folder is not a run's, or the towers cannot be built.
        """
        job, layout, state = load_model(folder)
        record = load_record(folder)
        backbone = load_backbone(job.backbone)
        model = build_model(backbone, job.classes, job.model, job.seed)
        if model.layout() != layout:
            raise ValueError(f"{folder}: the model's layout is not that of its own job: the folder mixes two runs")
        model.load_vector(state)
        evaluated = [r for r in record["rounds"] if "threshold" in r]
        threshold = evaluated[-1]["threshold"] if evaluated else 0.5
        conditions = model.conditions
        return Predictor(backbone, model, conditions, threshold)

    def predict(self, path: Path) -> PictureLabels:
        """Labels of one picture.

        Raises:
            ValueError: the file is missing or cannot be decoded.
        """
        prediction = self._run(path)
        return PictureLabels(
            str(path),
            self._model.classes,
            prediction.probabilities[0].double().numpy(),
            prediction.gate[0].double().numpy(),
        )

    def explain(self, answer: PictureLabels, folder: Path, *, top: int) -> PictureLabels:
        """Write heat maps of the `top` labels, one row per label and one column per condition.

        Raises:
            ValueError: the model has no transport, so there is no plan to show.
        """
        path = Path(answer.picture)
        prediction = self._run(path)
        if prediction.plan is None:
            raise ValueError(
                "this model works without 'transport', so there is no plan to draw: only model.method = 'fedmpt' with "
                "'transport' in model.components has one"
            )
        weights = prediction.plan[0] * len(answer.classes)  # (N,P,C)
        picture = self._seen(path)
        rows = answer.ranked(top)
        figure = Figure(figsize=(2.2 * (len(self.conditions) + 1), 2.3 * len(rows) + 0.6), layout="constrained")
        axes = figure.subplots(len(rows), len(self.conditions) + 1, squeeze=False)
        for row, (label, probability) in enumerate(rows):
            axes[row][0].imshow(picture)
            axes[row][0].set_title(f"{label} {probability:.2f}", fontsize=9, fontweight="bold")
            column = answer.classes.index(label)
            peak = float(weights[:, :, column].max())
            for n, condition in enumerate(self.conditions):
                heat = _enlarge(weights[n, :, column].reshape(self._backbone.grid), picture.shape[0])
                axes[row][n + 1].imshow(picture)
                axes[row][n + 1].imshow(heat, cmap="inferno", alpha=0.6, vmin=0, vmax=max(peak, 1e-12))
                own = float(prediction.condition_probabilities[0, n, column])
                axes[row][n + 1].set_title(f"{condition}\ngate {answer.gate[n]:.2f}, p {own:.2f}", fontsize=8)
        for axis in axes.flat:
            axis.set_axis_off()
        figure.suptitle(f"{path.name}: where each label was found", fontsize=9)
        target = folder / f"{path.stem}.explained.png"
        figure.savefig(target, dpi=110, metadata={"Software": None})
        return replace(answer, explanation=str(target))

    def _run(self, path: Path) -> Any:
        image = self._backbone.preprocess(FilePicture(str(path)).load())
        with torch.no_grad():
            return self._model(self._backbone.patches(image[None]), self._text)

    def _seen(self, path: Path) -> np.ndarray:
        """(S,S,3) uint8: the part of the picture that the towers were given."""
        image = FilePicture(str(path)).load()
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return np.asarray(image.crop((left, top, left + side, top + side)).resize((224, 224)))


def _enlarge(heat: Tensor, side: int) -> np.ndarray:
    big = torch.nn.functional.interpolate(heat[None, None].float(), size=(side, side), mode="bilinear")
    return big[0, 0].numpy()
