"""`fedmpt conditions`: lists of abstract conditions, found with a language model or read. Nothing is sent."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fedmpt_flare.cli.options import AsJson, Kit, SiteFile, SiteName, Unsigned, WrongUse, check_signed

conditions = typer.Typer(
    help="Lists of abstract conditions: find them with a language model, look at them.", no_args_is_help=True
)

Classes = Annotated[
    Path, typer.Argument(metavar="CLASSES", help="A job.toml (its classes and backbone), or a text file, one a line.")
]
_FORMATS = {"generate": "writes sentences and sums them up", "score": "chooses from a lexicon"}


@conditions.command("list")
def list_(as_json: AsJson = False) -> None:
    """The lists that come with this release; a job names one in `model.conditions`."""
    from fedmpt_core.config.condition_lists import load_conditions, preset_names

    lists = [load_conditions(name) for name in preset_names()]
    if as_json:
        typer.echo(json.dumps([vars(one) for one in lists]))
        return
    from fedmpt_flare.cli.screen import show_table

    rows = []
    for one in lists:
        whom = f"{len(one.classes)} classes" if one.classes else "any classes"
        rows.append((one.name, ", ".join(one.conditions), whom, one.digest[:12]))
    show_table("", ("name", "conditions", "for", "digest"), rows)


@conditions.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A list of this release, or a .json file.")],
    answers: Annotated[bool, typer.Option("--answers", help="Also print the model's raw answers.")] = False,
    as_json: AsJson = False,
) -> None:
    """One list: its words, what they were chosen from, and where they come from."""
    from fedmpt_core.conditions.journal import unpacked
    from fedmpt_core.config.condition_lists import read_content

    content = read_content(name)
    provenance = content["provenance"]
    raw = unpacked(provenance["answers"]) if content["schema"] > 1 and answers else None
    if as_json:
        typer.echo(json.dumps({**content, "raw_answers": raw} if answers else content))
        return
    typer.echo(f"{content['name']}: {', '.join(content['conditions'])}")
    typer.echo(f"Digest {content['digest']}")
    typer.echo(provenance["note"] or "No note.")
    if content["schema"] == 1:
        if answers:
            raise WrongUse(f"{name}: was taken by hand: no model was asked")
        return
    model, settings = provenance["model"], provenance["settings"]
    typer.echo(f"For {len(content['classes'])} classes: {', '.join(content['classes'])}")
    typer.echo(
        f"Model {model['name']} {_FORMATS[provenance['method']]}; weights {model['weights'][:16]}, {model['library']}"
    )
    typer.echo(f"{settings['label_sets']} label sets, seed {settings['seed']}; text features of {settings['backbone']}")
    from fedmpt_flare.cli.screen import show_table

    rows = []
    for row in provenance["ranking"]:
        visual = "–" if row["visual"] is None else f"{row['visual']:.2e}"
        kept, nearest = "kept" if row["kept"] else "", row["closest"]
        rows.append((kept, row["condition"], f"{row['coverage']:.2f}", visual, nearest, f"{row['cosine']:.2f}"))
    show_table("", ("", "condition", "coverage", "visual", "closest kept", "cosine"), rows)
    if answers and raw is None:
        typer.echo(f"The raw answers were too long for the list; their SHA-256 is {provenance['answers']['sha256']}.")
    for line in raw or ():
        typer.echo(f"{line['stage']} {line['number']}{' (cut off)' if line['cut'] else ''}: {line['answer']}")


@conditions.command()
def discover(
    classes: Classes,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.json", help="The list to write; must not exist.")],
    model: Annotated[
        str,
        typer.Option("--model", help="A causal language model: name on the hub, folder, GGUF file, or 'embedded'."),
    ] = "embedded",
    scorer: Annotated[
        bool, typer.Option("--scorer", help="Let the model choose from a lexicon instead of writing; for small ones.")
    ] = False,
    lexicon: Annotated[
        Path | None, typer.Option("--lexicon", metavar="FILE.json", help="With --scorer: a lexicon of your own.")
    ] = None,
    number: Annotated[int, typer.Option("--conditions", help="How many to keep.")] = 5,
    candidates: Annotated[
        int | None, typer.Option("--candidates", help="How many the model shall name; default 15.")
    ] = None,
    budget: Annotated[int, typer.Option("--budget", help="Most label sets (pairs and triples) to ask about.")] = 240,
    sentences: Annotated[
        int | None, typer.Option("--sentences", help="Sentences asked for each label set; default 3.")
    ] = None,
    most_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Where an answer is cut off; default 160.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 (default): always the most probable token.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Prompts that are run together; default 8.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of label sets and drawn tokens.")] = 0,
    most_cosine: Annotated[
        float | None, typer.Option("--max-cosine", help="Largest cosine between two kept; default 0.9, stand-in 0.7.")
    ] = None,
    pictures: Annotated[
        int, typer.Option("--pictures", help="Embedded scenes to measure visual usefulness on; 0: leave it out.")
    ] = 0,
    counts: Annotated[
        list[Path] | None, typer.Option("--counts", metavar="FILE", help="A site's noisy counts; one for each site.")
    ] = None,
    raw: Annotated[
        Path | None,
        typer.Option("--raw", metavar="FILE.jsonl", help="Raw answers, to go on with; default: beside --out."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Ask a language model about the classes and write a frozen list of conditions. Needs no data.

    A run that broke off goes on when the same command is given again.
    """
    from fedmpt_core.conditions.class_list import read_classes
    from fedmpt_core.conditions.cooccurrence import read_counts
    from fedmpt_core.conditions.discover import discover, write_list
    from fedmpt_core.conditions.scorer import load_lexicon
    from fedmpt_core.conditions.stages import DiscoveryConfig

    if out.suffix != ".json" or out.exists() or not out.parent.is_dir():
        raise WrongUse(f"--out {out}: name a new .json file in an existing folder; a list is never replaced")
    if lexicon and not scorer:
        raise WrongUse(f"--lexicon {lexicon}: the model chooses from it with --scorer only")
    writing: dict[str, Any] = {
        "candidates": candidates,
        "sentences": sentences,
        "most_tokens": most_tokens,
        "temperature": temperature,
        "batch_size": batch_size,
    }
    given = {name: value for name, value in writing.items() if value is not None}
    if scorer and given:
        options = ", ".join("--max-new-tokens" if n == "most_tokens" else f"--{n.replace('_', '-')}" for n in given)
        raise WrongUse(f"{options}: of a model that writes, while one with --scorer chooses: leave it out")
    config = DiscoveryConfig(
        method="score" if scorer else "generate",
        conditions=number,
        **given,
        budget=budget,
        seed=seed,
        most_cosine=most_cosine,
        pictures=pictures,
    )
    names, tower = read_classes(classes)
    words = load_lexicon(lexicon) if scorer else None
    released = [read_counts(path) for path in counts or ()]
    from fedmpt_core.conditions.language_model import LanguageModel
    from fedmpt_core.model.backbone.load import load_backbone
    from fedmpt_core.model.device import pick_device
    from fedmpt_flare.cli.screen import progress

    if not as_json:
        typer.echo(f"{len(names)} classes; loading the language model {model} and the text tower")
    backbone = load_backbone(tower).to(pick_device(device))
    asked = LanguageModel.load(model, device)
    with progress(quiet=as_json) as report:
        content = discover(
            out.stem,
            names,
            config,
            asked,
            backbone,
            raw or out.with_suffix(".answers.jsonl"),
            lexicon=words,
            counts=released,
            on_progress=report,
        )
    write_list(content, out)
    if as_json:
        typer.echo(json.dumps(content))
    else:
        show(str(out))
        typer.echo(f'Wrote {out}. A job beside it names it with [model] conditions = "{out.name}".')


@conditions.command()
def counts(
    site_file: SiteFile,
    classes: Annotated[
        Path, typer.Option("--classes", metavar="CLASSES", help="A job.toml, or a text file with one class a line.")
    ],
    name: SiteName,
    noise_multiplier: Annotated[
        float, typer.Option("--noise-multiplier", help="Standard deviation of the noise over --max-norm.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.json", help="The counts to write; must not exist.")],
    max_norm: Annotated[
        float, typer.Option("--max-norm", help="Bound on what one record or group adds to all pairs together (L2).")
    ] = 1.0,
    kit: Kit = None,
    unsigned: Unsigned = False,
    in_clear: Annotated[
        bool, typer.Option("--in-clear", help="Agree that the counts leave without a mask; the noise protects them.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="The job's seed, where it decides what pictures there are.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would cost, charge nothing, write nothing.")
    ] = False,
) -> None:
    """Release this site's noisy co-occurrence counts of labels, charged to its ledger. Off unless a site runs this.

    Whoever runs `discover --counts` then asks more about pairs that occur together.
    """
    from fedmpt_core.conditions.class_list import read_classes
    from fedmpt_core.conditions.cooccurrence import CountRelease, write_counts
    from fedmpt_core.config.toml import load_site

    check_signed(kit, unsigned=unsigned)
    if out.exists() or not out.parent.is_dir():
        raise WrongUse(f"--out {out}: name a new file in an existing folder")
    names, _ = read_classes(classes)
    release = CountRelease(
        load_site(site_file, name),
        name,
        kit,
        names,
        noise_multiplier=noise_multiplier,
        max_norm=max_norm,
        seed=seed,
        in_clear=in_clear,
    )
    cost = release.projection
    price = f"epsilon {cost.job:.3f}; the data set's total with it: {cost.total:.3f} of {cost.cap:g}"
    if dry_run:
        typer.echo(f"Nothing was charged. The release would cost {price}.")
        return
    write_counts(release.make(), out)
    typer.echo(f"Wrote {out}. The release cost {price}.")
