"""What a run leaves at the server: `result.json`, `model.safetensors`, and `events.jsonl` for whoever watches."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from fedmpt_core.layout import ParameterLayout
from fedmpt_core.result import RunRecord, save_model

RESULT = "result.json"
MODEL = "model.safetensors"
EVENTS = "events.jsonl"


class RunFolder:
    """Writes whole files atomically and events line by line."""

    def __init__(self, path: Path) -> None:
        """The folder of this job at the server."""
        self._path = path
        self._lock = threading.Lock()

    def write_record(self, record: RunRecord) -> None:
        """Replace `result.json`."""
        self._replace(RESULT, (json.dumps(record.to_dict(), indent=2) + "\n").encode())

    def write_model(self, layout: ParameterLayout, state: Any) -> None:
        """Replace `model.safetensors`; the layout is in its metadata."""
        self._replace(MODEL, save_model(layout, state))

    def event(self, kind: str, **values: Any) -> None:
        """Append one line to `events.jsonl`."""
        line = json.dumps({"event": kind, "time": time.time(), **values}) + "\n"
        with self._lock, (self._path / EVENTS).open("a", encoding="utf-8") as stream:
            stream.write(line)

    def _replace(self, name: str, data: bytes) -> None:
        partial = self._path / f".{name}.partial"
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self._path / name)
