"""The command line in this process: what it printed and how it ended, as of a process of its own."""

from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

Fedmpt = Callable[..., CompletedProcess[str]]


@pytest.fixture
def fedmpt(capsys: pytest.CaptureFixture[str]) -> Fedmpt:
    """Takes the arguments of `fedmpt`."""
    from fedmpt_flare.cli.main import main

    def run(*arguments: object) -> CompletedProcess[str]:
        words = [str(a) for a in arguments]
        with pytest.raises(SystemExit) as ended:
            main(words)
        printed = capsys.readouterr()
        return CompletedProcess(words, int(ended.value.code or 0), printed.out, printed.err)

    return run
