"""Which sites are asked in a round, where a job asks only some of them.

The draw follows from the job's seed, the round and the attempt, so that a run can be repeated and another attempt of a
failed round asks others. It is public and chosen by the server: it hides nobody, and no privacy is claimed for it.
Every site's budget is planned as if it were asked in every round, and charged for the rounds in which it was.
"""

from collections.abc import Sequence

import numpy as np


def participants(
    sites: Sequence[str], share: float, *, least: int, seed: int, round_number: int, attempt: int = 0
) -> list[str]:
    """The sites to ask.

    Args:
        sites: names of all that can be asked, in any order.
        share: part of them to ask, (0, 1]; halves are rounded up.
        least: never fewer than so many, if there are so many: `federation.min_sites`, below which a round fails.
        seed: of the job.
        round_number: from 1.
        attempt: from 0.

    Returns:
        Their names, sorted; all where `share` is 1.

    Raises:
        ValueError: the share is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"participation={share} is out of range: allowed is (0, 1]")
    names = sorted(sites)
    count = min(len(names), max(least, int(share * len(names) + 0.5)))
    chosen = np.random.default_rng([seed, round_number, attempt]).permutation(len(names))[:count]
    return sorted(names[i] for i in chosen)
