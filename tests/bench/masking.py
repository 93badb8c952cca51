"""One mask of 1.2 million words against its floor, and an epoch's dealing and its opening for a hundred members.

The floor is one `update_into` of AES-256-CTR over the whole length and one uint32 addition in place: what the work
costs when nothing is saved and nothing wasted. Both are timed in turn, so that a busy machine slows both.
"""

import secrets
import tracemalloc

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedmpt_core.secagg.dealing import SLOTS, deal, share_of
from fedmpt_core.secagg.masking import Masker
from fedmpt_core.secagg.shamir import Lagrange, random_element
from tests.bench.measure import Row, cpu_seconds

WORDS, REPEATS = 1_200_000, 60
MEMBERS, THRESHOLD, SECRETS = 100, 67, 50
MASK_BOUND, MEMORY_BOUND, DEAL_BOUND, FIT_BOUND, COMBINE_BOUND = 1.15, 1.0, 200.0, 2.0, 30.0


def run() -> list[Row]:
    """Time masks and shares."""
    return [_mask(), _memory(), *_shares()]


def _mask() -> Row:
    vector, key, masker = np.zeros(WORDS, dtype="<u4"), bytes(range(32)), Masker()
    zeros, stream = bytes(4 * WORDS), bytearray(4 * WORDS + 16)
    words = np.frombuffer(stream, dtype="<u4", count=WORDS)

    def ours() -> None:
        masker.add(vector, key)

    def floor() -> None:
        Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update_into(zeros, stream)
        np.add(vector, words, out=vector)

    mine, least = float("inf"), float("inf")
    for _ in range(REPEATS):
        mine, least = min(mine, cpu_seconds(ours, 1)), min(least, cpu_seconds(floor, 1))
    return Row(
        f"mask of {WORDS:,} words against one AES-256-CTR call and one addition (CPU-ms)",
        f"{1e3 * mine:.2f}",
        f"{1e3 * least:.2f}",
        f"{mine / least:.2f}x",
        f"<= {MASK_BOUND}x",
        mine <= MASK_BOUND * least,
    )


def _memory() -> Row:
    vector, masker = np.zeros(WORDS, dtype="<u4"), Masker()
    tracemalloc.start()
    masker.add(vector, bytes(32))
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    bound = f"<= {MEMORY_BOUND:g}"
    return Row("memory that a mask takes at its peak (MB)", f"{peak:.3f}", "–", "–", bound, peak <= MEMORY_BOUND)


def _shares() -> list[Row]:
    drawn, xs = (
        [random_element() for _ in range(SLOTS)],
        [*secrets.SystemRandom().sample(range(1, MEMBERS + 1), THRESHOLD)],
    )
    dealing, rows = deal(drawn, THRESHOLD, MEMBERS, bytes(34))
    shares, lagrange = [share_of(rows[x - 1], 1) for x in xs], Lagrange(xs)
    assert lagrange.combine(shares) == drawn[0]
    dealt = 1e3 * cpu_seconds(lambda: deal(drawn, THRESHOLD, MEMBERS, bytes(34)), 3)
    fits = 1e3 * cpu_seconds(lambda: dealing.fits(0, rows[0]), 20)
    opened = 1e6 * cpu_seconds(lambda: [lagrange.combine(shares) for _ in range(SECRETS)], 10) / SECRETS
    once = 1e3 * cpu_seconds(lambda: Lagrange(xs), 20)
    of = f"{THRESHOLD} of {MEMBERS}"
    return [
        _row(f"dealing {SLOTS} secrets, {of} (CPU-ms)", dealt, DEAL_BOUND),
        _row(f"checking a row of {SLOTS} shares, {of} (CPU-ms)", fits, FIT_BOUND),
        _row(f"a secret of its shares, {of} (CPU-us); coefficients once {once:.2f} ms", opened, COMBINE_BOUND),
    ]


def _row(what: str, figure: float, bound: float) -> Row:
    return Row(what, f"{figure:.2f}", "–", "–", f"<= {bound:g}", figure <= bound)
