"""What each part of FedMPT adds on the demo's scenes: `python -m tests.bench.ablation --seeds 3` prints a Markdown
table.

Plain training, without differential privacy, whose noise would hide the differences, with 200 records at each site.

Runs the demo's federation as a plain loop in one process, which gives the same numbers as FLARE (a test holds them
equal), for a growing list of components and several seeds, which change pictures, pairs, initial weights and batches.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import torch

from fedmpt_core.config import JobConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config_file import load_job, load_sites
from fedmpt_core.site_config import SiteConfig
from tests.reference import federate

DEMO = Path(__file__).parents[2] / "jobs" / "demo"
LADDER = {
    "prompts": ("prompts",),
    "+ adapters": ("prompts", "adapters"),
    "+ transport": ("prompts", "adapters", "transport"),
    "+ gate (FedMPT)": ("prompts", "adapters", "transport", "gate"),
}


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


def one(components: tuple[str, ...], seed: int, cache: str) -> dict[str, float]:
    """Final figures of one run."""
    job = plain_job(seed)
    job = dataclasses.replace(job, model=dataclasses.replace(job.model, components=components))
    rows = [figures for _, figures in federate(job, open_sites(train=200), cache)]
    return {
        "zero_shot": rows[0]["zero_shot"]["mAP"],
        "start": rows[0]["mAP"],
        **{k: rows[-1][k] for k in ("mAP", "CF1", "OF1")},
    }


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def main() -> None:
    """Run the ladder and print the table; every run is one line of JSON in `--out`, so a broken-off table resumes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", default=str(Path.home() / ".cache" / "fedmpt" / "features"))
    parser.add_argument("--out", default="runs/ablation.jsonl")
    parser.add_argument("--only", help="one row, for running rows side by side")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for name, components in LADDER.items():
        for seed in range(arguments.seeds):
            if (arguments.only or name) != name or any(d["row"] == name and d["seed"] == seed for d in done):
                continue
            row = {"row": name, "seed": seed, **one(components, seed, arguments.cache)}
            done.append(row)
            with out.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
    keys = ("zero_shot", "start", "mAP", "CF1", "OF1")
    print("| components | zero-shot mAP | mAP before training | final mAP | CF1 | OF1 |\n|---|---|---|---|---|---|")
    for name in LADDER:
        rows = [d for d in done if d["row"] == name]
        if rows:
            print(f"| {name} | " + " | ".join(spread([r[k] for r in rows]) for k in keys) + " |")


if __name__ == "__main__":
    main()
