"""Labels and heat maps of pictures with awkward names, in awkward folders, some of them broken."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmpt_core.common.text import drawn
from fedmpt_core.config.job import JobConfig, ModelConfig
from fedmpt_core.federation.prediction import PictureLabels, Predictor
from fedmpt_core.federation.run.curves import draw_curves
from fedmpt_core.federation.run.record import RunRecord, save_model
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.backbone.load import load_backbone
from fedmpt_core.model.registry import build_model
from tests.command_line import Fedmpt
from tests.fakes import FakeBackbone

CLASSES, CONDITIONS = ("dose$_$", "$x^2", "dog"), ("50$ or 60$", "_hidden")
AWKWARD = ("dose$_$", "$x^2", "50$ or 60$", r"a\$b", "_hidden", "two\nlines", r"\frac{1}{2}$\frac$")


def finished(folder: Path, backbone: Backbone | None = None) -> Path:
    """A run that has not moved from where it began."""
    job = JobConfig("p", CLASSES, model=ModelConfig(conditions=CONDITIONS))
    model = build_model(backbone or load_backbone(job.backbone), job.classes, job.model, job.seed)
    (folder / "result.json").write_text(json.dumps(asdict(RunRecord.start(job, "run"))))
    (folder / "model.safetensors").write_bytes(save_model(model.layout(), model.vector()))
    return folder


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor.load(finished(tmp_path_factory.mktemp("run"), FakeBackbone()), backbone=FakeBackbone())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the embedded towers."""
    return finished(tmp_path_factory.mktemp("run"))


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), (value, 10, 90)).save(path)
    return path


def width(path: Path) -> int:
    with Image.open(path) as image:
        return image.width


def explained(predictor: Predictor, folder: Path, *pictures: Path) -> Sequence[PictureLabels]:
    folder.mkdir(exist_ok=True)
    return [predictor.answer(path, folder, top=1) for path in pictures]


def test_every_picture_has_heat_maps_of_its_own(predictor: Predictor, tmp_path: Path) -> None:
    names = ("x/0001.png", "y/0001.png", "x/0001.jpg", "x/0001-2.png", "x/0001.png")
    pictures = [picture(tmp_path / name, 40 * k) for k, name in enumerate(names)]
    maps = [Path(answer.explanation) for answer in explained(predictor, tmp_path / "out", *pictures)]
    assert len(set(maps)) == 5 and maps[0].name == "0001.explained.png"
    assert len({path.read_bytes() for path in maps}) == 4  # the first picture was asked for twice


def test_heat_maps_of_before_stay(predictor: Predictor, tmp_path: Path) -> None:
    (first,) = explained(predictor, tmp_path / "out", picture(tmp_path / "a.png"))
    before = Path(first.explanation).read_bytes()
    later = explained(predictor, tmp_path / "out", picture(tmp_path / "a.png", 200), tmp_path / "a.png")
    assert Path(first.explanation).read_bytes() == before
    assert {p.name for p in (tmp_path / "out").iterdir()} == {Path(a.explanation).name for a in (first, *later)}
    assert len({a.explanation for a in (first, *later)}) == 3


@pytest.mark.parametrize(
    "name", ["é" * 120, "x" * 250, "dose$_$", "$", "50$ or 60$", r"\$", "_", "[bold]", "a\nb", "b\udce9"]
)
def test_any_name_of_a_picture_can_be_drawn(predictor: Predictor, tmp_path: Path, name: str) -> None:
    path = picture(tmp_path / "a.png").rename(tmp_path / f"{name}.png")
    (answer,) = explained(predictor, tmp_path / "out", path)
    assert width(Path(answer.explanation)) > 100


def test_labels_and_conditions_are_drawn_as_they_are_written(predictor: Predictor, tmp_path: Path) -> None:
    figure = predictor.figure(predictor.predict(picture(tmp_path / "a.png")), top=3)
    titles = " ".join(axis.get_title() for axis in figure.axes)
    assert all(drawn(word) in titles for word in (*CLASSES, *CONDITIONS))
    assert drawn("a$b$") == r"a\$b\$" and drawn("_x") == " _x" and "\n" not in drawn("a\nb")


def test_curves_show_every_name(tmp_path: Path) -> None:
    job = JobConfig("p", CLASSES, model=ModelConfig(conditions=AWKWARD))
    figures = {"mAP": 1.0, "CF1": 1.0, "OF1": 1.0, "gate": [0.1] * len(AWKWARD)}
    record = {"config": job.to_dict(), "rounds": [{"round": k, **figures} for k in (0, 1)]}
    draw_curves(record | {"backbone": "ViT $B$_$16", "is_stand_in": False}, tmp_path / "curves.png")
    assert width(tmp_path / "curves.png") > 500


@pytest.mark.parametrize("place", ["file/below", "/proc/nowhere", "file"])
def test_a_folder_that_cannot_be_written_to_is_a_sentence_before_any_work(
    fedmpt: Fedmpt, run: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    asked = fedmpt("predict", run, picture(tmp_path / "a.png"), "--explain", "--out", tmp_path / place)
    assert (asked.returncode, asked.stdout) == (2, "")
    assert "cannot be written" in asked.stderr and "name another place" in asked.stderr


BROKEN = {
    "missing.png": None,
    "empty.png": b"",
    "text.jpg": b"no picture",
    "cut.png": b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR",
}


def test_one_broken_picture_stops_no_other(fedmpt: Fedmpt, run: Path, tmp_path: Path) -> None:
    good = [picture(tmp_path / "a.png"), picture(tmp_path / "z.png")]
    for name, content in BROKEN.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    bad = [tmp_path / name for name in BROKEN]
    order = [good[0], *bad, good[1]]
    asked = fedmpt("predict", run, *order, "--explain", "--out", tmp_path / "out", "--json")
    rows = json.loads(asked.stdout)
    assert asked.returncode == 1
    assert f"4 of 6 pictures: the first is {bad[0]}, which does not exist" in " ".join(asked.stderr.split())
    assert [row["picture"] for row in rows] == [str(path) for path in order]
    for row in rows:
        fine = Path(row["picture"]) in good
        assert fine == bool(row["labels"]) == (not row["error"])
        assert bool(row["explanation"]) == fine
    reasons = {Path(row["picture"]).name: row["error"] for row in rows}
    assert "truncated or damaged" in reasons["cut.png"] and "is not a picture" in reasons["text.jpg"]
    shown = fedmpt("predict", run, *bad)
    assert (shown.returncode, shown.stdout.count("no labels: it ")) == (1, 4)


def test_what_one_picture_lacks_is_said_and_its_labels_stay(predictor: Predictor, tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "file").touch()
    deep = predictor.answer(tmp_path / "deep.png", None, top=1)
    assert "more than 8 bits per channel" in deep.error and not deep.ranked(1)
    full = predictor.answer(picture(tmp_path / "a.png"), tmp_path / "file", top=1)
    assert "has no heat maps" in full.error and "cannot be written" in full.error and len(full.ranked(1)) == 1
