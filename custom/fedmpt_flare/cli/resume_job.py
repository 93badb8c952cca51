"""`fedmpt resume-job`: the job that continues a run which broke off."""

from pathlib import Path
from typing import Annotated

import typer

from fedmpt_flare.cli.options import JobFile, WrongUse


def resume_job(
    job: JobFile,
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="The run that broke off: as downloaded, or its folder among the server's checkpoints."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The job file to write.")] = Path("resumed.toml"),
) -> None:
    """Write the job that goes on where a run broke off: last complete round, noise of the run, what it has spent."""
    if out.exists():
        raise WrongUse(f"--out {out}: exists already: name another file")
    import tomli_w

    from fedmpt_core.common.files import write_whole
    from fedmpt_core.config.toml import load_job, without_none
    from fedmpt_core.federation.run.record import LEDGER_COPIES
    from fedmpt_core.federation.server.continuation import continuation, load_broken, run_of
    from fedmpt_core.privacy.ledger.ledger import read_ledger
    from fedmpt_core.privacy.ledger.site_ledger import SUFFIX

    before, kept = load_job(job), load_broken(run)
    copies = sorted((run_of(run) / LEDGER_COPIES).glob(f"*{SUFFIX}"))
    goes_on = continuation(before, kept, [read_ledger(path) for path in copies])
    write_whole(out, tomli_w.dumps(without_none(goes_on.to_dict())).encode(), mode=None)
    last, privacy = goes_on.training.rounds, goes_on.privacy
    typer.echo(f"Wrote {out}: rounds {goes_on.first_round} to {last} of run {kept.run_id}.")
    if privacy.epsilon > before.privacy.epsilon:
        counted = "" if copies else "; no ledger is beside the run, so every attempt that it may have made is counted"
        typer.echo(
            f"privacy.epsilon is {privacy.epsilon:g}, not {before.privacy.epsilon:g}: what was broken off was charged, "
            f"and is trained again{counted}."
        )
    typer.echo(f"It is another job (digest {goes_on.digest()[:16]}): every custodian approves it anew.")
