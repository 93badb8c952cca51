"""`fedmpt predict`: labels for pictures, by a finished run's model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedmpt_flare.cli.options import AsJson


def predict(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that a run wrote.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files.")],
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Also write where each label was found, per condition, as heat maps."),
    ] = False,
    top: Annotated[int, typer.Option("--top", min=1, help="Labels to show per picture.")] = 5,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for heat maps; default: DIR/explanations."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Label pictures with a finished run's model; exit code 1 when some could not be labelled."""
    from fedmpt_core.common.files import require_place
    from fedmpt_core.federation.prediction import Predictor
    from fedmpt_flare.cli.screen import fail

    predictor, folder = Predictor.load(run), None
    if explain:
        folder = out or run / "explanations"
        require_place(folder)
        folder.mkdir(parents=True, exist_ok=True)
    answers = [predictor.answer(path, folder, top=top) for path in images]
    if as_json:
        typer.echo(json.dumps([a.to_dict(top) for a in answers]))
    else:
        _show(answers, top, predictor)
    failed = [a for a in answers if a.error]
    if failed:
        fail(f"{len(failed)} of {len(answers)} pictures: the first is {failed[0].picture}, which {failed[0].error}")
        raise typer.Exit(1)


def _show(answers: Sequence[Any], top: int, predictor: Any) -> None:
    from rich.text import Text

    from fedmpt_flare.cli.screen import show_table

    if predictor.is_stand_in:
        typer.echo(f"Backbone: {predictor.backbone_name}: a stand-in")
    for answer in answers:
        if not len(answer.probabilities):
            typer.echo(f"{answer.picture}\n  no labels: it {answer.error}")
            continue
        rows = []
        for label, probability in answer.ranked(top):
            style = "bold" if probability >= predictor.threshold else "dim"
            rows.append((Text(label, style), Text(f"{probability:.3f}", style)))
        show_table(answer.picture, ("label", "probability"), rows)
        gates = ", ".join(f"{c} {w:.2f}" for c, w in zip(predictor.conditions, answer.gate, strict=True))
        typer.echo(f"  gate: {gates}")
        if answer.explanation:
            typer.echo(f"  heat maps: {answer.explanation}")
