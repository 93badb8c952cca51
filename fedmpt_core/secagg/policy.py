"""What all members agreed on before the first round, and the floors that no message can lower.

The threshold follows from the number of members whose keys all have confirmed and two numbers of the job; a server
never chooses it.
"""

from dataclasses import dataclass

from fedmpt_core.secagg.errors import Abort, SecAggError

LEAST_COHORT = 3  # with two, each learns the other's vector from the sum


@dataclass(frozen=True)
class Floors:
    """Least protection of a member.

    Attributes:
        min_cohort: fewest members in a sum, 3..65535.
        colluders: members assumed to work with the server, 0..65535.
    """

    min_cohort: int = LEAST_COHORT
    colluders: int = 1

    def __post_init__(self) -> None:
        """Raises SecAggError(POLICY) below the least that protects anybody."""
        if not LEAST_COHORT <= self.min_cohort <= 65535 or not 0 <= self.colluders <= 65535:
            raise SecAggError(
                Abort.POLICY,
                f"min_cohort={self.min_cohort}, colluders={self.colluders}: secure aggregation needs min_cohort of at "
                f"least {LEAST_COHORT} and colluders of at least 0",
            )

    def threshold(self, members: int) -> int:
        """Members that must be in a sum, and that must open it.

        The least t with t > 2n/3, 2t > n + c (two different sums of one round would need more honest members than
        there are), t - c >= 2 (an honest member hides among at least one other) and t >= min_cohort.

        Args:
            members: n, those in the confirmed directory.

        Raises:
            SecAggError: POLICY, they are too few for these floors.
        """
        least = max(2 * members // 3, (members + self.colluders) // 2) + 1
        least = max(least, self.colluders + 2, self.min_cohort)
        if least > members:
            raise SecAggError(
                Abort.POLICY,
                f"{members} members cannot protect each other: min_cohort={self.min_cohort} and "
                f"colluders={self.colluders} need {least} to answer",
            )
        return least

    def admits(self, other: "Floors") -> bool:
        """Whether `other` is at least as strict as this."""
        return other.min_cohort >= self.min_cohort and other.colluders >= self.colluders


@dataclass(frozen=True)
class Terms:
    """One run's numbers; every member works them out for itself.

    Attributes:
        job_id: name of the run.
        digest: SHA-256 over everything agreed (`context.job_digest`).
        words: length of a vector, 1..2^31.
        floors: the job's; every member has compared them with its own.
        max_sites: bound on members and on every count in a message, 3..65535.
        first_round: the first round of training, from 1.
        rounds: the last.
        attempts: largest attempt number of a round, from 0.
    """

    job_id: str
    digest: bytes
    words: int
    floors: Floors
    max_sites: int
    first_round: int
    rounds: int
    attempts: int
