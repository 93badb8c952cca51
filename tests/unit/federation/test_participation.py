"""Who is asked in a round: as many as were agreed, never too few, the same whenever it is worked out."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpt_core.config.job import FederationConfig, JobConfig
from fedmpt_core.federation.server.participation import participants
from tests.settings import UNMASKED

SITES = [f"site-{i}" for i in range(1, 21)]


def job(share: float, least: int = 3, seed: int = 0) -> JobConfig:
    federation = FederationConfig(participation=share, min_sites=least)
    return JobConfig("r", ("cat", "dog"), seed=seed, secagg=UNMASKED, federation=federation)


@given(st.integers(1, 30), st.floats(0.001, 1), st.integers(1, 12), st.integers(1, 99), st.integers(0, 3))
def test_the_number_asked_is_the_share_and_never_below_the_least(
    count: int, share: float, least: int, round_number: int, attempt: int
) -> None:
    sites = [f"s{i:02d}" for i in range(count)]
    asked = participants(sites, job(share, least), round_number, attempt)
    assert len(asked) == len(set(asked)) == min(count, max(least, int(share * count + 0.5)))
    assert set(asked) <= set(sites)
    assert asked == sorted(asked)


def draw(number: int, attempt: int = 0, seed: int = 0, share: float = 0.25) -> list[str]:
    return participants(SITES, job(share, seed=seed), number, attempt)


def test_the_draw_repeats_and_hangs_on_seed_round_and_attempt_not_on_order() -> None:
    assert draw(4) == draw(4)
    assert draw(4) == participants(SITES[::-1], job(0.25), 4)
    assert len({tuple(draw(n)) for n in range(1, 30)}) > 20
    assert draw(4) != draw(4, attempt=1)
    assert draw(4) != draw(4, seed=1)


def test_all_sites_are_asked_equally_often_in_the_long_run() -> None:
    asked = Counter(name for number in range(1, 801) for name in draw(number))
    assert set(asked) == set(SITES)
    assert all(200 - 5 * 12.3 < times < 200 + 5 * 12.3 for times in asked.values())  # five standard deviations


def test_everybody_takes_part_unless_the_job_says_otherwise() -> None:
    assert FederationConfig().participation == 1.0
    assert draw(1, share=1.0) == sorted(SITES)
    for share in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="participation="):
            FederationConfig(participation=share)
