"""Every `fedmpt` command in a document exists, with the options that it is shown with."""

import re
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from fedmpt_flare.cli.main import app
from tests.federation import REPOSITORY

GLOBS = ("*.md", "docs/*.md", "deploy/**/*.md", ".github/**/*.yml")
PAGES = sorted(page for glob in GLOBS for page in REPOSITORY.glob(glob))
LINE = re.compile(r"(?:`|^|/bin/)fedmpt ([a-z-][^`|#\n]*)", re.MULTILINE)
ROOT = typer.main.get_command(app)


def unknown(line: str) -> list[str]:
    """What of a command line, without `fedmpt`, this release does not have."""
    words, path, command = [word.strip("[].,") for word in line.split()], [], ROOT
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        path.append(words.pop(0))
        command = command.get_command(typer.Context(command), path[-1])
    if command is None:
        return [" ".join(path)]
    known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    return [word for word in words if word.startswith("--") and word not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_command_of_a_page_exists(page: Path) -> None:
    wrong = {line: missing for line in LINE.findall(page.read_text()) if (missing := unknown(line))}
    assert not wrong


def test_what_does_not_exist_would_be_found() -> None:
    assert unknown("simulat jobs/demo/job.toml") == ["simulat"]
    assert unknown("ledger shew x") == ["ledger shew"]
    assert unknown("simulate job.toml --inseecure --out x") == ["--inseecure"]
    assert unknown("ledger") == []
