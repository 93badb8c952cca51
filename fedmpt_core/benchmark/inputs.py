"""What a benchmark runs on: a job, its simulated sites, and what each method needs otherwise, out of one folder.

    job.toml        towers, classes, rounds, privacy: the same for all methods
    site.toml       simulated sites; one of them scores
    methods.toml    optional: by method, what differs in [METHOD.model], [METHOD.training] and [METHOD.privacy]
    grid.toml       optional: by method, the settings that `tuning` tries

FedMPT takes the job's own [model]; a baseline starts from the defaults of its own settings, as it has none of FedMPT's,
nor its groups of parameters (`training.group_rates`, `privacy.group_norms`).
Nothing leaves the process, so what protects updates on their way is left out: masks, and the numbers of sites that they
ask for. Differential privacy stays as the job has it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmpt_core.config import methods
from fedmpt_core.config.job import JobConfig, ModelConfig
from fedmpt_core.config.secagg import SecAggConfig, SiteSecAggConfig
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.config.toml import ConfigError, job_from_dict, load_job, load_sites, read_toml
from fedmpt_core.privacy.ledger.budget import resolved

ZERO_SHOT = "zero-shot"
LABELS = {ZERO_SHOT: ZERO_SHOT} | {name: method.label for name, method in methods.METHODS.items()}
METHODS = tuple(LABELS)
"""Every method, in the order of tables."""

EMBEDDED = ("scenes", "scenes-private")
"""Names of the folders that come with this release: the embedded scenes, plain and at epsilon 8."""

_SECTIONS = ("model", "training", "privacy")
Changes = Mapping[str, Mapping[str, Any]]
"""Settings by section."""


@dataclass(frozen=True)
class BenchmarkInputs:
    """One folder, read.

    Attributes:
        folder: where it is.
        sites: the simulated sites.
        changes: by method, what differs from the job.
        grid: by method, the settings to try, `section.key` to values.
    """

    folder: Path
    sites: dict[str, SiteConfig]
    changes: Mapping[str, Changes]
    grid: dict[str, dict[str, list[Any]]]

    def job(self, method: str, seed: int, extra: Changes | None = None) -> JobConfig:
        """The job of one method, its noise multiplier worked out.

        Args:
            method: one of `METHODS`.
            seed: replaces the job's.
            extra: further changes, which win.

        Raises:
            ConfigError: a setting that the method has not, or that is out of range.
        """
        base = load_job(self.folder / "job.toml", seed=seed)
        values = base.to_dict()
        if method not in ("fedmpt", ZERO_SHOT):
            values["model"] = asdict(ModelConfig(method=method))  # type: ignore[arg-type]
            values["training"]["group_rates"], values["privacy"]["group_norms"] = {}, {}
        for changes in (self.changes.get(method, {}), extra or {}):
            for section, settings in changes.items():
                values[section] |= settings
        values["secagg"] = asdict(SecAggConfig(mechanism="none"))
        values["federation"]["min_sites"], values["resume"] = 1, None
        return resolved(job_from_dict(values, f"{self.folder}: {method}"))


def load_inputs(data: str) -> BenchmarkInputs:
    """Read a folder.

    Args:
        data: a folder, or one of `EMBEDDED`.

    Raises:
        ConfigError: a file is missing or says something impossible.
    """
    folder = Path(__file__).parent / "jobs" / data if data in EMBEDDED else Path(data)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is not a folder: give one with job.toml and site.toml, or {', '.join(EMBEDDED)}")
    sites = {}
    for name, site in load_sites(folder / "site.toml").items():
        policy = site.privacy and dataclasses.replace(site.privacy, min_sites=1)
        sites[name] = dataclasses.replace(site, privacy=policy, secagg=SiteSecAggConfig(allow_unmasked=True))
    changes, grid = _changes(folder / "methods.toml"), _grid(folder / "grid.toml")
    path = folder / "job.toml"
    job = load_job(path)
    if job.model.method != "fedmpt":
        raise ConfigError(
            f"{path}: [model] method='{job.model.method}': a benchmark's job is FedMPT's, remove it and "
            "name other methods on the command line"
        )
    if job.unseen_classes:
        raise ConfigError(f"{path}: unseen_classes: `fedmpt simulate` alone scores them, remove them")
    inputs = BenchmarkInputs(folder, sites, changes, grid)
    for method in changes:
        inputs.job(method, 0)
    return inputs


def _changes(path: Path) -> dict[str, dict[str, Any]]:
    changes = _table(path)
    for method, sections in changes.items():
        wrong = sorted(set(sections) - set(_SECTIONS))
        if wrong or not all(isinstance(s, dict) for s in sections.values()):
            raise ConfigError(f"{path}: [{method}] takes the tables {', '.join(_SECTIONS)}")
    return changes


def _grid(path: Path) -> dict[str, dict[str, list[Any]]]:
    grid = _table(path)
    for method, settings in grid.items():
        for key, values in settings.items():
            section, _, name = key.partition(".")
            if section not in _SECTIONS or not name or not isinstance(values, list) or not values:
                raise ConfigError(f'{path}: [{method}] {key!r} = {values!r}: write "model.reg" = [0.03, 0.1]')
    return grid


def _table(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    values = read_toml(path)
    wrong = sorted(name for name, table in values.items() if name not in METHODS or not isinstance(table, dict))
    if wrong:
        raise ConfigError(f"{path}: [{wrong[0]}] is no method: use {', '.join(METHODS)}")
    return values
