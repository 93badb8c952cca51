"""Using a finished run: the model's own probabilities, and heat maps that are the transport plan."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import ExifTags, Image
from torch import Tensor

from fedmpt_core.config.job import JobConfig, ModelConfig
from fedmpt_core.federation.prediction import Predictor
from fedmpt_core.federation.run.record import RunRecord, save_model
from fedmpt_core.model.backbone.base import Backbone, centre_square
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from tests.fakes import FakeBackbone

CLASSES = ("cat", "dog", "bus")
CONDITIONS = ("color", "pose")


def run(folder: Path, *, backbone: Backbone | None = None, moved: float = 0.01, **model: Any) -> Path:
    job = JobConfig("p", CLASSES, model=ModelConfig(conditions=CONDITIONS, **model))
    made = FedMPT(backbone or FakeBackbone(), job.classes, job.model.conditions, job.model, job.seed)
    record = RunRecord.start(job, "run").with_round(1, 1.0, {}, {"mAP": 1.0, "threshold": 0.3})
    (folder / "result.json").write_text(json.dumps(asdict(record)))
    state = made.vector() + moved
    (folder / "model.safetensors").write_bytes(save_model(made.layout(), state.astype(np.float32)))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder


def load(folder: Path) -> Predictor:
    return Predictor.load(folder, backbone=FakeBackbone())


def test_probabilities_are_the_model_s(tmp_path: Path) -> None:
    predictor = load(run(tmp_path))
    answer = predictor.predict(tmp_path / "picture.png")
    backbone = FakeBackbone()
    model = FedMPT(backbone, CLASSES, CONDITIONS, ModelConfig(conditions=CONDITIONS), 0)
    model.load_vector(model.vector() + 0.01)
    image = backbone.preprocess(Image.open(tmp_path / "picture.png").convert("RGB"))
    with torch.no_grad():
        expected = model(backbone.patches(image[None])).probabilities[0]
    assert np.allclose(answer.probabilities, expected.numpy(), atol=1e-6)
    ranked = answer.ranked(2)
    assert ranked[0][1] >= ranked[1][1]
    assert predictor.threshold == 0.3
    assert answer.to_dict(1)["labels"][0]["label"] == ranked[0][0]


# Where a label is found: in each cell of a picture is the colour of one label under one condition, or of none.

GRID = 6
PLACES = {0: (2, 0), 1: (3, 4), 2: (2, 5), 3: (3, 1), 4: (2, 3), 5: (3, 2)}  # colour -> (row, column)
COLOURS = np.array(
    [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200), (200, 30, 200), (128, 128, 128)]
)


class ColourBackbone(FakeBackbone):
    """Finds label c under condition n wherever colour 3 n + c is, the later ones the more surely."""

    def patches(self, images: Tensor) -> Tensor:
        cells = torch.nn.functional.adaptive_avg_pool2d(images, GRID).flatten(2).mT  # (B,P,3)
        colour = (cells[:, :, None] * 255 - torch.from_numpy(COLOURS)).square().sum(-1).argmin(-1)
        sure = torch.linspace(0.9, 1, len(COLOURS))[colour] * (colour < len(PLACES))
        features = torch.zeros(*colour.shape, self.feature_dim).scatter(-1, colour[..., None], sure[..., None])
        features[..., -1] = (1 - sure.square()).sqrt()
        return features

    def encode_prompts(self, prefixes: Sequence[Tensor], suffixes: Sequence[Tensor]) -> Tensor:
        return torch.eye(self.feature_dim)[: len(prefixes) * len(suffixes)].unflatten(0, (len(prefixes), len(suffixes)))


class CroppedBackbone(ColourBackbone):
    """The same behind a centre crop."""

    def preprocess(self, image: Image.Image) -> Tensor:
        return super().preprocess(self.seen(image))

    def seen(self, image: Image.Image) -> Image.Image:
        return centre_square(image, min(image.size))


class PaddedBackbone(CroppedBackbone):
    """The same behind white bars above and below."""

    def seen(self, image: Image.Image) -> Image.Image:
        return centre_square(image, max(image.size), 255)


def _cells() -> np.ndarray:
    cells = np.full((GRID, GRID), len(PLACES))
    for colour, place in PLACES.items():
        cells[place] = colour
    return COLOURS[cells].astype(np.uint8)


BOARD = Image.fromarray(_cells()).resize((180, 180), Image.Resampling.NEAREST)
WAYS = {  # how a tower sees a picture of 180 by 60 -> the one whose cells, where there is picture, are the board's
    ColourBackbone: BOARD.resize((180, 60), Image.Resampling.NEAREST),
    CroppedBackbone: centre_square(BOARD.resize((60, 60), Image.Resampling.NEAREST), 180).crop((0, 60, 180, 120)),
    PaddedBackbone: BOARD.crop((0, 60, 180, 120)),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_explanation_shows_each_label_where_it_is(way: type[ColourBackbone], tmp_path: Path) -> None:
    backbone = way(grid=(GRID, GRID))
    job = run(tmp_path, backbone=backbone, moved=0, scale=4.0, bias=-3.0)
    predictor = Predictor.load(job, backbone=backbone)
    path, exif = tmp_path / "planted.png", Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned to the right before it is shown
    WAYS[way].transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    answer = predictor.explain(predictor.predict(path), tmp_path, top=3)
    assert answer.explanation.endswith("planted.explained.png")
    figure = predictor.figure(answer, top=3)
    FigureCanvasAgg(figure).draw()  # lays the panels out
    written = np.asarray(Image.open(answer.explanation).convert("RGB"), float)
    panels = np.array(figure.axes).reshape(3, 1 + len(CONDITIONS))
    model = FedMPT(backbone, CLASSES, CONDITIONS, ModelConfig(conditions=CONDITIONS, scale=4.0, bias=-3.0), 0)
    with torch.no_grad():
        expected = model(backbone.patches(backbone.preprocess(WAYS[way])[None]))
    for (label, probability), (plain, *maps) in zip(answer.ranked(3), panels, strict=True):
        assert plain.get_title() == f"{label} {probability:.2f}"
        for n, axis in enumerate(maps):
            c = CLASSES.index(label)
            own = float(expected.condition_probabilities[0, n, c])
            assert axis.get_title() == f"{CONDITIONS[n]}\ngate {answer.gate[n]:.2f}, p {own:.2f}"
            brightest = np.unravel_index(_heat(written, plain, axis).argmax(), (GRID, GRID))
            assert brightest == PLACES[3 * n + c]
            width, height = plain.get_window_extent().size
            assert width / height == pytest.approx(np.divide(*backbone.seen(WAYS[way]).size), rel=0.02)


def _heat(written: np.ndarray, plain: Axes, drawn: Axes) -> np.ndarray:
    """(GRID,GRID) brightness of the map over each cell, from the pixels of the written file."""

    def cells(axis: Axes) -> np.ndarray:
        box = axis.get_window_extent().transformed(axis.get_figure().transFigure.inverted())  # type: ignore[union-attr]
        middles = (np.arange(GRID) + 0.5) / GRID
        rows = np.rint((1 - box.y1 + box.height * middles) * written.shape[0]).astype(int)
        columns = np.rint((box.x0 + box.width * middles) * written.shape[1]).astype(int)
        return written[np.ix_(rows, columns)]

    over, under = cells(drawn), cells(plain)
    shades = matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255
    heat = (over - 0.4 * under) / 0.6  # the map is drawn with an opacity of 0.6
    return np.square(heat[:, :, None] - shades).sum(-1).argmin(-1)


def test_without_transport_there_is_nothing_to_explain(tmp_path: Path) -> None:
    predictor = load(run(tmp_path, components=("prompts", "adapters", "gate")))
    with pytest.raises(ValueError, match="without 'transport'"):
        predictor.explain(predictor.predict(tmp_path / "picture.png"), tmp_path, top=1)


@pytest.mark.parametrize("name", ["missing.png", "result.json"])
def test_what_is_no_picture_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        load(run(tmp_path)).predict(tmp_path / name)


def test_a_model_of_another_job_is_refused(tmp_path: Path) -> None:
    folder = run(tmp_path)
    record = json.loads((folder / "result.json").read_text())
    record["config"]["model"]["adapter_width"] = 8
    (folder / "result.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="mixes two runs"):
        load(folder)
