"""Where a site keeps what it has said in a masked job: one small file per run, replaced as a whole.

It lies outside every job folder, since it must outlive the job's processes.
"""

from pathlib import Path

from fedmpt_core.common.files import WriteError, write_whole
from fedmpt_core.config.site import SiteConfig
from fedmpt_core.secagg.errors import Abort, SecAggError
from fedmpt_core.secagg.latch import Latch


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
        raise SecAggError(
            Abort.STORAGE, "secagg.state='' and this site has no ledger folder: name a folder outside the job's"
        )
    return folder / f"{run_id}.json"


def read_latch(path: Path) -> Latch | None:
    """What the site has said; None when it has said nothing yet. Raises SecAggError(STORAGE) when unreadable."""
    try:
        return Latch.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise SecAggError(Abort.STORAGE, f"{path} cannot be read ({type(error).__name__}): nothing is signed") from None


def write_latch(path: Path, latch: Latch) -> None:
    """Replace the record; on disk when this returns. Raises SecAggError(STORAGE), and nothing may be sent then."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, latch.to_json().encode())
    except (OSError, WriteError) as error:
        raise SecAggError(
            Abort.STORAGE, f"{path} cannot be written ({error.strerror}): nothing is signed until it can"
        ) from None
