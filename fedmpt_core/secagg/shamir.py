"""Secret sharing (Shamir 1979) of 32-byte secrets over the integers modulo 2^256 + 297.

That is the least prime above 2^256, so every 32-byte secret is an element and none is more likely than another.
Any `threshold` shares give the secret; fewer say nothing of it. Wrong shares are corrected by Gao's decoder (2003) for
Reed-Solomon codes. Python's integers do not run in constant time: secrets must be fresh and used once.
"""

import secrets
from collections.abc import Callable, Sequence

from fedmpt_core.secagg.errors import Abort, SecAggError

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
MOST_SHARES = 65535
_LAZY = 16  # measured: steps of Horner's rule between reductions


def split(
    secret: bytes, threshold: int, count: int, *, randbelow: Callable[[int], int] = secrets.randbelow
) -> list[bytes]:
    """Shares of a secret: values at x = 1..count of a random polynomial that is the secret at 0.

    Args:
        secret: 32 bytes.
        threshold: shares that give it back, 2..count.
        count: shares, up to 65535.
        randbelow: uniform integers from 0 up to its argument; only tests give another.

    Returns:
        `count` shares of 33 bytes, big-endian, that of x at index x - 1.

    Raises:
        ValueError: an argument outside its range.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"the secret has {len(secret)} bytes, it must have {SECRET_BYTES}")
    if not 2 <= threshold <= count <= MOST_SHARES:
        raise ValueError(f"threshold={threshold}, count={count}: give 2 <= threshold <= count <= {MOST_SHARES}")
    ascending = [int.from_bytes(secret, "big"), *(randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value(ascending, x).to_bytes(SHARE_BYTES, "big") for x in range(1, count + 1)]


class Lagrange:
    """Combines shares of one set of x; the coefficients are worked out once for all secrets."""

    def __init__(self, xs: Sequence[int]) -> None:
        """Works out the coefficients.

        Args:
            xs: distinct, 1..65535; as many as the threshold, or more where all shares are known to be right.

        Raises:
            ValueError: they are not so.
        """
        self._xs = _points(xs)
        whole, bottoms = 1, []
        for x in self._xs:
            whole = whole * x % PRIME
            bottom = x
            for place, other in enumerate(self._xs, 1):
                if other != x:
                    bottom *= other - x
                if not place % _LAZY:
                    bottom %= PRIME
            bottoms.append(bottom % PRIME)
        self._weights = [whole * inverse % PRIME for inverse in _inverses(bottoms)]

    def combine(self, shares: Sequence[bytes]) -> bytes:
        """The secret of these shares, 32 bytes.

        Args:
            shares: in the order of `xs`.

        Raises:
            SecAggError: BAD_SHARE, a share is no field element, or all together are no 32-byte secret.
            ValueError: another number of shares than of xs.
        """
        _match(self._xs, shares)
        total = 0
        for x, weight, share in zip(self._xs, self._weights, shares, strict=True):
            value = _element(share)
            if value is None:
                raise SecAggError(Abort.BAD_SHARE, f"the share of x={x} is not {SHARE_BYTES} bytes below the prime")
            total += weight * value
        return _secret(total % PRIME)


def correct(xs: Sequence[int], shares: Sequence[bytes], threshold: int) -> tuple[bytes, list[int]]:
    """The secret although some shares are wrong, and which.

    With more wrong shares than promised below it raises, or, where they were made to fit, gives another secret: compare
    the result with a commitment.

    Args:
        xs: distinct, 1..65535.
        shares: in the order of `xs`.
        threshold: that of `split`, from 2.

    Returns:
        The secret, 32 bytes, and the xs of wrong shares in the order given; right for up to
        (len(shares) - threshold) // 2 wrong shares. A share that is no field element counts as half a wrong one.

    Raises:
        SecAggError: BAD_SHARE, there are fewer than `threshold` usable shares or too many wrong ones.
        ValueError: xs that are not as above, another number of shares, or a threshold below 2.
    """
    points = _points(xs)
    _match(points, shares)
    if threshold < 2:
        raise ValueError(f"threshold={threshold}, it must be at least 2")
    known = {x: v for x, share in zip(points, shares, strict=True) if (v := _element(share)) is not None}
    if len(known) < threshold:
        raise SecAggError(Abort.BAD_SHARE, f"{len(known)} shares are usable, the threshold is {threshold}")
    polynomial = _gao(list(known), list(known.values()), threshold)
    wrong = [x for x in points if x not in known or _value(polynomial, x) != known[x]]
    most = (len(known) - threshold) // 2
    if len(polynomial) > threshold or len(wrong) - (len(points) - len(known)) > most:
        raise SecAggError(Abort.BAD_SHARE, f"more than {most} of {len(known)} shares are wrong")
    return _secret(polynomial[0] if polynomial else 0), wrong


def _gao(xs: list[int], ys: list[int], threshold: int) -> list[int]:
    """The polynomial, ascending, that all but (n - threshold) // 2 points lie on; when there is none, any other.

    Euclid's algorithm on prod(X - x) and the polynomial through all points stops at the remainder
    g = u prod(X - x) + v (polynomial) of degree below (n + threshold) / 2; then g / v is the one sought.
    """
    above, below = _product(xs), _interpolate(xs, ys)
    v_above, v_below = [], [1]
    while 2 * (len(below) - 1) >= len(xs) + threshold:
        quotient, rest = _divide(above, below)
        above, below = below, rest
        v_above, v_below = v_below, _minus(v_above, _times(quotient, v_below))
    return _divide(below, v_below)[0]


def _interpolate(xs: list[int], ys: list[int]) -> list[int]:
    """Newton's divided differences, as ascending coefficients."""
    n = len(xs)
    steps = [xs[i] - xs[i - k] for k in range(1, n) for i in range(k, n)]
    unlike = sorted(set(steps))
    inverse = dict(zip(unlike, _inverses([s % PRIME for s in unlike]), strict=True))
    slopes = list(ys)
    for k in range(1, n):
        for i in range(n - 1, k - 1, -1):
            slopes[i] = (slopes[i] - slopes[i - 1]) * inverse[xs[i] - xs[i - k]] % PRIME
    polynomial: list[int] = []
    for x, slope in zip(reversed(xs), reversed(slopes), strict=True):
        polynomial = _minus([slope, *polynomial], [x * c for c in polynomial])
    return polynomial


def _product(xs: list[int]) -> list[int]:
    polynomial = [1]
    for x in xs:
        polynomial = _minus([0, *polynomial], [x * c for c in polynomial])
    return polynomial


def _divide(top: list[int], bottom: list[int]) -> tuple[list[int], list[int]]:
    """Quotient and remainder; coefficients ascend and the last is not zero."""
    rest, size = list(top), len(bottom)
    if len(rest) < size:
        return [], rest
    lead, quotient = pow(bottom[-1], -1, PRIME), [0] * (len(rest) - size + 1)
    for place in range(len(quotient) - 1, -1, -1):
        factor = quotient[place] = rest[place + size - 1] * lead % PRIME
        for i, c in enumerate(bottom):
            rest[place + i] = (rest[place + i] - factor * c) % PRIME
    return _trim(quotient), _trim(rest)


def _times(one: list[int], other: list[int]) -> list[int]:
    product = [0] * max(0, len(one) + len(other) - 1)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            product[i + j] = (product[i + j] + a * b) % PRIME
    return product


def _minus(one: list[int], other: list[int]) -> list[int]:
    size = max(len(one), len(other))
    one, other = one + [0] * (size - len(one)), other + [0] * (size - len(other))
    return _trim([(a - b) % PRIME for a, b in zip(one, other, strict=True)])


def _trim(polynomial: list[int]) -> list[int]:
    while polynomial and not polynomial[-1]:
        polynomial.pop()
    return polynomial


def _value(ascending: Sequence[int], x: int) -> int:
    """Horner's rule. A step adds the bits of x only, so reducing at each would cost more than the longer numbers."""
    value = 0
    for place, coefficient in enumerate(reversed(ascending), 1):
        value = value * x + coefficient
        if not place % _LAZY:
            value %= PRIME
    return value % PRIME


def _inverses(values: Sequence[int]) -> list[int]:
    """Inverses of non-zero values with one exponentiation (Montgomery's trick)."""
    products = [1]
    for value in values:
        products.append(products[-1] * value % PRIME)
    inverse, inverses = pow(products[-1], -1, PRIME), [0] * len(values)
    for place in range(len(values) - 1, -1, -1):
        inverses[place] = inverse * products[place] % PRIME
        inverse = inverse * values[place] % PRIME
    return inverses


def _element(share: bytes) -> int | None:
    if len(share) != SHARE_BYTES:
        return None
    value = int.from_bytes(share, "big")
    return value if value < PRIME else None


def _secret(value: int) -> bytes:
    if value >> 8 * SECRET_BYTES:
        raise SecAggError(Abort.BAD_SHARE, "the shares do not combine to a secret of 32 bytes: one of them is wrong")
    return value.to_bytes(SECRET_BYTES, "big")


def _points(xs: Sequence[int]) -> list[int]:
    points = list(xs)
    if not points or len(set(points)) != len(points) or not 1 <= min(points) <= max(points) <= MOST_SHARES:
        raise ValueError(f"the xs {points} are not distinct numbers of 1..{MOST_SHARES}")
    return points


def _match(points: Sequence[int], shares: Sequence[bytes]) -> None:
    if len(points) != len(shares):
        raise ValueError(f"{len(shares)} shares for {len(points)} xs: give one for each")
