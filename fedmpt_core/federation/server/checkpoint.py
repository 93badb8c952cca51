"""What the server keeps of a run after every round, outside the run's folder, so that another run can continue it.

One safetensors file per run, replaced as a whole: the global parameters, beside them what the server's optimizer
remembers, and in its metadata the round, the job, the record so far and the newest ledger head of every site. Sites
keep their own ledgers; keys of secure aggregation are made anew.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from fedmpt_core.common.files import write_whole
from fedmpt_core.config.job import JobConfig, ResumeConfig
from fedmpt_core.config.toml import ConfigError, job_from_dict
from fedmpt_core.federation.run.record import RunRecord, load_state, save_model
from fedmpt_core.model.vector import LayoutError, ParameterLayout

CHECKPOINT = "checkpoint.safetensors"
SAME = ("classes", "seed", "backbone", "model", "loss", "training", "privacy", "server")  # what decides a model


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another job; the sentence says which and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """One run after one round.

    Attributes:
        run_id: name of the run.
        job: what it trains.
        round: last complete round, from 1.
        layout: of the trained tensors.
        state: (d,) float32 global parameters after that round.
        record: the run's record so far.
        privacy: by site, what it last said of its budget, with the head of its ledger.
        memory: what the server's optimizer remembers, by name.
    """

    run_id: str
    job: JobConfig
    round: int
    layout: ParameterLayout
    state: np.ndarray
    record: RunRecord
    privacy: dict[str, dict[str, Any]]
    memory: dict[str, np.ndarray] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Replace `<folder>/<run_id>/checkpoint.safetensors`; on disk when this returns."""
        path = folder / self.run_id / CHECKPOINT
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = {"run_id": self.run_id, "round": self.round, "job": self.job.to_dict()}
        facts |= {"record": asdict(self.record), "privacy": self.privacy}
        write_whole(path, save_model(self.layout, self.state, {"checkpoint": json.dumps(facts)}, self.memory))

    def resuming(self) -> ResumeConfig:
        """What a job says to continue this run."""
        return ResumeConfig(self.run_id, self.round, self.digest(), self.job.earlier_runs)

    def digest(self) -> str:
        """SHA-256 hex of the parameters in wire bytes."""
        return sha256(self.layout.encode(self.state)).hexdigest()

    def check(self, job: JobConfig) -> None:
        """Raises CheckpointError unless `job` may continue this run from this round."""
        if job.resume is None or job.resume.round != self.round:
            raise CheckpointError(
                f"the checkpoint of run '{self.run_id}' is of round {self.round}: set resume.round = {self.round}"
            )
        if job.resume.state not in ("", self.digest()):
            raise CheckpointError(
                f"the checkpoint of run '{self.run_id}' holds other parameters: set resume.state = '{self.digest()}'"
            )
        if job.resume.before != self.job.earlier_runs:
            before = " and ".join(f"'{name}'" for name in self.job.continued) or "none"
            raise CheckpointError(
                f"run '{self.run_id}' continued {before} itself, and resume.before says otherwise: write the job with "
                "`fedmpt resume-job`"
            )
        mine, theirs = (asdict(replace(j, privacy=replace(j.privacy, epsilon=1.0))) for j in (self.job, job))
        if mine["privacy"]["noise_multiplier"] != theirs["privacy"]["noise_multiplier"]:
            raise CheckpointError(
                f"privacy.noise_multiplier={job.privacy.noise_multiplier}: run '{self.run_id}' trained with "
                f"{self.job.privacy.noise_multiplier}, and goes on with no other: write the job with "
                "`fedmpt resume-job`"
            )
        differ = [name for name in SAME if mine[name] != theirs[name]]
        if differ:
            raise CheckpointError(
                f"run '{self.run_id}' was of another job: {', '.join(differ)} differ, so its parameters do not fit"
            )


def checkpoint_for(job: JobConfig, folder: Path) -> Checkpoint | None:
    """The checkpoint that a job goes on from; None when it begins anew.

    Raises:
        CheckpointError: it is missing, damaged or of another job, or another run goes on from it.
    """
    if job.resume is None:
        return None
    kept = load_checkpoint(folder, job.resume.job)
    for path in folder.glob(f"*/{CHECKPOINT}"):
        with suppress(CheckpointError):
            later = load_checkpoint(folder, path.parent.name)
            if later.job.continued[:1] == (kept.run_id,):
                break
    else:
        kept.check(job)
        return kept
    raise CheckpointError(
        f"run '{later.run_id}' went on from run '{kept.run_id}', and what it spent counts too: continue that one"
    )


def load_checkpoint(folder: Path, run_id: str) -> Checkpoint:
    """The checkpoint of a run.

    Args:
        folder: the server's checkpoint folder.
        run_id: name of the run.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / run_id / CHECKPOINT
    try:
        metadata, layout, state, memory = load_state(path)
        facts = json.loads(metadata["checkpoint"])
        record = {**facts["record"], "rounds": tuple(facts["record"]["rounds"])}
        return Checkpoint(
            facts["run_id"],
            job_from_dict(facts["job"], str(path)),
            facts["round"],
            layout,
            state,
            RunRecord(**record),
            facts["privacy"],
            memory,
        )
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no checkpoint of run '{run_id}': it ended before its first round was complete, or ran on "
            "another server"
        ) from None
    except (SafetensorError, LayoutError, ConfigError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint of run '{run_id}' is damaged, or of another release ({type(error).__name__})"
        ) from None


def newest_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint that was written last below a folder. Raises CheckpointError when there is none."""
    paths = sorted(folder.glob(f"*/{CHECKPOINT}"), key=lambda p: p.stat().st_mtime)
    if not paths:
        raise CheckpointError(f"{folder}: holds no checkpoint: the run ended before its first round was complete")
    return load_checkpoint(folder, paths[-1].parent.name)
