"""The benchmark: what it measures, that it resumes, that nothing it reports comes from where it must not."""

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpt_core import metrics, session
from fedmpt_core.benchmark import workshop as workshop_module
from fedmpt_core.benchmark.book import KEYS, NAME, Book, BookError
from fedmpt_core.benchmark.exam import EQUAL_RECALL, judge
from fedmpt_core.benchmark.federate import federate, open_sessions, train_rounds
from fedmpt_core.benchmark.output import write_results
from fedmpt_core.benchmark.plan import LADDER, TABLES, Case, _content, plan
from fedmpt_core.benchmark.reported import reported_by_the_authors
from fedmpt_core.benchmark.runs import run, run_missing
from fedmpt_core.benchmark.setup import EMBEDDED, METHODS, Setup, load_setup
from fedmpt_core.benchmark.spurious import false_activation, threshold_at_recall
from fedmpt_core.benchmark.tables import COLUMNS, markdown, rows_of
from fedmpt_core.benchmark.tuning import chosen, methods_toml, ordered, trials, tuning_table
from fedmpt_core.benchmark.workshop import Workshop
from fedmpt_core.config import BackboneConfig
from fedmpt_core.config_file import ConfigError
from fedmpt_core.data.scenes import CLASSES, SceneConfig, co_occurrence, scenes
from fedmpt_core.methods import build_model
from fedmpt_core.site_config import DataConfig
from fedmpt_core.training import make_optimizer
from tests.fakes import FakeBackbone

JOB = f"""
name = "small"
classes = {json.dumps(list(CLASSES))}
[model]
conditions = ["pose"]
adapter_width = 3
[training]
rounds = 2
local_steps = 1
batch_size = 8
optimizer = "adam"
learning_rate = 0.01
[privacy]
mechanism = "none"
[secagg]
mechanism = "none"
"""
SITES = """
[defaults.data]
source = "scenes"
train = 14
[defaults.privacy]
dataset = "scenes"
units = 14
epsilon = 8.0
delta = 1e-5
allow_unprotected = true
[sites.site-1.data]
evaluate = true
val = 12
test = 16
[sites.site-2]
"""
METHOD_FILE = """
[coop.model]
context_tokens = 3
[coop.training]
learning_rate = 0.02
"""
GRID = """
[coop]
"training.learning_rate" = [0.001, 0.01]
[linear]
"training.learning_rate" = [0.01, 0.1]
"""


@pytest.fixture(autouse=True)
def fake_towers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (workshop_module, session):
        monkeypatch.setattr(module, "load_backbone", lambda _: FakeBackbone())
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, text in (("job", JOB), ("site", SITES), ("methods", METHOD_FILE), ("grid", GRID)):
        (folder / f"{name}.toml").write_text(text)
    return load_setup(str(folder))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One feature cache for all tests."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def workshop(shared: Path) -> Workshop:
    return Workshop(shared)


def binary(shape: tuple[int, int], seed: int, share: float = 0.4) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) < share).astype(np.uint8)


# What is measured


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(2, 6), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_false_activation_is_the_count_written_out(seed: int, records: int, classes: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    probabilities, targets = rng.random((records, classes)), binary((records, classes), seed)
    pairs = np.array([rng.choice(classes, 2, replace=False) for _ in range(2)])
    partners: dict[int, set[int]] = {c: set() for c in range(classes)}
    for a, b in pairs.tolist():
        partners[a].add(b)
        partners[b].add(a)
    awaited, others = [], []
    for r in range(records):
        for c in range(classes):
            if not targets[r, c]:
                hit = float(probabilities[r, c] >= threshold)
                (awaited if any(targets[r, p] for p in partners[c]) else others).append(hit)
    found = false_activation(probabilities, targets, pairs, threshold)
    assert found.cases == len(awaited)
    for value, wanted in ((found.partners, awaited), (found.others, others)):
        assert np.isnan(value) if not wanted else value == pytest.approx(statistics.mean(wanted))


def test_who_learnt_the_pairs_activates_partners_and_who_did_not_activates_both_alike() -> None:
    targets = binary((4000, 6), 1, 0.3)
    pairs = np.array([[0, 1], [2, 3], [4, 5]])
    rng = np.random.default_rng(2)
    clean = 0.8 * targets + 0.4 * rng.random(targets.shape)
    partner = targets[:, [1, 0, 3, 2, 5, 4]]
    spoilt = clean + 0.3 * partner
    honest, misled = (false_activation(p, targets, pairs, 0.35) for p in (clean, spoilt))
    assert abs(honest.partners - honest.others) < 0.02
    assert misled.partners > 3 * misled.others
    assert misled.others == honest.others
    nothing = false_activation(clean, targets, np.zeros((0, 2), np.int64), 0.35)
    assert nothing.cases == 0
    assert np.isnan(nothing.partners)
    with pytest.raises(ValueError, match="paired with itself"):
        false_activation(clean, targets, np.array([[1, 1]]), 0.5)
    with pytest.raises(ValueError, match="do not belong together"):
        false_activation(clean, targets, np.array([1, 2]), 0.5)


@given(st.integers(0, 10_000), st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_the_threshold_at_a_recall_is_the_largest_that_reaches_it(seed: int, recall: float) -> None:
    probabilities, targets = np.random.default_rng(seed).random((9, 4)), binary((9, 4), seed)
    targets[0, 0] = 1
    threshold = threshold_at_recall(probabilities, targets, recall)

    def reached(t: float) -> float:
        return float((probabilities[targets == 1] >= t).mean())

    assert reached(threshold) >= recall
    assert reached(np.nextafter(threshold, 2)) < recall


def test_a_recall_that_nobody_can_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="recall=0"):
        threshold_at_recall(np.ones((1, 1)), np.ones((1, 1)), 0.0)
    with pytest.raises(ValueError, match="no present label"):
        threshold_at_recall(np.ones((1, 1)), np.zeros((1, 1)), 0.5)


def test_correlated_scenes_have_the_sites_pairs_and_the_looks_of_test_scenes() -> None:
    config = SceneConfig(5)
    matrix = co_occurrence(config, 1) > 0
    drawn = {s: scenes(config, site=1, sites=3, split=s, count=300) for s in ("train", "test", "correlated")}  # type: ignore[arg-type]

    def together(split: str) -> float:
        """Share of shown labels whose partner is shown too."""
        targets = drawn[split].targets.astype(bool)
        partner = (drawn[split].targets @ matrix) > 0
        return float(partner[targets].mean())

    assert together("train") > 0.85
    assert together("correlated") > 0.85
    assert together("test") < 0.4

    def looks(split: str) -> tuple[set[str], float]:
        objects = [thing for picture in drawn[split].pictures for thing in picture.objects()]  # type: ignore[attr-defined]
        return {thing.sprite for thing in objects}, max(abs(thing.degrees) for thing in objects)

    sprites, turned = looks("correlated")
    assert sprites - looks("train")[0]
    assert turned > 20 > looks("train")[1]
    assert not {p.digest() for p in drawn["correlated"].pictures[:5]} & {p.digest() for p in drawn["test"].pictures[:5]}
    assert "site-2" in drawn["correlated"].pictures[0].name


def test_figures_are_the_metrics_on_the_independent_records(setup: Setup, workshop: Workshop) -> None:
    job = setup.job("coop", 0)
    exam = workshop.records(job, setup.sites).exam
    model = build_model(workshop.backbone(job.backbone), job.classes, job.model, 0)
    found = judge(model, exam)

    def scores(split: Any) -> np.ndarray:
        with torch.no_grad():
            return model(split.features.batch(range(len(split.features)))).probabilities.double().numpy()

    val, test = scores(exam.val), scores(exam.independent)
    assert exam.val is not None
    assert exam.correlated is not None
    threshold = metrics.best_threshold(val, exam.val.targets)
    assert found["threshold"] == pytest.approx(threshold, rel=1e-5)
    assert found["mAP"] == pytest.approx(100 * metrics.average_precision(test, exam.independent.targets).mean, abs=1e-3)
    precision = metrics.average_precision(scores(exam.correlated), exam.correlated.targets).mean
    assert found["mAP_correlated"] == pytest.approx(100 * precision, abs=1e-3)
    at_recall = threshold_at_recall(val, exam.val.targets, EQUAL_RECALL)
    rate = false_activation(test, exam.independent.targets, exam.pairs, at_recall)
    assert found["false_activation_at_recall"] == pytest.approx(100 * rate.partners, abs=1)
    spread = np.nanstd(metrics.average_precision(test, exam.independent.targets).per_class)
    assert found["AP_spread"] == pytest.approx(100 * spread, abs=1e-3)
    wanted = np.concatenate([np.argwhere(np.triu(co_occurrence(SceneConfig(0), s))) for s in range(2)])
    assert {tuple(p) for p in exam.pairs.tolist()} == {tuple(p) for p in wanted.tolist()}


def test_thresholds_never_come_from_test_records(setup: Setup, workshop: Workshop) -> None:
    job = setup.job("coop", 0)
    exam = workshop.records(job, setup.sites).exam
    model = build_model(workshop.backbone(job.backbone), job.classes, job.model, 0)
    changed = dataclasses.replace(exam.independent, targets=1 - exam.independent.targets)
    one, other = judge(model, exam), judge(model, dataclasses.replace(exam, independent=changed))
    assert one["threshold"] == other["threshold"]
    assert one["mAP_val"] == other["mAP_val"]
    assert one["mAP"] != other["mAP"]


# Federations


def test_sharing_towers_and_records_changes_no_number(setup: Setup, workshop: Workshop, shared: Path) -> None:
    job = setup.job("fedmpt", 0)
    records = workshop.records(job, setup.sites)
    alone = list(federate(job, records.sites, str(shared)))
    with open_sessions(job, records.sites, backbone=workshop.backbone(job.backbone), data=records.data) as sessions:
        together = list(train_rounds(job, sessions))
        assert len({id(s.backbone) for s in sessions.values()}) == 1
    assert [r.number for r in together] == [0, 1, 2]
    for (state, _), step in zip(alone, together, strict=True):
        assert np.array_equal(state, step.state)
    assert together[-1].sent == 32 + 4 * len(together[-1].state)
    assert together[-1].steps == 2
    assert {"mAP", "zero_shot"} <= set(alone[0][1])


def test_a_share_of_the_sites_is_asked(setup: Setup, workshop: Workshop) -> None:
    job = setup.job("linear", 0)
    records = workshop.records(job, setup.sites, 0.2)
    some = dataclasses.replace(job, federation=dataclasses.replace(job.federation, participation=0.5))
    with open_sessions(some, records.sites, backbone=workshop.backbone(job.backbone), data=records.data) as sessions:
        assert [r.steps for r in train_rounds(some, sessions)] == [0, 2, 2]  # two of four sites, one step each


def test_records_are_shared_out_anew_by_their_labels(setup: Setup, workshop: Workshop) -> None:
    job = setup.job("linear", 0)
    plain = workshop.records(job, setup.sites)
    spread = workshop.records(job, setup.sites, 0.3)
    assert len(spread.sites) == 6

    def digests(records: Any) -> list[str]:
        return sorted(d for data in records.data.values() for d in data.train[0].digests())

    assert digests(plain) == digests(spread)
    for name, data in spread.data.items():
        assert data.train is not None
        policy = spread.sites[name].privacy
        assert policy is not None
        assert policy.units == len(data.train[1]) == len(data.train[0])
    assert np.array_equal(spread.exam.independent.targets, plain.exam.independent.targets)
    again = Workshop(workshop._cache.folder).records(job, setup.sites, 0.3)
    assert [d.train[0].digests() for d in again.data.values() if d.train] == [
        d.train[0].digests() for d in spread.data.values() if d.train
    ]


def test_masks_drop_training_labels_alone(setup: Setup, workshop: Workshop) -> None:
    case = next(c for c in plan(setup, "masks", ["linear"], [0]) if c.value == 0.5)
    plain, masked = workshop.records(case.job, setup.sites), workshop.records(case.job, case.sites)
    for name, data in plain.data.items():
        other = masked.data[name]
        assert data.train is not None
        assert other.train is not None
        assert (other.train[1] <= data.train[1]).all()
        assert 0.2 < other.train[1].sum() / data.train[1].sum() < 0.8
    for split in ("val", "independent", "correlated"):
        assert np.array_equal(getattr(plain.exam, split).targets, getattr(masked.exam, split).targets)


def test_features_taken_are_those_of_the_records(setup: Setup, workshop: Workshop) -> None:
    features = workshop.records(setup.job("linear", 0), setup.sites).exam.independent.features
    taken = features.take([3, 0, 3])
    assert torch.equal(taken.batch([0, 1, 2]), features.batch([3, 0, 3]))
    assert taken.digests() == [features.digests()[i] for i in (3, 0, 3)]
    assert len(features.take([])) == 0
    with pytest.raises(ValueError, match="index 99 is out of range"):
        features.take([99])


# Runs and their results


def test_a_broken_off_benchmark_goes_on_where_it_was(setup: Setup, workshop: Workshop, tmp_path: Path) -> None:
    cases = plan(setup, "methods", ["zero-shot", "linear", "coop"], [0, 1])
    whole = tmp_path / "whole"
    with Book(whole) as book:
        run_missing(cases, book, workshop)
    done: list[str] = []

    def stop_after(count: int) -> Any:
        def on_run(case: Case, result: object, n: int, total: int) -> None:
            if result is not None:
                done.append(case.row)
            elif n == count:
                raise KeyboardInterrupt

        return on_run

    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt), Book(broken) as book:
        run_missing(cases, book, workshop, stop_after(2))
    with (broken / NAME).open("a") as stream:
        stream.write('{"run": "half a li')
    with Book(broken) as book:
        assert len(book.results) == 2
        run_missing(cases, book, workshop, stop_after(100))
    assert len(done) == len(cases) == 6  # none of them twice
    tables = []
    for folder in (whole, broken):
        with Book(folder) as book:
            tables.append([book.results[c.identity()]["figures"] for c in cases])
    assert tables[0] == tables[1]


def test_a_book_is_written_by_one_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    whole = {**dict.fromkeys(KEYS, 1), "figures": {"mAP": 50.0}}
    with Book(tmp_path) as book:
        book.add("a", whole)
        with pytest.raises(BookError, match="another benchmark writes here"), Book(tmp_path):
            pass
    with Book(tmp_path) as book:
        assert book.results == {"a": whole}
    with pytest.raises(BookError, match="closed"):
        book.add("b", {})
    line = json.dumps({"run": "a", **whole})
    for damaged in ("not json", '{"run": "b"}', "[]"):
        (tmp_path / NAME).write_text(f"{line}\n{damaged}\n")
        with pytest.raises(BookError, match="line 2 is not a result"), Book(tmp_path):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(BookError, match="cannot be written"), Book(tmp_path / "file"):
        pass


def test_a_run_says_what_it_cost(setup: Setup, workshop: Workshop) -> None:
    found = {c.method: run(c, workshop) for c in plan(setup, "methods", ["zero-shot", "coop", "linear"], [0])}
    assert (found["zero-shot"]["trained"], found["zero-shot"]["epsilon"]) == (0, None)
    for method in ("coop", "linear"):
        result = found[method]
        model = build_model(FakeBackbone(), CLASSES, setup.job(method, 0).model, 0)
        assert result["trained"] == model.layout().size
        assert result["bytes_per_round"] == 32 + 4 * result["trained"]
        assert result["epsilon"] is None
        assert result["pictures_per_step"] == 8
        assert result["cpu_ms_per_step"] > 0 < result["cpu_ms_zero_shot"]
        assert result["sites"] == 2
        json.dumps(result, allow_nan=False)


def test_a_private_run_reports_what_it_spent(setup: Setup, workshop: Workshop) -> None:
    private = {"privacy": {"mechanism": "dp-sgd", "sample_rate": 0.5, "epsilon": 5.0}, "training": {"batch_size": None}}
    job = setup.job("linear", 0, private)
    assert job.privacy.noise_multiplier is not None
    result = run(Case("methods", "linear", 0.0, "linear", job, setup.sites), workshop)
    assert 0 < result["epsilon"] <= 5.0
    assert result["pictures_per_step"] == 7


def test_the_same_run_of_two_tables_is_done_once(setup: Setup) -> None:
    seeds = [0, 1]
    methods, ablation = plan(setup, "methods", METHODS, seeds), plan(setup, "ablation", METHODS, seeds)
    assert {c.row for c in ablation} == {*LADDER, "FedMPT, logits mixed"}
    whole = {c.identity() for c in methods if c.method == "fedmpt"}
    assert whole == {c.identity() for c in ablation if c.row == "+ gate (FedMPT)"}
    every = [c for table in TABLES for c in plan(setup, table, ["linear", "fedmpt"], seeds)]
    assert len({c.identity() for c in every}) > 100
    assert [c.job.seed for c in methods] == [0] * len(METHODS) + [1] * len(METHODS)
    case = methods[0]
    assert case.identity() == plan(setup, "methods", METHODS, seeds)[0].identity()
    moved = {n: dataclasses.replace(s, cache_dir="/elsewhere", threads=2) for n, s in case.sites.items()}
    assert dataclasses.replace(case, sites=moved).identity() == case.identity()
    fewer = {n: dataclasses.replace(s, data=dataclasses.replace(s.data, train=9)) for n, s in case.sites.items()}
    for other in (dataclasses.replace(case, sites=fewer), dataclasses.replace(case, heterogeneity=0.1), methods[1]):
        assert other.identity() != case.identity()
    for table, names, says in (("methods", ["clip"], "method 'clip'"), ("speed", ["coop"], "table 'speed'")):
        with pytest.raises(ValueError, match=says):
            plan(setup, table, names, seeds)


def result(mean: float, activation: float | None) -> dict[str, Any]:
    figures = dict.fromkeys((c.key.partition(".")[2] for c in COLUMNS if c.key.startswith("figures.")), mean)
    figures |= {k: activation for k in figures if k.startswith("false_activation")}
    costs = {"trained": 10, "bytes_per_round": 72, "epsilon": None, "cpu_ms_per_step": 8.0, "cpu_ms_zero_shot": 2.0}
    return {"figures": figures, **costs, "backbone": "towers", "is_stand_in": True, "method": "coop", "seed": 0}


def test_tables_hold_means_deviations_and_the_best_in_bold(setup: Setup, tmp_path: Path) -> None:
    cases = plan(setup, "methods", ["coop", "fedmpt"], [0, 1])
    results = {c.identity(): result(40 + 10 * c.job.seed + (c.method == "fedmpt"), 5.0) for c in cases}
    text = write_results(tmp_path, setup, {"methods": cases}, results)
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
    fewer = write_results(tmp_path, setup, {"methods": cases}, dict(list(results.items())[:3]))
    assert "Not all runs are finished" in fewer
    none = {c.identity(): result(40, None) for c in cases}
    assert "false activation" not in markdown("methods", rows_of(cases, none))
    assert "No finished run" in write_results(tmp_path, setup, {"methods": cases}, {})


@pytest.mark.parametrize("table", ["heterogeneity", "ablation", "sensitivity"])
def test_every_table_has_its_picture(setup: Setup, tmp_path: Path, table: str) -> None:
    cases = plan(setup, table, ["coop", "fedmpt"], [0])
    text = write_results(tmp_path, setup, {table: cases}, {c.identity(): result(40 + c.value, 5.0) for c in cases})
    assert (tmp_path / f"{table}.png").stat().st_size > 5000
    assert ("| value |" in text) == (table != "ablation")
    assert text.count("\n| ") == 1 + len({(c.row, c.value) for c in cases})


# Tuning


def test_every_method_gets_as_many_trials_and_validation_alone_decides(setup: Setup) -> None:
    tried = trials(setup, ["coop", "linear"], [7, 8])
    assert [t.method for t in tried] == ["coop", "coop", "linear", "linear"]
    assert [c.job.seed for c in ordered(tried)] == [7] * 4 + [8] * 4
    results = {}
    for n, trial in enumerate(tried):
        for case in trial.cases:
            results[case.identity()] = {"figures": {"mAP_val": [20.0, 10.0, 5.0, 6.0][n], "mAP": 100.0 - n}}
    best = chosen(tried, results)
    assert best["coop"].changes == {"training": {"learning_rate": 0.001}}
    assert best["linear"].changes == {"training": {"learning_rate": 0.1}}
    written = methods_toml(setup, best)
    assert "context_tokens = 3" in written
    assert "learning_rate = 0.001" in written
    (setup.folder / "methods.toml").write_text(written)
    assert load_setup(str(setup.folder)).job("coop", 0).training.learning_rate == 0.001
    assert "| Fed-CoOp: training.learning_rate 0.001 | **20.0** |" in tuning_table(tried, results)
    with pytest.raises(ConfigError, match=r"has no table \[fedmpt\]"):
        trials(setup, ["coop", "fedmpt"], [7])
    unequal = dataclasses.replace(setup, grid={**setup.grid, "linear": {"training.learning_rate": [0.1]}})
    with pytest.raises(ConfigError, match=r"grids differ in size \(coop 2, linear 1\)"):
        trials(unequal, ["coop", "linear"], [7])
    results[tried[0].cases[0].identity()]["figures"]["mAP_val"] = None
    with pytest.raises(ConfigError, match="no validation pictures"):
        chosen(tried, results)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("methods.toml", "[clip.model]\nscale = 1.0", r"\[clip\] is no method"),
        ("methods.toml", "[coop]\nscale = 1.0", r"\[coop\] takes the tables model, training, privacy"),
        ("methods.toml", "[coop.model]\nreg = 0.5", "method='coop' has no reg"),
        ("methods.toml", "[coop.loss]\nmargin = 0.5", r"\[coop\] takes the tables"),
        ("methods.toml", "coop = [", "cannot be read as TOML"),
        ("grid.toml", "[coop]\nlearning_rate = [1.0]", "'learning_rate'"),
        ("grid.toml", '[coop]\n"training.learning_rate" = 1.0', "write"),
        ("site.toml", "[sites]", "no .sites.NAME. table"),
    ],
)
def test_a_wrong_folder_is_named(setup: Setup, file: str, text: str, says: str) -> None:
    (setup.folder / file).write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_setup(str(setup.folder))


def test_a_folder_that_is_none_and_one_without_a_judge(setup: Setup, workshop: Workshop) -> None:
    with pytest.raises(ConfigError, match=r"is not a folder: give one with job\.toml and site\.toml, or scenes"):
        load_setup(str(setup.folder / "nowhere"))
    blind = {
        n: dataclasses.replace(s, data=dataclasses.replace(s.data, evaluate=False)) for n, s in setup.sites.items()
    }
    with pytest.raises(ValueError, match="no site scores"):
        workshop.records(setup.job("coop", 0), blind)


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_embedded_folders_have_every_method(name: str) -> None:
    embedded = load_setup(name)
    assert embedded.job("fedmpt", 3).classes == CLASSES
    assert {embedded.job(m, 0).training.rounds for m in METHODS} == {embedded.job("fedmpt", 0).training.rounds}
    assert embedded.job("fedmpt", 0).privacy.private == (name == "scenes-private")
    assert len(trials(embedded, METHODS, [0])) > 0


def test_the_authors_figures_stand_beside_the_paper_s_data_and_weights_only(setup: Setup, tmp_path: Path) -> None:
    job = setup.job("fedmpt", 0)
    clip = dataclasses.replace(job, backbone=BackboneConfig("open_clip", "ViT-B-16", "openai"))
    voc = {n: dataclasses.replace(s, data=DataConfig("voc2007", path="/voc")) for n, s in setup.sites.items()}
    found = reported_by_the_authors(clip, voc)
    assert found is not None
    assert found.figures["fedmpt"] == 89.51
    cases = [dataclasses.replace(c, job=clip, sites=voc) for c in plan(setup, "methods", ["fedmpt"], [0])]
    text = markdown("methods", rows_of(cases, {cases[0].identity(): result(80, None)}), found)
    assert "| 89.51 |" in text
    assert "Reported by the authors" in text
    manifest = tmp_path / "coco.csv"
    manifest.write_text("path,labels,split\na.jpg,cat,train\n")
    record = {"kind": "coco2014", "sha256": hashlib.sha256(manifest.read_bytes()).hexdigest()}
    prepared = {n: dataclasses.replace(s, data=DataConfig("manifest", path=str(manifest))) for n, s in voc.items()}
    for fewest, shown in ((0, True), (5, False)):  # pictures with few labels left out: other data
        (tmp_path / "coco.csv.json").write_text(json.dumps({**record, "options": {"min_labels": fewest}}))
        assert (reported_by_the_authors(clip, prepared) is not None) == shown
    (tmp_path / "coco.csv.json").write_text(json.dumps({**record, "options": {"min_labels": 0}}))
    manifest.write_text("path,labels,split\na.jpg,dog,train\n")
    assert reported_by_the_authors(clip, prepared) is None
    other = dataclasses.replace(job, backbone=BackboneConfig("open_clip", "ViT-B-16", "random:1"))
    for wrong_job, sites in ((job, voc), (other, voc), (clip, setup.sites)):
        assert reported_by_the_authors(wrong_job, sites) is None


@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.parametrize("table", ["ablation", "sensitivity"])
def test_every_case_names_only_groups_that_it_trains(name: str, table: str) -> None:
    for case in plan(load_setup(name), table, [], [0]):
        model = build_model(FakeBackbone(), CLASSES, case.job.model, 0)
        rates = {g["lr"] for g in make_optimizer(model, case.job.training, 1).param_groups}
        assert len(rates) == 1 + any(n.startswith("gate.") for n in model.trainable_parameters())


def test_a_run_is_another_one_when_a_manifest_changes(setup: Setup, tmp_path: Path) -> None:
    path, found = tmp_path / "m.csv", []
    site = dataclasses.replace(setup.sites["site-1"], data=DataConfig("manifest", path=str(path)))
    for label in ("cat", "dog", "cat"):
        path.write_text(f"path,labels,split\na.jpg,{label},train\n")
        _content.cache_clear()  # as in a process of its own
        case = dataclasses.replace(plan(setup, "methods", ["coop"], [0])[0], sites={"a": site})
        found.append(case.identity())
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(
    ("job", "says"),
    [
        (JOB.replace('conditions = ["pose"]\nadapter_width = 3', 'method = "coop"'), "is FedMPT's"),
        ('unseen_classes = ["giraffe"]\n' + JOB, "unseen_classes: `fedmpt simulate` alone"),
    ],
)
def test_a_benchmark_s_job_is_fedmpt_s_without_unseen_classes(job: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(job)
    (tmp_path / "site.toml").write_text(SITES)
    with pytest.raises(ConfigError, match=says):
        load_setup(str(tmp_path))


def test_sites_that_drop_other_shares_are_refused(setup: Setup, workshop: Workshop) -> None:
    name, site = next(iter(setup.sites.items()))
    dropping = dataclasses.replace(site, data=dataclasses.replace(site.data, drop_positives=0.5))
    with pytest.raises(ValueError, match="drop_positives differs between sites"):
        workshop.records(setup.job("coop", 0), {**setup.sites, name: dropping})
