"""Secret sharing: known answers, any threshold of shares open, fewer say nothing, wrong shares are named."""

import itertools
import json
import secrets
from pathlib import Path
from typing import Any

import independent
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpt_core.secagg import shamir
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.shamir import PRIME, Lagrange, correct, split

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "secagg_primitives.json").read_text())["shamir"]
SECRET = st.one_of(st.binary(min_size=32, max_size=32), st.sampled_from([bytes(32), b"\xff" * 32]))


def unhex(texts: list[str]) -> list[bytes]:
    """Shares of the vectors."""
    return [bytes.fromhex(text) for text in texts]


def spoiled(share: bytes, by: int = 1) -> bytes:
    """Another field element."""
    return ((int.from_bytes(share, "big") + by) % PRIME).to_bytes(33, "big")


@st.composite
def sizes(draw: st.DrawFn, most: int = 9) -> tuple[int, int]:
    """A threshold and a number of shares."""
    count = draw(st.integers(2, most))
    return draw(st.integers(2, count)), count


def test_the_prime_is_the_least_above_2_256() -> None:
    def prime(n: int) -> bool:  # Miller and Rabin, fixed bases
        odd, twos = n - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in range(2, 40):
            value = pow(base, odd, n)
            if value != 1 and all(pow(value, 2**k, n) != n - 1 for k in range(twos)):
                return False
        return True

    assert [n for n in range(2**256, PRIME + 1) if prime(n)] == [PRIME]


@pytest.mark.parametrize("case", VECTORS["split"], ids=lambda case: case["secret"][:4])
def test_known_shares(case: dict[str, Any]) -> None:
    secret, coefficients = bytes.fromhex(case["secret"]), [int(c) for c in case["coefficients"]]
    shares = unhex(case["shares"])
    given_in_turn = iter(coefficients)
    assert split(secret, len(coefficients) + 1, len(shares), randbelow=lambda _: next(given_in_turn)) == shares
    assert [independent.share(secret, coefficients, x) for x in range(1, len(shares) + 1)] == shares
    for xs in itertools.combinations(range(1, len(shares) + 1), len(coefficients) + 1):
        found = [shares[x - 1] for x in xs]
        assert Lagrange(xs).combine(found) == independent.combine(xs, found) == secret


def test_the_frozen_share_of_the_suite() -> None:
    coefficients = iter([1, 2])
    shares = split(bytes(range(32)), 3, 3, randbelow=lambda _: next(coefficients))
    assert shares[2].hex() == "00000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e34"


@pytest.mark.parametrize("case", VECTORS["bad_combine"], ids=lambda case: case["what"])
def test_shares_that_do_not_combine(case: dict[str, Any]) -> None:
    with pytest.raises(SecAggError) as refusal:
        Lagrange(case["xs"]).combine(unhex(case["shares"]))
    assert refusal.value.code is Abort.BAD_SHARE


@pytest.mark.parametrize("case", VECTORS["correct"], ids=lambda case: case["what"])
def test_known_corrections(case: dict[str, Any]) -> None:
    shares, wrong = unhex(case["shares"]), case["wrong"]
    assert correct(case["xs"], shares, case["threshold"]) == (bytes.fromhex(case["secret"]), wrong)
    right = [(x, s) for x, s in zip(case["xs"], shares, strict=True) if x not in wrong][: case["threshold"]]
    assert independent.combine(*zip(*right, strict=True)).hex() == case["secret"]


@pytest.mark.parametrize("case", VECTORS["bad_correct"], ids=lambda case: case["what"])
def test_shares_that_cannot_be_corrected(case: dict[str, Any]) -> None:
    with pytest.raises(SecAggError) as refusal:
        correct(case["xs"], unhex(case["shares"]), case["threshold"])
    assert refusal.value.code is Abort.BAD_SHARE


@given(SECRET, sizes(), st.data())
def test_any_threshold_of_shares_open(secret: bytes, size: tuple[int, int], data: Any) -> None:
    threshold, count = size
    shares = split(secret, threshold, count)
    xs = data.draw(st.permutations(range(1, count + 1)))
    enough = xs[: data.draw(st.integers(threshold, count))]
    found = [shares[x - 1] for x in enough]
    assert Lagrange(enough).combine(found) == independent.combine(enough, found) == secret


@given(SECRET, SECRET, sizes(), st.data())
def test_one_share_fewer_fits_every_secret(secret: bytes, other: bytes, size: tuple[int, int], data: Any) -> None:
    """For any other secret exactly one polynomial of the same degree passes through the shares seen."""
    threshold, count = size
    shares = split(secret, threshold, count)
    seen = data.draw(st.permutations(range(1, count + 1)))[: threshold - 1]
    values = [int.from_bytes(shares[x - 1], "big") for x in seen]
    xs, ys = [0, *seen], [int.from_bytes(other, "big"), *values]
    deal = [independent.interpolate(xs, ys, at).to_bytes(33, "big") for at in range(1, count + 1)]
    assert [deal[x - 1] for x in seen] == [shares[x - 1] for x in seen]
    for enough in itertools.islice(itertools.combinations(range(1, count + 1), threshold), 5):
        assert Lagrange(enough).combine([deal[x - 1] for x in enough]) == other


def test_over_a_small_field_the_shares_seen_are_as_likely_under_every_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """All coefficients once: each pair of values occurs for each secret equally often. Kept in bytes as always."""
    monkeypatch.setattr(shamir, "PRIME", 7)
    for seen in itertools.combinations(range(4), 2):
        views = []
        for secret in range(7):
            deals = []
            for coefficients in itertools.product(range(7), repeat=2):
                given_in_turn = iter(coefficients)
                shares = split(secret.to_bytes(32, "big"), 3, 4, randbelow=lambda _, it=given_in_turn: next(it))
                deals.append(tuple(shares[place] for place in seen))
            views.append(sorted(deals))
        assert all(view == views[0] for view in views)
        assert len(set(views[0])) == 49


def test_coefficients_are_drawn_from_the_whole_field() -> None:
    asked: list[int] = []

    def randbelow(bound: int) -> int:
        asked.append(bound)
        return secrets.randbelow(bound)

    shares = split(bytes(32), 5, 7, randbelow=randbelow)
    assert asked == [PRIME] * 4
    assert split(bytes(32), 5, 7) != shares


@settings(max_examples=60)
@given(SECRET, sizes(13), st.data())
def test_wrong_shares_are_corrected_and_named(secret: bytes, size: tuple[int, int], data: Any) -> None:
    threshold, count = size
    shares = split(secret, threshold, count)
    xs = data.draw(st.permutations(range(1, count + 1)))
    wrong = set(data.draw(st.lists(st.sampled_from(xs), max_size=(count - threshold) // 2, unique=True)))
    by = st.integers(1, PRIME - 1)
    formless = st.sampled_from([b"", bytes(32), bytes(34), b"\xff" * 33, PRIME.to_bytes(33, "big")])
    sent = [data.draw(st.one_of(by.map(lambda b, x=x: spoiled(shares[x - 1], b)), formless)) if x in wrong
            else shares[x - 1] for x in xs]  # fmt: skip
    assert correct(xs, sent, threshold) == (secret, [x for x in xs if x in wrong])


@pytest.mark.parametrize(("threshold", "count"), [(3, 5), (4, 9), (7, 10), (21, 30)])
def test_one_wrong_share_too_many_is_never_taken_for_right(threshold: int, count: int) -> None:
    secret, xs = bytes(range(32)), range(1, count + 1)
    shares, most = split(secret, threshold, count), (count - threshold) // 2
    sent = [spoiled(s, x) if x <= most else s for x, s in zip(xs, shares, strict=True)]
    assert correct(xs, sent, threshold) == (secret, [*range(1, most + 1)])
    sent[most] = spoiled(sent[most])
    with pytest.raises(SecAggError) as refusal:
        correct(xs, sent, threshold)
    assert refusal.value.code is Abort.BAD_SHARE


def test_a_majority_that_agrees_on_another_secret_wins() -> None:
    """What the docstring warns of: the decoder cannot know which polynomial was dealt, a commitment can."""
    dealt, forged = split(bytes(32), 3, 7), split(b"\x01" * 32, 3, 7)
    assert correct(range(1, 8), dealt[:2] + forged[2:], 3) == (b"\x01" * 32, [1, 2])


def test_a_polynomial_of_lower_degree_and_the_zero_polynomial() -> None:
    flat = split(b"\x05" * 32, 4, 8, randbelow=lambda _: 0)
    assert len(set(flat)) == 1
    assert correct(range(1, 9), [spoiled(flat[0]), *flat[1:]], 4) == (b"\x05" * 32, [1])
    nothing = split(bytes(32), 4, 8, randbelow=lambda _: 0)
    assert correct(range(1, 9), [*nothing[:6], spoiled(nothing[6]), spoiled(nothing[7], 9)], 4) == (bytes(32), [7, 8])


def test_large_x_as_a_cohort_of_many_has_them() -> None:
    secret, coefficients = bytes(range(32)), [secrets.randbelow(PRIME) for _ in range(40)]
    xs = range(65535 - 45, 65536)
    shares = [independent.share(secret, coefficients, x) for x in xs]
    ascending = [int.from_bytes(secret, "big"), *coefficients]
    assert [shamir._value(ascending, x).to_bytes(33, "big") for x in xs] == shares
    assert Lagrange(xs[:41]).combine(shares[:41]) == secret
    assert correct(xs, [spoiled(shares[0]), *shares[1:]], 41) == (secret, [xs[0]])


def test_a_hundred_members() -> None:
    secret = secrets.token_bytes(32)
    shares = split(secret, 67, 100)
    lagrange = Lagrange(range(34, 101))
    assert lagrange.combine(shares[33:]) == secret
    sent = [spoiled(s) if x % 7 == 0 else s for x, s in enumerate(shares, 1)]
    assert correct(range(1, 101), sent, 67) == (secret, [*range(7, 101, 7)])


@pytest.mark.parametrize(
    ("secret", "threshold", "count", "match"),
    [
        (bytes(31), 2, 3, "the secret has 31 bytes"),
        (bytes(33), 2, 3, "the secret has 33 bytes"),
        (bytes(32), 1, 3, "threshold=1"),  # every share would be the secret
        (bytes(32), 0, 3, "threshold=0"),
        (bytes(32), 4, 3, "threshold=4, count=3"),
        (bytes(32), 2, 65536, "count=65536"),
    ],
)
def test_a_split_is_refused(secret: bytes, threshold: int, count: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        split(secret, threshold, count)


@pytest.mark.parametrize("xs", [[], [0, 1, 2], [1, 2, 2], [-1, 2], [1, 65536]])
def test_points_must_be_distinct_and_not_the_secret_s(xs: list[int]) -> None:
    for call in (lambda: Lagrange(xs), lambda: correct(xs, [bytes(33)] * len(xs), 2)):
        with pytest.raises(ValueError, match=r"not distinct numbers of 1\.\.65535"):
            call()


def test_as_many_shares_as_points() -> None:
    shares = split(bytes(32), 2, 3)
    for call in (lambda: Lagrange([1, 2]).combine(shares), lambda: correct([1, 2], shares, 2)):
        with pytest.raises(ValueError, match="3 shares for 2 xs"):
            call()
    with pytest.raises(ValueError, match="threshold=1"):
        correct([1, 2, 3], shares, 1)


def test_the_refusals_name_no_share() -> None:
    shares = split(b"\xee" * 32, 2, 5)
    said = []
    for call in (
        lambda: Lagrange([1, 2]).combine([shares[0], shares[1][1:]]),
        lambda: Lagrange([1, 2]).combine([shares[0], b"\xff" * 33]),
        lambda: correct([1, 2, 3, 4], [shares[0], spoiled(shares[1]), shares[2], spoiled(shares[3])], 2),
        lambda: split(b"\xee" * 31, 2, 3),
    ):
        with pytest.raises(ValueError) as refusal:
            call()
        said.append(repr(refusal.value))
    text = "\n".join(said) + repr(Lagrange([1, 2]))
    for secret in (b"\xee" * 8, *(s[1:9] for s in shares)):
        assert secret.hex() not in text and repr(secret)[2:-1] not in text
        assert str(int.from_bytes(secret, "big")) not in text
