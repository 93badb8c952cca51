"""The table of rounds takes every event of a workflow, on a terminal and in a log."""

import pytest
from rich.console import Console

from fedmpt_flare import tasks
from fedmpt_flare.cli.rounds_table import RoundsTable


@pytest.mark.parametrize("phase", sorted(tasks.TASKS))
def test_every_phase_has_words(phase: str) -> None:
    table = RoundsTable(2)
    assert table.take({"event": "phase", "phase": phase, "sites": ["a", "b"]}) is None
    table.take({"event": "answered", "site": "a"})
    console = Console(record=True, width=120)
    console.print(table.draw())
    assert "(1 of 2 sites answered)" in console.export_text()
