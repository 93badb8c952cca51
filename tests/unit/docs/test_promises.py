"""What SECURITY.md and the page on secure aggregation promise names the test that holds it, and that test exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROMISES = ("SECURITY.md", "docs/secure-aggregation.md")
REFERENCE = re.compile(r"`(?:tests/)?((?:unit|flare|browser|[a-z]+)/[\w/]+\.py)(?:::(\w+))?`")
PROMISING = re.compile(r"\b(never|nobody|nothing|cannot|refuse[sd]?|held back|alone|gone|only)\b", re.IGNORECASE)
# what is said there is a limit, an instruction or an explanation, and no promise
LIMITS = ("Not covered", "Reporting", "Going on after a crash", "Numbers", "No two sums of one round share a site")


@cache
def names_in(path: Path) -> set[str]:
    """Functions of a file."""
    return {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}


def named(text: str, page: str = "") -> list[tuple[Path, str]]:
    """The tests that a text names, itself or in its page's footnotes; the name is '' for a whole file."""
    notes = dict(re.findall(r"^\[\^(\w+)\]: (.*)$", page, re.MULTILINE))
    text += "".join(notes.get(mark, "") for mark in re.findall(r"\[\^(\w+)\]", text))
    tests = []
    for path, name in REFERENCE.findall(text):
        file = ROOT / "tests" / path
        tests.append((file if file.exists() else ROOT / "tests" / "unit" / path, name))
    return tests


def blocks(text: str) -> list[tuple[str, str]]:
    """A page's paragraphs, list items and rows of tables, each after its heading; without heads of tables and notes."""
    heading, inside, parts = "", False, []
    for chunk in text.split("\n\n"):
        for line in re.split(r"\n(?=[-|#*\[]|\d\. )", chunk):
            if line.startswith("#"):
                heading, _, line = line.partition("\n")
            inside ^= line.count("```") % 2 == 1
            shown = line.strip() and not inside and "```" not in line
            if shown and not line.startswith(("|---", "| who |", "| step |", "[^")):
                parts.append((heading.lstrip("# "), line))
    return parts


@pytest.mark.parametrize("page", [*PROMISES, "docs/threats.md", "docs/privacy.md", "docs/audit.md", "docs/canaries.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    tests = named((ROOT / page).read_text(encoding="utf-8"))
    missing = [f"{path}::{name}" for path, name in tests if not path.exists() or (name and name not in names_in(path))]
    assert not missing
    assert tests or page != "docs/threats.md"


@pytest.mark.parametrize("page", PROMISES)
def test_every_promise_names_the_test_that_holds_it(page: str) -> None:
    whole = (ROOT / page).read_text(encoding="utf-8")
    promises = [text for heading, text in blocks(whole) if heading not in LIMITS and PROMISING.search(text)]
    assert len(promises) > 10
    bare = [text for text in promises if not named(text, whole)]
    assert not bare, "\n\n".join(bare)


def test_every_row_of_the_threats_names_a_test() -> None:
    rows = [line for line in (ROOT / "docs" / "threats.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| attack |")]
    assert len(rows) > 35
    assert not [row for row in rows if not named(row)]
