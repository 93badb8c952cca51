"""Whole rounds of the protocol over its bytes: sums are exact whoever drops out and when, or nothing is revealed."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.policy import Floors
from fedmpt_core.secagg.server import RoundLost
from tests.secagg import MODEL, PHASES, Federation, member, names, plain_sum, vectors


@st.composite
def rounds(draw: st.DrawFn) -> tuple[int, int, dict[str, int], dict[str, list[str]], int]:
    """Members, words, floors, and for each phase who is lost in it."""
    count, words = draw(st.integers(3, 12)), draw(st.integers(1, 400))
    floors = {"colluders": draw(st.integers(0, 2)), "min_cohort": draw(st.integers(3, 6))}
    lost = {phase: draw(st.lists(st.sampled_from(names(count)), unique=True, max_size=3)) for phase in PHASES}
    return count, words, floors, lost, draw(st.integers(0, 2**32 - 1))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rounds())
def test_sums_are_exact_or_the_round_is_lost(case: tuple[int, int, dict[str, int], dict[str, list[str]], int]) -> None:
    count, words, floors, lost, seed = case
    summands, limits = vectors(count, words, seed), Floors(**floors)
    setup = sorted(set(names(count)) - set(lost["advertise"]))
    cohort = [n for n in setup if n not in lost["confirm"]]
    survivors = [n for n in cohort if n not in lost["masked"]]
    signers = [n for n in survivors if n not in lost["consistency"]]
    openers = [n for n in signers if n not in lost["unmask"]]
    try:
        threshold = limits.threshold(len(cohort))
    except SecAggError:
        threshold = count + 1
    enough = len(setup) >= limits.min_cohort and len(openers) >= threshold
    if not enough:
        with pytest.raises((RoundLost, SecAggError)):
            Federation(count, words, lost=lost, **floors).run(summands, lost=lost)
        return
    result = Federation(count, words, lost=lost, **floors).run(summands, lost=lost)
    assert result.survivors == tuple(survivors)
    assert np.array_equal(result.words, plain_sum(summands, survivors))
    assert result.culprits == ()


# a hundred make a hundred RSA keys and shares that grow with their cube
@pytest.mark.parametrize("count", [40, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.thorough])])
def test_many_members_with_a_third_of_them_lost(count: int) -> None:
    federation, summands = Federation(count, 1000), vectors(count, 1000)
    lost = names(count)[1::3]
    left, threshold = count - len(lost), Floors().threshold(count)
    assert left == threshold
    result = federation.run(summands, lost={"masked": lost})
    assert len(result.survivors) == left
    assert np.array_equal(result.words, plain_sum(summands, result.survivors))
    with pytest.raises(RoundLost, match=f"{left - 1} of {count} vectors arrived, the threshold is {threshold}"):
        federation.run(summands, 2, lost={"masked": [*lost, "site-000"]})


def test_rounds_follow_each_other_and_a_member_that_missed_one_comes_back() -> None:
    federation = Federation(5, 20)
    for number in range(1, 6):
        summands = vectors(5, 20, number)
        lost = {"masked": names(5)[number % 5 : number % 5 + 1]}
        result = federation.run(summands, number, lost=lost)
        assert len(result.survivors) == 4
        assert np.array_equal(result.words, plain_sum(summands, result.survivors))


def test_a_lost_attempt_is_repeated_with_the_same_vectors_and_other_masks() -> None:
    federation, summands = Federation(4, 50), vectors(4, 50)
    sent: dict[tuple[str, int], bytes] = {}
    with pytest.raises(RoundLost, match="2 of 4 vectors arrived, the threshold is 3"):
        federation.run(
            summands,
            lost={"masked": names(4)[2:]},
            change=lambda phase, name, data: sent.setdefault((name, 0), data) if phase == "masked" else data,
        )
    result = federation.run(
        summands,
        attempt=1,
        change=lambda phase, name, data: sent.setdefault((name, 1), data) if phase == "masked" else data,
    )
    assert np.array_equal(result.words, plain_sum(summands, names(4)))
    for name in names(4)[:2]:
        before, after = (np.frombuffer(sent[name, a][-200:], "<u4") for a in (0, 1))
        assert not np.array_equal(before, after)
        assert not np.array_equal(before, summands[name])


def test_a_member_that_restarts_is_back_with_the_next_key_exchange() -> None:
    federation, summands = Federation(4, 10), vectors(4, 10)
    federation.run(summands)
    again = member("site-001", federation.terms, federation.members["site-001"].latch)
    federation.members["site-001"] = again
    with pytest.raises(SecAggError, match="a round in state NEW"):
        again.begin(federation.begin(2), MODEL)
    federation.exchange_keys()
    result = federation.run(summands, 2)
    assert result.survivors == tuple(names(4))
    assert np.array_equal(result.words, plain_sum(summands, names(4)))


def test_a_member_that_restarts_remembers_what_it_signed() -> None:
    federation, summands = Federation(4, 10), vectors(4, 10)
    federation.run(summands)
    for name, one in federation.members.items():
        federation.members[name] = member(name, federation.terms, one.latch)
    federation.exchange_keys()
    with pytest.raises(SecAggError, match="has a signed list of survivors") as refused:
        federation.run(summands, 1, attempt=1)
    assert refused.value.code == Abort.LATCHED


@pytest.mark.parametrize(("cohort", "threshold"), [(3, 3), (4, 3), (5, 4), (10, 7), (30, 21), (100, 67)])
def test_thresholds_are_those_of_the_table(cohort: int, threshold: int) -> None:
    assert Floors().threshold(cohort) == threshold


@given(st.integers(3, 200), st.integers(0, 60), st.integers(3, 60))
def test_no_threshold_lets_two_sums_of_one_round_be_opened(cohort: int, colluders: int, least: int) -> None:
    try:
        threshold = Floors(least, colluders).threshold(cohort)
    except SecAggError:
        return
    assert 3 * threshold > 2 * cohort
    # two lists of survivors need threshold signatures each; only colluders sign twice
    assert 2 * threshold > cohort + colluders
    assert threshold - colluders >= 2
    assert least <= threshold <= cohort


def test_floors_only_get_stricter() -> None:
    assert Floors(3, 1).admits(Floors(4, 2))
    assert not Floors(4, 1).admits(Floors(3, 2))
    assert not Floors(3, 2).admits(Floors(5, 1))
    for floors in ((2, 1), (3, -1), (0, 0)):
        with pytest.raises(SecAggError, match="secure aggregation needs"):
            Floors(*floors)
