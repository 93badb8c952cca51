"""Whole rounds of the protocol over its bytes: sums are exact whoever drops out and when, or nothing is revealed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmpt_core.secagg.dealing import LISTS, ROUNDS
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.policy import Floors
from fedmpt_core.secagg.server import RoundLost
from tests.secagg import MODEL, PHASES, Federation, member, names, plain_sum, vectors

Case = tuple[int, int, dict[str, Any], dict[str, list[str]], int]


@st.composite
def rounds(draw: st.DrawFn) -> Case:
    """Members, words, floors, and for each phase who is lost in it."""
    count, words = draw(st.integers(3, 9)), draw(st.integers(1, 400))
    floors = {"colluders": draw(st.integers(0, 2)), "min_cohort": draw(st.integers(3, 6))}
    lost = {phase: draw(st.lists(st.sampled_from(names(count)), unique=True, max_size=2)) for phase in PHASES}
    return count, words, floors, lost, draw(st.integers(0, 2**32 - 1))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rounds())
def test_sums_are_exact_or_the_round_is_lost(case: Case) -> None:
    count, words, floors, lost, seed = case
    summands = vectors(count, words, seed)
    left = {phase: set(names(count)) for phase in PHASES}
    gone: set[str] = set()
    for phase in PHASES:
        gone |= set(lost[phase])
        left[phase] -= gone
    try:
        threshold = Floors(**floors).threshold(len(left["advertise"]))
    except SecAggError:
        threshold = count + 1
    if len(left["open"]) < threshold:
        with pytest.raises((RoundLost, SecAggError)):
            Federation(count, words, lost=lost, **floors).run(summands, lost=lost)
        return
    result = Federation(count, words, lost=lost, **floors).run(summands, lost=lost)
    assert result.cohort == tuple(sorted(left["mask"]))
    assert np.array_equal(result.words, plain_sum(summands, result.cohort))
    assert result.culprits == {}


# a hundred make a hundred RSA keys, and check ten thousand certificates and rows
@pytest.mark.parametrize("count", [20, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.thorough])])
def test_many_members_with_a_third_of_them_lost(count: int) -> None:
    federation, summands = Federation(count, 1000), vectors(count, 1000)
    threshold = Floors().threshold(count)
    lost = names(count)[1::3][: count - threshold]
    for phase in ("train", "mask", "open"):
        number = PHASES.index(phase)
        result = federation.run(summands, number, lost={phase: lost})
        assert len(result.cohort) == (count if phase == "open" else threshold)
        assert np.array_equal(result.words, plain_sum(summands, result.cohort))
    with pytest.raises(RoundLost, match=f"{threshold - 1} of {count} sites have an update, .* is {threshold}"):
        federation.run(summands, 8, lost={"mask": [*lost, "site-000"]})


def test_rounds_follow_each_other_and_a_member_that_missed_one_comes_back() -> None:
    federation = Federation(5, 20)
    for number in range(1, 6):
        summands = vectors(5, 20, number)
        result = federation.run(summands, number, lost={"mask": names(5)[number % 5 : number % 5 + 1]})
        assert len(result.cohort) == 4
        assert np.array_equal(result.words, plain_sum(summands, result.cohort))


def test_a_vector_that_does_not_come_costs_another_list_and_other_masks() -> None:
    federation, summands = Federation(5, 50), vectors(5, 50)
    sent: dict[str, list[bytes]] = {name: [] for name in names(5)}
    result = federation.run(
        summands,
        lost={"mask": ["site-004"]},
        change=lambda phase, name, data: (sent[name].append(data), data)[1] if phase == "mask" else data,
    )
    assert np.array_equal(result.words, plain_sum(summands, names(4)))
    for name in names(4):
        before, after = (np.frombuffer(data[-200:], "<u4") for data in sent[name])
        assert not np.isin(before, [*after, *summands[name]]).any()


def test_a_lost_attempt_is_made_again_with_the_same_vectors_and_other_masks() -> None:
    federation, summands = Federation(4, 50), vectors(4, 50)
    with pytest.raises(RoundLost, match="2 of 4 sites have an update, the threshold is 3") as lost:
        federation.run(summands, lost={"mask": names(4)[2:]})
    assert not lost.value.used_up
    result = federation.run(summands, attempt=1)
    assert np.array_equal(result.words, plain_sum(summands, names(4)))


def test_a_round_that_was_to_be_opened_is_used_up_and_the_next_is_not() -> None:
    federation, summands = Federation(4, 10), vectors(4, 10)
    with pytest.raises(RoundLost, match="2 of 4 sites sent their shares, the threshold is 3") as lost:
        federation.run(summands, lost={"open": names(4)[2:]})
    assert (lost.value.used_up, lost.value.culprits) == (True, {})
    with refused(Abort.LATCHED, "round 1 is used up at this site"):
        federation.run(summands, attempt=1)
    assert np.array_equal(federation.run(summands, 2).words, plain_sum(summands, names(4)))


def test_an_epoch_serves_so_many_rounds_and_then_another_follows() -> None:
    federation, summands = Federation(3, 4), vectors(3, 4)
    for number in range(1, ROUNDS + 1):
        assert federation.server.serves(number)
        federation.run(summands, number)
    assert not federation.server.serves(ROUNDS + 1)
    with refused(Abort.CTX_MISMATCH, f"the keys are not for round {ROUNDS + 1}: exchange them anew"):
        federation.run(summands, ROUNDS + 1)
    federation.exchange_keys(number=ROUNDS + 1)
    assert federation.server.serves(ROUNDS + 1)
    assert np.array_equal(federation.run(summands, ROUNDS + 1).words, plain_sum(summands, names(3)))


def test_sessions_end_and_a_new_epoch_begins_before() -> None:
    now = time.time()
    federation = Federation(3, 4, clock=lambda: now)
    now += 19 * 3600
    assert federation.server.serves(2)
    now += 2 * 3600
    assert not federation.server.serves(2)
    now += 4 * 3600
    with refused(Abort.BAD_CERT, "session has expired: the server must start a new epoch"):
        federation.run(vectors(3, 4), 2)
    federation.exchange_keys(number=2)
    assert federation.run(vectors(3, 4), 2, attempt=1).cohort == tuple(names(3))


def test_a_round_has_so_many_lists_and_leaves_those_of_the_next_alone() -> None:
    federation, summands = Federation(3, 4), vectors(3, 4)
    request = federation.server.open_round(1, 0, MODEL)
    for name, one in federation.members.items():
        one.begin(request, MODEL)
        federation.server.take_ready(name, one.ready())
    for _ in range(LISTS):
        federation.server.mask_request()
    with pytest.raises(RoundLost, match="sites failed 4 times while they masked their updates"):
        federation.server.mask_request()
    assert np.array_equal(federation.run(summands, 2).words, plain_sum(summands, names(3)))


def test_a_member_that_restarts_is_back_with_the_next_key_exchange() -> None:
    federation, summands = Federation(4, 10), vectors(4, 10)
    federation.run(summands)
    again = member("site-001", federation.terms, federation.members["site-001"].latch)
    federation.members["site-001"] = again
    with refused(Abort.CTX_MISMATCH, "a round in state NEW"):
        again.begin(federation.server.open_round(2, 0, MODEL), MODEL)
    federation.exchange_keys()
    result = federation.run(summands, 2)
    assert result.cohort == tuple(names(4))
    assert np.array_equal(result.words, plain_sum(summands, names(4)))


@contextmanager
def refused(code: Abort, match: str) -> Iterator[None]:
    """That a member refuses for this reason."""
    with pytest.raises(SecAggError, match=match) as refusal:
        yield
    assert refusal.value.code == code


@pytest.mark.parametrize(("members", "threshold"), [(3, 3), (4, 3), (5, 4), (6, 5), (10, 7), (30, 21), (100, 67)])
def test_thresholds_are_those_of_the_table(members: int, threshold: int) -> None:
    assert Floors().threshold(members) == threshold


@given(st.integers(3, 200), st.integers(0, 60), st.integers(3, 60))
def test_no_threshold_lets_two_sums_of_one_round_be_opened(members: int, colluders: int, least: int) -> None:
    try:
        threshold = Floors(least, colluders).threshold(members)
    except SecAggError:
        return
    assert 3 * threshold > 2 * members
    # two sums need a threshold of shares each; only colluders give theirs twice
    assert 2 * threshold > members + colluders
    assert threshold - colluders >= 2
    assert least <= threshold <= members


def test_floors_only_get_stricter() -> None:
    assert Floors(3, 1).admits(Floors(4, 2))
    assert not Floors(4, 1).admits(Floors(3, 2))
    assert not Floors(3, 2).admits(Floors(5, 1))
    for floors in ((2, 1), (3, -1), (0, 0)):
        with pytest.raises(SecAggError, match="secure aggregation needs"):
            Floors(*floors)
