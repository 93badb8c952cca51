"""The job of an app as FLARE deployed it: our executor's configuration, nothing else, of this release."""

import json
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import JobConstants
from nvflare.lighter.tool_consts import NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE

from fedmpt_core.common.release import RELEASE
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.toml import ConfigError, job_from_dict
from fedmpt_core.privacy.ledger.budget import JobRefused
from fedmpt_flare import tasks

EXECUTOR = tasks.CLASS_ALLOW_LIST[0]
CLIENT_CONFIG = Path("config", JobConstants.CLIENT_JOB_CONFIG)
SERVER_CONFIG = Path("config", JobConstants.SERVER_JOB_CONFIG)
SIGNATURES = (NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE)
# FLARE resolves names in braces from the other keys of the file, so no other key may be there.
CONFIG_KEYS = {"format_version", "executors", "default_task_fetch_interval"}
EMPTY_KEYS = {"components", "task_data_filters", "task_result_filters"}
MAX_TEXT = 256  # chosen: characters of a name, a version, a device


def deployed_job(app: Path) -> JobConfig:
    """The job of a deployed app that holds our executor's configuration and nothing else.

    Args:
        app: `<workspace>/<job id>/app_<site>`, as FLARE's deployer makes it.

    Raises:
        JobRefused: it holds more, or what it holds is no job; a sentence for its submitter.
    """
    known = {CLIENT_CONFIG, SERVER_CONFIG}
    files = {p.relative_to(app) for p in app.rglob("*") if not p.is_dir() or p.is_symlink()}
    if any(p not in known and p.name not in SIGNATURES for p in files):
        raise JobRefused("the job carries files beside its two configurations: export it again with this release")
    try:
        config = json.loads((app / CLIENT_CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        raise JobRefused(f"the job's {CLIENT_CONFIG} is not JSON: export it again with this release") from None
    if any(config.get(key) for key in EMPTY_KEYS) or set(config) - CONFIG_KEYS - EMPTY_KEYS:
        raise JobRefused("the job configures more than an executor: no component, filter or variable is run here")
    executors = config.get("executors")
    wanted = {"tasks": list(tasks.TASKS), "executor": {"path": EXECUTOR, "args": {"job": None, "release": None}}}
    if not isinstance(executors, list) or len(executors) != 1 or _outline(executors[0]) != wanted:
        raise JobRefused(f"the job must have one executor, {EXECUTOR}, for the tasks {', '.join(tasks.TASKS)}")
    arguments = executors[0]["executor"]["args"]
    if arguments["release"] != RELEASE:
        other = arguments["release"] if is_short_text(arguments["release"]) else "another release"
        raise JobRefused(
            f"the job was exported with fedmpt {other}, this site runs {RELEASE}: all must run the same release"
        )
    return _job(arguments["job"])


def is_short_text(value: Any) -> bool:
    """Whether it is a text of one line that can stand in a sentence."""
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def _outline(executor: Any) -> Any:
    """All of an executor's definition but the values of its arguments."""
    try:
        inner = executor["executor"]
        return {**executor, "executor": {**inner, "args": dict.fromkeys(dict(inner["args"]))}}
    except (TypeError, KeyError, ValueError):
        return None


def _job(values: Any) -> JobConfig:
    try:
        return job_from_dict({k: v for k, v in dict(values).items() if k != "config_type"})
    except (ConfigError, TypeError, ValueError) as error:
        raise JobRefused(f"the job's configuration is refused: {error}") from None
