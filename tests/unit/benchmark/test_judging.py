"""What a benchmark measures: false activations, thresholds, figures on independent records."""

import dataclasses
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpt_core.benchmark.inputs import BenchmarkInputs
from fedmpt_core.benchmark.judging import EQUAL_RECALL, judge
from fedmpt_core.benchmark.shared_records import SharedRecords
from fedmpt_core.benchmark.spurious import false_activation, threshold_at_recall
from fedmpt_core.data.scenes import SceneConfig, co_occurrence, scenes
from fedmpt_core.model.registry import build_model
from fedmpt_core.training import metrics
from tests.benchmarks import binary


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
    rates = false_activation(probabilities, targets, pairs, threshold)
    for value, wanted in zip(rates, (awaited, others), strict=True):
        assert np.isnan(value) if not wanted else value == pytest.approx(statistics.mean(wanted))


def test_who_learnt_the_pairs_activates_partners_and_who_did_not_activates_both_alike() -> None:
    targets = binary((4000, 6), 1, 0.3)
    pairs = np.array([[0, 1], [2, 3], [4, 5]])
    rng = np.random.default_rng(2)
    clean = 0.8 * targets + 0.4 * rng.random(targets.shape)
    partner = targets[:, [1, 0, 3, 2, 5, 4]]
    spoilt = clean + 0.3 * partner
    honest, misled = (false_activation(p, targets, pairs, 0.35) for p in (clean, spoilt))
    assert abs(honest[0] - honest[1]) < 0.02
    assert misled[0] > 3 * misled[1]
    assert misled[1] == honest[1]
    assert np.isnan(false_activation(clean, targets, np.zeros((0, 2), np.int64), 0.35)[0])
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


def test_figures_are_the_metrics_on_the_independent_records(inputs: BenchmarkInputs, shared: SharedRecords) -> None:
    job = inputs.job("coop", 0)
    held_out = shared.records(job, inputs.sites).held_out
    model = build_model(shared.backbone(job.backbone), job.classes, job.model, 0)
    judged = judge(model, held_out)

    def scores(split: Any) -> np.ndarray:
        with torch.no_grad():
            return model(split.features.batch(range(len(split.features)))).probabilities.double().numpy()

    val, test = scores(held_out.val), scores(held_out.independent)
    assert held_out.val is not None
    assert held_out.correlated is not None
    threshold = metrics.best_threshold(val, held_out.val.targets)
    assert judged["threshold"] == pytest.approx(threshold, rel=1e-5)
    assert judged["mAP"] == pytest.approx(
        100 * np.nanmean(metrics.average_precision(test, held_out.independent.targets)), abs=1e-3
    )
    precision = np.nanmean(metrics.average_precision(scores(held_out.correlated), held_out.correlated.targets))
    assert judged["mAP_correlated"] == pytest.approx(100 * precision, abs=1e-3)
    at_recall = threshold_at_recall(val, held_out.val.targets, EQUAL_RECALL)
    rate = false_activation(test, held_out.independent.targets, held_out.pairs, at_recall)
    assert judged["false_activation_at_recall"] == pytest.approx(100 * rate[0], abs=1)
    spread = np.nanstd(metrics.average_precision(test, held_out.independent.targets))
    assert judged["AP_spread"] == pytest.approx(100 * spread, abs=1e-3)
    wanted = np.concatenate([np.argwhere(np.triu(co_occurrence(SceneConfig(0), s))) for s in range(2)])
    assert {tuple(p) for p in held_out.pairs.tolist()} == {tuple(p) for p in wanted.tolist()}


def test_thresholds_never_come_from_test_records(inputs: BenchmarkInputs, shared: SharedRecords) -> None:
    job = inputs.job("coop", 0)
    held_out = shared.records(job, inputs.sites).held_out
    model = build_model(shared.backbone(job.backbone), job.classes, job.model, 0)
    changed = dataclasses.replace(held_out.independent, targets=1 - held_out.independent.targets)
    one, other = judge(model, held_out), judge(model, dataclasses.replace(held_out, independent=changed))
    assert one["threshold"] == other["threshold"]
    assert one["mAP_val"] == other["mAP_val"]
    assert one["mAP"] != other["mAP"]
