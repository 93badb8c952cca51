"""The rows of `privacy_budget` from what sites answer, whatever that is."""

import json

import pytest

from fedmpt_flare.server.budget_command import COLUMNS, budget_row


def test_a_budget_fills_the_columns() -> None:
    budget = {
        "dataset": "images",
        "epsilon": 1.23456,
        "reach": 2.0,
        "cap": 8.0,
        "if_masks_fail": 3.0,
        "delta": 1e-5,
        "unit": "record",
        "entries": 3,
    }
    row = budget_row("site-1", json.dumps(budget | {"head": "ab" * 32}))
    assert row == ["site-1", "images", "1.235", "2.000", "8", "3.000", "1e-05", "record", "3", "ab" * 8]
    assert len(row) == len(COLUMNS)


def test_what_a_site_says_cannot_draw_on_the_terminal() -> None:
    row = budget_row(
        "site-1", json.dumps({"dataset": "\x1b[31mred\n", "epsilon": "many", "cap": 8.0, "head": "x" * 99})
    )
    assert row == ["site-1", "\ufffd[31mred ", "many", "", "8", *[""] * 4, "x" * 16]


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (json.dumps({"refused": "no\x07"}), "no\ufffd"),
        ("not allowed", "not allowed"),
        ("[1]", "[1]"),
        (None, "no answer"),
        ("", "no answer"),
    ],
)
def test_an_answer_without_a_budget_is_shown_as_a_refusal(body: object, shown: str) -> None:
    assert budget_row("site-1", body) == ["site-1", shown, *[""] * (len(COLUMNS) - 2)]
