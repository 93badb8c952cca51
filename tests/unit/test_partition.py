"""Partitions cover every record once, repeat, and follow the published formula."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from fedmpt_core.data.partition import by_labels, uniform
from fedmpt_core.data.pictures import Dataset, FilePicture


def dataset(targets: np.ndarray) -> Dataset:
    classes = tuple(f"class {c}" for c in range(targets.shape[1]))
    return Dataset(classes, tuple(FilePicture(f"{r}.png") for r in range(len(targets))), targets)


def random_targets(records: int, classes: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((records, classes)) < 0.3).astype(np.uint8)


@pytest.mark.parametrize("split", [by_labels, uniform])
@settings(max_examples=25, deadline=None)
@given(records=st.integers(1, 40), classes=st.integers(1, 6), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_every_record_is_in_exactly_one_part_and_no_part_is_empty(
    split, records: int, classes: int, share: float, seed: int
) -> None:
    sites = max(1, round(share * records))
    parts = split(dataset(random_targets(records, classes, seed)), sites, seed)
    assert len(parts) == sites
    assert all(len(part) and part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(records))


@pytest.mark.parametrize("split", [by_labels, uniform])
def test_the_seed_fixes_the_partition(split) -> None:
    data = dataset(random_targets(200, 8))
    again = [p.tolist() for p in split(data, 4, 7)]
    assert [p.tolist() for p in split(data, 4, 7)] == again
    assert [p.tolist() for p in split(data, 4, 8)] != again


def test_global_generators_are_left_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr,index]
    by_labels(dataset(random_targets(50, 4)), 3, 1)
    uniform(dataset(random_targets(50, 4)), 3, 1)
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]


def test_clusters_are_those_of_k_means_on_the_formula() -> None:
    targets = random_targets(150, 6, seed=3)
    e, count, classes = np.e, targets.sum(1, keepdims=True), targets.shape[1]
    vectors = (1 + (e - 1) * targets) / (classes + (e - 1) * count)
    labels = KMeans(3, n_init=10, random_state=5, algorithm="lloyd").fit_predict(vectors)  # type: ignore[arg-type]
    expected = {tuple(np.flatnonzero(labels == k)) for k in range(3)}
    assert {tuple(p) for p in by_labels(dataset(targets), 3, 5)} == expected


def test_separate_label_sets_become_separate_sites() -> None:
    kinds = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1]])
    of = np.random.default_rng(0).integers(0, 3, 90)
    parts = by_labels(dataset(kinds[of]), 3, 0)
    assert sorted(len(set(of[part])) for part in parts) == [1, 1, 1]
    assert [part[0] for part in parts] == sorted(part[0] for part in parts)


def test_fewer_label_sets_than_sites_halves_the_largest_part() -> None:
    targets = np.array([[1, 0]] * 10 + [[0, 1]] * 2)
    parts = by_labels(dataset(targets), 4, 0)
    assert sorted(len(part) for part in parts) == [2, 2, 3, 5]
    assert all(len({tuple(targets[i]) for i in part}) == 1 for part in parts)


def test_records_without_labels_are_records_too() -> None:
    parts = by_labels(dataset(np.zeros((5, 3), int)), 5, 0)
    assert sorted(len(part) for part in parts) == [1] * 5


def test_uniform_parts_differ_by_one_record_at_most_and_mix_labels() -> None:
    targets = np.repeat(np.eye(2, dtype=int), 51, axis=0)
    parts = uniform(dataset(targets), 4, 0)
    assert sorted(len(part) for part in parts) == [25, 25, 26, 26]
    assert all(0.2 < targets[part, 0].mean() < 0.8 for part in parts)


@pytest.mark.parametrize("split", [by_labels, uniform])
@pytest.mark.parametrize(
    ("sites", "seed", "message"), [(0, 0, "sites=0"), (6, 0, "sites=6"), (2, -1, "seed=-1"), (2, 2**32, "seed=")]
)
def test_what_is_out_of_range_is_refused(split, sites: int, seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(dataset(random_targets(5, 2)), sites, seed)
