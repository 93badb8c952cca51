"""A benchmark's runs, its file of results and its tables."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from fedmpt_core.benchmark.cases import LADDER, TABLES, Case, cases_of
from fedmpt_core.benchmark.folder import write_results
from fedmpt_core.benchmark.inputs import METHODS, BenchmarkInputs
from fedmpt_core.benchmark.results_file import KEYS, NAME, ResultsError, open_results
from fedmpt_core.benchmark.runs import run, run_missing
from fedmpt_core.benchmark.shared_records import SharedRecords
from fedmpt_core.benchmark.tables import markdown, rows_of
from fedmpt_core.data.scenes import CLASSES
from fedmpt_core.model.registry import build_model
from tests.benchmarks import result
from tests.fakes import FakeBackbone


def test_a_broken_off_benchmark_goes_on_where_it_was(
    inputs: BenchmarkInputs, shared: SharedRecords, tmp_path: Path
) -> None:
    cases = cases_of(inputs, "methods", ["zero-shot", "linear", "coop"], [0, 1])
    whole = tmp_path / "whole"
    with open_results(whole) as finished:
        run_missing(cases, finished, shared)
    done: list[str] = []

    def stop_after(count: int) -> Any:
        def on_run(case: Case, result: object, n: int, total: int) -> None:
            if result is not None:
                done.append(case.row)
            elif n == count:
                raise KeyboardInterrupt

        return on_run

    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt), open_results(broken) as finished:
        run_missing(cases, finished, shared, stop_after(2))
    with (broken / NAME).open("a") as stream:
        stream.write('{"run": "half a li')
    with open_results(broken) as finished:
        assert len(finished.results) == 2
        run_missing(cases, finished, shared, stop_after(100))
    assert len(done) == len(cases) == 6  # none of them twice
    tables = []
    for folder in (whole, broken):
        with open_results(folder) as finished:
            tables.append([finished.results[c.identity()]["figures"] for c in cases])
    assert tables[0] == tables[1]


def test_a_book_is_written_by_one_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    whole = {**dict.fromkeys(KEYS, 1), "figures": {"mAP": 50.0}}
    with open_results(tmp_path) as finished:
        finished.add("a", whole)
        with pytest.raises(ResultsError, match="another benchmark writes here"), open_results(tmp_path):
            pass
    with open_results(tmp_path) as finished:
        assert finished.results == {"a": whole}
    line = json.dumps({"run": "a", **whole})
    for damaged in ("not json", '{"run": "b"}', "[]"):
        (tmp_path / NAME).write_text(f"{line}\n{damaged}\n")
        with pytest.raises(ResultsError, match="line 2 is not a result"), open_results(tmp_path):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot be written"), open_results(tmp_path / "file"):
        pass


def test_a_run_says_what_it_cost(inputs: BenchmarkInputs, shared: SharedRecords) -> None:
    results = {c.method: run(c, shared) for c in cases_of(inputs, "methods", ["zero-shot", "coop", "linear"], [0])}
    assert (results["zero-shot"]["trained"], results["zero-shot"]["epsilon"]) == (0, None)
    for method in ("coop", "linear"):
        result = results[method]
        model = build_model(FakeBackbone(), CLASSES, inputs.job(method, 0).model, 0)
        assert result["trained"] == model.layout().size
        assert result["bytes_per_round"] == 32 + 4 * result["trained"]
        assert result["epsilon"] is None
        assert result["pictures_per_step"] == 8
        assert result["cpu_ms_per_step"] > 0 < result["cpu_ms_zero_shot"]
        assert result["sites"] == 2
        json.dumps(result, allow_nan=False)


def test_a_private_run_reports_what_it_spent(inputs: BenchmarkInputs, shared: SharedRecords) -> None:
    private = {"privacy": {"mechanism": "dp-sgd", "sample_rate": 0.5, "epsilon": 5.0}, "training": {"batch_size": None}}
    job = inputs.job("linear", 0, private)
    assert job.privacy.noise_multiplier is not None
    result = run(Case("methods", "linear", 0.0, "linear", job, inputs.sites), shared)
    assert 0 < result["epsilon"] <= 5.0
    assert result["pictures_per_step"] == 7


def test_the_same_run_of_two_tables_is_done_once(inputs: BenchmarkInputs) -> None:
    seeds = [0, 1]
    methods, ablation = cases_of(inputs, "methods", METHODS, seeds), cases_of(inputs, "ablation", METHODS, seeds)
    assert {c.row for c in ablation} == {*LADDER, "FedMPT, logits mixed"}
    whole = {c.identity() for c in methods if c.method == "fedmpt"}
    assert whole == {c.identity() for c in ablation if c.row == "+ gate (FedMPT)"}
    every = [c for table in TABLES for c in cases_of(inputs, table, ["linear", "fedmpt"], seeds)]
    assert len({c.identity() for c in every}) > 100
    assert [c.job.seed for c in methods] == [0] * len(METHODS) + [1] * len(METHODS)
    case = methods[0]
    assert case.identity() == cases_of(inputs, "methods", METHODS, seeds)[0].identity()
    moved = {n: dataclasses.replace(s, cache_dir="/elsewhere", threads=2) for n, s in case.sites.items()}
    assert dataclasses.replace(case, sites=moved).identity() == case.identity()
    fewer = {n: dataclasses.replace(s, data=dataclasses.replace(s.data, train=9)) for n, s in case.sites.items()}
    for other in (dataclasses.replace(case, sites=fewer), dataclasses.replace(case, heterogeneity=0.1), methods[1]):
        assert other.identity() != case.identity()
    for table, names, says in (("methods", ["clip"], "method 'clip'"), ("speed", ["coop"], "table 'speed'")):
        with pytest.raises(ValueError, match=says):
            cases_of(inputs, table, names, seeds)


def test_tables_hold_means_deviations_and_the_best_in_bold(inputs: BenchmarkInputs, tmp_path: Path) -> None:
    cases = cases_of(inputs, "methods", ["coop", "fedmpt"], [0, 1])
    results = {c.identity(): result(40 + 10 * c.job.seed + (c.method == "fedmpt"), 5.0) for c in cases}
    text = write_results(tmp_path, inputs, {"methods": cases}, results)
    assert f"| Fed-CoOp | 45.0 ± {statistics.stdev([40, 50]):.1f} |" in text
    assert f"| FedMPT | **46.0 ± {statistics.stdev([41, 51]):.1f}** |" in text
    assert "seeds 0, 1." in text
    assert "a stand-in, not CLIP" in text
    assert "Not all runs" not in text
    assert "reported by the authors" not in text
    plain = json.loads((tmp_path / "results.json").read_text())
    assert plain["tables"]["methods"][0]["figures"]["figures.mAP"] == {
        "mean": 45.0,
        "deviation": pytest.approx(7.0710678),
    }
    assert plain["tables"]["methods"][0]["figures"]["cost_ratio"]["mean"] == 4.0
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("table,row,value,method,seed,figures.mAP")
    assert lines[1].startswith("methods,Fed-CoOp,0,coop,0,40,")
    assert (tmp_path / "methods.png").stat().st_size > 5000
    fewer = write_results(tmp_path, inputs, {"methods": cases}, dict(list(results.items())[:3]))
    assert "Not all runs are finished" in fewer
    none = {c.identity(): result(40, None) for c in cases}
    assert "false activation" not in markdown("methods", rows_of(cases, none))
    assert "No finished run" in write_results(tmp_path, inputs, {"methods": cases}, {})


@pytest.mark.parametrize("table", ["heterogeneity", "ablation", "sensitivity"])
def test_every_table_has_its_picture(inputs: BenchmarkInputs, tmp_path: Path, table: str) -> None:
    cases = cases_of(inputs, table, ["coop", "fedmpt"], [0])
    text = write_results(tmp_path, inputs, {table: cases}, {c.identity(): result(40 + c.value, 5.0) for c in cases})
    assert (tmp_path / f"{table}.png").stat().st_size > 5000
    assert ("| value |" in text) == (table != "ablation")
    assert text.count("\n| ") == 1 + len({(c.row, c.value) for c in cases})
