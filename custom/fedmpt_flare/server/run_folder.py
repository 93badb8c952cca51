"""What a run leaves at the server: `result.json`, `model.safetensors`, copies of the sites' ledgers below `privacy/`,
`manifest.json`, which names them all, and `events.jsonl` for whoever watches.
"""

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedmpt_core.common.files import write_whole
from fedmpt_core.federation.run.manifest import RunManifest
from fedmpt_core.federation.run.record import (
    EVENTS,
    LEDGER_COPIES,
    MANIFEST,
    MODEL,
    RESULT,
    START,
    RunRecord,
    save_model,
    sum_file,
)
from fedmpt_core.federation.server.checkpoint import Checkpoint
from fedmpt_core.federation.server.rounds import Keeper
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.privacy.ledger.site_ledger import SUFFIX


class RunFolder(Keeper):
    """Writes whole files atomically and events line by line."""

    def __init__(self, path: Path, checkpoints: Path) -> None:
        """The folder of this job at the server, and the one of all jobs' checkpoints."""
        self._path, self._checkpoints = path, checkpoints
        self._lock = threading.Lock()

    def write_record(self, record: RunRecord) -> None:
        """Replace `result.json`."""
        self._replace(RESULT, (json.dumps(asdict(record), indent=2) + "\n").encode())

    def write_model(self, layout: ParameterLayout, state: Any) -> None:
        """Replace `model.safetensors`; the layout is in its metadata."""
        self._replace(MODEL, save_model(layout, state))

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the run's checkpoint."""
        checkpoint.save(self._checkpoints)

    def write_sum(self, round_number: int, total: Any) -> None:
        """Keep the sum of a round of shared noise, little-endian uint32."""
        path = self._path / sum_file(round_number)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, total.astype("<u4").tobytes(), mode=None)

    def write_start(self, layout: ParameterLayout, state: Any, memory: Mapping[str, Any]) -> None:
        """Keep what the run begins from."""
        self._replace(START, save_model(layout, state, beside=memory))

    def write_ledger(self, site: str, ledger: bytes, certificate: bytes) -> dict[str, str]:
        """Keep a site's ledger; returns the files for the manifest."""
        (self._path / LEDGER_COPIES).mkdir(exist_ok=True)
        files = {"file": f"{LEDGER_COPIES}/{site}{SUFFIX}"}
        self._replace(files["file"], ledger)
        if certificate:
            files["certificate"] = f"{LEDGER_COPIES}/{site}.crt"
            self._replace(files["certificate"], certificate)
        return files

    def write_manifest(self, record: RunRecord, ledgers: Mapping[str, Mapping[str, str]], kit: Path | None) -> None:
        """Replace `manifest.json`, signed with the server's kit. Raises SigningError."""
        manifest = RunManifest.of(record, self._path, ledgers=ledgers, kit=kit)
        self._replace(MANIFEST, manifest.to_json().encode())

    def event(self, kind: str, **values: Any) -> None:
        """Append one line to `events.jsonl`."""
        line = json.dumps({"event": kind, "time": time.time(), **values}) + "\n"
        with self._lock, (self._path / EVENTS).open("a", encoding="utf-8") as stream:
            stream.write(line)

    def _replace(self, name: str, data: bytes) -> None:
        write_whole(self._path / name, data, mode=None)
