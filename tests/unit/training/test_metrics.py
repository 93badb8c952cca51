"""Figures against scikit-learn, torchmetrics and brute force, ties included."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score
from torchmetrics.functional.classification import binary_calibration_error

from fedmpt_core.training.metrics import BINS, average_precision, best_threshold, calibration_error, f1_scores


def data(records: int, classes: int, seed: int, *, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Scores in [0, 1] that know something of the targets; every class has a positive and a negative."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((records, classes)) < rng.uniform(0.1, 0.6, classes)).astype(np.uint8)
    targets[0], targets[1] = 1, 0
    scores = 1 / (1 + np.exp(-rng.normal(2.0 * targets - 1, 1.5)))
    return (np.round(scores, 1) if ties else scores), targets


@given(st.integers(2, 40), st.integers(1, 6), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_average_precision_is_scikit_learn_s(records: int, classes: int, ties: bool, seed: int) -> None:
    scores, targets = data(records, classes, seed, ties=ties)
    got = average_precision(scores, targets)
    expected = [average_precision_score(targets[:, c], scores[:, c]) for c in range(classes)]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_classes_without_positives_have_no_precision_and_no_say() -> None:
    scores, targets = data(30, 5, 0)
    targets[:, [1, 3]] = 0
    got = average_precision(scores, targets)
    kept = average_precision(scores[:, [0, 2, 4]], targets[:, [0, 2, 4]])
    assert np.isnan(got[[1, 3]]).all()
    assert got[[0, 2, 4]].tolist() == kept.tolist()
    every, some = f1_scores(scores, targets, 0.5), f1_scores(scores[:, [0, 2, 4]], targets[:, [0, 2, 4]], 0.5)
    assert (every.cf1_overall, every.cf1_macro, every.recall) == (some.cf1_overall, some.cf1_macro, some.recall)
    assert every.of1 < some.of1


def test_ties_do_not_depend_on_the_order_of_records() -> None:
    scores, targets = data(40, 3, 1, ties=True)
    assert average_precision(scores, targets) == pytest.approx(average_precision(scores[::-1], targets[::-1]))
    constant = average_precision(np.ones((4, 1)), np.array([[1], [0], [0], [0]]))
    assert constant == pytest.approx(0.25)


@given(st.integers(2, 40), st.integers(2, 6), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_f1_is_scikit_learn_s(records: int, classes: int, threshold: float, seed: int) -> None:
    scores, targets = data(records, classes, seed)
    got, chosen = f1_scores(scores, targets, threshold), (scores >= threshold).astype(int)
    precision = precision_score(targets, chosen, average="macro", zero_division=0)
    recall = recall_score(targets, chosen, average="macro", zero_division=0)
    assert got.cf1_overall == pytest.approx(2 * precision * recall / max(precision + recall, 1e-300))
    assert got.cf1_macro == pytest.approx(f1_score(targets, chosen, average="macro", zero_division=0))
    assert got.of1 == pytest.approx(f1_score(targets, chosen, average="micro", zero_division=0))
    assert got.recall == pytest.approx(recall_score(targets, chosen, average="micro", zero_division=0))


def test_the_two_definitions_of_cf1_differ() -> None:
    targets = np.array([[1, 1], [0, 1], [0, 1], [0, 1]])
    scores = np.array([[0.9, 0.9], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]])
    got = f1_scores(scores, targets, 0.5)
    # class 1: P 1/4, R 1, F 0.4;  class 2: P 1, R 1/4, F 0.4
    assert got.cf1_macro == pytest.approx(0.4)
    assert got.cf1_overall == pytest.approx(0.625)


@given(st.integers(2, 12), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_the_best_threshold_is_that_of_trying_them_all(
    records: int, classes: int, ties: bool, empty: bool, seed: int
) -> None:
    scores, targets = data(records, classes, seed, ties=ties)
    if empty and classes > 1:
        targets[:, 0] = 0
    got = best_threshold(scores, targets)
    tried = {float(t): f1_scores(scores, targets, t).of1 for t in np.unique(scores)}
    best = max(tried.values())
    assert tried[got] == pytest.approx(best, abs=1e-10)
    assert got == max(t for t, value in tried.items() if value >= best - 1e-10)


def test_a_threshold_chosen_on_the_test_split_flatters() -> None:
    """Why thresholds come from a validation split: chosen on test they can only look better."""
    val, test = data(60, 4, 0), data(60, 4, 1)
    honest = f1_scores(*test, best_threshold(*val)).of1
    flattering = f1_scores(*test, best_threshold(*test)).of1
    assert flattering > honest


@pytest.mark.parametrize("ties", [False, True])
def test_calibration_error_is_torchmetrics_(ties: bool) -> None:
    scores, targets = data(300, 4, 2, ties=ties)
    expected = binary_calibration_error(
        torch.from_numpy(scores.ravel()), torch.from_numpy(targets.ravel().astype(int)), n_bins=BINS, norm="l1"
    )
    assert calibration_error(scores, targets) == pytest.approx(float(expected), abs=1e-7)


def test_calibration_of_the_extremes() -> None:
    assert calibration_error(np.array([[1.0, 0.0]]), np.array([[1, 0]])) == 0
    assert calibration_error(np.array([[1.0, 0.0]]), np.array([[0, 1]])) == 1
    assert calibration_error(np.array([[0.5, 0.5]]), np.array([[1, 0]])) == 0


@pytest.mark.parametrize("figure", [average_precision, lambda s, t: f1_scores(s, t, 0.5), best_threshold])
@pytest.mark.parametrize(
    ("scores", "targets", "says"),
    [
        (np.zeros((2, 3)), np.zeros((2, 3)), "no positive"),
        (np.zeros((2, 3)), np.ones((3, 2)), "two .R, C. arrays"),
        (np.zeros((0, 3)), np.ones((0, 3)), "not empty"),
        (np.array([[np.nan]]), np.ones((1, 1)), "NaN"),
        (np.zeros((1, 2)), np.array([[1, 2]]), "other than 0 and 1"),
    ],
)
def test_impossible_input_is_refused(figure: object, scores: np.ndarray, targets: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        figure(scores, targets)


def test_logits_are_no_probabilities() -> None:
    scores, targets = data(5, 2, 0)
    with pytest.raises(ValueError, match="not logits"):
        calibration_error(5 * scores, targets)
