"""What a job says of how the sites work together, and of the run that it continues."""

from dataclasses import dataclass
from typing import Literal

from fedmpt_core.config.checks import STRICT, check_range, check_unique


@dataclass(frozen=True)
class FederationConfig:
    """How the sites work together.

    Attributes:
        min_sites: a round with fewer updates fails; below it the job ends, 1..1000. At least 3 with secure aggregation,
            whose threshold is often higher: two thirds of the sites that start a round, and one.
        participation: share of the sites that is asked in each round, drawn by the server from the seed, never fewer
            than `min_sites`, (0, 1]; 1 with secure aggregation. It amplifies no privacy: a site is charged for each
            round in which it is asked, and its budget must suffice for all rounds.
        weighting: `equal`, or `records`: by the number of units that each site declares in its policy, or, without
            differential privacy, by its true number of records.
        join_timeout: seconds for a site to start, check its data and compute missing patch features, 1..604800.
        round_timeout: seconds for a site's answer to one task, 1..604800.
        max_failed_rounds: failed attempts in the whole job before it is given up, 0..1000.
        evaluate_every: rounds between two evaluations of the global model; the last is always evaluated, 1..100000.
            0 asks for none: figures of test pictures are exact, no privacy mechanism covers them.
        gpus: GPUs that each site's job process asks FLARE for; 0 runs on what the site's device setting says, 0..64.
        tracking: where the server also writes each round's figures: `tensorboard` (into the job's folder), `mlflow`
            (to the tracking server that MLFLOW_TRACKING_URI names in the FLARE server's environment).
    """

    min_sites: int = 3
    participation: float = 1.0
    weighting: Literal["equal", "records"] = "equal"
    join_timeout: int = 3600
    round_timeout: int = 3600
    max_failed_rounds: int = 2
    evaluate_every: int = 1
    gpus: int = 0
    tracking: tuple[Literal["tensorboard", "mlflow"], ...] = ()

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is out of range."""
        check_range(self, "min_sites", 1, 1000)
        check_range(self, "participation", 0, 1, open_low=True)
        check_unique(self, "tracking")
        for name in ("join_timeout", "round_timeout"):
            check_range(self, name, 1, 604_800)
        check_range(self, "max_failed_rounds", 0, 1000)
        check_range(self, "evaluate_every", 0, 100_000)
        check_range(self, "gpus", 0, 64)


@dataclass(frozen=True)
class ResumeConfig:
    """The broken-off run that this job continues.

    Attributes:
        job: its name: FLARE's job id, or `run_id` of a simulation's result.
        round: its last complete round, of which the server keeps a checkpoint, 1..100000.
    """

    job: str
    round: int

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError when a field is impossible; the name becomes part of a path."""
        if not 1 <= len(self.job) <= 64 or not all(c.isascii() and (c.isalnum() or c in "_-") for c in self.job):
            raise ValueError(f"job={self.job!r}: use the job id of the run to continue")
        check_range(self, "round", 1, 100_000)
