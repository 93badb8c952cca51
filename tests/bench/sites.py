"""Memory of a federation of 20 sites in one process, as `fedmpt bench` runs it, against one of 2: the towers and the
feature cache are shared.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from fedmpt_core.benchmark.cases import cases_of
from fedmpt_core.benchmark.inputs import load_inputs
from fedmpt_core.benchmark.runs import run as run_case
from fedmpt_core.benchmark.shared_records import SharedRecords
from tests.bench.measure import Row, in_own_process, peak_mib

MANY, FEW, LABELS = 20, 2, 20
TRAIN, TEST = 60, 30
BOUND = 1.25


def federate(sites: int) -> dict[str, float]:
    """One round of one step at every site; peak MiB."""
    inputs = load_inputs("scenes")
    small = {
        name: dataclasses.replace(
            site, data=dataclasses.replace(site.data, train=TRAIN, val=min(TEST, site.data.val), test=TEST)
        )
        for name, site in inputs.sites.items()
    }
    inputs = dataclasses.replace(inputs, sites=small)
    case = next(c for c in cases_of(inputs, "heterogeneity", ["fedmpt"], [0]) if round(c.value * LABELS) == sites)
    training = dataclasses.replace(case.job.training, rounds=1, local_steps=1)
    case = dataclasses.replace(case, job=dataclasses.replace(case.job, training=training))
    with tempfile.TemporaryDirectory() as folder:
        result = run_case(case, SharedRecords(Path(folder)))
    return {"sites": result["sites"], "mib": peak_mib()}


def run() -> list[Row]:
    """The table's rows."""
    many, few = (in_own_process("tests.bench.sites", str(sites)) for sites in (MANY, FEW))
    ratio = many["mib"] / few["mib"]
    what = f"peak memory of a plain federation of {many['sites']:.0f} sites; other: of {few['sites']:.0f}"
    return [Row(what, f"{many['mib']:.0f} MiB", f"{few['mib']:.0f} MiB", f"{ratio:.2f}x", f"{BOUND}x", ratio <= BOUND)]


if __name__ == "__main__":
    print(json.dumps(federate(int(sys.argv[1]))))
