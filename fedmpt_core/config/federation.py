"""What a job says of how the sites work together, and of the run that it continues."""

from typing import Annotated, Literal

from pydantic import Field

from fedmpt_core.config.checks import Name, Once, checked, pattern


@checked
class FederationConfig:
    """How the sites work together."""

    min_sites: Annotated[int, Field(ge=1, le=1000)] = 3
    """A round with fewer updates fails; below it the job ends. At least 3 with secure aggregation, whose threshold is
    often higher: two thirds of the sites that start a round, and one."""
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the sites that is asked in each round, drawn by the server from the seed, never fewer than `min_sites`;
    1 with secure aggregation. It amplifies no privacy: a site is charged for each round in which it is asked, and its
    budget must suffice for all rounds."""
    weighting: Literal["equal", "records"] = "equal"
    """`equal`, or `records`: by the number of units that each site declares in its policy (`privacy.units`), never by
    its true number of records."""
    max_movement: Annotated[float, Field(gt=0, le=1e6)] = 0.5
    """Most that a round may move the global parameters, as the root mean square over all of them. The server shortens a
    mean that would move them further, and a site refuses parameters that did. Where the optimizer, or clipping and
    noise, allow less, that holds. Ordinary jobs stay below 0.2."""
    min_units: Annotated[int, Field(ge=1, le=1_000_000_000)] = 1
    """Fewest units that a site may declare. The noise of differential privacy moves the parameters of a small site far;
    the larger this number, the closer the bound on how far."""
    join_timeout: Annotated[int, Field(ge=1, le=604_800)] = 3600
    """Seconds for a site to start, check its data and compute missing patch features."""
    round_timeout: Annotated[int, Field(ge=1, le=604_800)] = 3600
    """Seconds for a site's answer to one task."""
    max_failed_rounds: Annotated[int, Field(ge=0, le=1000)] = 2
    """Failed attempts in the whole job before it is given up."""
    evaluate_every: Annotated[int, Field(ge=0, le=100_000)] = 1
    """Rounds between two evaluations of the global model; the last is always evaluated. 0 asks for none: figures of
    test pictures are exact, no privacy mechanism covers them."""
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    """GPUs that each site's job process asks FLARE for; 0 runs on what the site's device setting says."""
    tracking: Once[tuple[Literal["tensorboard", "mlflow"], ...]] = ()
    """Where the server also writes each round's figures: `tensorboard` (into the job's folder), `mlflow` (to the
    tracking server that MLFLOW_TRACKING_URI names in the FLARE server's environment)."""


RunName = Annotated[
    Name,
    Field(description="Its name, which becomes part of a path: FLARE's job id, or `run_id` of a simulation's result."),
]
LastRound = Annotated[
    int, Field(ge=1, le=100_000, description="Its last complete round, of which the server keeps a checkpoint.")
]


@checked
class EarlierRun:
    """A run that broke off and was continued."""

    job: RunName
    round: LastRound


@checked
class ResumeConfig(EarlierRun):
    """The broken-off run that this job continues."""

    state: Annotated[str, pattern("^([0-9a-f]{64})?$", "give a SHA-256 in hex, or nothing")] = ""
    """SHA-256 of that checkpoint's parameters, so that sites take no others; the server says it. Empty: sites take what
    so many rounds can have made of the initial ones."""
    before: tuple[EarlierRun, ...] = ()
    """What that run continued in its turn, newest first. All of them count towards the job's epsilon."""

    def __post_init__(self) -> None:
        """Raises ValueError when a run is named twice, or has more rounds than the one that continued it."""
        names, rounds = [run.job for run in self.runs], [run.round for run in self.runs]
        if len(set(names)) < len(names) or rounds != sorted(rounds, reverse=True):
            raise ValueError(
                f"before={list(zip(names[1:], rounds[1:], strict=True))}: names each run once, newest first, and none "
                "with more rounds than the run that continued it"
            )

    @property
    def runs(self) -> tuple[EarlierRun, ...]:
        """This run and those before it, newest first."""
        return (EarlierRun(self.job, self.round), *self.before)
