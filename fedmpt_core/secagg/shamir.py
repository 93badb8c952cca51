"""Secret sharing (Shamir 1979) over the integers modulo 2^256 + 297, the least prime above 2^256.

Secrets and shares are numbers of this field, 33 bytes.
Any `threshold` shares give the secret; fewer say nothing of it. Python's integers do not run in constant time: secrets
must be fresh and used once.
"""

import secrets
from collections.abc import Callable, Sequence

from fedmpt_core.secagg.errors import Abort, SecAggError

PRIME = 2**256 + 297
SHARE_BYTES = 33
MOST_SHARES = 65535
_LAZY = 16  # measured: steps of Horner's rule between reductions


def random_element(randbelow: Callable[[int], int] = secrets.randbelow) -> bytes:
    """A secret: a uniform number of the field, 33 bytes."""
    return randbelow(PRIME).to_bytes(SHARE_BYTES, "big")


def polynomial(
    secret: bytes, threshold: int, *, randbelow: Callable[[int], int] = secrets.randbelow
) -> tuple[int, ...]:
    """A random polynomial that is the secret at 0: `threshold` coefficients, ascending.

    Args:
        secret: 33 bytes, below the prime.
        threshold: shares that give it back, from 2.
        randbelow: uniform integers from 0 up to its argument; only tests give another.

    Raises:
        ValueError: a threshold outside its range.
        SecAggError: BAD_SHARE, the secret is none.
    """
    if not 2 <= threshold <= MOST_SHARES:
        raise ValueError(f"threshold={threshold}: give 2 to {MOST_SHARES}")
    return (element(secret), *(randbelow(PRIME) for _ in range(threshold - 1)))


def value(ascending: Sequence[int], x: int) -> int:
    """A polynomial at x: for x = 1..65535 a share. Horner's rule.

    A step adds the bits of x only, so reducing at each would cost more than the longer numbers.
    """
    result = 0
    for place, coefficient in enumerate(reversed(ascending), 1):
        result = result * x + coefficient
        if not place % _LAZY:
            result %= PRIME
    return result % PRIME


def element(share: bytes) -> int:
    """A share as a number. Raises SecAggError(BAD_SHARE) when it is not 33 bytes below the prime."""
    number = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or number >= PRIME:
        raise SecAggError(Abort.BAD_SHARE, f"a share is not {SHARE_BYTES} bytes below the prime")
    return number


class Lagrange:
    """Combines shares of one set of x; the coefficients are worked out once for all secrets."""

    def __init__(self, xs: Sequence[int]) -> None:
        """Works out the coefficients.

        Args:
            xs: distinct, 1..65535; as many as the threshold, or more.

        Raises:
            ValueError: they are not so.
        """
        points = list(xs)
        if not points or len(set(points)) != len(points) or not 1 <= min(points) <= max(points) <= MOST_SHARES:
            raise ValueError(f"the xs {points} are not distinct numbers of 1..{MOST_SHARES}")
        whole, bottoms = 1, []
        for x in points:
            whole = whole * x % PRIME
            bottom = x
            for place, other in enumerate(points, 1):
                if other != x:
                    bottom *= other - x
                if not place % _LAZY:
                    bottom %= PRIME
            bottoms.append(bottom % PRIME)
        self._weights = [whole * inverse % PRIME for inverse in _inverses(bottoms)]

    def combine(self, shares: Sequence[bytes]) -> bytes:
        """The secret of these shares, 33 bytes.

        Args:
            shares: in the order of `xs`.

        Raises:
            SecAggError: BAD_SHARE, a share is no number of the field.
            ValueError: another number of shares than of xs.
        """
        if len(shares) != len(self._weights):
            raise ValueError(f"{len(shares)} shares for {len(self._weights)} xs: give one for each")
        total = sum(weight * element(share) for weight, share in zip(self._weights, shares, strict=True))
        return (total % PRIME).to_bytes(SHARE_BYTES, "big")


def _inverses(values: Sequence[int]) -> list[int]:
    """Inverses of non-zero values with one exponentiation (Montgomery's trick)."""
    products = [1]
    for factor in values:
        products.append(products[-1] * factor % PRIME)
    inverse, inverses = pow(products[-1], -1, PRIME), [0] * len(values)
    for place in range(len(values) - 1, -1, -1):
        inverses[place] = inverse * products[place] % PRIME
        inverse = inverse * values[place] % PRIME
    return inverses
