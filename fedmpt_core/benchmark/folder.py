"""A benchmark's folder: what is written into it, each file whole or not at all.

| file | what |
|---|---|
| `runs.jsonl` | one line per finished run, with all its figures (`results_file.py`) |
| `results.json`, `results.csv`, `results.md` | the tables: for programs, one line per run, for people |
| `TABLE.png` | the table as a picture |
| `methods.toml`, `tuning.md` | chosen settings and all trials, after tuning |
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmpt_core.benchmark import charts, tables
from fedmpt_core.benchmark.cases import Case
from fedmpt_core.benchmark.inputs import BenchmarkInputs
from fedmpt_core.benchmark.published import reported_by_the_authors
from fedmpt_core.common.files import whole_file, write_whole

MOST_PAIRS = 8  # that a sentence names (chosen)


def write_results(
    folder: Path,
    inputs: BenchmarkInputs,
    planned: Mapping[str, Sequence[Case]],
    results: Mapping[str, Mapping[str, Any]],
) -> str:
    """Write every table of a plan from the finished runs.

    Args:
        folder: that exists.
        inputs: what was run on.
        planned: cases by table.
        results: by run.

    Returns:
        All tables in Markdown.

    Raises:
        ValueError: a file cannot be written.
    """
    rows_by_table = {table: tables.rows_of(cases, results) for table, cases in planned.items()}
    cases = [case for cases in planned.values() for case in cases]
    written = [results[run] for run in dict.fromkeys(case.identity() for case in cases) if run in results]
    parts = []
    for table, rows in rows_by_table.items():
        # the authors' mean over all t stands beside our own sites' figures only: a sweep has its values apart
        reported = reported_by_the_authors(planned[table][0].job, inputs.sites) if table == "methods" else None
        parts.append(tables.markdown(table, rows, reported))
    towers = sorted({r["backbone"] + (", a stand-in, not CLIP" if r["is_stand_in"] else "") for r in written})
    pairs = pairs_sentence([result["figures"] for result in written])
    note = f"Frozen towers: {'; '.join(towers) or 'none'}. {len(written)} runs."
    text = "\n".join([*parts, pairs, "", note, ""])
    plain = tables.plain(rows_by_table) | {"note": note, "pairs": pairs, "runs": written}
    write_whole(folder / "results.md", text.encode())
    write_whole(folder / "results.json", json.dumps(plain, indent=1, allow_nan=False).encode() + b"\n")
    write_whole(folder / "results.csv", tables.comma_separated(cases, results).encode())
    for table, rows in rows_by_table.items():
        if rows:
            with whole_file(folder / f"{table}.png") as file:
                charts.draw(table, rows, note, file)
    return text


def pairs_sentence(figures: Sequence[Mapping[str, Any]]) -> str:
    """Which label pairs the false activations are of, or why there are none."""
    named = {tuple(pair): None for one in figures for pair in one.get("spurious_pairs", ())}
    if not named:
        return (
            "No false activations of spurious pairs: no two labels occur together at a site clearly more often than in "
            "the test pictures."
        )
    few = ", ".join(" + ".join(pair) for pair in list(named)[:MOST_PAIRS])
    more = f" and {len(named) - MOST_PAIRS} more" if len(named) > MOST_PAIRS else ""
    return f"Spurious pairs, which occur together at a site more often than in the test pictures: {few}{more}."


def write_tuning(folder: Path, settings: str, table: str) -> None:
    """Write the chosen settings and the trials. Raises ValueError when they cannot be written."""
    write_whole(folder / "methods.toml", settings.encode())
    write_whole(folder / "tuning.md", table.encode())
