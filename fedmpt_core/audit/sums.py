"""The model against the sums that the server opened: where sites share their noise, every step can be taken again."""

import numpy as np
from safetensors import SafetensorError

from fedmpt_core.audit.run_evidence import Run
from fedmpt_core.federation.run.record import MODEL, START, load_state, sum_file
from fedmpt_core.federation.server.optimizer import ServerOptimizer
from fedmpt_core.federation.terms import encoding_of
from fedmpt_core.model.vector import LayoutError, ParameterLayout
from fedmpt_core.secagg.errors import SecAggError

ROUNDED = 1e-5  # of how far the model moved: another machine's square roots and cosines may differ by a bit
AGAIN = "download the run again; if it repeats, the server's model is not what its sums say: do not use it"


def sum_files(run: Run) -> set[str]:
    """What a run of shared noise has beside its model: where it began, and each of its sums."""
    if not run.job.privacy.distributed or not run.sites:
        return set()
    return {START, *(sum_file(row["round"]) for row in run.rounds if run.job_of(row["round"]) == run.manifest.run_id)}


def check_sums(run: Run, layout: ParameterLayout | None) -> None:
    """Adds findings to the run.

    Args:
        run: as loaded; its files' digests were compared.
        layout: of what was trained; None where there is no model.
    """
    if not run.job.privacy.distributed or layout is None:
        return
    try:
        _, _, model, _ = load_state(run.folder / MODEL)
        _, began, state, memory = load_state(run.folder / START)
        if began != layout:
            raise LayoutError("it has another layout than the model")
        optimizer, encoding, start = ServerOptimizer(run.job, layout), encoding_of(run.job, layout), state
        optimizer.recall(memory)
        largest = run.job.secagg.max_weight or 1
        for row in run.rounds:
            if run.job_of(row["round"]) != run.manifest.run_id:
                continue
            shares = [min(1.0, int(run.sites[site]["weight"]) / largest) for site in row["sites"]]
            total = np.frombuffer((run.folder / sum_file(row["round"])).read_bytes(), "<u4")
            state = optimizer.next(state, encoding.decode(total, shares).mean, row["round"])
    except (OSError, SafetensorError, LayoutError, SecAggError, ValueError, KeyError, TypeError) as error:
        text = f"the steps from the recorded sums to the model cannot be taken again: {str(error)[:200]}"
        run.say("sums-missing", MODEL, text, "download the run again: without its sums nobody can check the model")
        return
    apart, moved = (float(np.abs(model - other).max(initial=0.0)) for other in (state, start))
    if not apart <= ROUNDED * max(moved, 1e-6):
        text = f"it differs by {apart:.3g} from what the server's steps on the recorded sums give"
        run.say("model-not-of-the-sums", MODEL, text, AGAIN)
