"""Run all benchmarks, or those named: `python -m tests.bench sinkhorn step`."""

import platform
import sys
from importlib import import_module

import torch
from rich.console import Console
from rich.table import Table

NAMES = (
    "sinkhorn",
    "step",
    "private_step",
    "accounting",
    "ledger",
    "audit",
    "masking",
    "secagg",
    "latency",
    "federation",
    "features",
    "sites",
    "gpu",
    "demo",
)
PEERS = ("peers",)  # in an environment of their own: make bench-peers


def main() -> int:
    """Print the table; exit code 1 when a bound is missed."""
    names = sys.argv[1:] or NAMES
    table = Table(
        "what",
        "ours",
        "other",
        "ratio",
        "bound",
        "met",
        title=f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads",
    )
    missed = False
    for name in names:
        if name not in (*NAMES, *PEERS):
            Console(stderr=True).print(f"error: benchmark '{name}' is not one of {', '.join((*NAMES, *PEERS))}")
            return 2
        for row in import_module(f"tests.bench.{name}").run():
            met = {True: "yes", False: "NO", None: "–"}[row.good]
            missed |= row.good is False
            table.add_row(row.what, row.ours, row.other, row.ratio, row.bound, met)
    Console(width=150).print(table)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
