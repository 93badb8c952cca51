"""What the masks add to a round's wall time: three provisioned sites, mutual TLS, loopback."""

import dataclasses
import tempfile
from pathlib import Path
from statistics import median

from fedmpt_core.config.job import BackboneConfig, FederationConfig, JobConfig, ModelConfig, TrainingConfig
from fedmpt_core.config.secagg import SecAggConfig
from tests.bench.measure import Row
from tests.federation import Federation
from tests.pictures import CLASSES, small_sites
from tests.settings import UNPROTECTED

ROUNDS, MOST_SECONDS = 12, 0.6


def run() -> list[Row]:
    """The two phases that a masked round has more, and whole rounds with and without masks."""
    job = JobConfig(
        "masked",
        CLASSES,
        backbone=BackboneConfig(image_size=96),
        model=ModelConfig(conditions=("color", "pose")),
        training=TrainingConfig(rounds=ROUNDS, local_steps=1, batch_size=5),
        privacy=UNPROTECTED,
        federation=FederationConfig(join_timeout=300, round_timeout=120, evaluate_every=0),
    )
    plain = dataclasses.replace(job, name="plain", secagg=SecAggConfig(mechanism="none"))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "pictures").mkdir()
        with Federation(root / "all", small_sites(root / "pictures")) as federation:
            rounds = {j.name: federation.run_job(federation.export(j)).record["rounds"][1:] for j in (job, plain)}
    phases = [r["secagg"]["seconds"] for r in rounds["masked"]]
    added = median(p["mask"] + p["open"] for p in phases)
    masked, unmasked = (median(r["seconds"] for r in rounds[name][1:]) for name in ("masked", "plain"))
    exchange = phases[0]["advertise"] + phases[0]["deal"] + phases[0]["confirm"]
    return [
        Row(
            "two more phases in a masked round, 3 sites, mutual TLS on loopback (wall time)",
            f"{added:.2f} s",
            "–",
            f"{added:.2f} s",
            f"{MOST_SECONDS} s",
            added <= MOST_SECONDS,
        ),
        Row(
            "a whole round; other: without masks",
            f"{masked:.2f} s",
            f"{unmasked:.2f} s",
            f"+{masked - unmasked:.2f} s",
            "–",
            None,
        ),
        Row("key exchange, once", f"{exchange:.2f} s", "–", "–", "–", None),
    ]
