"""What a person reads when a simulated run has ended: scores, what protected the sites, what it left."""

import dataclasses
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedmpt_core.config.job import FederationConfig, JobConfig, PrivacyConfig
from fedmpt_core.federation.preflight import ModelSize, warnings_of
from fedmpt_core.federation.run.record import RunRecord
from fedmpt_flare.cli.run_view import RunView
from tests.settings import REHEARSED, UNMASKED, UNPROTECTED

JOB = JobConfig("ended", ("cat", "dog"), privacy=PrivacyConfig(epsilon=8.0, delta=1e-5), secagg=REHEARSED)
SITES = ["site-1", "site-2", "site-3"]


def a_round(number: int, score: float, *, spent: float | None = None, masked: bool = False) -> dict[str, Any]:
    """A round with figures; each site has spent a little more than the one before it."""
    head = {"seq": 2 * number, "hash": f"{number:02x}" * 32, "sig": ""}
    privacy = {} if spent is None else {s: spent + i / 10 for i, s in enumerate(SITES)}
    return {
        "round": number,
        "sites": SITES,
        "mAP": score,
        "privacy": {site: {"epsilon": e, "delta": 1e-5, "head": head} for site, e in privacy.items()},
        "secagg": {"cohort": SITES} if masked else {},
    }


def end_screen(job: JobConfig, rounds: list[dict[str, Any]], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    record = replace(RunRecord.start(job, "run-1"), backbone="tower", is_stand_in=True, rounds=tuple(rounds))
    RunView(job, quiet=False).show_end(asdict(record), folder, {"preparing": 1.2, "rounds": 30.6})
    return capsys.readouterr().out


def test_the_end_of_a_protected_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").touch()
    (tmp_path / "ledgers").mkdir()
    before = {**a_round(0, 41.0), "zero_shot": {"mAP": 40.0}, "sites": []}
    rounds = [before, a_round(1, 45.0, spent=1.0, masked=True), a_round(2, 52.5, spent=2.5, masked=True)]
    lines = end_screen(JOB, rounds, tmp_path, capsys).splitlines()
    assert "Backbone: tower, not CLIP" in lines
    assert "zero-shot mAP 40.00   round 0 mAP 41.00   final mAP 52.50 (+12.50)" in lines
    assert (
        "Protection: differential privacy (every site at most epsilon 2.700, delta 1e-05, per record) and secure "
        "aggregation (the server saw only sums of 3 or more masked updates); identities were made up for the simulation"
    ) in lines
    table = [line.strip("│ ").split(" │ ") for line in lines if line.startswith("│ site-")]
    expected = [[f"site-{i}", f"2.{i + 4}00", "1e-05", "4 020202020202"] for i in (1, 2, 3)]
    assert [[cell.strip() for cell in row] for row in table] == expected
    assert "Seconds: preparing 1, rounds 31" in lines
    assert f"Wrote result.json, ledgers to {tmp_path}" in lines


def test_the_end_of_a_run_without_protection_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = replace(JOB, privacy=UNPROTECTED, secagg=UNMASKED)
    rounds = [{**a_round(0, 41.0), "zero_shot": {"mAP": 43.0}}, a_round(1, 42.0)]
    lines = end_screen(job, rounds, tmp_path, capsys).splitlines()
    assert "zero-shot mAP 43.00   round 0 mAP 41.00   final mAP 42.00 (-1.00)" in lines
    assert (
        "Protection: no differential privacy (updates can tell things about pictures) and no secure aggregation (the "
        "server saw every site's updates)"
    ) in lines
    assert not any("epsilon spent" in line for line in lines)


def test_a_run_without_figures_has_no_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unscored = {k: v for k, v in a_round(1, 0.0, spent=1.0).items() if k != "mAP"}
    shown = end_screen(replace(JOB, secagg=UNMASKED), [unscored], tmp_path, capsys)
    assert "mAP" not in shown
    assert "Protection: differential privacy (every site at most epsilon 1.200," in shown


def test_a_quiet_view_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view = RunView(JOB, quiet=True)
    view.step("starting")
    view.show_end(asdict(RunRecord.start(JOB, "run-1")), tmp_path, {})
    assert capsys.readouterr().out == ""


def test_a_job_is_warned_of_only_where_a_failed_round_ends_it() -> None:
    size = ModelSize({}, {}, "towers", True, ("class 'a' and 'b' are one",))
    assert warnings_of(JOB, size, {}) == list(size.indistinct)
    fragile = dataclasses.replace(JOB, federation=FederationConfig(max_failed_rounds=0))
    assert [text.split(":")[0] for text in warnings_of(fragile, size, {})[1:]] == ["federation.max_failed_rounds = 0"]
    plain = dataclasses.replace(fragile, privacy=PrivacyConfig(mechanism="none"))
    assert warnings_of(plain, size, {}) == list(size.indistinct)
