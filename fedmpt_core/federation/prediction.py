"""A finished run's model, put to use: labels of pictures, and where in the picture each was found.

The explanation of a label is the transport plan itself: per condition, the share of the label's mass that each patch
received (columns of `C * plan` sum to one), drawn over the part of the picture that the towers saw, with the gate's
weight.
"""

import io
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL.Image import Image

from fedmpt_core.common.files import WriteError, write_whole
from fedmpt_core.common.text import drawn
from fedmpt_core.data.pictures import BadPicture, FilePicture
from fedmpt_core.federation.run.record import load_model, load_record
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.backbone.load import load_backbone
from fedmpt_core.model.base import Prediction, TunedModel
from fedmpt_core.model.registry import build_model

SIDE = 448  # most pixels of a drawn picture's side
MOST_STEM = 50  # characters of a picture's name in that of its heat maps: a file's has 255 bytes


@dataclass(frozen=True)
class PictureLabels:
    """One picture's labels.

    Attributes:
        picture: the file.
        classes: C labels.
        probabilities: (C,) in [0, 1].
        gate: (N,) weights of the conditions.
        explanation: the written heat maps, or empty.
        error: why the picture has no labels, or no heat maps that were asked for; or empty.
    """

    picture: str
    classes: tuple[str, ...]
    probabilities: np.ndarray
    gate: np.ndarray
    explanation: str = ""
    error: str = ""

    def ranked(self, top: int) -> list[tuple[str, float]]:
        """The `top` labels, likeliest first."""
        order = np.argsort(-self.probabilities, kind="stable")[:top]
        return [(self.classes[i], float(self.probabilities[i])) for i in order]

    def to_dict(self, top: int) -> dict[str, Any]:
        """Plain values for JSON."""
        labels = [{"label": label, "probability": p} for label, p in self.ranked(top)]
        rest = {"gate": self.gate.tolist(), "explanation": self.explanation, "error": self.error}
        return {"picture": self.picture, "labels": labels, **rest}


class Predictor:
    """A trained model with its frozen towers.

    Example:
        What `make demo` leaves, and a picture that comes with the documents.

        >>> from pathlib import Path
        >>> from fedmpt_core.federation.prediction import Predictor
        >>> predictor = Predictor.load(Path("runs/demo"))
        >>> predictor.conditions, predictor.is_stand_in
        (('color', 'background', 'pose'), True)
        >>> answer = predictor.predict(Path("docs/images/scenes.png"))
        >>> labels = [label for label, probability in answer.ranked(top=5) if probability >= predictor.threshold]
        >>> answer.probabilities.shape, answer.gate.shape
        ((20,), (3,))
    """

    def __init__(self, backbone: Backbone, model: TunedModel, threshold: float) -> None:
        """Takes ready parts; `load` makes them from a run's folder."""
        self._backbone, self._model = backbone, model.eval()
        self.conditions, self.threshold = model.conditions, threshold
        self.backbone_name, self.is_stand_in = backbone.name, backbone.is_stand_in
        with torch.no_grad():
            self._text = model.text_features()

    @staticmethod
    def load(folder: Path, *, backbone: Backbone | None = None) -> "Predictor":
        """From what a run left.

        Args:
            folder: the run's.
            backbone: the job's frozen towers, on the CPU, where they are loaded already.

        Raises:
            ValueError: the folder is not a run's, or the towers cannot be built.
        """
        job, layout, state = load_model(folder)
        record = load_record(folder)
        backbone = backbone or load_backbone(job.backbone)
        model = build_model(backbone, job.classes, job.model, job.seed)
        if model.layout() != layout:
            raise ValueError(f"{folder}: the model's layout is not that of its own job: the folder mixes two runs")
        model.load_vector(state)
        evaluated = [r for r in record["rounds"] if "threshold" in r]
        threshold = evaluated[-1]["threshold"] if evaluated else 0.5
        return Predictor(backbone, model, threshold)

    def predict(self, path: Path) -> PictureLabels:
        """Labels of one picture. Raises BadPicture: the file is missing or cannot be decoded."""
        prediction = self._run(FilePicture(str(path)).load())
        return PictureLabels(
            str(path),
            self._model.classes,
            prediction.probabilities[0].double().numpy(),
            prediction.gate[0].double().numpy(),
        )

    def answer(self, path: Path, folder: Path | None, *, top: int) -> PictureLabels:
        """`predict`, and `explain` where a folder is given; what one picture lacks is in `error`, for others go on.

        Raises:
            ValueError: as `figure`.
        """
        try:
            labels = self.predict(path)
        except BadPicture as error:
            nothing = np.zeros(0)
            return PictureLabels(str(path), self._model.classes, nothing, nothing, error=error.reason)
        try:
            return self.explain(labels, folder, top=top) if folder else labels
        except WriteError as error:
            return replace(labels, error=f"has no heat maps: {error}")

    def explain(self, answer: PictureLabels, folder: Path, *, top: int) -> PictureLabels:
        """Write `figure` into a folder, under a name that no file there has.

        Raises:
            WriteError: the folder is full, or cannot be written to.
            ValueError: as `figure`.
        """
        drawing = io.BytesIO()
        self.figure(answer, top=top).savefig(drawing, format="png", dpi=110, metadata={"Software": None})
        stem = Path(answer.picture).stem[:MOST_STEM]
        for number in count(1):
            target = folder / f"{stem}{f'-{number}' if number > 1 else ''}.explained.png"
            with suppress(FileExistsError):
                write_whole(target, drawing.getvalue(), mode=None, replace=False)
                break
        return replace(answer, explanation=str(target))

    def figure(self, answer: PictureLabels, *, top: int) -> Figure:
        """Heat maps of the `top` labels over what the towers saw: a row per label, the picture and a column per
        condition.

        Raises:
            ValueError: the model has no transport, so there is no plan to show.
        """
        path = Path(answer.picture)
        image = FilePicture(str(path)).load()
        prediction = self._run(image)
        if prediction.plan is None:
            raise ValueError(
                "this model works without 'transport', so there is no plan to draw: only model.method = 'fedmpt' with "
                "'transport' in model.components has one"
            )
        shares = prediction.plan[0] * len(answer.classes)  # (N,P,C)
        heat = shares.mT.unflatten(-1, self._backbone.grid).numpy()  # (N,C,rows,columns)
        picture = self._backbone.seen(image)
        picture.thumbnail((SIDE, SIDE))
        frame = (0, picture.width, picture.height, 0)
        rows = answer.ranked(top)
        tall = 1.85 * min(picture.height / picture.width, 2) + 0.45  # inches, for a panel and its title
        figure = Figure(figsize=(2.2 * (len(self.conditions) + 1), tall * len(rows) + 0.6), layout="constrained")
        axes = figure.subplots(len(rows), len(self.conditions) + 1, squeeze=False)
        for axis in axes.flat:
            axis.imshow(picture, extent=frame)
            axis.set_axis_off()
        for (label, probability), (first, *others) in zip(rows, axes, strict=True):
            first.set_title(f"{drawn(label)} {probability:.2f}", fontsize=9, fontweight="bold")
            column = answer.classes.index(label)
            peak = max(float(heat[:, column].max()), 1e-12)
            for n, (condition, axis) in enumerate(zip(self.conditions, others, strict=True)):
                axis.imshow(
                    heat[n, column],
                    extent=frame,
                    interpolation="bilinear",
                    cmap="inferno",
                    alpha=0.6,
                    vmin=0,
                    vmax=peak,
                )
                own = float(prediction.condition_probabilities[0, n, column])
                axis.set_title(f"{drawn(condition)}\ngate {answer.gate[n]:.2f}, p {own:.2f}", fontsize=8)
        figure.suptitle(f"{drawn(path.name)}: where each label was found", fontsize=9)
        return figure

    def _run(self, image: Image) -> Prediction:
        with torch.no_grad():
            return self._model(self._backbone.patches(self._backbone.preprocess(image)[None]), self._text)
