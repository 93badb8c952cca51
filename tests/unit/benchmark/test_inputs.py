"""A benchmark's folder, its methods' settings and their tuning."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest

from fedmpt_core.benchmark.cases import cases_of
from fedmpt_core.benchmark.inputs import EMBEDDED, METHODS, BenchmarkInputs, load_inputs
from fedmpt_core.benchmark.published import reported_by_the_authors
from fedmpt_core.benchmark.shared_records import SharedRecords
from fedmpt_core.benchmark.tables import markdown, rows_of
from fedmpt_core.benchmark.tuning import chosen, methods_toml, ordered, trials, tuning_table
from fedmpt_core.config.job import BackboneConfig
from fedmpt_core.config.site import DataConfig
from fedmpt_core.config.toml import ConfigError
from fedmpt_core.data.scenes import CLASSES
from fedmpt_core.model.registry import build_model
from fedmpt_core.training.local import make_optimizer
from tests.benchmarks import JOB, SITES, result
from tests.fakes import FakeBackbone


def test_every_method_gets_as_many_trials_and_validation_alone_decides(inputs: BenchmarkInputs) -> None:
    tried = trials(inputs, ["coop", "linear"], [7, 8])
    assert [t.method for t in tried] == ["coop", "coop", "linear", "linear"]
    assert [c.job.seed for c in ordered(tried)] == [7] * 4 + [8] * 4
    results = {}
    for n, trial in enumerate(tried):
        for case in trial.cases:
            results[case.identity()] = {"figures": {"mAP_val": [20.0, 10.0, 5.0, 6.0][n], "mAP": 100.0 - n}}
    best = chosen(tried, results)
    assert best["coop"].changes == {"training": {"learning_rate": 0.001}}
    assert best["linear"].changes == {"training": {"learning_rate": 0.1}}
    written = methods_toml(inputs, best)
    assert "context_tokens = 3" in written
    assert "learning_rate = 0.001" in written
    (inputs.folder / "methods.toml").write_text(written)
    assert load_inputs(str(inputs.folder)).job("coop", 0).training.learning_rate == 0.001
    assert "| Fed-CoOp: training.learning_rate 0.001 | **20.0** |" in tuning_table(tried, results)
    with pytest.raises(ConfigError, match=r"has no table \[fedmpt\]"):
        trials(inputs, ["coop", "fedmpt"], [7])
    unequal = dataclasses.replace(inputs, grid={**inputs.grid, "linear": {"training.learning_rate": [0.1]}})
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
        ("methods.toml", "coop = [", "is not TOML"),
        ("grid.toml", "[coop]\nlearning_rate = [1.0]", "'learning_rate'"),
        ("grid.toml", '[coop]\n"training.learning_rate" = 1.0', "write"),
        ("site.toml", "[sites]", "no .sites.NAME. table"),
    ],
)
def test_a_wrong_folder_is_named(inputs: BenchmarkInputs, file: str, text: str, says: str) -> None:
    (inputs.folder / file).write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_inputs(str(inputs.folder))


def test_a_folder_that_is_none_and_one_without_a_judge(inputs: BenchmarkInputs, shared: SharedRecords) -> None:
    with pytest.raises(ConfigError, match=r"is not a folder: give one with job\.toml and site\.toml, or scenes"):
        load_inputs(str(inputs.folder / "nowhere"))
    blind = {
        n: dataclasses.replace(s, data=dataclasses.replace(s.data, evaluate=False)) for n, s in inputs.sites.items()
    }
    with pytest.raises(ValueError, match="no site scores"):
        shared.records(inputs.job("coop", 0), blind)


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_embedded_folders_have_every_method(name: str) -> None:
    embedded = load_inputs(name)
    assert embedded.job("fedmpt", 3).classes == CLASSES
    assert {embedded.job(m, 0).training.rounds for m in METHODS} == {embedded.job("fedmpt", 0).training.rounds}
    assert embedded.job("fedmpt", 0).privacy.private == (name == "scenes-private")
    assert len(trials(embedded, METHODS, [0])) > 0


def test_the_authors_figures_stand_beside_the_paper_s_data_and_weights_only(
    inputs: BenchmarkInputs, tmp_path: Path
) -> None:
    job = inputs.job("fedmpt", 0)
    clip = dataclasses.replace(job, backbone=BackboneConfig("open_clip", "ViT-B-16", "openai"))
    voc = {n: dataclasses.replace(s, data=DataConfig("voc2007", path="/voc")) for n, s in inputs.sites.items()}
    reported = reported_by_the_authors(clip, voc)
    assert reported is not None
    assert reported["fedmpt"] == 89.51
    cases = [dataclasses.replace(c, job=clip, sites=voc) for c in cases_of(inputs, "methods", ["fedmpt"], [0])]
    text = markdown("methods", rows_of(cases, {cases[0].identity(): result(80, None)}), reported)
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
    for wrong_job, sites in ((job, voc), (other, voc), (clip, inputs.sites)):
        assert reported_by_the_authors(wrong_job, sites) is None


@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.parametrize("table", ["ablation", "sensitivity"])
def test_every_case_names_only_groups_that_it_trains(name: str, table: str) -> None:
    for case in cases_of(load_inputs(name), table, [], [0]):
        model = build_model(FakeBackbone(), CLASSES, case.job.model, 0)
        rates = {g["lr"] for g in make_optimizer(model, case.job.training, 1).param_groups}
        assert len(rates) == 1 + any(n.startswith("gate.") for n in model.trainable_parameters())


def test_a_run_is_another_one_when_a_manifest_changes(inputs: BenchmarkInputs, tmp_path: Path) -> None:
    path, identities = tmp_path / "m.csv", []
    site = dataclasses.replace(inputs.sites["site-1"], data=DataConfig("manifest", path=str(path)))
    for second, label in enumerate(("cat", "dog", "cat")):
        path.write_text(f"path,labels,split\na.jpg,{label},train\n")
        os.utime(path, (second, second))
        case = dataclasses.replace(cases_of(inputs, "methods", ["coop"], [0])[0], sites={"a": site})
        identities.append(case.identity())
    assert identities[0] == identities[2] != identities[1]


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
        load_inputs(str(tmp_path))


def test_sites_that_drop_other_shares_are_refused(inputs: BenchmarkInputs, shared: SharedRecords) -> None:
    name, site = next(iter(inputs.sites.items()))
    dropping = dataclasses.replace(site, data=dataclasses.replace(site.data, drop_positives=0.5))
    with pytest.raises(ValueError, match="drop_positives differs between sites"):
        shared.records(inputs.job("coop", 0), {**inputs.sites, name: dropping})
