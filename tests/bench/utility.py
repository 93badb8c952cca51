"""What privacy costs on the demo job: `python -m tests.bench.utility --seeds 3` prints a Markdown table.

The demo's federation as a plain loop at several epsilons, which change the noise alone, and once as it was tuned for
plain training (all parameters, Adam). The seed changes pictures, pairs and initial weights; the noise is secret and
so differs between runs of one seed.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import torch

from fedmpt_core.benchmark.in_process import open_federation
from fedmpt_core.config.job import JobConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.config.toml import load_job, load_sites
from fedmpt_core.privacy.ledger.budget import resolved

DEMO = Path(__file__).parents[2] / "jobs" / "demo"
ROWS = ("plain training", "epsilon 8", "epsilon 3", "epsilon 1")


def plain_job(seed: int) -> JobConfig:
    """The demo job as it is tuned for plain training."""
    job = load_job(DEMO / "job.toml", seed=seed)
    training = TrainingConfig(
        rounds=5,
        local_steps=12,
        batch_size=48,
        optimizer="adam",
        learning_rate=0.01,
        weight_decay=0.0,
        schedule="constant",
    )
    model = dataclasses.replace(job.model, trained="all", bias=None)
    return dataclasses.replace(job, model=model, training=training, privacy=PrivacyConfig(mechanism="none"))


def open_sites(train: int | None = None) -> dict[str, SiteConfig]:
    """The demo's sites, which also allow plain training."""
    sites = {}
    for name, site in load_sites(DEMO / "site.toml").items():
        policy = site.privacy and dataclasses.replace(site.privacy, allow_unprotected=True)
        data = dataclasses.replace(site.data, train=train or site.data.train)
        sites[name] = dataclasses.replace(site, data=data, privacy=policy)
    return sites


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def variant(row: str, seed: int) -> JobConfig:
    """The demo job at an epsilon, or as it is tuned for plain training."""
    if row == "plain training":
        return plain_job(seed)
    job = load_job(DEMO / "job.toml", seed=seed)
    return resolved(dataclasses.replace(job, privacy=dataclasses.replace(job.privacy, epsilon=float(row.split()[1]))))


def one(row: str, seed: int, cache: str) -> dict[str, float]:
    """Final figures of one run."""
    job = variant(row, seed)
    sites = {name: dataclasses.replace(site, cache_dir=cache) for name, site in open_sites().items()}
    with open_federation(job, sites) as federation:
        rounds = [done.row for done in federation.rounds()]
    return {
        "noise": job.privacy.noise_multiplier or 0.0,
        "spent": max((said["epsilon"] for said in rounds[-1]["privacy"].values()), default=float("inf")),
        "zero_shot": rounds[0]["zero_shot"]["mAP"],
        "start": rounds[0]["mAP"],
        **{k: rounds[-1][k] for k in ("mAP", "CF1", "OF1")},
    }


def main() -> None:
    """Run the rows and print the table; every run is one line of JSON in `--out`, so a broken-off table resumes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", default=str(Path.home() / ".cache" / "fedmpt" / "features"))
    parser.add_argument("--out", default="runs/utility.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for seed in range(arguments.seeds):
        for name in ROWS:
            if any(d["row"] == name and d["seed"] == seed for d in done):
                continue
            row = {"row": name, "seed": seed, **one(name, seed, arguments.cache)}
            done.append(row)
            with out.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
    keys = ("zero_shot", "start", "mAP", "CF1", "OF1")
    print("| | noise multiplier | epsilon spent | zero-shot mAP | mAP before training | final mAP | CF1 | OF1 |")
    print("|---|---|---|---|---|---|---|---|")
    for name in ROWS:
        rows = [d for d in done if d["row"] == name]
        if rows:
            head = f"| {name} | {rows[0]['noise']:g} | {rows[0]['spent']:.2f} | "
            print(head + " | ".join(spread([r[k] for r in rows]) for k in keys) + " |")


if __name__ == "__main__":
    main()
