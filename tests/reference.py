"""The federation as a plain loop in one process: what FLARE's run must equal, and a quick way to compare settings."""

from fedmpt_core.benchmark.federate import federate, with_ledger

__all__ = ["federate", "with_ledger"]
