"""Updates as integers: sums are exact within range, never run over, and means keep their bound."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpt_core.secagg.encoding import METRIC_RANGE, Encoding
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.headroom import headroom

EXACT = Encoding(4, rounding="deterministic")


def total(vectors: list[np.ndarray]) -> np.ndarray:
    """What the server adds, modulo 2^32."""
    return np.sum(np.array(vectors, dtype=np.uint64), axis=0).astype("<u4")


def refused(code: Abort, says: str, call, *arguments, **named) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SecAggError, match=says) as error:
        call(*arguments, **named)
    assert error.value.code == code


@given(
    st.integers(1, 20),
    st.integers(1, 12),
    st.sampled_from(["stochastic", "deterministic"]),
    st.floats(0.01, 1.0),
    st.integers(0, 2**32 - 1),
)
def test_the_mean_of_a_sum_is_the_weighted_mean_within_its_bound(
    sites: int, size: int, rounding: str, least: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    encoding = Encoding(size, max_sites=20, rounding=rounding, metrics=("loss",))  # type: ignore[arg-type]
    updates = generator.uniform(-16, 16, (sites, size))
    shares = generator.uniform(least, 1, sites).tolist()
    losses = generator.uniform(0, 5, sites)
    sent = [encoding.encode(u, s, {"loss": float(v)}).words for u, s, v in zip(updates, shares, losses, strict=True)]
    decoded = encoding.decode(total(sent), shares)
    weights = np.array(shares)
    exact = weights @ updates / weights.sum()
    assert np.abs(decoded.mean - exact).max() <= encoding.error_bound(shares)
    assert decoded.metrics["loss"] == pytest.approx(weights @ losses / weights.sum(), abs=1e-2)
    assert decoded.beyond == 0


@pytest.mark.parametrize(("sites", "bits"), [(3, 26), (100, 20), (1000, 16), (100, 24)])
def test_sums_at_the_bound_do_not_run_over_and_one_step_more_is_refused(sites: int, bits: int) -> None:
    most = (2**31 - 1) // sites / 2**bits
    assert headroom(sites, most, bits) < 2**31
    refused(Abort.OVERFLOW, "is not below 2\\^31", headroom, sites, most + 2**-bits, bits)
    encoding = Encoding(2, sites, most, bits, "deterministic")
    word = encoding.encode(np.array([most, -most])).words
    assert encoding.decode(total([word] * sites), [1.0] * sites).mean.tolist() == [most, -most]
    # the twin without the check: the sum looks like a number of the other sign
    wrapped = (int((most + 2**-bits) * 2**bits) * sites) % 2**32
    assert np.array([wrapped], dtype="<u4").view("<i4")[0] < 0


def test_the_refusal_names_a_range_that_fits() -> None:
    with pytest.raises(SecAggError, match=r"value_range=20.479 is the largest"):
        Encoding(1, value_range=30.0)
    assert Encoding(1, value_range=20.479).words == 1
    refused(Abort.OVERFLOW, "sum of figures could run over", Encoding, 1, 2_000_000, 0.001, 4, metrics=("loss",))


def test_what_is_beyond_the_range_is_cut_off_and_counted_at_the_site() -> None:
    encoded = EXACT.encode(np.array([17.0, -1e30, 16.0, 0.5]))
    assert encoded.clamped == 2
    assert EXACT.decode(encoded.words, [1.0]).mean.tolist() == [16, -16, 16, 0.5]
    # before it is weighed, so that no mean is ever beyond the range
    light = EXACT.encode(np.array([1000.0, 0, 0, 0]), 0.25)
    assert EXACT.decode(light.words, [0.25]).mean[0] == 16


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_sent(value: float) -> None:
    update = np.array([0, value, 0, 0])
    refused(Abort.OVERFLOW, "NaN or infinity", EXACT.encode, update)
    with_loss = Encoding(1, metrics=("loss",))
    refused(Abort.OVERFLOW, "NaN or infinity", with_loss.encode, np.zeros(1), 1.0, {"loss": value})
    refused(Abort.OVERFLOW, r"share=", EXACT.encode, np.zeros(4), value)


def test_other_shapes_shares_and_figures_are_refused() -> None:
    refused(Abort.MALFORMED, r"shape \(3,\)", EXACT.encode, np.zeros(3))
    refused(Abort.MALFORMED, r"figures \['loss'\]", EXACT.encode, np.zeros(4), 1.0, {"loss": 1.0})
    with_loss = Encoding(1, metrics=("loss",))
    refused(Abort.MALFORMED, r"figures \[\]", with_loss.encode, np.zeros(1))
    refused(Abort.OVERFLOW, "beyond", with_loss.encode, np.zeros(1), 1.0, {"loss": METRIC_RANGE + 1})
    for share in (0.0, -0.1, 1.0001):
        refused(Abort.OVERFLOW, "share=", EXACT.encode, np.zeros(4), share)
    refused(Abort.MALFORMED, "words", EXACT.decode, np.zeros(5, "<u4"), [1.0])
    refused(Abort.MALFORMED, "words", EXACT.decode, np.zeros(4, np.int64), [1.0])
    for shares in ([], [0.0, 1.0], [-1.0], [1.5], [np.nan], [1.0] * 101):
        refused(Abort.OVERFLOW, "shares=", EXACT.decode, np.zeros(4, "<u4"), shares)


def test_a_mean_that_updates_within_range_cannot_have_is_cut_off_and_counted() -> None:
    """One site sends a vector that is no update: beside two honest ones the mean is within range at least."""
    honest = EXACT.encode(np.full(4, 16.0)).words
    false = np.array([2**30, -(2**30), 0, 1], dtype=np.int64).astype("<u4")
    decoded = EXACT.decode(total([honest, honest, false]), [1.0] * 3)
    assert decoded.beyond == 2
    assert decoded.mean[:2].tolist() == [16, -16]
    assert EXACT.decode(total([honest] * 3), [1.0] * 3).beyond == 0


def test_the_least_share_is_too_small_to_show_and_does_no_harm() -> None:
    light, heavy = EXACT.encode(np.full(4, 8.0), 1e-12).words, EXACT.encode(np.full(4, 2.0)).words
    assert not light.any()
    assert EXACT.decode(total([light, heavy]), [1e-12, 1.0]).mean == pytest.approx(2.0)


@settings(max_examples=20)
@given(st.floats(-3, 3))
def test_stochastic_rounding_keeps_the_mean_where_rounding_to_the_nearest_does_not(steps: float) -> None:
    count = 4000
    coarse = Encoding(count, fraction_bits=4)
    words = coarse.encode(np.full(count, steps / 16)).words[:count].view("<i4")
    fraction = steps - np.floor(steps)
    deviation = np.sqrt(max(fraction * (1 - fraction), 1e-3) / count)
    assert abs(words.mean() - steps) < 8 * deviation
    assert set(np.unique(words)) <= {int(np.floor(steps)), int(np.floor(steps)) + 1}


def test_a_rounding_to_the_nearest_would_be_found_out() -> None:
    coarse = Encoding(4000, fraction_bits=4, rounding="deterministic")
    words = coarse.encode(np.full(4000, 0.3 / 16)).words[:4000].view("<i4")
    assert abs(words.mean() - 0.3) > 8 * np.sqrt(0.21 / 4000)


def test_two_encodings_of_one_update_differ_only_by_their_rounding() -> None:
    encoding = Encoding(1000)
    update = np.linspace(-1, 1, 1000)
    one, other = (encoding.encode(update).words.view("<i4").astype(np.int64) for _ in range(2))
    assert not np.array_equal(one, other)
    assert np.abs(one - other).max() == 1
