"""Which sites are asked in a round, where a job asks only some of them.

The draw follows from the job's seed, the round and the attempt, so that a run can be repeated and another attempt of a
failed round asks others. It is public and chosen by the server: it hides nobody, and no privacy is claimed for it.
Every site's budget is planned as if it were asked in every round, and charged for the rounds in which it was.
"""

from collections.abc import Iterable

import numpy as np

from fedmpt_core.config.job import JobConfig


def participants(sites: Iterable[str], job: JobConfig, round_number: int, attempt: int = 0) -> list[str]:
    """The sites to ask.

    Args:
        sites: names of all that can be asked, in any order.
        job: asks the share `federation.participation` of them, halves rounded up, and never fewer than
            `federation.min_sites`, below which a round fails, if there are so many.
        round_number: from 1.
        attempt: from 0.

    Returns:
        Their names, sorted; all where the share is 1.
    """
    names = sorted(sites)
    count = min(len(names), max(job.federation.min_sites, int(job.federation.participation * len(names) + 0.5)))
    chosen = np.random.default_rng([job.seed, round_number, attempt]).permutation(len(names))[:count]
    return sorted(names[i] for i in chosen)
