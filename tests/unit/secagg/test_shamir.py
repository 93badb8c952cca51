"""Secret sharing: known answers, any threshold of shares open, fewer say nothing of the secret."""

import itertools
import json
import secrets
from pathlib import Path
from typing import Any

import independent
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpt_core.secagg import shamir
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.shamir import PRIME, Lagrange, element, polynomial, random_element, value

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "secagg_primitives.json").read_text())["shamir"]
SECRET = st.one_of(st.integers(0, PRIME - 1), st.sampled_from([0, 1, PRIME - 1])).map(lambda n: n.to_bytes(33, "big"))


def dealt(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares at 1..count."""
    ascending = polynomial(secret, threshold)
    return [value(ascending, x).to_bytes(33, "big") for x in range(1, count + 1)]


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
            power = pow(base, odd, n)
            if power != 1 and all(pow(power, 2**k, n) != n - 1 for k in range(twos)):
                return False
        return True

    assert [n for n in range(2**256, PRIME + 1) if prime(n)] == [PRIME]


@pytest.mark.parametrize("case", VECTORS["split"], ids=lambda case: case["secret"][:6])
def test_known_shares(case: dict[str, Any]) -> None:
    secret, coefficients = bytes.fromhex(case["secret"]), [int(c) for c in case["coefficients"]]
    shares = [bytes.fromhex(text) for text in case["shares"]]
    given_in_turn = iter(coefficients)
    ascending = polynomial(secret, len(coefficients) + 1, randbelow=lambda _: next(given_in_turn))
    assert ascending == (int(case["secret"], 16), *coefficients)
    xs = range(1, len(shares) + 1)
    assert [value(ascending, x).to_bytes(33, "big") for x in xs] == shares
    assert [independent.share(ascending, x) for x in xs] == shares
    for chosen in itertools.combinations(xs, len(coefficients) + 1):
        given_shares = [shares[x - 1] for x in chosen]
        assert Lagrange(chosen).combine(given_shares) == independent.combine(chosen, given_shares) == secret


@pytest.mark.parametrize("case", VECTORS["bad_combine"], ids=lambda case: case["what"])
def test_shares_that_do_not_combine(case: dict[str, Any]) -> None:
    with pytest.raises(SecAggError) as refusal:
        Lagrange(case["xs"]).combine([bytes.fromhex(text) for text in case["shares"]])
    assert refusal.value.code is Abort.BAD_SHARE


@given(SECRET, sizes(), st.data())
def test_any_threshold_of_shares_open(secret: bytes, size: tuple[int, int], data: Any) -> None:
    threshold, count = size
    shares = dealt(secret, threshold, count)
    xs = data.draw(st.permutations(range(1, count + 1)))
    enough = xs[: data.draw(st.integers(threshold, count))]
    chosen = [shares[x - 1] for x in enough]
    assert Lagrange(enough).combine(chosen) == independent.combine(enough, chosen) == secret


@given(SECRET, SECRET, sizes(), st.data())
def test_one_share_fewer_fits_every_secret(secret: bytes, other: bytes, size: tuple[int, int], data: Any) -> None:
    """For any other secret exactly one polynomial of the same degree passes through the shares seen."""
    threshold, count = size
    shares = dealt(secret, threshold, count)
    seen = data.draw(st.permutations(range(1, count + 1)))[: threshold - 1]
    xs, ys = [0, *seen], [element(other), *(element(shares[x - 1]) for x in seen)]
    deal = [independent.interpolate(xs, ys, at).to_bytes(33, "big") for at in range(1, count + 1)]
    assert [deal[x - 1] for x in seen] == [shares[x - 1] for x in seen]
    for enough in itertools.islice(itertools.combinations(range(1, count + 1), threshold), 5):
        assert Lagrange(enough).combine([deal[x - 1] for x in enough]) == other


def test_over_a_small_field_the_shares_seen_are_as_likely_under_every_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """All coefficients once: each pair of values occurs for each secret equally often. Kept in bytes as always."""
    monkeypatch.setattr(shamir, "PRIME", 7)
    for seen in itertools.combinations(range(1, 5), 2):
        views = []
        for secret in range(7):
            deals = []
            for coefficients in itertools.product(range(7), repeat=2):
                given_in_turn = iter(coefficients)
                ascending = polynomial(secret.to_bytes(33, "big"), 3, randbelow=lambda _, it=given_in_turn: next(it))
                deals.append(tuple(value(ascending, x) for x in seen))
            views.append(sorted(deals))
        assert all(view == views[0] for view in views)
        assert len(set(views[0])) == 49


def test_secrets_and_coefficients_are_drawn_from_the_whole_field() -> None:
    asked: list[int] = []

    def randbelow(bound: int) -> int:
        asked.append(bound)
        return secrets.randbelow(bound)

    assert len(random_element(randbelow)) == 33
    polynomial(bytes(33), 5, randbelow=randbelow)
    assert asked == [PRIME] * 5
    assert polynomial(bytes(33), 5) != polynomial(bytes(33), 5)
    assert random_element() != random_element()


@pytest.mark.parametrize("size", [2, 16, 17, 41, 67])
def test_large_x_as_a_cohort_of_many_has_them(size: int) -> None:
    secret = random_element()
    ascending = polynomial(secret, size)
    xs = range(65535 - size - 5, 65536)
    shares = [independent.share(ascending, x) for x in xs]
    assert [value(ascending, x).to_bytes(33, "big") for x in xs] == shares
    assert Lagrange(xs[:size]).combine(shares[:size]) == Lagrange(xs[5:]).combine(shares[5:]) == secret


@pytest.mark.parametrize("secret", [bytes(32), bytes(34), PRIME.to_bytes(33, "big"), b"\xff" * 33])
def test_what_is_no_number_of_the_field_is_no_secret(secret: bytes) -> None:
    for call in (lambda: polynomial(secret, 3), lambda: element(secret)):
        with pytest.raises(SecAggError, match="not 33 bytes below the prime") as refusal:
            call()
        assert refusal.value.code is Abort.BAD_SHARE


@pytest.mark.parametrize("threshold", [1, 0, -1, 65536])  # with 1, every share would be the secret
def test_a_threshold_that_hides_nothing_is_refused(threshold: int) -> None:
    with pytest.raises(ValueError, match=f"threshold={threshold}"):
        polynomial(bytes(33), threshold)


@pytest.mark.parametrize("xs", [[], [0, 1, 2], [1, 2, 2], [-1, 2], [1, 65536]])
def test_points_must_be_distinct_and_not_the_secret_s(xs: list[int]) -> None:
    with pytest.raises(ValueError, match=r"not distinct numbers of 1\.\.65535"):
        Lagrange(xs)


def test_as_many_shares_as_points() -> None:
    with pytest.raises(ValueError, match="3 shares for 2 xs"):
        Lagrange([1, 2]).combine([bytes(33)] * 3)


def test_the_refusals_name_no_share() -> None:
    shares = dealt(b"\0" + b"\xee" * 32, 2, 5)
    texts = [repr(Lagrange([1, 2]))]
    for call in (
        lambda: Lagrange([1, 2]).combine([shares[0], shares[1][1:]]),
        lambda: Lagrange([1, 2]).combine([shares[0], b"\xff" * 33]),
        lambda: polynomial(b"\xee" * 32, 2),
    ):
        with pytest.raises(ValueError) as refusal:
            call()
        texts.append(repr(refusal.value))
    for secret in (b"\xee" * 8, *(s[1:9] for s in shares)):
        assert not [t for t in texts if secret.hex() in t or repr(secret)[2:-1] in t]
        assert not [t for t in texts if str(int.from_bytes(secret, "big")) in t]
