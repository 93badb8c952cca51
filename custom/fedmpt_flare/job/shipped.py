"""Jobs that come with the release: in `jobs/` of a checkout, and beside this package where a wheel was installed."""

from pathlib import Path


def shipped(name: str) -> Path:
    """Folder with the `job.toml` and `site.toml` of a job, such as `demo`."""
    package = Path(__file__).parents[1]
    installed = package / "jobs" / name
    return installed if installed.is_dir() else package.parents[1] / "jobs" / name
