"""TensorBoard reads back what the record holds."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fedmpt_core.federation.run.tracking import write_tensorboard

RECORD = {
    "rounds": [
        {"round": 0, "seconds": 1.0, "bytes_sent": {}, "mAP": 20.0, "gate": [0.5, 0.5]},
        {"round": 1, "seconds": 2.0, "bytes_sent": {"a": 10, "b": 12}, "mAP": 30.0, "gate": [0.2, 0.8]},
        {"round": 2, "seconds": 1.0, "bytes_sent": {"a": 1}, "privacy": {"a": {"epsilon": 2.5, "delta": 1e-5}}},
    ]
}


def test_scalars_come_back(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard and its protobuf use deprecated calls
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        write_tensorboard(RECORD, tmp_path)
        events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("global/mAP")] == [(0, 20.0), (1, 30.0)]
    assert [e.value for e in events.Scalars("round/bytes_sent")] == [0.0, 22.0, 1.0]
    assert [(e.step, e.value) for e in events.Scalars("epsilon/a")] == [(2, 2.5)]
    assert events.Scalars("gate/1")[1].value == pytest.approx(0.8)


def test_it_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from fedmpt_core.federation.run.tracking import write_tensorboard;"
        f"write_tensorboard({{'rounds': []}}, {str(tmp_path)!r}); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_without_tensorboard_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    with pytest.raises(ValueError, match=r"pip install 'fedmpt\[tracking\]'"):
        write_tensorboard(RECORD, tmp_path)
