"""What a run leaves: its record (`result.json`) and its model (`model.safetensors`). numpy only, no torch.

The record stores what happened; figures are those the sites reported. Round 0 is the model before any training. What
else lies in a run's folder is named here too, whoever writes it.
"""

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.toml import job_from_dict
from fedmpt_core.model.vector import LayoutError, ParameterLayout

RESULT, MODEL, MANIFEST, EVENTS = "result.json", "model.safetensors", "manifest.json", "events.jsonl"
ABORTED = "the job was aborted"  # in the outcome of a run that people ended
LEDGER_COPIES = "privacy"  # folder of what the sites gave of their ledgers
SUMS, START = "sums", "start.safetensors"  # of a run of shared noise: each round's sum, and what it goes on from
LOG, TIMING, CURVES, REPORT = "fedmpt.log", "timing.json", "curves.png", "report.html"
LEDGERS, CHECKPOINTS = "ledgers", "checkpoints"  # folders of a simulation, which is its own sites and server
EXPLANATIONS = "explanations"  # folder of heat maps
_LEFT = (
    *(RESULT, MODEL, MANIFEST, LEDGER_COPIES, SUMS, START, TIMING, CURVES, REPORT, LEDGERS, CHECKPOINTS, EXPLANATIONS),
)
BESIDE = "beside/"  # begins the names of arrays in a model's file that are no parameters
RESULT_SCHEMA = 1


@dataclass(frozen=True)
class RunRecord:
    """One run, as `result.json` holds it.

    Attributes:
        config: the job in plain values; `config_digest` is its SHA-256.
        outcome: `running`, `completed`, or `failed: reason`.
        started: UTC, ISO 8601; `ended` likewise, empty while running.
        backbone: name of the frozen towers; `is_stand_in` whether they only stand in for CLIP.
        sites: by site, what it said when it joined (device, versions, whether it evaluates).
        rounds: one dict per round from 0: `round`, `seconds`, `bytes_sent` by site, `sites`, `privacy` by site
            (epsilon of the job so far at `delta`, and the `head` of the site's ledger; empty without differential
            privacy), `secagg` (cohort, members of the directory, threshold, attempt, transcript, who was left out and
            why, and seconds by phase; empty without masks), and, where it was evaluated, the figures of
            `evaluation.evaluate` averaged over the evaluating sites; at round 0 also `zero_shot`, the
            same figures of the plain prompt on the untouched towers.
        server: hardware and platform of the server.
        run_id: name of the run, as ledgers and checkpoints have it.
        aggregation: `masked`: the server has seen sums only; or `unmasked`: it has seen every site's updates.
        identities: `start-up kits`, or `insecure`: made up for a simulation.
        absent: by site, why one that was invited takes no part.
        lost: by round, in text, why it has no sum and never will: its number is used up.
        resumed: the run that this one continues and its last round; None when it began anew.
        schema: version of this record.
    """

    config: dict[str, Any]
    config_digest: str
    outcome: str
    started: str
    ended: str = ""
    backbone: str = ""
    is_stand_in: bool = False
    sites: dict[str, dict[str, Any]] | None = None
    rounds: tuple[dict[str, Any], ...] = ()
    server: dict[str, Any] | None = None
    run_id: str = ""
    aggregation: str = ""
    identities: str = ""
    absent: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    resumed: dict[str, Any] | None = None
    schema: int = RESULT_SCHEMA

    @staticmethod
    def start(job: JobConfig, run_id: str) -> "RunRecord":
        """The record of a run that has just begun."""
        server = {"machine": platform.machine(), "system": platform.platform(), "cpus": os.cpu_count()}
        return RunRecord(
            job.to_dict(),
            job.digest(),
            "running",
            _now(),
            server=server,
            run_id=run_id,
            aggregation="masked" if job.secagg.masked else "unmasked",
            identities="insecure" if job.secagg.insecure_identities else "start-up kits",
            resumed=asdict(job.resume) if job.resume else None,
        )

    def joined(self, fields: Mapping[str, Mapping[str, Any]], absent: Mapping[str, str] | None = None) -> "RunRecord":
        """With what the sites said of themselves, who agree on backbone and layout, and with why others are absent."""
        one = next(iter(fields.values()))
        keep = ("device", "versions", "evaluates", "backbone_digest", "weight")
        sites = {s: {k: f[k] for k in keep} for s, f in fields.items()}
        return replace(
            self, backbone=one["backbone"], is_stand_in=one["is_stand_in"], sites=sites, absent=dict(absent or {})
        )

    def with_round(
        self,
        number: int,
        seconds: float,
        sent: Mapping[str, int],
        figures: Mapping[str, Any],
        privacy: Mapping[str, Mapping[str, Any]] | None = None,
        secagg: Mapping[str, Any] | None = None,
    ) -> "RunRecord":
        """With one more round."""
        row = {
            "round": number,
            "seconds": round(seconds, 3),
            "sites": sorted(sent),
            "bytes_sent": dict(sent),
            "privacy": {site: dict(budget) for site, budget in (privacy or {}).items()},
            "secagg": dict(secagg or {}),
            **figures,
        }
        return replace(self, rounds=(*self.rounds, row))

    def without_round(self, number: int, reason: str) -> "RunRecord":
        """With a round that was lost for good."""
        return replace(self, lost=self.lost | {str(number): reason})

    def ended_as(self, outcome: str) -> "RunRecord":
        """With its end."""
        return replace(self, outcome=outcome, ended=_now())


def sum_file(round_number: int) -> str:
    """Where a run of shared noise keeps a round's sum, below its folder."""
    return f"{SUMS}/{round_number:05}.u32"


def mean_figures(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Equal-weight mean over the sites that give it of each figure; lists element by element, of the length that most
    give, and sites that could not score a class (-1) are left out of that class.
    """
    mean: dict[str, Any] = {}
    for key in dict.fromkeys(key for report in reports for key in report):
        values = [r[key] for r in reports if key in r]
        first = values[0]
        if isinstance(first, Mapping):
            mean[key] = mean_figures(values)
        elif isinstance(first, list):
            length = Counter(map(len, values)).most_common(1)[0][0]
            table = np.asarray([value for value in values if len(value) == length], dtype=np.float64)
            known = np.where(table < 0, np.nan, table)
            mean[key] = [float(np.nanmean(c)) if not np.isnan(c).all() else -1.0 for c in known.T]
        else:
            mean[key] = float(np.mean(values))
    return mean


def left_by_a_run(folder: Path) -> list[str]:
    """What in a folder is of a run, finished or broken off; beside a new model it would be taken for that one's."""
    return [name for name in _LEFT if os.path.lexists(folder / name)]


def save_model(
    layout: ParameterLayout,
    state: np.ndarray,
    metadata: Mapping[str, str] | None = None,
    beside: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    """The trained parameters as a safetensors file, the layout in its metadata, and what else is given.

    Args:
        layout: of the trained tensors.
        state: (d,) float32.
        metadata: further text by name.
        beside: further arrays by name.
    """
    tensors = {name: np.ascontiguousarray(t) for name, t in layout.split(state).items()}
    tensors |= {BESIDE + name: values for name, values in (beside or {}).items()}
    return save(tensors, metadata={**(metadata or {}), "layout": layout.to_json()})


def load_state(path: Path) -> tuple[dict[str, str], ParameterLayout, np.ndarray, dict[str, np.ndarray]]:
    """Metadata, layout, parameters and what is beside them of what `save_model` made.

    Raises:
        OSError: it cannot be read; or SafetensorError, or LayoutError.
    """
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
    layout, tensors = ParameterLayout.from_json(metadata.get("layout", "")), load_file(path)
    beside = {name.removeprefix(BESIDE): tensors.pop(name) for name in list(tensors) if name.startswith(BESIDE)}
    return metadata, layout, layout.flatten(tensors), beside


def load_model(folder: Path) -> tuple[JobConfig, ParameterLayout, np.ndarray]:
    """The job and the trained parameters of a finished or broken-off run.

    Args:
        folder: what `fedmpt simulate --out` wrote, or a downloaded job's workspace.

    Raises:
        ValueError: a file is missing, damaged or of a later schema.
    """
    job = job_from_dict(load_record(folder)["config"], str(folder / RESULT))
    path = folder / MODEL
    try:
        _, layout, state, _ = load_state(path)
        return job, layout, state
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file: the run ended before its first round was complete") from None
    except (SafetensorError, LayoutError) as error:
        raise ValueError(f"{path}: is not a model of this program: {error}") from None


def load_record(folder: Path) -> dict[str, Any]:
    """The plain values of `result.json`. Raises ValueError when missing, damaged or of a later schema."""
    path = folder / RESULT
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file: give the folder that a run wrote with --out") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(record, dict) or record.get("schema") != RESULT_SCHEMA:
        schema = record.get("schema") if isinstance(record, dict) else None
        raise ValueError(f"{path}: schema={schema}: this release reads schema {RESULT_SCHEMA}")
    return record


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
