"""`fedmpt report`: a run's privacy report for people, as one HTML file, as JSON, and the model card as Markdown."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fedmpt_flare.cli.evidence import EXIT_CODES, load_evidence
from fedmpt_flare.cli.options import Independent, Policies, RosterFile, SelfTest, WrongUse


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run, downloaded or simulated.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.html", help="Where the report goes; default: DIR/report.html.")
    ] = None,
    model_card: Annotated[
        Path | None, typer.Option("--model-card", metavar="FILE.md", help="Also write the model card, as Markdown.")
    ] = None,
    roster: RosterFile = None,
    policies: Policies = None,
    independent: Independent = False,
    self_test: SelfTest = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object; no HTML is written unless --out asks.")
    ] = False,
) -> None:
    """Write a run's privacy report: the claim in plain words, budgets, strength, utility, findings. Audits it first.

    Exit code 0: nothing fails. 1: something does, and the report says so. 2: there is no run, or no place to write to.
    """
    from fedmpt_core.audit.auditor import audit_run
    from fedmpt_core.audit.finding import worst
    from fedmpt_core.common.files import write_whole
    from fedmpt_core.federation.run.record import REPORT
    from fedmpt_core.federation.site.policy_card import PolicyCard
    from fedmpt_core.report.build import build_report
    from fedmpt_core.report.html import is_report, render
    from fedmpt_core.report.model_card import is_model_card, to_markdown

    page = out or (None if as_json else folder / REPORT)
    if page:
        _check_place(page, is_report)
    if model_card:
        _check_place(model_card, is_model_card)
    (run,), _ = load_evidence([folder], roster)
    policy_cards = [PolicyCard.load(path) for path in policies or []]
    audit = audit_run(run, independent=independent, policy_cards=policy_cards, self_test=self_test)
    made = build_report(run, audit, datetime.now(UTC).isoformat(timespec="seconds"))
    written = []
    if page:
        write_whole(page, render(made).encode(), mode=0o644)
        written.append(page)
    if model_card:
        write_whole(model_card, to_markdown(made).encode(), mode=0o644)
        written.append(model_card)
    if as_json:
        typer.echo(json.dumps(made.to_dict(), allow_nan=False))
    else:
        typer.echo(made.claim.headline)
        for path in written:
            typer.echo(f"Wrote {path}")
    raise typer.Exit(EXIT_CODES.get(worst(made.findings), 0))


def _check_place(path: Path, ours: Callable[[str], bool]) -> None:
    """A run's folder is evidence, and its makers chose what lies in it: nothing but a report is written over."""
    if path.is_symlink():
        raise WrongUse(f"{path}: is a link to another place: name another file")
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            same = ours(stream.read(1000))
    except OSError as error:
        raise WrongUse(f"{path}: cannot be read ({error.strerror}): name another file") from None
    if not same:
        raise WrongUse(f"{path}: exists and was not written by this command: name another file")
