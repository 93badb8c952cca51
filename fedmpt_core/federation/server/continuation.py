"""The job that goes on where a run broke off: from its last complete round, with its noise, and with what it spent."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

from fedmpt_core.config.job import JobConfig
from fedmpt_core.federation.run.record import RESULT, RunRecord, load_model, load_record
from fedmpt_core.federation.server.checkpoint import CHECKPOINT, Checkpoint, CheckpointError, load_checkpoint
from fedmpt_core.privacy.accounting.epsilon import epsilon
from fedmpt_core.privacy.ledger.budget import history, planned_steps
from fedmpt_core.privacy.ledger.chain import Entry
from fedmpt_core.privacy.mechanism.mechanism import Mechanism


def load_broken(folder: Path) -> Checkpoint:
    """What a run left, as its checkpoint has it.

    Args:
        folder: what `nvflare job download` wrote, its `workspace`, or the run's folder among the server's checkpoints.

    Raises:
        CheckpointError: the run completed no round, or nothing of it can be read.
    """
    if (folder / CHECKPOINT).exists():
        return load_checkpoint(folder.parent, folder.absolute().name)
    try:
        values = load_record(run_of(folder))
        record = RunRecord(**{**values, "rounds": tuple(values["rounds"])})
        if not any(row["round"] for row in record.rounds):
            raise CheckpointError(
                f"run '{record.run_id}' ended before its first round was complete, so there is nothing to go on from: "
                "submit the job again as it was"
            )
        job, layout, state = load_model(run_of(folder))
        spent = {site: budget for row in record.rounds for site, budget in row["privacy"].items()}
        return Checkpoint(record.run_id, job, record.rounds[-1]["round"], layout, state, record, spent)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: is not the folder of a run, or of its checkpoint: {error}") from None


def run_of(folder: Path) -> Path:
    """The folder with a run's record: the downloaded one, or the workspace in it."""
    return folder if (folder / RESULT).exists() else folder / "workspace"


def continuation(job: JobConfig, kept: Checkpoint, ledgers: Iterable[Sequence[Entry]] = ()) -> JobConfig:
    """`job`, going on from a run that broke off.

    Its noise is the run's, since the epsilon of both is worked out with one. Its epsilon is raised where what was
    charged, together with what is left to do, passes it.

    Args:
        job: what the run trained; timeouts and attempts may be others.
        kept: after the run's last complete round.
        ledgers: of its sites, as far as they are known. Without any, all that the run can have tried is counted.

    Raises:
        CheckpointError: the run has ended as it should, or trained something else.
    """
    if kept.record.outcome == "completed" or kept.round >= kept.job.training.rounds:
        raise CheckpointError(f"run '{kept.run_id}' has completed its job: nothing is left to do")
    noise = job.privacy.noise_multiplier or kept.job.privacy.noise_multiplier
    goes_on = replace(job, resume=kept.resuming(), privacy=replace(job.privacy, noise_multiplier=noise))
    kept.check(goes_on)
    if not job.privacy.private:
        return goes_on
    charged = _charged(kept, ledgers)
    steps = Mechanism.of(goes_on).steps(charged + planned_steps(goes_on, charged))
    least = ceil(1000 * epsilon([steps], job.privacy.delta)) / 1000
    return replace(goes_on, privacy=replace(goes_on.privacy, epsilon=max(job.privacy.epsilon, least)))


def _charged(kept: Checkpoint, ledgers: Iterable[Sequence[Entry]]) -> int:
    """Steps that one site was charged for, by the run and those before it; at most."""
    runs = (kept.run_id, *kept.job.continued)
    known = [sum(steps.count for steps in history(entries, *runs)) for entries in ledgers]
    tried = kept.round + len(runs) * (kept.job.federation.max_failed_rounds + 1)
    return max(known, default=tried * kept.job.steps_per_round)
