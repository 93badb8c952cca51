"""`fedmpt report`: a run's privacy report or all jobs' budgets for people, as one HTML file or JSON; the model card."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmpt_core.common.text import shown
from fedmpt_flare.cli.evidence import EXIT_CODES, load_evidence
from fedmpt_flare.cli.options import Independent, Policies, RosterFile, SelfTest, WrongUse

if TYPE_CHECKING:
    from fedmpt_core.audit.auditor import Examination
    from fedmpt_core.audit.run_evidence import Run
    from fedmpt_core.audit.site_ledger import OwnLedger
    from fedmpt_core.federation.site.policy_card import PolicyCard

BUDGETS = "budgets.html"


def report(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="A run, with exports of sites' ledgers. Several runs, or exports alone: the budgets of all jobs.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE.html", help="Where the report goes; default: DIR/report.html, or budgets.html here."
        ),
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
    """Write a run's privacy report, or what all jobs spent on each data set, as of several runs and exports.

    Of a run: the claim in plain words, budgets, strength, utility, findings. All is audited first. Exit code 0: nothing
    fails. 1: something contradicts the claim, and the report says so. 2: there is no run, or no place to write to. 3: a
    ledger that the claim rests on is missing.
    """
    from fedmpt_core.audit.auditor import examine
    from fedmpt_core.audit.site_ledger import is_ledger
    from fedmpt_core.common.files import write_whole
    from fedmpt_core.federation.run.record import REPORT
    from fedmpt_core.federation.site.policy_card import PolicyCard
    from fedmpt_core.report.html import is_report
    from fedmpt_core.report.model_card import is_model_card

    folders = [place for place in places if not is_ledger(place)]
    of_one_run = len(folders) == 1
    if model_card and not of_one_run:
        raise WrongUse("--model-card is of one run: name that run alone")
    page = out or (None if as_json else folders[0] / REPORT if of_one_run else Path(BUDGETS))
    if page:
        _check_place(page, is_report)
    if model_card:
        _check_place(model_card, is_model_card)
    cards = [PolicyCard.load(path) for path in policies or []]
    runs, ledgers = load_evidence(places, roster)
    examined = examine(runs, ledgers, independent=independent, policy_cards=cards, self_test=self_test)
    made = datetime.now(UTC).isoformat(timespec="seconds")
    written = _of_run(runs[0], examined, made) if of_one_run else _of_budgets(examined, runs, ledgers, cards, made)
    for path, text in ((page, written.html), (model_card, written.card)):
        if path:
            write_whole(path, text.encode(), mode=0o644)
    if as_json:
        typer.echo(json.dumps(written.plain, allow_nan=False))
    else:
        typer.echo("\n".join([*written.lines, *(f"Wrote {path}" for path in (page, model_card) if path)]))
    raise typer.Exit(EXIT_CODES.get(examined.worst, 0))


@dataclass(frozen=True)
class _Written:
    """What goes to a page, a model card, a script and the screen."""

    html: str
    card: str
    plain: dict[str, Any]
    lines: list[str]


def _of_run(run: "Run", examined: "Examination", made: str) -> _Written:
    from fedmpt_core.report.build import build_report
    from fedmpt_core.report.html import render
    from fedmpt_core.report.model_card import to_markdown

    audit = replace(examined.audits[0], findings=examined.findings)
    whole = build_report(run, audit, made)
    return _Written(render(whole), to_markdown(whole), whole.to_dict(), [whole.claim.headline])


def _of_budgets(
    examined: "Examination", runs: "list[Run]", ledgers: "list[OwnLedger]", cards: "list[PolicyCard]", made: str
) -> _Written:
    from fedmpt_core.report.budgets import budget_report
    from fedmpt_core.report.html import render_budgets

    whole = budget_report(examined, runs, ledgers, cards, made)
    lines = [whole.headline]
    for account in (one.account for one in whole.accounts):
        cap = "" if account.cap is None else f" of {account.cap:g}"
        jobs = f"{len(account.jobs)} job{'s' * (len(account.jobs) != 1)}"
        spent = f"epsilon {account.total:.3f}{cap} (delta {account.delta:g}) spent by {jobs}"
        lines.append(f"{shown(account.site)}, data set '{shown(account.dataset)}': {spent}")
    return _Written(render_budgets(whole), "", whole.to_dict(), lines)


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
