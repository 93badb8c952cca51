"""The `fedmpt` command: what there is, exit codes, and errors as sentences.

A command's module imports at its top what its signature needs, and where it works what it works with: no command
waits for FLARE, torch or an accountant that it does not use.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from fedmpt_core.common.dumps import forbid_dumps
from fedmpt_flare.cli.audit import audit
from fedmpt_flare.cli.bench import bench
from fedmpt_flare.cli.canaries import canaries
from fedmpt_flare.cli.check import check
from fedmpt_flare.cli.conditions import conditions
from fedmpt_flare.cli.demo import demo
from fedmpt_flare.cli.export import export
from fedmpt_flare.cli.init import init
from fedmpt_flare.cli.ledger import ledger
from fedmpt_flare.cli.partition import partition
from fedmpt_flare.cli.predict import predict
from fedmpt_flare.cli.prepare import prepare
from fedmpt_flare.cli.report import report
from fedmpt_flare.cli.resume_job import resume_job
from fedmpt_flare.cli.roster import roster
from fedmpt_flare.cli.screen import never_fail_at_a_sign
from fedmpt_flare.cli.simulate import simulate
from fedmpt_flare.cli.site import site

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _show_versions(asked: bool) -> None:
    if not asked:
        return
    from fedmpt_core.common.release import package_versions

    versions = package_versions()
    for name in ("fedmpt", "nvflare", "torch", "python"):
        typer.echo(f"{name:<8} {versions.get(name, 'is not installed')}")
    if "torch" in versions:
        from fedmpt_core.model.device import device_name, pick_device

        typer.echo(f"{'device':<8} {device_name(pick_device('auto'))}")
    raise typer.Exit


@app.callback()
def fedmpt(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_show_versions,
            help="Say which release, FLARE and torch are installed, and what device is here.",
        ),
    ] = False,
) -> None:
    """Federated multi-label prompt tuning of vision-language models on NVIDIA FLARE."""


for command in (demo, init, check, simulate, export, resume_job, predict, prepare, partition, bench):
    app.command()(command)
for command in (audit, canaries, report):
    app.command()(command)
for name, group in (("conditions", conditions), ("roster", roster), ("site", site), ("ledger", ledger)):
    app.add_typer(group, name=name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors meant for people are one sentence on standard error and exit code 2.

    Args:
        arguments: of the command line; those of this process when None.
    """
    # Third-party notices are of no use to whoever runs a command; FLARE's own go to the log file.
    warnings.filterwarnings("ignore")
    forbid_dumps()  # simulations, ledgers and audits hold pictures or keys
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    never_fail_at_a_sign()
    try:
        app(arguments)
    except ValueError as error:
        _fail(str(error), 2)
    except OSError as error:
        # a disk that is full or gone, a folder that may not be read: nothing of the program's
        if error.errno is None:
            raise
        place = f"{str(error.filename)!r}: " if error.filename else ""
        _fail(f"{place}{os.strerror(error.errno)}: name another place, or make room", 2)
    except KeyboardInterrupt:
        _fail("stopped", 130)


def _fail(sentence: str, code: int) -> None:
    from fedmpt_flare.cli.screen import fail

    fail(sentence)
    sys.exit(code)
