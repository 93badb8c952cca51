"""Figures of seen and unseen classes, and a threshold that neither test records nor unseen labels decide."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedmpt_core.config.job import ModelConfig
from fedmpt_core.model.fedmpt.fedmpt import FedMPT
from fedmpt_core.training import metrics
from fedmpt_core.training.evaluation import Split, evaluate
from tests.fakes import FakeBackbone, Table

R, C, UNSEEN = 60, 6, 2


SCORES = {seed: np.random.default_rng(100 + seed).random((R, C)) for seed in range(4)}


class Told:
    """A model whose scores are its records' features."""

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"none": torch.nn.Parameter(torch.zeros(1))}

    def text_features(self) -> None:
        return None

    def __call__(self, patches: torch.Tensor, text: None) -> SimpleNamespace:
        return SimpleNamespace(probabilities=patches, gate=torch.full((len(patches), 2), 0.5))


def split(seed: int, targets: np.ndarray | None = None) -> Split:
    """Records with the scores of a seed, and its labels or others."""
    drawn = (np.random.default_rng(seed).random((R, C)) < 0.35).astype(np.uint8)
    return Split(Table(torch.from_numpy(SCORES[seed])), drawn if targets is None else targets)  # type: ignore[arg-type]


def judged(test: Split, val: Split | None, unseen: int = 0) -> dict[str, Any]:
    return evaluate(Told(), test, val, unseen=unseen)  # type: ignore[arg-type]


def test_the_threshold_is_the_best_on_val_and_test_records_do_not_move_it() -> None:
    val = split(0)
    best = metrics.best_threshold(SCORES[0], val.targets)
    found = {judged(split(seed), val)["threshold"] for seed in (1, 2, 3)}
    assert found == {best}
    changed = split(1, 1 - split(1).targets)
    assert judged(changed, val)["threshold"] == best
    assert judged(split(1), None)["threshold"] == 0.5


def test_unseen_labels_of_val_do_not_move_the_threshold() -> None:
    val = split(0)
    seen_only = metrics.best_threshold(SCORES[0][:, :-UNSEEN], val.targets[:, :-UNSEEN])
    other = val.targets.copy()
    other[:, -UNSEEN:] = 1 - other[:, -UNSEEN:]
    for labels in (val.targets, other):
        assert judged(split(1), split(0, labels), UNSEEN)["threshold"] == seen_only
    assert seen_only != metrics.best_threshold(SCORES[0], other)


def test_seen_and_unseen_figures_are_those_of_their_columns() -> None:
    test = split(1)
    found = judged(test, split(0), UNSEEN)
    plain = judged(test, split(0))
    assert found["mAP"] == plain["mAP"]
    for name, columns in (("seen", slice(0, C - UNSEEN)), ("unseen", slice(C - UNSEEN, C))):
        part, labels = SCORES[1][:, columns], test.targets[:, columns]
        assert found[name]["mAP"] == pytest.approx(100 * np.nanmean(metrics.average_precision(part, labels)))
        f1 = metrics.f1_scores(part, labels, found["threshold"])
        assert (found[name]["CF1"], found[name]["OF1"]) == pytest.approx((100 * f1.cf1_overall, 100 * f1.of1))
        assert found[name]["threshold"] == found["threshold"]
        assert found[name]["AP"] == found["AP"][columns]
    assert "seen" not in plain


def test_a_label_that_nobody_knows_is_never_scored() -> None:
    targets = split(1).targets.copy()
    targets[0, 0] = 2
    with pytest.raises(ValueError, match="other than 0 and 1"):
        judged(split(1, targets), None)


def test_trained_parameters_fit_a_model_with_more_classes() -> None:
    """What is trained knows no class, so a model of seen and unseen classes takes the parameters as they are."""
    config = ModelConfig(conditions=("color", "pose"))
    few = FedMPT(FakeBackbone(), ("cat", "dog"), config.conditions, config, 0)
    many = FedMPT(FakeBackbone(), ("cat", "dog", "horse"), config.conditions, config, 0)
    assert few.layout() == many.layout()
    state = few.vector() + np.float32(0.01)
    few.load_vector(state)
    many.load_vector(state)
    patches = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(few.text_features(), many.text_features()[:, :2])
        assert many(patches).probabilities.shape == (2, 3)
