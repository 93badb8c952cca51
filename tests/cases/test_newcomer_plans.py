"""What a newcomer is told before anything is spent: `check` shows the pictures first and doubts; `init` begins well."""

import json
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedmpt_core.config.job import BackboneConfig
from fedmpt_core.config.toml import load_job, load_sites
from fedmpt_core.federation.preflight import check_data
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.backbone.load import load_backbone
from fedmpt_core.privacy.ledger.budget import resolved

Fedmpt = Callable[..., subprocess.CompletedProcess[str]]
LABELS = ("cat", "dog", "bird")


def hospital(folder: Path, train: int, *, test: int = 0, labels: tuple[str, ...] = LABELS, above: bool = False) -> Path:
    """A manifest with plain pictures, beside it or, as labs have it, in one folder beside those of the hospitals."""
    pictures = folder.parent / "pictures" if above else folder
    for place in (folder, pictures):
        place.mkdir(parents=True, exist_ok=True)
    rows = ["path,labels,split"]
    for i in range(train + test):
        name = f"{folder.name}-{i}.png"
        colour = (i % 250, sum(map(ord, folder.name)) % 250, 0)  # no picture of one hospital is another's
        Image.new("RGB", (8, 8), colour).save(pictures / name)
        label = labels[i % len(labels)] if i % 5 else ""
        rows.append(f"{'../pictures/' if above else ''}{name},{label},{'train' if i < train else 'test'}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def towers() -> Backbone:
    return load_backbone(BackboneConfig())


@pytest.fixture(autouse=True)
def loaded_once(towers: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading them takes longer than all that is tested here."""
    monkeypatch.setattr("fedmpt_core.model.backbone.load.load_backbone", lambda _: towers)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("hospitals")
    return [hospital(folder / f"site-{x}", 90, test=9 * (x == "a"), above=True) for x in "abc"]


def started(fedmpt: Fedmpt, folder: Path, manifests: list[Path], *options: object) -> Path:
    run = fedmpt("init", folder, *manifests, *options)
    assert run.returncode == 0, run.stderr
    return folder / "job.toml"


def changed(job: Path, sites: bool = False, **values: Any) -> None:
    """Keys set anew wherever they stand."""
    path = job.with_name("site.toml") if sites else job
    text = path.read_text()
    for key, value in values.items():
        text, times = re.subn(rf"(?m)^{key} = \S+", f"{key} = {value}", text)
        assert times, key
    path.write_text(text)


def checked(fedmpt: Fedmpt, job: Path) -> dict[str, Any]:
    run = fedmpt("check", job, "--json")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    ("count", "options", "expected"),
    [
        (3, (), ("dp-sgd", "pairwise-masking", 6, 2)),
        (3, ("--epsilon", 2), ("dp-sgd", "pairwise-masking", 6, 2)),
        (3, ("--no-privacy",), ("none", "pairwise-masking", 20, 12)),
        (2, (), ("dp-sgd", "none", 6, 2)),
        (2, ("--no-privacy",), ("none", "none", 20, 12)),
    ],
)
def test_what_init_writes_is_a_job_that_fits_the_pictures(
    fedmpt: Fedmpt,
    tmp_path: Path,
    three: list[Path],
    count: int,
    options: tuple[object, ...],
    expected: tuple[Any, ...],
) -> None:
    job = started(fedmpt, tmp_path / "jobs" / "mine", three[:count], *options)
    config, sites = resolved(load_job(job)), load_sites(job.with_name("site.toml"))
    training = config.training
    found = (config.privacy.mechanism, config.secagg.mechanism, training.rounds, training.local_steps)
    assert found == expected
    assert (config.name, config.classes) == ("mine", ("bird", "cat", "dog"))
    assert list(sites) == ["site-a", "site-b", "site-c"][:count]
    counts = check_data(config, sites)
    assert [(c.train, c.test, c.units) for c in counts.values()] == [(90, 9, 90), (90, 0, 90), (90, 0, 90)][:count]
    assert {site.privacy.units for site in sites.values() if site.privacy} == {90}
    again = fedmpt("init", tmp_path / "jobs" / "mine", *three)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)


def test_many_records_take_more_steps(fedmpt: Fedmpt, tmp_path: Path) -> None:
    for x in "abc":
        (tmp_path / x).mkdir()
        rows = "".join(f"{i}.png,{'cat' if i % 2 else 'dog'},train\n" for i in range(512))
        (tmp_path / x / "manifest.csv").write_text(f"path,labels,split\n{rows}")
    job = started(fedmpt, tmp_path / "mine", [tmp_path / x / "manifest.csv" for x in "abc"])
    assert load_job(job).training.rounds * (load_job(job).training.local_steps or 0) == 40
    assert {s.privacy.units for s in load_sites(job.with_name("site.toml")).values() if s.privacy} == {510}


def test_without_manifests_init_leaves_places_to_fill_in(fedmpt: Fedmpt, tmp_path: Path) -> None:
    """On the stand-in towers, which run at once; those of open_clip are a comment to take."""
    job = started(fedmpt, tmp_path / "mine", [])
    assert load_job(job).backbone.kind == "embedded"
    chosen = re.sub(r'kind = "embedded".*', "", job.read_text())
    chosen = re.sub(r"(?m)^# ((kind|architecture|weights) = )", r"\1", chosen)
    assert tomllib.loads(chosen)["backbone"] == {"kind": "open_clip", "architecture": "ViT-B-16", "weights": "openai"}
    run = fedmpt("check", job)
    assert run.returncode == 2
    assert "hospital-a: manifest.csv cannot be used" in run.stderr
    assert "does not exist" in run.stderr


def test_check_shows_pictures_and_labels_first_and_keys_on_request(
    fedmpt: Fedmpt, tmp_path: Path, three: list[Path]
) -> None:
    job = started(fedmpt, tmp_path / "mine", three)
    run = fedmpt("check", job)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == "Pictures"
    cells = [[c.strip() for c in line.strip("│ ").split("│")] for line in lines if line.startswith("│")]
    assert cells[0] == ["site-a", "90", "–", "9", "3", "18"]
    assert ["cat", "24", "24", "24"] in cells
    assert "None" not in run.stdout
    assert len(lines) < 40
    assert lines[-1] == "OK: nothing is wrong with this job."
    assert "learning_rate" not in run.stdout
    assert "learning_rate" in fedmpt("check", job, "--verbose").stdout


@pytest.mark.parametrize(
    ("job_keys", "site_keys", "says"),
    [
        ({}, {"units": 5000}, "site-a declares units = 5000 and has 90 training pictures"),
        ({}, {"units": 8}, "site-c declares units = 8 and has 90 training pictures"),
        ({"epsilon": 0.01}, {}, "the noise is far stronger than what can be learnt"),
        ({"epsilon": 0.3}, {}, "the noise is far stronger than what can be learnt"),
        ({"learning_rate": 0.001}, {}, "steps are too small to move anything: with about 90 records a site these did"),
        ({"rounds": 50}, {}, "so many steps leave little but noise: with about 90 records a site these did well"),
        (
            {"sample_rate": 0.05},
            {},
            "privacy.sample_rate = 0.05 takes about 4.5 records into a step at the smallest site",
        ),
        ({"max_failed_rounds": 0}, {}, "federation.max_failed_rounds = 0: the first round that fails ends the job"),
        ({"classes": '["bird","cat","cow","dog"] #'}, {}, "no training picture of any site shows 'cow'"),
    ],
)
def test_check_doubts_what_is_allowed_and_cannot_be_meant(
    fedmpt: Fedmpt, tmp_path: Path, three: list[Path], job_keys: dict[str, Any], site_keys: dict[str, Any], says: str
) -> None:
    job = started(fedmpt, tmp_path / "mine", three)
    changed(job, **job_keys)
    changed(job, sites=True, **site_keys)
    report = checked(fedmpt, job)
    assert any(says in warning for warning in report["warnings"]), report["warnings"]
    assert report["sites"]["site-b"]["labels"]["cat"] == 24
    if job_keys.get("rounds") == 50:
        assert "rounds = 6" in "\n".join(report["warnings"])


def test_a_job_without_sites_is_not_called_right(fedmpt: Fedmpt, tmp_path: Path, three: list[Path]) -> None:
    job = started(fedmpt, tmp_path / "mine", three)
    job.with_name("site.toml").unlink()
    run = fedmpt("check", job)
    assert run.returncode == 0
    assert "no sites were given, so no picture, no label and no budget was checked" in run.stdout
    assert "OK" not in run.stdout
    assert run.stdout.splitlines()[-1] == "Nothing stops this job; there is one thing to look at above."
