"""`fedmpt prepare`: a public data set's folder, or pictures as a lab keeps them, to a manifest."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedmpt_core.config.datasets import LayoutName, PublicName
from fedmpt_flare.cli.options import WrongUse


def prepare(
    kind: Annotated[
        Literal[PublicName, LayoutName],
        typer.Argument(
            help="The data set; or your own: 'folders' (one per class), 'yolo' (text files), 'table' (a CSV file)."
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where its archives were unpacked; of a table, the file.")
    ],
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
    test_share: Annotated[
        float | None, typer.Option("--test-share", help="Your own: share that becomes test where nothing says so; 0.2.")
    ] = None,
    path_column: Annotated[
        str, typer.Option("--path-column", help="table: column of pictures; default: guessed from its name.")
    ] = "",
    labels_column: Annotated[
        str,
        typer.Option(
            "--labels-column",
            help="table: column of labels; default: guessed, or a column per label (1, 0, -1 unknown).",
        ),
    ] = "",
    separator: Annotated[
        str, typer.Option("--separator", help="table: between the labels of a cell; default: | or ; or a comma.")
    ] = "",
    split_column: Annotated[
        str, typer.Option("--split-column", help="table: column of train, val, test; default: guessed, or drawn.")
    ] = "",
    group_column: Annotated[
        str, typer.Option("--group-column", help="table: column of patients; default: guessed, or none.")
    ] = "",
    pictures: Annotated[
        str, typer.Option("--pictures", metavar="DIR", help="table: where its paths start; default: beside the table.")
    ] = "",
) -> None:
    """Turn a data set's folder into a manifest, and say beside it, in FILE.json, what was kept and what left out."""
    from fedmpt_core.data.layouts import TableOptions, read_layout
    from fedmpt_core.data.public.folder import FolderOptions
    from fedmpt_core.data.public.prepare import ClassFile, PrepareOptions, record_path
    from fedmpt_core.data.public.prepare import prepare as prepare_folder
    from fedmpt_core.data.public.registry import DATASETS
    from fedmpt_core.data.public.splits import class_split
    from fedmpt_flare.cli.screen import progress

    if unseen_share is not None and classes is None:
        raise WrongUse("--unseen-share needs --classes FILE, where the two lists of classes go")
    table = TableOptions(path_column, labels_column, separator, split_column, group_column, pictures)
    own = kind == "folders" or kind == "yolo" or kind == "table"
    if (kind != "table" and table != TableOptions()) or (test_share is not None and not own):
        raise WrongUse(f"{kind}: columns are for 'table', --test-share is for your own pictures: leave them out")
    options = PrepareOptions(
        FolderOptions(val_share, seed, split, difficult), missing, min_labels, test_share, table if own else None
    )
    lists = None
    if classes:
        if kind == "folders" or kind == "yolo" or kind == "table":
            every = read_layout(kind, folder, table).classes
        else:
            every = DATASETS[kind].classes
        seen, unseen = (every, ()) if unseen_share is None else class_split(every, unseen_share, seed)
        lists = ClassFile(classes, seen, unseen)
        lists.check(out)
    with progress() as report:
        record = prepare_folder(kind, folder, out, options, on_progress=partial(report, "reading annotations"))
    typer.echo(f"Wrote {out}: " + ", ".join(f"{n} {name}" for name, n in record.pictures.items()) + " pictures")
    for what, counts in (
        ("without any label, kept as all-negative", record.unlabelled),
        (f"left out with fewer than {min_labels} labels", record.few_labels),
    ):
        if any(counts.values()):
            typer.echo(f"  {what}: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    if record.missing:
        typer.echo(f"  left out because the file is missing: {record.missing}")
    typer.echo(f"Wrote {record_path(out)}: how the manifest came about")
    if own:
        typer.echo(
            f"{len(record.classes)} labels: {', '.join(record.classes[:12])}{' ...' * (len(record.classes) > 12)}"
        )
    if lists:
        lists.write()
        unseen = f" and {len(lists.unseen)} unseen ones" if lists.unseen else ""
        typer.echo(f"Wrote {classes}: {len(lists.seen)} classes{unseen}")
