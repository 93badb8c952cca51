"""What a run leaves can be read again, and nothing damaged or foreign is taken for a run."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from fedmpt_core.config.job import JobConfig
from fedmpt_core.federation.run.curves import draw_curves
from fedmpt_core.federation.run.record import RunRecord, load_model, load_record, mean_figures, save_model
from fedmpt_core.model.vector import ParameterLayout

JOB = JobConfig("r", ("cat", "dog"))
LAYOUT = ParameterLayout(("gate.up", "head.bias"), ((2, 2), (3,)))
STATE = np.arange(7, dtype=np.float32)


def run(folder: Path) -> Path:
    record = RunRecord.start(JOB, "run").with_round(
        0, 1.0, {}, {"mAP": 20.0, "CF1": 10.0, "OF1": 15.0, "gate": [0.5, 0.5]}
    )
    record = record.with_round(1, 2.0, {"a": 60}, {"mAP": 30.0, "CF1": 20.0, "OF1": 25.0, "gate": [0.2, 0.8]})
    (folder / "result.json").write_text(json.dumps(asdict(record.ended_as("completed"))))
    (folder / "model.safetensors").write_bytes(save_model(LAYOUT, STATE))
    return folder


def test_job_layout_and_parameters_come_back(tmp_path: Path) -> None:
    job, layout, state = load_model(run(tmp_path))
    assert (job, layout) == (JOB, LAYOUT)
    assert np.array_equal(state, STATE)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "before its first round"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"), "is not a model of this program"),
        (lambda f: (f / "result.json").unlink(), "give the folder that a run wrote"),
        (lambda f: (f / "result.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "result.json").write_text("[]"), "schema=None"),
        (lambda f: (f / "result.json").write_text('{"schema": 9}'), "schema=9: this release reads schema 1"),
        (lambda f: (f / "result.json").write_text('{"schema": 1, "config": {"name": "x", "y": 1}}'), "unknown key 'y'"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, says: str) -> None:
    damage(run(tmp_path))  # type: ignore[operator]
    with pytest.raises(ValueError, match=says):
        load_model(tmp_path)


def test_a_cut_model_file_is_refused(tmp_path: Path) -> None:
    path = run(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not a model"):
        load_model(tmp_path)


def test_figures_are_averaged_over_sites_class_by_class() -> None:
    one = {"mAP": 40.0, "AP": [50.0, -1.0, -1.0], "gate": [0.5, 0.5], "zero_shot": {"mAP": 10.0}}
    two = {"mAP": 60.0, "AP": [70.0, 20.0, -1.0], "gate": [0.1, 0.9], "zero_shot": {"mAP": 30.0}}
    assert mean_figures([one, two]) == {
        "mAP": 50.0,
        "AP": [60.0, 20.0, -1.0],
        "gate": [0.3, 0.7],
        "zero_shot": {"mAP": 20.0},
    }
    assert mean_figures([]) == {}


def test_the_curves_are_a_picture_of_some_size(tmp_path: Path) -> None:
    draw_curves(load_record(run(tmp_path)), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    record = load_record(tmp_path)
    with pytest.raises(ValueError, match="no evaluated round"):
        draw_curves({**record, "rounds": []}, tmp_path / "empty.png")
