"""Epsilon of a long ledger: 10,000 entries of 5 steps, of five jobs with their own sample rate and noise."""

import dp_accounting.pld.privacy_loss_distribution  # noqa: F401  # its import is not what is timed

from fedmpt_core.privacy.accounting import epsilon as accounting
from fedmpt_core.privacy.accounting.epsilon import Steps, epsilon
from tests.bench.measure import Row, cpu_seconds

KINDS = ((0.01, 1.0), (0.02, 1.5), (0.005, 0.8), (0.032, 2.0), (0.015, 1.1))
ENTRIES, COUNT, DELTA, BOUND = 10_000, 5, 1e-5, 2.0


def run() -> list[Row]:
    """Time one reading of the ledger, nothing cached."""
    history = [Steps(*KINDS[i % len(KINDS)], COUNT) for i in range(ENTRIES)]

    def account() -> float:
        accounting._epsilon.cache_clear()
        accounting._moments.cache_clear()
        return epsilon(history, DELTA)

    seconds = cpu_seconds(account, 3)
    return [
        Row(
            f"epsilon of {ENTRIES:,} ledger entries of {COUNT} steps over {len(KINDS)} jobs (CPU-s), {account():.2f}",
            f"{seconds:.2f}",
            "–",
            "–",
            f"<= {BOUND:g}",
            seconds <= BOUND,
        )
    ]
