"""What a reader searches the page on troubleshooting for is what the program says."""

import ast
import re
from functools import cache

import pytest

from tests.federation import REPOSITORY

PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
ROW = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
OF_A_TERMINAL = {"CF1` and `OF1", "mAP"}  # columns of the table of rounds


@cache
def sentences() -> str:
    """Every string of the program, and the Makefile."""
    texts = [(REPOSITORY / "Makefile").read_text()]
    for top in ("fedmpt_core", "custom"):
        for path in (REPOSITORY / top).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text()))
            texts += [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return "\0".join(texts)


@pytest.mark.parametrize("sentence", ROW.findall(PAGE))
def test_a_sentence_that_the_page_explains_is_one_that_the_program_says(sentence: str) -> None:
    assert sentence in OF_A_TERMINAL or sentence in sentences()


def test_a_sentence_that_nobody_says_would_be_noticed() -> None:
    assert len(ROW.findall(PAGE)) > 20
    assert "the job is too heavy" not in sentences()
