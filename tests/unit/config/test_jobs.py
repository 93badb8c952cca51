"""The jobs that come with the project are read by the schema that they document."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedmpt_core.config.federation import ResumeConfig
from fedmpt_core.config.job import JobConfig, LossConfig, PrivacyConfig, TrainingConfig
from fedmpt_core.config.toml import load_job, load_sites
from fedmpt_core.data.public import voc
from fedmpt_core.data.scenes import CLASSES

JOBS = Path(__file__).parents[3] / "jobs"


@pytest.mark.parametrize("path", sorted(JOBS.glob("*/job.toml")), ids=lambda p: p.parent.name)
def test_every_job_and_its_sites_are_read(path: Path) -> None:
    job, sites = load_job(path), load_sites(path.parent / "site.toml")
    assert len(sites) >= job.federation.min_sites
    assert any(s.data.evaluate for s in sites.values())
    assert job.name == path.parent.name


def test_labels_are_those_of_the_data() -> None:
    assert load_job(JOBS / "demo" / "job.toml").classes == CLASSES
    assert set(load_job(JOBS / "voc2007" / "job.toml").classes) == set(voc.CLASSES)


def test_the_template_shows_the_defaults() -> None:
    job = load_job(JOBS / "template" / "job.toml")
    assert (job.training, job.loss) == (TrainingConfig(), LossConfig())
    assert job.model == JobConfig("x", ("a", "b")).model
    assert job.federation == JobConfig("x", ("a", "b")).federation
    assert job.privacy == PrivacyConfig()


def test_the_template_shows_every_key() -> None:
    """Lines that are off are switched on; those that need no other choice then still say the default."""
    text = (JOBS / "template" / "job.toml").read_text()
    shown = tomllib.loads(re.sub(r"^# (?=\w+ = |\[)", "", text, flags=re.MULTILINE))
    top = {name for name in JobConfig.__dataclass_fields__ if name in shown}
    assert top == set(JobConfig.__dataclass_fields__)
    job = JobConfig("x", ("a", "b"), resume=ResumeConfig("x", 1))
    examples = {"kind", "architecture", "weights", "conditions", "batch_size", "tracking", "metrics"}
    examples |= {"job", "round", "state", "before"}
    for section, values in shown.items():
        owner = getattr(job, section)
        if not isinstance(values, dict):
            continue
        assert set(values) == set(owner.__dataclass_fields__), section
        for name, value in values.items():
            default = getattr(owner, name)
            if name not in examples and default not in (None, {}):
                assert value == (list(default) if isinstance(default, tuple) else default), name


def test_flare_s_own_idiom_exports_the_same_job(tmp_path: Path) -> None:
    script = [str(JOBS / "job.py"), str(JOBS / "demo" / "job.toml"), "--export", "--export-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-W", "ignore", *script], check=True, capture_output=True)
    assert (tmp_path / "demo" / "meta.json").is_file()
    assert not list(tmp_path.glob("demo/**/custom"))
