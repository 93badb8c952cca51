"""Timing and memory of one call, and the table that shows them."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits


@dataclass(frozen=True)
class Row:
    """One line of the table; `good` is None where there is no bound."""

    what: str
    ours: str
    other: str
    ratio: str
    bound: str
    good: bool | None


def cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    """Least CPU time of `repeats` calls on one thread; more threads would also count the time they wait."""
    threads, best = torch.get_num_threads(), float("inf")
    torch.set_num_threads(1)
    with threadpool_limits(1):
        for _ in range(repeats):
            start = time.process_time()
            call()
            best = min(best, time.process_time() - start)
    torch.set_num_threads(threads)
    return best


def in_own_process(module: str, *arguments: str) -> dict[str, float]:
    """Run `python -m module arguments` and read the JSON object on its last line."""
    run = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def peak_mib() -> float:
    """Largest resident memory of this process so far; of this program alone, unlike getrusage's after an exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
