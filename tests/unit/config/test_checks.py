"""Bounds and descriptions stand at the fields: every way to make a configuration is held to them."""

import dataclasses
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fedmpt_core.config.checks import json_schema
from fedmpt_core.config.federation import FederationConfig, ResumeConfig
from fedmpt_core.config.job import BackboneConfig, LossConfig, ModelConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.secagg import SecAggConfig, SiteSecAggConfig
from fedmpt_core.config.site import DataConfig, SitePrivacyConfig
from fedmpt_core.config.toml import ConfigError, build, schema

ROOT = Path(__file__).parents[3]
JOBS = sorted(p for top in ("jobs", "fedmpt_core/benchmark/jobs") for p in (ROOT / top).glob("*/job.toml"))
LEAST: dict[type, dict[str, Any]] = {
    **{kind: {} for kind in (BackboneConfig, ModelConfig, LossConfig, TrainingConfig, PrivacyConfig)},
    **{kind: {} for kind in (FederationConfig, SecAggConfig, SiteSecAggConfig)},
    ResumeConfig: {"job": "x", "round": 1},
    DataConfig: {"source": "scenes"},
    SitePrivacyConfig: {"dataset": "d", "units": 100, "epsilon": 1.0, "delta": 1e-5},
}
"""Every section, and what it cannot do without."""


def outside() -> list[Any]:
    """(class, field, value) just outside each end of every number."""
    rows = []
    for kind in LEAST:
        for name, node in json_schema(kind)["properties"].items():
            if node.get("type") in ("integer", "number"):
                step = node.get("multipleOf", 1) if node["type"] == "integer" else 1e-3
                low = node["exclusiveMinimum"] if "exclusiveMinimum" in node else node["minimum"] - step
                rows += [pytest.param(kind, name, v, id=f"{name}={v}") for v in (low, node["maximum"] + step)]
    return rows


@pytest.mark.parametrize(("kind", "name", "value"), outside())
def test_a_number_is_held_to_its_bounds_however_its_class_is_made(kind: type, name: str, value: Any) -> None:
    least, says = LEAST[kind], rf"{name}={value} is out of range: allowed is [\[(]"
    with pytest.raises(ValueError, match=f"^{says}"):
        kind(**{**least, name: value})
    with pytest.raises(ValueError, match=f"^{says}"):
        dataclasses.replace(kind(**least), **{name: value})
    with pytest.raises(ConfigError, match=f"^there: {says}"):
        build(kind, {**least, name: value}, "there")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rounds": "3"}, "rounds='3': input should be a valid integer"),
        ({"rounds": True}, "rounds=True: input should be a valid integer"),
        ({"momentum": float("nan")}, "momentum=nan: input should be a finite number"),
        ({"schedule": "step"}, "schedule='step': input should be 'cosine' or 'constant'"),
        ({"group_rates": {"head": 2000.0}}, r"[group_rates] head=2000.0 is out of range: allowed is (0, 1000]"),
        ({"round": 3}, "unknown key 'round': did you mean 'rounds'?"),
    ],
)
def test_types_and_choices_hold_in_python_too(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        TrainingConfig(**values)


def test_every_problem_is_named_in_python_too() -> None:
    with pytest.raises(ValueError, match=r"rounds=0 is out of range.*\nlocal_epochs=0 is out of range"):
        TrainingConfig(rounds=0, local_epochs=0)


def objects(node: Any) -> list[dict[str, Any]]:
    """Every object of a schema that has keys."""
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    mine = [node] if isinstance(node, dict) and isinstance(node.get("properties"), dict) else []
    return mine + [one for value in inner for one in objects(value)]


def test_the_schema_describes_every_key_and_bounds_every_number() -> None:
    tables = objects(schema())
    assert len(tables) == 14
    for table in tables:
        assert table["additionalProperties"] is False
        for name, node in table["properties"].items():
            assert node.get("description") or "$ref" in node, name
            if node.get("type") in ("integer", "number") and "const" not in node:
                assert {"minimum", "exclusiveMinimum"} & set(node), name
                assert "maximum" in node, name
    text = json.dumps(schema())
    assert text.count("imum") >= 60
    assert text.count("description") >= 100


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.parent.name)
def test_jobs_fit_the_schema(path: Path) -> None:
    validator = jsonschema.Draft7Validator(schema())
    validator.check_schema(schema())
    values = tomllib.loads(path.read_text())
    assert list(validator.iter_errors(values)) == []
    for wrong in ({"name": "a b"}, {"classes": ["a"]}, {"classes": ["a", "a"]}, {"rounds": 3}, {"loss": {"margin": 1}}):
        assert list(validator.iter_errors({**values, **wrong}))


@pytest.mark.skipif(shutil.which("taplo") is None, reason="no taplo")
def test_an_editor_s_toml_checker_takes_the_schema(tmp_path: Path) -> None:
    def problems(job: str) -> str:
        (tmp_path / "job.toml").write_text(f"#:schema ./job.schema.json\n{job}")
        return subprocess.run(["taplo", "check", "job.toml"], cwd=tmp_path, capture_output=True, text=True).stderr

    (tmp_path / "job.schema.json").write_text(json.dumps(schema()))
    text = (ROOT / "jobs/template/job.toml").read_text()
    assert "error" not in problems(text)
    assert "0 is less than the minimum of 1" in problems(text.replace("rounds = 50", "rounds = 0"))
