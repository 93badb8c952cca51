"""Federated averaging against the plain formula."""

import numpy as np

from fedmpt_core.federation.server.averaging import apply, average


def test_equal_and_weighted_means_equal_the_formula() -> None:
    rng = np.random.default_rng(0)
    updates = {f"site-{i}": rng.normal(size=50).astype(np.float32) for i in range(4)}
    weights = {s: float(i + 1) for i, s in enumerate(updates)}
    table = np.stack(list(updates.values())).astype(np.float64)
    assert np.allclose(average(updates, dict.fromkeys(updates, 7.0)), table.mean(0), rtol=0, atol=1e-12)
    assert np.allclose(average(updates, weights), np.average(table, axis=0, weights=[1, 2, 3, 4]), rtol=0, atol=1e-12)


def test_the_order_of_arrival_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    updates = {s: rng.normal(size=200).astype(np.float32) for s in "abcdefg"}
    backwards = dict(reversed(updates.items()))
    weights = dict.fromkeys(updates, 1.0)
    assert np.array_equal(average(updates, weights), average(backwards, weights))


def test_one_site_alone_moves_the_state_by_its_update() -> None:
    state, update = np.ones(3, np.float32), np.array([1, 2, 3], np.float32)
    assert apply(state, average({"a": update}, {"a": 5.0})).tolist() == [2, 3, 4]
    assert apply(state, average({"a": update}, {"a": 5.0})).dtype == np.float32
