"""Epsilon of a long ledger: 10,000 entries of 5 steps, of five jobs with their own sample rate and noise; of one where
200 jobs had their own; and of a rate so small that the grid is very fine.
"""

import dp_accounting.pld.privacy_loss_distribution  # noqa: F401  # its import is not what is timed

from fedmpt_core.privacy.accounting import epsilon as accounting
from fedmpt_core.privacy.accounting.epsilon import Steps, epsilon
from tests.bench.measure import Row, cpu_seconds

KINDS = ((0.01, 1.0), (0.02, 1.5), (0.005, 0.8), (0.032, 2.0), (0.015, 1.1))
ENTRIES, COUNT, DELTA = 10_000, 5, 1e-5
JOBS = 200
HISTORIES = (
    (
        f"{ENTRIES:,} ledger entries of {COUNT} steps over {len(KINDS)} jobs",
        [Steps(*KINDS[i % len(KINDS)], COUNT) for i in range(ENTRIES)],
        2.0,
    ),
    (f"{JOBS} jobs of {JOBS} kinds", [Steps(0.005 + i / 2500, 0.8 + i / 100, 5 + i % 90) for i in range(JOBS)], 3.0),
    ("100,000 steps at a rate of 1e-6", [Steps(1e-6, 0.5, 100_000)], 3.0),
)


def run() -> list[Row]:
    """Time one pricing of each history, nothing cached."""
    rows = []
    for what, history, bound in HISTORIES:

        def account(history: list[Steps] = history) -> float:
            accounting._epsilon.cache_clear()
            accounting._moments.cache_clear()
            return epsilon(history, DELTA)

        seconds = cpu_seconds(account, 3)
        shown = f"epsilon of {what} (CPU-s), {account():.4g}"
        rows.append(Row(shown, f"{seconds:.2f}", "–", "–", f"<= {bound:g}", seconds <= bound))
    return rows
