"""Verifiable dealing: known answers, rows of an honest dealer fit, and no others do."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import independent
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpt_core.secagg.dealing import (
    ROW_BYTES,
    SLOTS,
    Dealing,
    are_shares,
    deal,
    leaves,
    share_of,
)
from fedmpt_core.secagg.shamir import PRIME, Lagrange, polynomial, random_element, value

VECTOR = json.loads((Path(__file__).parents[2] / "vectors" / "secagg_primitives.json").read_text())["dealing"]
LABEL = bytes(range(34))


def unhex(texts: Sequence[str]) -> list[bytes]:
    """Bytes of the vector."""
    return [bytes.fromhex(text) for text in texts]


def secrets() -> list[bytes]:
    """Of all slots."""
    return [random_element() for _ in range(SLOTS)]


def rows_of(polynomials: Sequence[Sequence[int]], count: int) -> list[bytes]:
    """Everybody's, of polynomials of any degrees."""
    return [b"".join(value(f, x).to_bytes(33, "big") for f in polynomials) for x in range(1, count + 1)]


def committed(rows: Sequence[bytes], polynomials: Sequence[Sequence[int]]) -> Dealing:
    """To any rows, with the combination of any polynomials, as a dealer that lies can make it."""
    commitments = [independent.commit_row(independent.share_leaves(LABEL, i, row)) for i, row in enumerate(rows)]
    mixed = independent.combination(polynomials, independent.challenge(LABEL, commitments))
    return Dealing(LABEL, tuple(commitments), tuple(c.to_bytes(33, "big") for c in mixed))


def test_the_known_answer() -> None:
    label, rows = bytes.fromhex(VECTOR["label"]), unhex(VECTOR["rows"])
    dealing = Dealing(label, tuple(unhex(VECTOR["commitments"])), tuple(unhex(VECTOR["combination"])))
    assert len(dealing.combination) == VECTOR["threshold"]
    for recipient, row in enumerate(rows):
        assert b"".join(leaves(label, recipient, row)).hex() == VECTOR["leaves"][recipient]
        assert dealing.fits(recipient, row)
        assert not dealing.fits((recipient + 1) % 3, row)
    for slot, secret in enumerate(unhex(VECTOR["secrets"])):
        assert Lagrange([1, 3]).combine([share_of(rows[0], slot), share_of(rows[2], slot)]) == secret


def test_the_second_implementation_gives_the_same_commitments_and_combination() -> None:
    label, rows = bytes.fromhex(VECTOR["label"]), unhex(VECTOR["rows"])
    commitments = [independent.commit_row(independent.share_leaves(label, i, row)) for i, row in enumerate(rows)]
    assert [c.hex() for c in commitments] == VECTOR["commitments"]
    at = independent.challenge(label, commitments)
    assert str(at) == VECTOR["challenge"]
    slopes = [[a, (b - a) % PRIME] for a, b in zip(*_values(rows), strict=True)]
    polynomials = [[(first - slope) % PRIME, slope] for first, slope in slopes]
    assert [c.to_bytes(33, "big").hex() for c in independent.combination(polynomials, at)] == VECTOR["combination"]


def _values(rows: Sequence[bytes]) -> list[list[int]]:
    return [[int.from_bytes(row[i : i + 33], "big") for i in range(0, ROW_BYTES, 33)] for row in rows[:2]]


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.data())
def test_an_honest_dealer_s_rows_fit_and_open_its_secrets(threshold: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(threshold, 12))
    dealt = secrets()
    dealing, rows = deal(dealt, threshold, count, LABEL)
    assert all(dealing.fits(i, row) for i, row in enumerate(rows))
    chosen = data.draw(st.permutations(range(count)))[:threshold]
    lagrange, slot = Lagrange([i + 1 for i in chosen]), data.draw(st.integers(1, SLOTS))
    assert lagrange.combine([share_of(rows[i], slot) for i in chosen]) == dealt[slot - 1]
    mixed = lagrange.combine([share_of(rows[i], 0) for i in chosen])
    assert mixed not in dealt  # a random polynomial hides the secrets in what is published


@settings(max_examples=40, deadline=None)
@given(st.integers(0, SLOTS), st.integers(1, PRIME - 1), st.integers(0, 4))
def test_one_share_that_is_another_number_does_not_fit(slot: int, by: int, recipient: int) -> None:
    """Committed to or not, and with the combination of the other shares."""
    polynomials = [polynomial(random_element(), 3) for _ in range(SLOTS + 1)]
    rows = rows_of(polynomials, 5)
    honest, right = committed(rows, polynomials), list(rows)
    share = (int.from_bytes(share_of(rows[recipient], slot), "big") + by) % PRIME
    at = 33 * slot
    rows[recipient] = rows[recipient][:at] + share.to_bytes(33, "big") + rows[recipient][at + 33 :]
    assert not honest.fits(recipient, rows[recipient])
    lying = committed(rows, polynomials)
    assert [lying.fits(i, row) for i, row in enumerate(rows)] == [i != recipient for i in range(5)]
    assert not lying.fits(recipient, right[recipient])


@pytest.mark.parametrize("steep", [0, 1, SLOTS])
def test_a_polynomial_of_higher_degree_does_not_fit_whatever_is_published(steep: int) -> None:
    """Its shares would open another secret for every set of members."""
    polynomials = [polynomial(random_element(), 3 + (slot == steep)) for slot in range(SLOTS + 1)]
    rows = rows_of(polynomials, 5)
    flat = [f[:3] for f in polynomials]
    assert not any(committed(rows, flat).fits(i, row) for i, row in enumerate(rows))


def test_errors_of_two_slots_do_not_cancel() -> None:
    """The challenge follows from the commitments, so that nobody can choose errors for it."""
    polynomials = [polynomial(random_element(), 3) for _ in range(SLOTS + 1)]
    rows = rows_of(polynomials, 5)
    before = independent.challenge(LABEL, committed(rows, polynomials).rows)
    one, other = 33 * 4, 33 * 9  # plus 1 here, and there what the old challenge makes of it
    cancels = -pow(before, 4 - 9, PRIME) % PRIME
    numbers = [int.from_bytes(rows[2][at : at + 33], "big") for at in (one, other)]
    row = bytearray(rows[2])
    row[one : one + 33] = ((numbers[0] + 1) % PRIME).to_bytes(33, "big")
    row[other : other + 33] = ((numbers[1] + cancels) % PRIME).to_bytes(33, "big")
    assert _mixed(bytes(row), before) == _mixed(rows[2], before)  # they would cancel
    rows[2] = bytes(row)
    assert not committed(rows, polynomials).fits(2, rows[2])


def _mixed(row: bytes, at: int) -> int:
    return sum(pow(at, k, PRIME) * int.from_bytes(share_of(row, k), "big") for k in range(SLOTS + 1)) % PRIME


def test_rows_and_combinations_that_are_no_numbers_of_the_field_do_not_fit() -> None:
    dealing, rows = deal(secrets(), 3, 5, LABEL)
    for row in (b"", rows[0][:-1], rows[0] + b"\0", bytes(ROW_BYTES), b"\xff" * ROW_BYTES):
        assert not dealing.fits(0, row)
    first = int.from_bytes(dealing.combination[0], "big")
    shifted = replace(dealing, combination=((first + PRIME).to_bytes(33, "big"), *dealing.combination[1:]))
    assert dealing.fits(0, rows[0])
    assert not shifted.fits(0, rows[0])
    polynomials = [polynomial(random_element(), 3) for _ in range(SLOTS + 1)]
    rows = rows_of(polynomials, 5)
    rows[1] = b"\xff" * 33 + rows[1][33:]
    assert not committed(rows, polynomials).fits(1, rows[1])


def test_a_dealing_is_bound_to_its_label() -> None:
    dealing, rows = deal(secrets(), 3, 5, LABEL)
    assert not replace(dealing, label=bytes(34)).fits(0, rows[0])
    other = [f"{slot:066x}" for slot in range(SLOTS + 1)]
    row = b"".join(unhex(other))
    lines = [b"".join(leaves(label, place, row)) for label in (LABEL, bytes(34)) for place in (0, 1)]
    assert len(set(lines)) == 4
    assert len({*leaves(LABEL, 0, bytes(ROW_BYTES))}) == SLOTS + 1  # equal shares of two slots do not look alike


def test_a_share_is_told_from_all_others_by_its_leaf() -> None:
    dealing, rows = deal(secrets(), 3, 5, LABEL)
    for recipient, slot in ((0, 1), (4, SLOTS)):
        leaf, share = leaves(LABEL, recipient, rows[recipient])[slot], share_of(rows[recipient], slot)
        assert dealing.commits(recipient, leaves(LABEL, recipient, rows[recipient]))
        assert are_shares([LABEL], recipient, slot, [share], [leaf])
        for wrong in (bytes(33), share[1:], share + b"\0", share[:-1] + bytes([share[-1] ^ 1]), b""):
            assert not are_shares([LABEL], recipient, slot, [wrong], [leaf])
        assert not are_shares([LABEL], 2, slot, [share], [leaf])
        assert not are_shares([LABEL], recipient, slot - 1, [share], [leaf])
        assert not are_shares([bytes(34)], recipient, slot, [share], [leaf])
    row = b"".join(unhex(["ff" * 33] * (SLOTS + 1)))
    assert not are_shares([LABEL], 0, 1, [share_of(row, 1)], [leaves(LABEL, 0, row)[1]])  # committed to, but no number


@pytest.mark.parametrize(("count", "threshold", "recipients"), [(SLOTS - 1, 2, 3), (SLOTS + 1, 2, 3), (SLOTS, 4, 3)])
def test_a_dealing_is_refused(count: int, threshold: int, recipients: int) -> None:
    with pytest.raises(ValueError, match=f"{count} secrets, threshold={threshold}: give {SLOTS}"):
        deal([random_element()] * count, threshold, recipients, LABEL)
    with pytest.raises(ValueError, match="threshold=1"):
        deal([random_element()] * SLOTS, 1, 3, LABEL)


def test_one_share_fewer_and_all_that_is_published_fit_every_secret() -> None:
    """Of a dealing with other secrets and the same public part: the random polynomial makes up for the difference."""
    polynomials = [polynomial(random_element(), 3) for _ in range(SLOTS + 1)]
    rows = rows_of(polynomials, 5)
    dealing = committed(rows, polynomials)
    at = independent.challenge(LABEL, dealing.rows)
    seen = (2, 5)  # places of two recipients, as x
    # one that is 0 for both and 1 at 0, added to slot 7 and taken off the random one, changes nothing published
    zero = [independent.interpolate([0, *seen], [1, 0, 0], x) for x in range(4)]
    coefficients = _ascending(zero[:3])
    other = [list(f) for f in polynomials]
    for place, c in enumerate(coefficients):
        other[7][place] = (other[7][place] + c) % PRIME
        other[0][place] = (other[0][place] - pow(at, 7, PRIME) * c) % PRIME
    assert other[7][0] != polynomials[7][0]
    assert independent.combination(other, at) == independent.combination(polynomials, at)
    for x in seen:
        assert rows_of(other, 5)[x - 1] == rows[x - 1]


def _ascending(values: Sequence[int]) -> list[int]:
    """Coefficients of the polynomial of degree 2 with these values at 0, 1, 2."""
    a, b, c = values
    half = pow(2, -1, PRIME)
    square = (c - 2 * b + a) * half % PRIME
    return [a % PRIME, (b - a - square) % PRIME, square]
