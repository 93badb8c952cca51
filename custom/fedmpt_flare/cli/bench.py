"""`fedmpt bench`: methods side by side on one folder's data, over several seeds."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fedmpt_flare.cli.options import AsJson


def bench(
    methods: Annotated[str, typer.Argument(metavar="METHODS", help="Methods, separated by commas, or 'all'.")],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A folder with job.toml and site.toml, or 'scenes' or 'scenes-private', the embedded ones.",
        ),
    ],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds, counted from --first-seed.")] = 3,
    first_seed: Annotated[int, typer.Option("--first-seed", min=0, help="The first seed.")] = 0,
    table: Annotated[
        list[str] | None,
        typer.Option(
            "--table",
            help="What to measure; may be given several times: methods (the default), heterogeneity, masks, "
            "participation, ablation, sensitivity.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for results; one that is there is continued.")
    ] = Path("runs/bench"),
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Instead: try each method's settings in DATA/grid.toml, judged on validation pictures."
        ),
    ] = False,
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="Folder of patch features; default: the user's.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Train methods side by side in one process; write tables and pictures. Repeat it to go on with a broken-off one.

    Every run is a plain federation with FLARE's arithmetic; differential privacy is as DATA's job has it.
    """
    from fedmpt_core.benchmark.cases import cases_of
    from fedmpt_core.benchmark.folder import write_results, write_tuning
    from fedmpt_core.benchmark.inputs import METHODS, load_inputs
    from fedmpt_core.benchmark.results_file import open_results
    from fedmpt_core.benchmark.runs import run_missing
    from fedmpt_core.benchmark.shared_records import SharedRecords
    from fedmpt_core.benchmark.tuning import chosen, methods_toml, ordered, trials, tuning_table
    from fedmpt_core.common.files import require_place
    from fedmpt_core.config.site import default_cache
    from fedmpt_flare.cli.screen import interruptible, progress

    inputs = load_inputs(data)
    require_place(out)
    names = METHODS if methods == "all" else tuple(m.strip() for m in methods.split(","))
    numbers = range(first_seed, first_seed + seeds)
    if tune:
        tried = trials(inputs, names, numbers)
        planned = {"tuning": ordered(tried)}
    else:
        tried = []
        planned = {name: cases_of(inputs, name, names, numbers) for name in dict.fromkeys(table or ["methods"])}
    cases = [case for cases in planned.values() for case in cases]
    with (
        interruptible(lambda: f"; the same command goes on with what is missing in {out}"),
        open_results(out) as finished,
        progress(quiet=as_json) as show,
    ):

        def on_run(case: Any, result: Any, done: int, total: int) -> None:
            show("runs", done, total, f"({case.row}, seed {case.job.seed})")
            if result and not as_json:
                figures = f"mAP {result['figures']['mAP']:.1f} in {result['seconds']:.0f} s"
                typer.echo(f"{done} of {total}: {case.row}, seed {case.job.seed}: {figures}", err=True)

        def on_features(what: str, done: int, total: int) -> None:
            show("features", done, total, f"({what})")

        run_missing(cases, finished, SharedRecords(cache or default_cache(), on_features, threads=threads), on_run)
        if tune:
            text = tuning_table(tried, finished.results)
            write_tuning(out, methods_toml(inputs, chosen(tried, finished.results)), text)
        else:
            text = write_results(out, inputs, planned, finished.results)
    if as_json:
        typer.echo((out / "results.json").read_text() if not tune else json.dumps({"tuning": text}))
        return
    typer.echo(text)
    typer.echo(f"Wrote {out}")
