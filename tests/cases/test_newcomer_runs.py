"""What a newcomer loses nothing by: another run's folder, Ctrl-C, places that cannot be written, long file names."""

import dataclasses
import hashlib
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedmpt_core.config.job import JobConfig
from fedmpt_core.config.toml import load_job, load_sites
from fedmpt_core.federation.run.curves import draw_curves
from fedmpt_core.federation.run.record import RunRecord
from fedmpt_core.federation.server.checkpoint import Checkpoint, newest_checkpoint
from fedmpt_core.model.vector import ParameterLayout
from fedmpt_core.privacy.ledger.budget import Budget, PrivacyRefused, project, resolved
from fedmpt_core.privacy.ledger.site_ledger import open_ledger, read_site_ledger, with_ledger
from fedmpt_flare.cli.run_view import RunView
from fedmpt_flare.cli.screen import progress, show_table

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "jobs" / "demo"
Fedmpt = Callable[..., subprocess.CompletedProcess[str]]


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def small_demo(folder: Path) -> Path:
    """The demo with two pictures in each split, its features cached in the folder."""
    few = re.sub(r"(?m)^(train|val|test) = \d+", r"\1 = 2", (DEMO / "site.toml").read_text())
    (folder / "site.toml").write_text(few.replace("threads = 1", f"threads = 1\ncache_dir = '{folder}/cache'"))
    (folder / "job.toml").write_text((DEMO / "job.toml").read_text())
    return folder / "job.toml"


@pytest.mark.parametrize(
    "left",
    [
        ("result.json", "model.safetensors", "manifest.json", "ledgers/site-1/scenes.ledger.jsonl"),
        ("checkpoints/simulation-1/checkpoint.safetensors",),
        ("report.html",),
        ("explanations/cat.explained.png",),
        ("curves.png", "timing.json"),
    ],
)
def test_a_run_goes_into_no_folder_that_holds_another(fedmpt: Fedmpt, tmp_path: Path, left: tuple[str, ...]) -> None:
    out = tmp_path / "my runs" / "mine"
    for name in left:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"of another run")
    (tmp_path / "my runs" / "mine-2").mkdir()
    before = contents(tmp_path)
    run = fedmpt("simulate", DEMO / "job.toml", "--out", out)
    assert run.returncode == 2
    assert contents(tmp_path) == before
    assert f"--out '{tmp_path}/my runs/mine-3'" in run.stderr
    assert f"fedmpt simulate {DEMO / 'job.toml'} --resume '{out}'" in run.stderr
    assert left[0].partition("/")[0] in run.stderr


def broken_off(folder: Path, job: JobConfig, *, reserved: int) -> None:
    """A run of which two rounds are complete and `reserved` are charged."""
    site_configs = load_sites(DEMO / "site.toml")
    for name, site in site_configs.items():
        kept = with_ledger(dataclasses.replace(site, cache_dir=str(folder / "cache")), name, folder / "ledgers" / name)
        assert kept.privacy
        budget = Budget(job, kept, open_ledger(kept.privacy, name, None), "run-1")
        for number in range(1, reserved + 1):
            budget.reserve(number, 0, {})
    layout = ParameterLayout(("head.scale",), ((1,),))
    kept_state = Checkpoint("run-1", job, 2, layout, np.zeros(1, np.float32), RunRecord.start(job, "run-1"), {})
    kept_state.save(folder / "checkpoints")


def test_a_run_that_may_not_fail_is_continued_only_with_the_numbers_that_do(fedmpt: Fedmpt, tmp_path: Path) -> None:
    job = resolved(load_job(DEMO / "job.toml"))
    assert job.federation.max_failed_rounds == 0
    broken_off(tmp_path, job, reserved=3)
    before = contents(tmp_path)
    run = fedmpt("simulate", DEMO / "job.toml", "--resume", tmp_path)
    assert run.returncode == 2
    assert contents(tmp_path) == before
    assert "max_failed_rounds = 0 leaves no room for it. Nothing was touched." in run.stderr
    least, noise = re.findall(r"set epsilon = ([\d.]+) and noise_multiplier = ([\d.]+) in", run.stderr)[0]
    assert float(noise) == job.privacy.noise_multiplier
    privacy = dataclasses.replace(job.privacy, epsilon=float(least))
    resumed = dataclasses.replace(job, privacy=privacy, resume=newest_checkpoint(tmp_path / "checkpoints").resuming())
    for name, site in load_sites(DEMO / "site.toml").items():
        policy = with_ledger(site, name, tmp_path / "ledgers" / name).privacy
        assert policy
        entries = read_site_ledger(policy, None)
        roomy = dataclasses.replace(policy, epsilon=float(least))
        assert project(resumed, roomy, entries, "").job <= float(least)
        less = dataclasses.replace(resumed, privacy=dataclasses.replace(privacy, epsilon=float(least) - 0.02))
        with pytest.raises(PrivacyRefused):
            project(less, roomy, entries, "")


@pytest.mark.parametrize("place", ["/proc/foo", "/dev/null/foo", "/sys/foo/bar"])
@pytest.mark.parametrize("command", [["simulate", DEMO / "job.toml"], ["bench", "coop", "scenes"]])
def test_a_place_that_cannot_be_written_is_a_sentence_before_any_work(
    fedmpt: Fedmpt, command: list[object], place: str
) -> None:
    run = fedmpt(*command, "--out", place)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(f"error: '{place}' cannot be written (")
    assert "Traceback" not in run.stderr


def test_a_disk_that_is_full_is_a_sentence(fedmpt: Fedmpt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes, as far as no sentence of its own was made."""

    def full(*_: object, **__: object) -> None:
        with Path("/dev/full").open("w") as device:
            device.write("x")

    monkeypatch.setattr("fedmpt_core.config.toml.load_job", full)
    run = fedmpt("check", "job.toml")
    assert (run.returncode, run.stderr) == (2, "error: No space left on device: name another place, or make room\n")


@pytest.mark.parametrize(
    ("left", "says"),
    [
        (["checkpoints/run-1/checkpoint.safetensors"], "stopped; go on with `fedmpt simulate {job} --resume {out}`"),
        (["ledgers/site-1/x"], "stopped before the first round was complete: there is nothing to go on from"),
        ([], "stopped before training began; the same command begins again"),
    ],
)
def test_ctrl_c_says_how_to_go_on(
    fedmpt: Fedmpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: list[str], says: str
) -> None:
    out, job = tmp_path / "out", small_demo(tmp_path)

    def interrupted(*_: Any, **__: Any) -> None:
        for name in left:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("fedmpt_core.model.backbone.load.load_backbone", interrupted)
    run = fedmpt("simulate", job, "--out", out)
    assert run.returncode == 130
    assert run.stderr.splitlines()[-1].startswith(says.format(job=job, out=out))


def test_where_there_is_no_terminal_long_work_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as report:
        for done in range(1, 201):
            report("patch features", done, 200)
    lines = capsys.readouterr().err.splitlines()
    assert 10 <= len(lines) <= 12
    assert lines[-1] == "› patch features 200/200"
    with progress(quiet=True) as report:
        report("patch features", 1, 1)
    assert capsys.readouterr().err == ""


def test_a_title_is_never_broken(capsys: pytest.CaptureFixture[str]) -> None:
    name = f"/a/{'very-' * 40}long folder/with [bold]marks[/]/picture.jpg"
    show_table(name, ("label", "probability"), [("cat", "0.5")])
    assert name in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("trained", "panels"), [("all", 2), ("contexts+gate", 2), ("adapters", 1), ("contexts", 1)])
def test_the_gate_is_drawn_where_it_is_trained(tmp_path: Path, trained: Any, panels: int) -> None:
    agreed = JobConfig("drawn", ("cat", "dog"))
    agreed = dataclasses.replace(agreed, model=dataclasses.replace(agreed.model, trained=trained))
    record = dataclasses.asdict(dataclasses.replace(RunRecord.start(agreed, "run"), backbone="b"))
    record["rounds"] = [{"round": n, "mAP": 1.0, "CF1": 1.0, "OF1": 1.0, "gate": [0.2] * 5} for n in (0, 1)]
    draw_curves(record, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width == {1: 720, 2: 1200}[panels]


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ([70.0, 72.0, 66.0], "the best was round 1 with 72.00."),
        ([70.0, 69.0, 66.0], "no round was better."),
        ([60.0, 64.0], "is worse than the start (65.00); no round was better."),  # the plain prompt was better
        ([70.0, 72.0], None),
        ([70.0], None),
    ],
)
def test_a_run_that_lost_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scores: list[float], says: str | None
) -> None:
    rounds = [{"round": n, "mAP": score, "sites": [], "privacy": {}, "secagg": {}} for n, score in enumerate(scores)]
    rounds[0]["zero_shot"] = {"mAP": 65.0}
    record = dataclasses.asdict(RunRecord.start(resolved(load_job(DEMO / "job.toml")), "run")) | {"rounds": rounds}
    RunView(load_job(DEMO / "job.toml"), quiet=False).show_end(record, tmp_path, {})
    shown = capsys.readouterr().out
    assert ("Training lost" in shown) == (says is not None)
    assert says is None or says in shown


@pytest.mark.parametrize(
    ("job", "sites", "says"),
    [
        (
            ("epsilon = 8.0\ndelta", 'mechanism = "none"\ndelta'),
            ("", ""),
            "[privacy] allow_unprotected = true in the site's own file (fedmpt_site.toml; of a simulation, site.toml)",
        ),
        (
            ("insecure_identities = true", 'mechanism = "none"'),
            ("", ""),
            "[secagg] allow_unmasked = true in the site's own file (fedmpt_site.toml; of a simulation, site.toml)",
        ),
        (
            ("min_sites = 3", "min_sites = 2"),
            ("", ""),
            "[secagg] mechanism = 'none' in the job and [secagg] allow_unmasked = true in each site's own file",
        ),
        (
            ("", ""),
            ("[sites.site-3]", ""),
            "with fewer than three set [secagg] mechanism = 'none'",
        ),
    ],
)
def test_what_is_not_allowed_names_key_and_file(
    fedmpt: Fedmpt, tmp_path: Path, job: tuple[str, str], sites: tuple[str, str], says: str
) -> None:
    path = small_demo(tmp_path)
    path.write_text(path.read_text().replace(*job, 1))
    (tmp_path / "site.toml").write_text((tmp_path / "site.toml").read_text().replace(*sites, 1))
    tomllib.loads(path.read_text())
    run = fedmpt("simulate", path, "--out", tmp_path / "out")
    assert run.returncode == 2
    assert says in run.stderr
