"""`fedmpt prepare` and `fedmpt partition`: public data sets to manifests, one data set divided over simulated sites."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fedmpt_core.config.site import PublicName
from fedmpt_core.config.toml import ConfigError, load_job, load_sites
from fedmpt_flare.cli.screen import say

Division = Literal["labels", "features", "dirichlet", "uniform"]


def prepare(
    kind: Annotated[PublicName, typer.Argument(help="The data set.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where its archives were unpacked.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Manifest to write (.csv or .parquet).")] = Path(
        "manifest.csv"
    ),
    classes: Annotated[
        Path | None,
        typer.Option("--classes", metavar="FILE", help="New file: also write the class list for a job.toml."),
    ] = None,
    unseen_share: Annotated[
        float | None,
        typer.Option("--unseen-share", help="With --classes: list so much of them, in (0, 1), as unseen_classes."),
    ] = None,
    val_share: Annotated[
        float | None,
        typer.Option("--val-share", help="Share of the training pictures that becomes val; default: the standard."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of every draw: val, test, unseen classes.")] = 0,
    split: Annotated[
        Literal["random", "scenes"],
        typer.Option("--split", help="mlrsnet: test pictures drawn, or the last 23 categories."),
    ] = "random",
    difficult: Annotated[
        bool, typer.Option("--difficult", help="voc2007: a class with difficult objects only counts as present.")
    ] = False,
    missing: Annotated[
        Literal["refuse", "skip"], typer.Option("--missing", help="Refuse a folder that lacks pictures, or skip them.")
    ] = "refuse",
    min_labels: Annotated[
        int, typer.Option("--min-labels", min=0, help="Leave out pictures with fewer labels, in every split.")
    ] = 0,
) -> None:
    """Turn a data set's folder into a manifest, and say beside it, in FILE.json, what was kept and what left out."""
    from fedmpt_core.data.public.folder import FolderOptions
    from fedmpt_core.data.public.prepare import ClassFile, PrepareOptions, record_path
    from fedmpt_core.data.public.prepare import prepare as prepare_folder
    from fedmpt_core.data.public.registry import DATASETS
    from fedmpt_core.data.public.splits import class_split

    if unseen_share is not None and classes is None:
        raise ConfigError("--unseen-share needs --classes FILE, where the two lists of classes go")
    options = PrepareOptions(FolderOptions(val_share, seed, split, difficult), missing, min_labels)
    lists = None
    if classes:
        every = DATASETS[kind].classes
        seen, unseen = (every, ()) if unseen_share is None else class_split(every, unseen_share, seed)
        lists = ClassFile(classes, seen, unseen)
        lists.check(out)
    with _bar("reading annotations") as report:
        found = prepare_folder(kind, folder, out, options, on_progress=report)
    say(f"Wrote {out}: " + ", ".join(f"{n} {name}" for name, n in found.pictures.items()) + " pictures")
    for what, counts in (
        ("without any label, kept as all-negative", found.unlabelled),
        (f"left out with fewer than {min_labels} labels", found.few_labels),
    ):
        if any(counts.values()):
            say(f"  {what}: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    if found.missing:
        say(f"  left out because the file is missing: {found.missing}")
    say(f"Wrote {record_path(out)}: how the manifest came about")
    if lists:
        lists.write()
        unseen = f" and {len(lists.unseen)} unseen ones" if lists.unseen else ""
        say(f"Wrote {classes}: {len(lists.seen)} classes{unseen}")


def partition(
    job: Annotated[Path, typer.Argument(metavar="JOB.TOML", help="The job; its seed fixes the partition.")],
    sites: Annotated[
        Path | None,
        typer.Option("--sites", metavar="FILE", help="The simulated sites; default: site.toml beside the job."),
    ] = None,
    kind: Annotated[Division | None, typer.Option("--kind", help="How to divide; default: the sites' file.")] = None,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="Number of parts; default: one for each site of the file.")
    ] = None,
    heterogeneity: Annotated[
        float | None, typer.Option("--heterogeneity", help="Number of parts as a share of the classes, in (0, 1].")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="For dirichlet: concentration; default: the sites' file.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Replaces the seed of the job.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Partition to write; default: the sites' file.")
    ] = None,
) -> None:
    """Divide a data set over simulated sites once, so that all runs and methods share the division."""
    from fedmpt_core.data.partition import sites_for
    from fedmpt_core.data.partition_file import save_partition
    from fedmpt_core.federation.make_partition import divide

    config = load_job(job, seed=seed)
    file = sites or job.parent / "site.toml"
    found = load_sites(file)
    site = next(iter(found.values()))
    divided = kind or site.data.partition
    if alpha is not None and divided != "dirichlet":
        raise ConfigError(f"--alpha {alpha:g}: '{divided}' has none: leave it out, or add --kind dirichlet")
    if count and heterogeneity:
        raise ConfigError("--count and --heterogeneity both say how many parts there are: give one of them")
    parts = sites_for(heterogeneity, len(config.classes)) if heterogeneity is not None else count or len(found)
    place = out or (Path(site.data.partition_file) if site.data.partition_file else None)
    if place is None:
        raise ConfigError(f"{file}: names no data.partition_file: say with --out where the partition goes")
    with _bar("patch features") as report:
        made, dataset = divide(
            config,
            site,
            divided,
            parts,
            alpha=site.data.dirichlet_alpha if alpha is None else alpha,
            on_progress=report,
        )
    save_partition(made, dataset, place)
    sizes = [len(part) for part in made.parts]
    say(f"Wrote {place}: {len(dataset)} records in {parts} parts of {min(sizes)} to {max(sizes)}, by {made.kind}")
    if parts != len(found):
        say(f"{file} names {len(found)} sites: a run with this partition needs {parts}")


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that goes away when the work is done."""
    columns = (TextColumn(f"› {what}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(highlight=False), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
