"""What a person sees: tables on standard output, bars and one sentence per error on standard error."""

import codecs
import contextlib
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedmpt_core.common.text import shown

_TENTHS = 10  # lines on a kind of work, where there is no terminal (chosen)
_SIGNS = "fedmpt.signs"  # how an encoding deals with signs that it lacks, by Python's register
_OTHERS = {"–": "-", "›": ">", "…": "...", "→": "->", "×": "x", "±": "+-"}
SEVERITIES = {
    "fail": "[red]FAIL[/]",
    "unshown": "[magenta]not shown[/]",
    "warning": "[yellow]warning[/]",
    "note": "note",
}


def never_fail_at_a_sign() -> None:
    """Signs that the terminal's encoding lacks are written in others from now on; no command ends because of one."""
    codecs.register_error(_SIGNS, _in_others)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_SIGNS)


def _in_others(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(_OTHERS.get(s, ascii(s)[1:-1]) for s in signs), error.end


def fail(text: str) -> None:
    """One error, on standard error."""
    Console(stderr=True, highlight=False).print(Text("error: ", style="bold red") + Text(text), soft_wrap=True)


def harmless(text: Any) -> str:
    """Text from strangers for a table or a console that reads markup."""
    return escape(shown(text))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a library's prints off the screen."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def print_table(table: Table, console: Console | None = None) -> None:
    """A table of whole cells: cut off, the long names of two sites could look the same."""
    for column in table.columns:
        column.overflow = "fold"
    (console or Console(highlight=False)).print(table)


def table_of(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], caption: str = "") -> Table:
    """A table of plain cells, in which no text marks anything up."""
    table = Table(*map(escape, columns), caption=escape(caption) or None)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else escape(cell) for cell in row))
    return table


def show_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    caption: str = "",
    console: Console | None = None,
) -> None:
    """Print such a table below its title, a line that is never broken: it may be the name of a file."""
    console = console or Console(highlight=False)
    if title:
        console.print(Text(title, style="italic"), soft_wrap=True)
    print_table(table_of(columns, rows, caption), console)


def show_findings(title: str, findings: Sequence[Any]) -> None:
    """Every finding with what to do; nothing where there are none."""
    if not findings:
        return
    console = Console(highlight=False)
    console.print(f"[bold]{title}[/]")
    for f in findings:
        console.print(f"  {SEVERITIES[f.severity]} [bold]{f.code}[/] at {harmless(f.where)}", soft_wrap=True)
        remedy = f"\n[dim]do:[/] {harmless(f.remedy)}" if f.remedy else ""
        console.print(Padding(harmless(f.text) + remedy, (0, 0, 0, 6)))


@contextlib.contextmanager
def progress(*, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """A bar for each kind of work, which go away when the work is done; a line now and then where there is no terminal.

    Yields:
        What takes the kind of work, how much is done, of how much, and perhaps what goes on just now.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("› {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    console = Console(stderr=True, quiet=quiet, highlight=False)
    if not console.is_terminal:
        tenths: dict[str, int] = {}

        def say(what: str, done: int, total: int, now: str = "") -> None:
            tenth = _TENTHS * done // max(total, 1)
            if tenths.get(what) != tenth:
                console.print(Text(f"› {what} {done}/{total} {now}".rstrip()), soft_wrap=True)
            tenths[what] = tenth

        yield say
        return
    with Progress(*columns, console=console, transient=True) as bars:

        def report(what: str, done: int, total: int, now: str = "") -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(escape(what), total=total)
            bars.update(tasks[what], completed=done, total=total, description=escape(f"{what} {now}".strip()))

        yield report


@contextlib.contextmanager
def interruptible(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C ends the command with a sentence and exit code 130.

    Args:
        how_to_go_on: asked when that happens; what the sentence says after "stopped".
    """
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True, highlight=False).print(Text(f"stopped{how_to_go_on()}"), soft_wrap=True)
        raise typer.Exit(130) from None
