"""Using a finished run: the model's own probabilities, and heat maps that are the transport plan."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedmpt_core.config.job import JobConfig, ModelConfig
from fedmpt_core.federation import prediction as module
from fedmpt_core.federation.prediction import Predictor
from fedmpt_core.federation.run.record import RunRecord, save_model
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from tests.fakes import FakeBackbone

CONDITIONS = ("color", "pose")


def run(folder: Path, **model: object) -> Path:
    job = JobConfig("p", ("cat", "dog", "bus"), model=ModelConfig(conditions=CONDITIONS, **model))  # type: ignore[arg-type]
    made = FedMPT(FakeBackbone(), job.classes, job.model.conditions, job.model, job.seed)
    record = RunRecord.start(job, "run").with_round(1, 1.0, {}, {"mAP": 1.0, "threshold": 0.3})
    (folder / "result.json").write_text(json.dumps(record.to_dict()))
    state = made.vector() + 0.01
    (folder / "model.safetensors").write_bytes(save_model(made.layout(), state.astype(np.float32)))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder


@pytest.fixture(autouse=True)
def fake_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_backbone", lambda config: FakeBackbone())


def test_probabilities_are_the_model_s(tmp_path: Path) -> None:
    predictor = Predictor.load(run(tmp_path))
    answer = predictor.predict(tmp_path / "picture.png")
    backbone = FakeBackbone()
    image = backbone.preprocess(Image.open(tmp_path / "picture.png").convert("RGB"))
    with torch.no_grad():
        expected = predictor._model(backbone.patches(image[None])).probabilities[0]
    assert np.allclose(answer.probabilities, expected.numpy(), atol=1e-6)
    ranked = answer.ranked(2)
    assert ranked[0][1] >= ranked[1][1]
    assert predictor.threshold == 0.3
    assert answer.to_dict(1)["labels"][0]["label"] == ranked[0][0]


def test_an_explanation_is_written_for_every_label_and_condition(tmp_path: Path) -> None:
    predictor = Predictor.load(run(tmp_path))
    answer = predictor.explain(predictor.predict(tmp_path / "picture.png"), tmp_path, top=2)
    with Image.open(answer.explanation) as picture:
        assert picture.width > picture.height > 300
    assert answer.explanation.endswith("picture.explained.png")


def test_without_transport_there_is_nothing_to_explain(tmp_path: Path) -> None:
    predictor = Predictor.load(run(tmp_path, components=("prompts", "adapters", "gate")))
    with pytest.raises(ValueError, match="without 'transport'"):
        predictor.explain(predictor.predict(tmp_path / "picture.png"), tmp_path, top=1)


@pytest.mark.parametrize("name", ["missing.png", "result.json"])
def test_what_is_no_picture_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Predictor.load(run(tmp_path)).predict(tmp_path / name)


def test_a_model_of_another_job_is_refused(tmp_path: Path) -> None:
    folder = run(tmp_path)
    record = json.loads((folder / "result.json").read_text())
    record["config"]["model"]["adapter_width"] = 8
    (folder / "result.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="mixes two runs"):
        Predictor.load(folder)
