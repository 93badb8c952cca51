"""Where a site keeps what it has said in a masked job: one small file per run, replaced as a whole.

It lies outside every job folder, since it must outlive the job's processes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedmpt_core.common.files import WriteError, write_whole
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.latch import Latch, LatchError


def latch_path(site: SiteConfig, run_id: str) -> Path:
    """The file of a run.

    Raises:
        SecAggError: POLICY, the site names no folder, or the run's name cannot be part of a path.
    """
    if not run_id or not all(c.isascii() and (c.isalnum() or c in "_-") for c in run_id):
        raise SecAggError(Abort.POLICY, f"the run's name {run_id!r} has other characters than letters, digits, _ and -")
    ledger = site.privacy.ledger if site.privacy else ""
    if site.secagg.state:
        folder = Path(site.secagg.state)
    elif ledger:
        folder = Path(ledger) / "secagg"
    else:
        raise LatchError("secagg.state='' and this site has no ledger folder: name a folder outside the job's")
    return folder / f"{run_id}.json"


def read_latch(path: Path) -> Latch | None:
    """What the site has said; None when it has said nothing yet. Raises LatchError when unreadable."""
    try:
        return Latch.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise LatchError(f"{path} cannot be read ({type(error).__name__}): nothing is signed") from None


def open_latch(site: SiteConfig, run_id: str, resumed: Sequence[str]) -> Latch | None:
    """What the site has said in a run, or, as it begins to continue another one, which rounds that one used up.

    Runs that continue the same one follow each other: each takes up the rounds of all before, and the one before says
    nothing any more.

    Args:
        site: where the records lie.
        run_id: name of the run.
        resumed: names of the runs that it continues, newest first: the site takes up the newest that it took part in.

    Raises:
        LatchError: a record cannot be read or written.
    """
    known = read_latch(latch_path(site, run_id))
    if known:
        return known
    last = next(filter(None, (read_latch(latch_path(site, name)) for name in resumed)), None)
    if last is None:
        return None
    while last.continued_by not in ("", run_id):
        following = read_latch(latch_path(site, last.continued_by))
        if following is None:
            raise LatchError(
                f"the record of run {last.continued_by}, which continued {last.job_id}, is missing: restore it"
            )
        last = following
    if not last.continued_by:
        write_latch(latch_path(site, last.job_id), replace(last, continued_by=run_id))
    ours = last.continued(run_id)
    write_latch(latch_path(site, run_id), ours)
    return ours


def write_latch(path: Path, latch: Latch) -> None:
    """Replace the record; on disk when this returns.

    Raises:
        LatchError: it cannot be written, or another run has continued this one; nothing may be sent then.
    """
    before = read_latch(path)
    if before and before.continued_by:
        raise LatchError(f"run {before.continued_by} goes on from this one: nothing is signed here any more")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, latch.to_json().encode())
    except (OSError, WriteError) as error:
        raise LatchError(f"{path} cannot be written ({error.strerror}): nothing is signed until it can") from None
