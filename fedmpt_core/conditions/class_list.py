"""The class names that conditions are found for, and the backbone they are found with: of a job, or of a text file."""

from pathlib import Path

from fedmpt_core.config.job import BackboneConfig, JobConfig
from fedmpt_core.config.toml import build, read_text, read_toml


def read_classes(path: Path) -> tuple[tuple[str, ...], BackboneConfig]:
    """Class names and backbone.

    Args:
        path: a `job.toml`, of which nothing but `classes` and `[backbone]` is read, so that it may name the list of
            conditions that is yet to be found; or a text file with one class a line, for which the backbone is the
            embedded stand-in.

    Raises:
        ConfigError: missing, unreadable, or classes that no job may have.
    """
    if path.suffix != ".toml":
        return _checked(path, [line.strip() for line in read_text(path).splitlines() if line.strip()]), BackboneConfig()
    values = read_toml(path)
    backbone = build(BackboneConfig, values.get("backbone", {}), f"{path}: [backbone]")
    return _checked(path, values.get("classes")), backbone


def _checked(path: Path, classes: object) -> tuple[str, ...]:
    return build(JobConfig, {"name": "classes", "classes": classes}, str(path)).classes
