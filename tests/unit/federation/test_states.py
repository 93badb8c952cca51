"""Which global parameters a site takes: no further than rounds of training can have moved those that it knows."""

from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpt_core.config.federation import ResumeConfig
from fedmpt_core.config.job import FederationConfig, JobConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.federation.movement import largest_movement, shortened
from fedmpt_core.federation.server.averaging import apply
from fedmpt_core.federation.site.states import StateRefused, States
from fedmpt_core.model.vector import LayoutError, ParameterLayout
from tests.settings import REHEARSED, UNMASKED, UNPROTECTED

LAYOUT = ParameterLayout(("adapters.up", "gate.bias"), ((60,), (4,)))
START = np.linspace(-1, 1, LAYOUT.size, dtype=np.float32)
PLAIN = JobConfig(
    "s",
    ("cat", "dog"),
    training=TrainingConfig(rounds=8),
    privacy=UNPROTECTED,
    secagg=UNMASKED,
    federation=FederationConfig(max_movement=0.25),
)
MASKED = replace(PLAIN, secagg=REHEARSED)
BOUND = 0.25 * 8.0  # sqrt of 64 numbers


def states(job: JobConfig = PLAIN) -> States:
    return States(job, LAYOUT, LAYOUT.encode(START))


def moved(length: float, at: int | None = None) -> bytes:
    """The initial parameters, moved so far; all of them by the same step, or one alone."""
    step = np.full(LAYOUT.size, length / 8.0) if at is None else length * np.eye(LAYOUT.size)[at]
    return LAYOUT.encode((START + step).astype(np.float32))


@pytest.mark.parametrize("job", [PLAIN, MASKED])
@pytest.mark.parametrize("at", [None, 62])
def test_round_5_first_with_every_number_64_further_is_refused(job: JobConfig, at: int | None) -> None:
    for length in (64.0 * 8, 16.0 * 8, 16.0, 4 * BOUND * 1.001):
        with pytest.raises(StateRefused, match="moved by"):
            states(job).before(5, moved(length, at))
    states(job).before(5, moved(4 * BOUND * 0.999, at))


@pytest.mark.parametrize("job", [PLAIN, MASKED])
def test_a_saturated_gate_is_refused_in_every_round(job: JobConfig) -> None:
    gate = START.copy()
    gate[60:] += 16
    for number in range(1, 9):
        with pytest.raises(StateRefused):
            states(job).before(number, LAYOUT.encode(gate))
        with pytest.raises(StateRefused):
            states(job).after(number, LAYOUT.encode(gate))


def test_the_first_round_starts_from_the_site_s_own_parameters() -> None:
    for at in range(LAYOUT.size):
        with pytest.raises(StateRefused, match="at most 0 can be"):
            states().before(1, moved(1e-4, at))
    assert np.array_equal(states().before(1, moved(0)), START)
    assert np.array_equal(states().after(0, moved(0)), START)


@pytest.mark.parametrize("number", [-(2**70), -1, 0, 9, 2**70])
def test_a_round_that_the_job_does_not_have_has_no_parameters(number: int) -> None:
    with pytest.raises(StateRefused, match="not one of 1 to 8"):
        states().before(number, moved(0))
    if number:
        with pytest.raises(StateRefused, match="not one of 0 to 8"):
            states().after(number, moved(0))


def test_an_evaluation_and_the_round_after_it_have_the_same_parameters() -> None:
    known = states()
    known.after(1, moved(BOUND * 0.5))
    with pytest.raises(StateRefused, match="at most 0 can be"):
        known.before(2, moved(BOUND * 0.6))
    known.before(2, moved(BOUND * 0.5))
    with pytest.raises(StateRefused, match="at most 0 can be"):
        known.after(1, moved(BOUND * 0.4))


def test_rounds_only_go_up_and_a_refusal_changes_nothing() -> None:
    known = states()
    known.before(3, moved(BOUND))
    for _ in range(2):
        with pytest.raises(StateRefused):
            known.before(4, moved(2.1 * BOUND))
        with pytest.raises(StateRefused, match="round 1 came after those of round 2"):
            known.before(2, moved(0))
    known.before(4, moved(1.9 * BOUND))


def test_the_bound_holds_from_the_start_too_and_grows_with_rounds_missed() -> None:
    late = states()
    late.before(4, moved(2.9 * BOUND))
    late = states()
    late.before(2, moved(-0.9 * BOUND))
    late.before(5, moved(2.0 * BOUND))  # three rounds on from there, and four from the start


def test_a_resumed_run_starts_from_the_checkpoint_that_all_agreed_on() -> None:
    agreed = moved(2.5 * BOUND)
    resumed = replace(PLAIN, resume=ResumeConfig("run-1", 3, sha256(agreed).hexdigest()))
    with pytest.raises(StateRefused, match=r"not those that resume\.state names"):
        states(resumed).before(4, moved(2.4 * BOUND))
    with pytest.raises(StateRefused, match="not one of 4 to 8"):
        states(resumed).before(3, agreed)
    known = states(resumed)
    known.before(4, agreed)
    with pytest.raises(StateRefused):
        known.before(5, moved(3.6 * BOUND))
    known.before(5, moved(3.4 * BOUND))
    late = states(resumed)
    with pytest.raises(StateRefused):
        late.before(6, moved(5.1 * BOUND))
    late.before(6, moved(4.9 * BOUND))


@pytest.mark.parametrize("job", [PLAIN, MASKED])
def test_a_digest_in_the_job_lets_no_parameters_in_that_training_cannot_make(job: JobConfig) -> None:
    """Who writes the job and who runs the server may be one: they agree on any digest."""
    for hostile in (moved(64.0 * 8), moved(16.0, 62), moved(3.001 * BOUND)):
        resumed = replace(job, resume=ResumeConfig("run-1", 3, sha256(hostile).hexdigest()))
        with pytest.raises(StateRefused, match="moved by"):
            states(resumed).before(4, hostile)


@pytest.mark.parametrize("named", [True, False])
def test_what_a_run_with_more_noise_has_made_is_taken_by_the_one_that_continues_it(named: bool) -> None:
    """Its noise was worked out for other rounds; the bound that follows from this run's is for this run's rounds."""
    sgd = TrainingConfig(rounds=8, optimizer="sgd", learning_rate=0.01, momentum=0.0, local_steps=1)
    privacy = PrivacyConfig(noise_multiplier=0.5, sample_rate=1.0)
    calm = replace(PLAIN, training=sgd, privacy=privacy, federation=FederationConfig(max_movement=0.25, min_units=1000))
    agreed = moved(0.5 * BOUND)
    resumed = replace(calm, resume=ResumeConfig("run-1", 3, sha256(agreed).hexdigest() if named else ""))
    with pytest.raises(StateRefused):
        states(calm).before(4, agreed)
    known = states(resumed)
    known.before(4, agreed)
    with pytest.raises(StateRefused):
        known.before(5, moved(0.6 * BOUND))


def test_a_resumed_run_without_a_digest_is_bound_from_the_initial_parameters() -> None:
    resumed = replace(PLAIN, resume=ResumeConfig("run-1", 3))
    with pytest.raises(StateRefused):
        states(resumed).before(4, moved(3.1 * BOUND))
    states(resumed).before(4, moved(2.9 * BOUND))


def test_parameters_of_another_layout_or_not_finite_are_refused_and_not_noted() -> None:
    known = states()
    for block in (
        b"",
        moved(0)[:-1],
        moved(0) + bytes(4),
        bytes(32) + moved(0)[32:],
        moved(0)[:-4] + b"\x00\x00\x80\x7f",
    ):
        with pytest.raises(LayoutError):
            known.before(2, block)
    known.before(1, moved(0))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 1e4), st.booleans())
def test_an_honest_server_is_never_refused(seed: int, scale: float, masked: bool) -> None:
    """Whatever the sites send: the mean is brought back to the bound."""
    rng, job = np.random.default_rng(seed), MASKED if masked else PLAIN
    known, state, late = states(job), START, states(job)
    for number in range(1, 9):
        known.before(number, LAYOUT.encode(state))
        mean = np.clip(rng.normal(0, scale, LAYOUT.size), -16, 16)
        state = apply(state, shortened(mean, job, LAYOUT, number, state))
        known.after(number, LAYOUT.encode(state))
    late.after(8, LAYOUT.encode(state))


def test_one_layer_of_the_demo_s_gate_cannot_be_saturated_in_a_round() -> None:
    """With the default bound: the narrowest of the tensors that decide the gate, in the demo with all parts trained."""
    sizes = {"contexts": 6144, "adapters.down": 36864, "adapters.up": 36864, "gate.down": 12288, "gate.up": 96}
    layout = ParameterLayout(tuple(sizes), tuple((n,) for n in sizes.values()))
    initial = np.zeros(layout.size, np.float32)
    saturated = initial.copy()
    saturated[-96:] = 16
    known = States(JobConfig("d", ("cat", "dog"), privacy=UNPROTECTED), layout, layout.encode(initial))
    with pytest.raises(StateRefused, match=r"federation\.max_movement"):
        known.before(2, layout.encode(saturated))


def test_the_bound_of_a_job_is_what_the_server_keeps() -> None:
    assert largest_movement(PLAIN, LAYOUT, 1, 0.0) == BOUND
