"""The only reader of a site's or server's `local/` folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmpt_core.config.site import SiteConfig
from fedmpt_core.config.toml import ConfigError, load_server, load_site

if TYPE_CHECKING:
    from nvflare.apis.fl_context import FLContext

SITE_FILE = "fedmpt_site.toml"
SERVER_FILE = "fedmpt_server.toml"
RUN_FILE = "fedmpt_run_id"  # of a simulation, whose jobs all have one id
CHECKPOINTS = "fedmpt_checkpoints"
SIMULATED_JOB = "simulate_job"  # the id of every job in FLARE's simulator


def site_config(fl_ctx: "FLContext") -> SiteConfig:
    """This site's settings.

    Raises:
        ConfigError: the file is missing or says something impossible.
    """
    return load_site(local_folder(fl_ctx) / SITE_FILE, site_name(fl_ctx))


def site_name(fl_ctx: "FLContext") -> str:
    """This site's name in the federation."""
    return str(fl_ctx.get_identity_name())


def site_folder(fl_ctx: "FLContext") -> Path:
    """The folder of this site or server, with `startup` and `local`."""
    return Path(_workspace(fl_ctx).get_root_dir())


def local_folder(fl_ctx: "FLContext") -> Path:
    """The site's own configuration folder, which no job writes to."""
    return Path(_workspace(fl_ctx).get_site_config_dir())


def run_id(fl_ctx: "FLContext") -> str:
    """The run's name in ledgers and in the protocol: FLARE's job id, or in the simulator what its `local/` folder says.

    Raises:
        ConfigError: a simulation that was not prepared by this program.
    """
    job_id = str(fl_ctx.get_job_id())
    if job_id != SIMULATED_JOB:
        return job_id
    try:
        return (local_folder(fl_ctx) / RUN_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        raise ConfigError(
            f"{local_folder(fl_ctx) / RUN_FILE} is missing: start simulations with `fedmpt simulate`"
        ) from None


def checkpoint_folder(fl_ctx: "FLContext") -> Path:
    """Where the server keeps checkpoints. Raises ConfigError."""
    return checkpoints_of(local_folder(fl_ctx), site_folder(fl_ctx))


def checkpoints_of(local: Path, workspace: Path) -> Path:
    """What `fedmpt_server.toml` in `local` says, or a folder in the workspace. Raises ConfigError."""
    path = local / SERVER_FILE
    chosen = load_server(path).checkpoints if path.exists() else ""
    return Path(chosen) if chosen else workspace / CHECKPOINTS


def start_up_kit(fl_ctx: "FLContext") -> Path | None:
    """The folder with key and certificate of this site or server; None in the simulator, which has none."""
    folder = Path(_workspace(fl_ctx).get_startup_kit_dir())
    return folder if any((folder / name).exists() for name in ("client.key", "server.key")) else None


def run_folder(fl_ctx: "FLContext") -> Path:
    """The folder of this job at this site or server."""
    return Path(_workspace(fl_ctx).get_run_dir(fl_ctx.get_job_id()))


def _workspace(fl_ctx: "FLContext") -> Any:
    engine: Any = fl_ctx.get_engine()
    return engine.get_workspace()
