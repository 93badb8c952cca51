"""Which runs make which table: methods side by side, sweeps of the federation, ablation and sensitivity of FedMPT.

A case names its table, its row and, in a sweep, the value on the axis. Two cases of different tables may be the same
run; it is then done once.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmpt_core.benchmark.inputs import LABELS, METHODS, ZERO_SHOT, BenchmarkInputs, Changes
from fedmpt_core.common.canonical import canonical_digest
from fedmpt_core.common.files import known_digest
from fedmpt_core.common.release import RELEASE
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import SiteConfig

MEASUREMENT = 2
"""Version of what a run measures; a change makes all earlier results those of other runs."""

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MASKS = (0.1, 0.3, 0.5, 0.7, 0.9)
PARTICIPATION_CLUSTERS = 0.5
"""Heterogeneity where participation is varied: half as many sites as labels, so that a tenth can be asked."""

LADDER = {
    "prompts": ("prompts",),
    "+ adapters": ("prompts", "adapters"),
    "+ transport": ("prompts", "adapters", "transport"),
    "+ gate (FedMPT)": ("prompts", "adapters", "transport", "gate"),
    "gate without transport": ("prompts", "adapters", "gate"),
    "adapters alone": ("adapters",),
}
POOLING_TEMPERATURE = 0.1
"""Of the ablation's rows without transport: softmax pooling needs a sharper one than row marginals do (measured)."""

SENSITIVITY: dict[str, tuple[Any, ...]] = {
    "patch_temperature": (0.1, 0.5, 2.0, 8.0),
    "similarity_scale": (5.0, 10.0, 20.0, 50.0),
    "reg": (0.01, 0.03, 0.1, 0.3),
    "adapter_width": (8, 16, 32, 64, 128),
    "condition_tokens": (0, 2, 4, 8),
    "class_tokens": (2, 4, 7, 12),
    "gate_temperature": (0.5, 1.0, 2.0, 5.0),
}


@dataclass(frozen=True)
class Case:
    """One row of one table, for one seed.

    Attributes:
        table: `methods`, a sweep, `ablation` or `sensitivity`.
        row: what the row is called.
        value: place on a sweep's axis; 0 elsewhere.
        method: of `METHODS`.
        job: with its seed, noise multiplier worked out.
        sites: the simulated sites.
        heterogeneity: share t of the labels that is the number of clusters; None leaves records where they are.
    """

    table: str
    row: str
    value: float
    method: str
    job: JobConfig
    sites: dict[str, SiteConfig]
    heterogeneity: float | None = None

    def identity(self) -> str:
        """SHA-256 hex of what decides the run's figures: job, sites, manifests' content, release.

        Pictures and weights are not read for it: name another folder for results when they change under the same name.
        """
        sites = {
            n: {"data": dataclasses.asdict(s.data), "privacy": s.privacy and dataclasses.asdict(s.privacy)}
            for n, s in self.sites.items()
        }
        paths = [path for s in self.sites.values() for path in (s.data.path, s.data.partition_file)]
        lists = [known_digest(Path(path)) if path and Path(path).is_file() else "" for path in paths]
        known = [MEASUREMENT, RELEASE, self.method == ZERO_SHOT, self.job.to_dict(), sites, lists, self.heterogeneity]
        return canonical_digest(known)


def cases_of(inputs: BenchmarkInputs, table: str, methods: Sequence[str], seeds: Sequence[int]) -> list[Case]:
    """The cases of a table, those of one seed one after the other, so that they share their records.

    Args:
        inputs: the folder.
        table: a key of `TABLES`.
        methods: of `METHODS`; `ablation` and `sensitivity` are of FedMPT whatever stands here.
        seeds: at least one.

    Raises:
        ConfigError: a setting out of range.
        ValueError: an unknown table or method.
    """
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise ValueError(f"method {unknown[0]!r} is not known: use {', '.join(METHODS)}, or all")
    if table not in TABLES:
        raise ValueError(f"table {table!r} is not known: use {', '.join(TABLES)}")
    ordered = [m for m in METHODS if m in methods]
    return [case for seed in seeds for case in TABLES[table](inputs, ordered, seed)]


def _methods(inputs: BenchmarkInputs, methods: Sequence[str], seed: int) -> Iterator[Case]:
    for method in methods:
        yield Case("methods", LABELS[method], 0.0, method, inputs.job(method, seed), inputs.sites)


def _heterogeneity(inputs: BenchmarkInputs, methods: Sequence[str], seed: int) -> Iterator[Case]:
    for share in SHARES:
        for method in methods:
            job = inputs.job(method, seed)
            yield Case("heterogeneity", LABELS[method], share, method, job, inputs.sites, share)


def _masks(inputs: BenchmarkInputs, methods: Sequence[str], seed: int) -> Iterator[Case]:
    for share in MASKS:
        sites = {
            n: dataclasses.replace(s, data=dataclasses.replace(s.data, drop_positives=share))
            for n, s in inputs.sites.items()
        }
        for method in methods:
            yield Case("masks", LABELS[method], share, method, inputs.job(method, seed), sites)


def _participation(inputs: BenchmarkInputs, methods: Sequence[str], seed: int) -> Iterator[Case]:
    for method in methods:
        for share in (0.1, 0.3, 0.5, 1.0):
            job = inputs.job(method, seed)
            job = dataclasses.replace(job, federation=dataclasses.replace(job.federation, participation=share))
            yield Case("participation", LABELS[method], share, method, job, inputs.sites, PARTICIPATION_CLUSTERS)


def _ablation(inputs: BenchmarkInputs, methods: Sequence[str], seed: int) -> Iterator[Case]:
    base = inputs.job("fedmpt", seed)

    def rung(parts: tuple[str, ...]) -> Changes:
        model: dict[str, Any] = {"components": parts}
        if "transport" not in parts:
            model["patch_temperature"] = POOLING_TEMPERATURE
        if base.model.trained == "adapters" and "adapters" not in parts:
            model["trained"] = "contexts+gate"  # what is left to train
        return {"model": model, **_without({"adapters", "gate"} - set(parts), base)}

    rows = {name: rung(parts) for name, parts in LADDER.items()}
    rows["FedMPT, logits mixed"] = {"model": {"mixture": "logits"}}
    for row, extra in rows.items():
        yield Case("ablation", row, 0.0, "fedmpt", inputs.job("fedmpt", seed, extra), inputs.sites)


def _sensitivity(inputs: BenchmarkInputs, methods: Sequence[str], seed: int) -> Iterator[Case]:
    base = inputs.job("fedmpt", seed)
    conditions = base.model.conditions
    for n in range(1, len(conditions) + 1):
        lone = _without({"gate"}, base) if n == 1 else {}  # one condition needs no gate
        job = inputs.job("fedmpt", seed, {"model": {"conditions": conditions[:n]}, **lone})
        yield Case("sensitivity", "conditions", float(n), "fedmpt", job, inputs.sites)
    for name, values in SENSITIVITY.items():
        for value in values:
            job = inputs.job("fedmpt", seed, {"model": {name: value}})
            yield Case("sensitivity", name, float(value), "fedmpt", job, inputs.sites)


def _without(groups: Set[str], job: JobConfig) -> Changes:
    """Step sizes and bounds by group, without those of parts that are left out."""
    return {
        "training": {"group_rates": {k: v for k, v in job.training.group_rates.items() if k not in groups}},
        "privacy": {"group_norms": {k: v for k, v in job.privacy.group_norms.items() if k not in groups}},
    }


TABLES: dict[str, Callable[[BenchmarkInputs, Sequence[str], int], Iterator[Case]]] = {
    "methods": _methods,
    "heterogeneity": _heterogeneity,
    "masks": _masks,
    "participation": _participation,
    "ablation": _ablation,
    "sensitivity": _sensitivity,
}
