"""How large the numbers of a sum may be: below 2^31, so that none runs over and looks like another. Needs no numpy."""

from math import ceil, floor

from fedmpt_core.secagg.errors import Abort, SecAggError

HALF = 2**31


def largest_word(value_range: float, fraction_bits: int) -> int:
    """Largest absolute value of one site's number, in steps of 2^-fraction_bits."""
    return ceil(value_range * 2**fraction_bits)


def headroom(max_sites: int, value_range: float, fraction_bits: int) -> int:
    """Largest absolute sum of one coordinate over `max_sites` sites.

    Raises:
        SecAggError: OVERFLOW, it is not below 2^31, so a sum could run over and look like another number.
    """
    largest = max_sites * largest_word(value_range, fraction_bits)
    if largest >= HALF:
        fits = floor((HALF - 1) // max_sites / 2**fraction_bits * 1000) / 1000
        raise SecAggError(
            Abort.OVERFLOW,
            f"max_sites={max_sites} times value_range={value_range:g} times 2^{fraction_bits} is not below 2^31: sums "
            f"could run over; value_range={fits:.6g} is the largest that fits, or take fewer sites or bits",
        )
    return largest
