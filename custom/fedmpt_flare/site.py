"""The only reader of a site's `local/` folder."""

import uuid
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext

from fedmpt_core.config_file import load_site
from fedmpt_core.site_config import SiteConfig

SITE_FILE = "fedmpt_site.toml"
SIMULATED_JOB = "simulate_job"  # the id of every job in FLARE's simulator


def site_config(fl_ctx: FLContext) -> SiteConfig:
    """This site's settings.

    Raises:
        ConfigError: the file is missing or says something impossible.
    """
    return load_site(local_folder(fl_ctx) / SITE_FILE, site_name(fl_ctx))


def site_name(fl_ctx: FLContext) -> str:
    """This site's name in the federation."""
    return str(fl_ctx.get_identity_name())


def local_folder(fl_ctx: FLContext) -> Path:
    """The site's own configuration folder, which no job writes to."""
    return Path(_workspace(fl_ctx).get_site_config_dir())


def run_id(fl_ctx: FLContext) -> str:
    """The job's name in the site's ledger: FLARE's job id, or in the simulator, which gives all jobs one id, a new
    one.
    """
    job_id = str(fl_ctx.get_job_id())
    return f"simulation-{uuid.uuid4()}" if job_id == SIMULATED_JOB else job_id


def start_up_kit(fl_ctx: FLContext) -> Path | None:
    """The folder with the site's key and certificate; None in the simulator, which has none."""
    folder = Path(_workspace(fl_ctx).get_startup_kit_dir())
    return folder if (folder / "client.key").exists() else None


def run_folder(fl_ctx: FLContext) -> Path:
    """The folder of this job at this site or server."""
    return Path(_workspace(fl_ctx).get_run_dir(fl_ctx.get_job_id()))


def default_cache() -> Path:
    """Where patch features go when the site names no folder."""
    return Path.home() / ".cache" / "fedmpt" / "features"


def _workspace(fl_ctx: FLContext) -> Any:
    engine: Any = fl_ctx.get_engine()
    return engine.get_workspace()
