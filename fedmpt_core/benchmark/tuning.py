"""Settings for each method by the same effort: as many trials for every method, judged on validation pictures.

A trial is one combination of a method's values in `grid.toml`. The combination with the largest mean mAP on the `val`
split over the tuning seeds is taken; test pictures are not looked at. Report other seeds than these.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tomli_w

from fedmpt_core.benchmark.cases import Case
from fedmpt_core.benchmark.inputs import LABELS, ZERO_SHOT, BenchmarkInputs, Changes
from fedmpt_core.common.canonical import json_value
from fedmpt_core.config.toml import ConfigError


@dataclass(frozen=True)
class Trial:
    """One combination: the method, what it changes, and its runs."""

    method: str
    changes: Changes
    cases: tuple[Case, ...]

    def score(self, results: Mapping[str, Mapping[str, Any]]) -> float:
        """Mean validation mAP of its runs. Raises ConfigError when they have no validation pictures."""
        scores = [results[case.identity()]["figures"]["mAP_val"] for case in self.cases]
        if None in scores:
            raise ConfigError("no validation pictures: the site that scores needs a val split to tune on")
        return sum(scores) / len(scores)


def trials(inputs: BenchmarkInputs, methods: Sequence[str], seeds: Sequence[int]) -> list[Trial]:
    """Every trial, seed by seed inside.

    Args:
        inputs: the folder with its grid.
        methods: what to tune.
        seeds: at least one, not to be reported afterwards.

    Raises:
        ConfigError: a method without a grid, or grids of different sizes; zero-shot costs nothing and may have any.
    """
    missing = [m for m in methods if m not in inputs.grid]
    if missing:
        raise ConfigError(f"{inputs.folder / 'grid.toml'}: has no table [{missing[0]}]: give every method its grid")
    tried = []
    for method in methods:
        grid = inputs.grid[method]
        for values in itertools.product(*grid.values()):
            changes: dict[str, dict[str, Any]] = {}
            for key, value in zip(grid, values, strict=True):
                section, _, name = key.partition(".")
                changes.setdefault(section, {})[name] = value
            label = ", ".join(f"{k} {v}" for k, v in zip(grid, values, strict=True))
            cases = tuple(
                Case("tuning", f"{LABELS[method]}: {label}", 0.0, method, inputs.job(method, s, changes), inputs.sites)
                for s in seeds
            )
            tried.append(Trial(method, changes, cases))
    sizes = {m: sum(t.method == m for t in tried) for m in methods if m != ZERO_SHOT}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{m} {n}" for m, n in sizes.items())
        raise ConfigError(f"{inputs.folder / 'grid.toml'}: grids differ in size ({shown}): give each method as many")
    return tried


def ordered(tried: Sequence[Trial]) -> list[Case]:
    """The trials' cases, those of one seed one after the other."""
    return sorted((case for trial in tried for case in trial.cases), key=lambda case: case.job.seed)


def chosen(tried: Sequence[Trial], results: Mapping[str, Mapping[str, Any]]) -> dict[str, Trial]:
    """Each method's best trial, the first of equally good ones. Raises ConfigError without validation pictures."""
    best: dict[str, Trial] = {}
    for trial in tried:
        if trial.method not in best or trial.score(results) > best[trial.method].score(results):
            best[trial.method] = trial
    return best


def methods_toml(inputs: BenchmarkInputs, best: Mapping[str, Trial]) -> str:
    """What to write into `methods.toml`: the settings that were there, and the chosen ones."""
    merged: dict[str, dict[str, Any]] = {m: {s: dict(v) for s, v in c.items()} for m, c in inputs.changes.items()}
    for method, trial in best.items():
        for section, settings in trial.changes.items():
            merged.setdefault(method, {}).setdefault(section, {}).update(settings)
    return tomli_w.dumps(json_value(merged))


def tuning_table(tried: Sequence[Trial], results: Mapping[str, Mapping[str, Any]]) -> str:
    """All trials with their validation mAP as Markdown, the chosen ones in bold."""
    best = chosen(tried, results)
    lines = ["### tuning", "", "| trial | mAP on validation |", "|---|---|"]
    for trial in tried:
        score = f"{trial.score(results):.1f}"
        lines.append(f"| {trial.cases[0].row} | {f'**{score}**' if best[trial.method] is trial else score} |")
    seeds = sorted({case.job.seed for trial in tried for case in trial.cases})
    return "\n".join([*lines, "", f"Means over seeds {', '.join(map(str, seeds))}."]) + "\n"
