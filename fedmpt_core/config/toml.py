"""Reading jobs and sites: TOML files and plain dicts into the frozen dataclasses of `config`.

Every error is one sentence per problem that names the file, the section, the key and the value.
"""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fedmpt_core.common.text import alike
from fedmpt_core.config.checks import adapter, json_schema, sentences
from fedmpt_core.config.condition_lists import load_conditions
from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.site import ServerConfig, SiteConfig

T = TypeVar("T")


class ConfigError(ValueError):
    """A job or site file says something impossible; the message names file, section, key and value."""


def load_job(path: str | Path, *, seed: int | None = None) -> JobConfig:
    """Read a `job.toml`.

    Args:
        path: the file. A condition file that it names is looked up beside it.
        seed: replaces the seed of the file.

    Returns:
        The checked job, conditions resolved to words.

    Raises:
        ConfigError: a sentence per problem.

    Example:
        >>> from fedmpt_core.config.toml import load_job
        >>> job = load_job("jobs/demo/job.toml", seed=1)
        >>> job.name, job.seed, job.training.rounds, job.model.conditions
        ('demo', 1, 5, ('color', 'background', 'pose'))
    """
    path = Path(path)
    values = read_toml(path)
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("conditions"), str):
        name = model["conditions"]
        beside = path.parent / name
        try:
            chosen = load_conditions(beside if beside.is_file() else name)
            if isinstance(values.get("classes"), list):
                chosen.check_classes(values["classes"])
            model["conditions"] = list(chosen.conditions)
        except ValueError as error:
            raise ConfigError(f"{path}: [model] conditions: {error}") from None
    if seed is not None:
        values["seed"] = seed
    return build(JobConfig, values, str(path))


def job_from_dict(values: Mapping[str, Any], origin: str = "job") -> JobConfig:
    """The job in plain values, as `JobConfig.to_dict` wrote it. Raises ConfigError."""
    return build(JobConfig, values, origin)


def site_from_dict(values: Mapping[str, Any], origin: str = "site") -> SiteConfig:
    """One site's settings in plain values. Raises ConfigError."""
    return build(SiteConfig, values, origin)


def load_site(path: str | Path, name: str) -> SiteConfig:
    """Read one site's settings from a site file.

    Args:
        path: TOML file. A real site's holds the settings themselves; a simulation's holds `[defaults]` and one
            `[sites.NAME]` table per site, which override the defaults.
        name: the site. Relative paths in the file start from its folder.

    Raises:
        ConfigError: a sentence per problem.
    """
    path = Path(path)
    values = read_toml(path)
    if "sites" in values:
        sites = load_sites(path)
        if name not in sites:
            raise ConfigError(f"{path}: no table [sites.{name}]: the file must name every simulated site")
        return sites[name]
    return _absolute(build(SiteConfig, values, str(path)), path.parent)


def load_server(path: str | Path) -> ServerConfig:
    """Read a server's own settings. Raises ConfigError."""
    path = Path(path)
    server = build(ServerConfig, read_toml(path), str(path))
    place = str((path.parent / Path(server.checkpoints).expanduser()).absolute()) if server.checkpoints else ""
    return dataclasses.replace(server, checkpoints=place)


def load_sites(path: str | Path) -> dict[str, SiteConfig]:
    """Read the sites of a simulation, in the order of the file.

    A site whose data set is split takes the share of its position, unless the file gives another. A manifest is split
    where the file says `shares`.

    Raises:
        ConfigError: a sentence per problem.
    """
    path = Path(path)
    values = read_toml(path)
    unknown = set(values) - {"defaults", "sites"}
    if unknown:
        raise ConfigError(
            f"{path}: unknown table '{sorted(unknown)[0]}': a simulation's file has [defaults] and [sites.NAME]"
        )
    tables = values.get("sites")
    if not isinstance(tables, dict) or not tables:
        raise ConfigError(f"{path}: no [sites.NAME] table: name each simulated site")
    if same := alike(tables):
        raise ConfigError(f"{path}: [sites.NAME] lists {same}: give every site a name of its own")
    sites = {}
    for position, (name, table) in enumerate(tables.items(), start=1):
        if not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"{path}: site name {name!r}: use letters, digits, '-' and '_'")
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: sites.{name}={table!r} is not a table: write [sites.{name}]")
        merged = _merge(values.get("defaults", {}), table)
        data = merged.get("data")
        if isinstance(data, dict) and (data.get("source", "manifest") != "manifest" or "shares" in data):
            data.setdefault("share", position)
            data.setdefault("shares", len(tables))
        site = build(SiteConfig, merged, f"{path}: sites.{name}")
        sites[name] = _absolute(site, path.parent)
    return sites


def without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values for a TOML file, which has no null: keys without a value are left out."""
    return {k: without_none(v) if isinstance(v, Mapping) else v for k, v in values.items() if v is not None}


def schema() -> dict[str, Any]:
    """JSON Schema of a `job.toml`, for editors: every key with its type, bounds, default and description."""
    values = json_schema(JobConfig)
    conditions = values["$defs"]["ModelConfig"]["properties"]["conditions"]
    words = {key: conditions.pop(key) for key in ("type", "items", "minItems", "uniqueItems")}
    listed = {"type": "string", "description": "A list that comes with the project, or a file beside the job."}
    conditions["anyOf"] = [listed, words | {"description": "The words themselves."}]
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "FedMPT job"} | values


def read_text(path: Path) -> str:
    """A text file, without the mark that some editors put first. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error})") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        return {k: _merge(base.get(k), over.get(k, base.get(k))) for k in {**base, **over}}
    return over


def _absolute(site: SiteConfig, folder: Path) -> SiteConfig:
    def place(value: str) -> str:
        return str((folder / Path(value).expanduser()).absolute()) if value else ""

    data = site.data
    data = dataclasses.replace(
        data, path=place(data.path), root=place(data.root), partition_file=place(data.partition_file)
    )
    privacy = site.privacy and dataclasses.replace(site.privacy, ledger=place(site.privacy.ledger))
    secagg = dataclasses.replace(site.secagg, roster=place(site.secagg.roster), state=place(site.secagg.state))
    return dataclasses.replace(site, data=data, privacy=privacy, secagg=secagg, cache_dir=place(site.cache_dir))


def build(kind: type[T], values: Mapping[str, Any], origin: str) -> T:
    """A configuration class from plain values, strictly. Raises ConfigError, a sentence per problem."""
    try:
        # JSON mode: strict about types, yet arrays become tuples
        return adapter(kind).validate_json(json.dumps(values, allow_nan=False, default=str))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{origin}: {sentence}" for sentence in sentences(kind, error))) from None
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}: numbers must be finite") from None
