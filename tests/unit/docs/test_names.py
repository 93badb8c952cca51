"""Whatever a document or a docstring names is there: links and their headings, paths, dotted names, make targets.

Read from source text and syntax trees: nothing is imported.
"""

import ast
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.federation import REPOSITORY

DOCUMENTS = sorted(
    [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob(".github/**/*.*")]
    + [path for path in (REPOSITORY / "deploy").rglob("*") if path.is_file()]
)
PAGES = [path for path in DOCUMENTS if path.suffix == ".md"]
SOURCES = sorted(path for top in ("fedmpt_core", "custom", "jobs") for path in (REPOSITORY / top).rglob("*.py"))
PACKAGES = {"fedmpt_core": REPOSITORY, "fedmpt_flare": REPOSITORY / "custom", "tests": REPOSITORY}
YOURS = re.compile(r"^jobs/mine\b|/[A-Z]+/")  # a reader's own folder in examples

LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
DOTTED = re.compile(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.\w+)+(?!/)")
PATH = re.compile(r"(?<![\w./-])(?:fedmpt/)?((?:fedmpt_core|custom|tests|jobs|deploy|docs)/[\w./*-]*[\w/*])")
MODULE = re.compile(r"`([\w/]+\.py)`")
TARGET = re.compile(r"(?:`make ([a-z-]+)|^make ([a-z-]+)(?= *#| *$))", re.MULTILINE)


@functools.cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(text(path))


def defined(body: list[ast.stmt]) -> Iterator[tuple[str, list[ast.stmt]]]:
    """Names that statements define, each with the statements of its own body."""
    for node in body:
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node.name, node.body
            case ast.Assign():
                yield from ((name.id, []) for name in node.targets if isinstance(name, ast.Name))
            case ast.AnnAssign(target=ast.Name(name)):
                yield name, []


def exists(dotted: str) -> bool:
    """Whether a package, a module, or what a module defines has this name."""
    first, *rest = dotted.split(".")
    place = PACKAGES[first] / first
    while rest and (place / rest[0]).is_dir():
        place /= rest.pop(0)
    if not rest:
        return True
    module = place / f"{rest[0]}.py"
    if module.is_file():
        rest.pop(0)
    body = tree(module if module.is_file() else place / "__init__.py").body
    for name in rest:
        names = dict(defined(body))
        if name not in names:
            return False
        body = names[name]
    return True


def headings(path: Path) -> set[str]:
    """Names by which a link reaches the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", text(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def absent(path: Path) -> Iterator[str]:
    """What a text names that is not there."""
    for dotted in DOTTED.findall(text(path)):
        if not exists(dotted):
            yield dotted
    for place in PATH.findall(text(path)):
        if not (YOURS.search(place) or any(REPOSITORY.glob(place.rstrip("/")))):
            yield place
    for module in MODULE.findall(text(path)):
        rooms = (REPOSITORY, REPOSITORY / "fedmpt_core", REPOSITORY / "custom" / "fedmpt_flare", path.parent)
        if not any((room / module).is_file() for room in rooms):
            yield module


def broken(page: Path) -> Iterator[str]:
    """Links of a page that lead nowhere."""
    for place, heading in LINK.findall(text(page)):
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (heading and heading not in headings(target)):
            yield f"{place}#{heading}"


def by_file(look: Callable[[Path], Iterable[str]], files: Iterable[Path]) -> dict[str, list[str]]:
    """What a look at each file finds, where it finds something."""
    findings = {path.relative_to(REPOSITORY).as_posix(): list(look(path)) for path in files}
    return {path: names for path, names in findings.items() if names}


def test_what_a_document_or_a_docstring_names_is_there() -> None:
    assert by_file(absent, [*DOCUMENTS, *SOURCES]) == {}


def test_links_lead_somewhere() -> None:
    assert by_file(broken, PAGES) == {}


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text(REPOSITORY / "Makefile"), re.MULTILINE))
    assert by_file(lambda page: {a or b for a, b in TARGET.findall(text(page))} - targets, PAGES) == {}


@pytest.mark.parametrize(
    ("dotted", "there"),
    [
        ("fedmpt_core.privacy.ledger", True),
        ("fedmpt_core.privacy.ledger.ledger.Ledger.reserve", True),
        ("fedmpt_core.privacy.ledger.ledger.Ledger.renew", False),
        ("fedmpt_core.privacy.chain", False),
        ("fedmpt_flare.site.executor.FedMPTExecutor", True),
        ("fedmpt_flare.executor.FedMPTExecutor", False),
    ],
)
def test_a_name_that_is_not_there_would_be_found(dotted: str, there: bool) -> None:
    assert exists(dotted) is there
